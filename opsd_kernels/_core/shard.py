"""Heads whose rows are spread over the ranks of a group (tensor parallelism): the shard, its collectives, and sweeps that know whole rows from slices of them.

Every rank holds the same hidden states and [start, stop) of both heads. A row's statistics merge like entries merge into a row: a shard with student mass
exp(lse_s) and teacher mass exp(lse_t) is one entry of a smaller row, and L_r = lse_t - lse_s is its d. So the merged normalisers keep the accuracy near the
teacher that the sweeps have (contract.py), and the sweeps themselves stay what they are: they are given the merged statistics.

All ranks gather the same numbers and merge them in the same order in float64: statistics, weights and losses are equal on them to the bit.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .._rows import torch_rows
from .._rows.contract import SPREAD_LIMIT, Column, RowBackend, clip_tokens, plain_kl
from ..spec import RowSpec, Support, check_choice, expect
from . import topk_support
from .topk_support import Entries, Rows

_GROUPS: WeakValueDictionary[str, dist.ProcessGroup] = (
    WeakValueDictionary()
)  # an operator's schema holds a name, no group


@dataclass(frozen=True)
class VocabShard:
    """The rows of a head, [start, stop) of vocab_size, that this rank of `group` holds. `bounds` are the starts of all shards and the end of the last.

    With `reduce_hidden_grad` the gradient of the hidden states comes out summed over the group; without it each rank keeps its part, for a caller that sums
    or scatters it itself.
    """

    bounds: tuple[int, ...]
    group: dist.ProcessGroup
    reduce_hidden_grad: bool = True

    def __post_init__(self) -> None:
        world, widths = self.group.size(), [b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)]
        expect(
            len(widths) == world, "bounds", f"{world + 1} numbers for a group of {world} ranks", self.bounds
        )
        expect(
            self.bounds[0] == 0 and min(widths) >= 1,
            "bounds",
            "ascending numbers from 0, at least one row for each rank",
            self.bounds,
        )

    @classmethod
    def from_vocab(cls, V: int, group: dist.ProcessGroup, reduce_hidden_grad: bool = True) -> VocabShard:
        """V rows over the ranks, as evenly as they go: the first V % world ranks have one more. Raises ValueError for fewer rows than ranks."""
        each, more = divmod(V, group.size())
        return cls(
            tuple(rank * each + min(rank, more) for rank in range(group.size() + 1)),
            group,
            reduce_hidden_grad,
        )

    @classmethod
    def from_rows(cls, rows: int, device: torch.device, group: dist.ProcessGroup) -> VocabShard:
        """Of ranks that hold any number of rows each, one after the other. Exchanges these numbers, and waits for them."""
        counts = _gathered(torch.tensor([rows], device=device), group).reshape(-1).tolist()
        return cls(tuple(sum(counts[:rank]) for rank in range(len(counts) + 1)), group)

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def start(self) -> int:
        return self.bounds[self.rank]

    @property
    def stop(self) -> int:
        return self.bounds[self.rank + 1]

    @property
    def vocab_size(self) -> int:
        return self.bounds[-1]

    @property
    def widest(self) -> int:
        return max(b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False))

    def cut(self, vocab: int) -> VocabShard:
        """Without the columns from `vocab` on, which have probability zero."""
        expect(
            vocab > self.bounds[-2],
            "vocab_size",
            f"a size above {self.bounds[-2]}, so that every rank has a column",
            vocab,
        )
        return replace(self, bounds=tuple(min(bound, vocab) for bound in self.bounds))

    # How it travels through an operator's schema.

    def pack(self) -> tuple[list[int], str]:
        _GROUPS[self.group.group_name] = self.group
        return [int(self.reduce_hidden_grad), *self.bounds], self.group.group_name

    @classmethod
    def unpack(cls, packed: Sequence[int], name: str | None) -> VocabShard | None:
        return cls(tuple(packed[1:]), _GROUPS[name], bool(packed[0])) if packed else None

    # What the loop asks of it.

    def local(self, labels: Tensor) -> Tensor:
        """Labels as columns of this shard, -1 where they lie in another."""
        return torch.where((labels >= self.start) & (labels < self.stop), labels - self.start, -1)

    def of_owner(self, values: Tensor, labels: Tensor) -> Tensor:
        """(n, k) values that only the rank with the label's column has right, on all ranks."""
        mine = torch.where(self.local(labels)[:, None] >= 0, values, 0.0)
        dist.all_reduce(mine, group=self.group)
        return mine

    def sum_hidden_grad(self, dh: Tensor) -> None:
        """Sums (n, H) over the ranks, in place."""
        if self.reduce_hidden_grad:
            dist.all_reduce(dh, group=self.group)

    def entries(
        self,
        rows: Rows,
        stats: Tensor,
        spec: RowSpec,
        restriction: Support,
        ids: Tensor | None,
        logprobs: Tensor | None,
    ) -> tuple[Entries, Entries]:
        """The listed entries, or the K largest of a side over all shards: (all of them, on every rank; the same with this rank's own columns live alone)."""
        if ids is not None:
            return self._listed(rows, stats, spec, restriction, ids, logprobs)
        n = rows.S.shape[0]
        found = topk_support.entries(rows, stats, spec, restriction, None, None)
        logits = torch_rows.logits(*found.raw[:2], spec, *found.raw[2:])
        order = logits.s if restriction.side == "student" else logits.t
        k = min(restriction.k, self.widest)
        candidates = order.new_full((4, n, k), -torch.inf)
        candidates[:, :, : order.shape[1]] = torch.stack(
            [order.clamp(min=torch.finfo(order.dtype).min), found.q, found.p, found.delta]
        )  # no filler is chosen
        every = _gathered(candidates, self.group).permute(1, 2, 0, 3).reshape(4, n, -1)
        # A stable sort: equal logits are chosen alike on all ranks.
        chosen = every[0].argsort(dim=-1, descending=True, stable=True)[
            :, : min(restriction.k, self.vocab_size)
        ]
        q, p, delta = (part.gather(1, chosen) for part in every[1:])
        mine = torch.div(chosen, k, rounding_mode="floor") == self.rank
        at = torch.where(mine, chosen % k, 0)
        at = torch.where(
            mine, at, at.gather(1, mine.to(torch.int8).argmax(1, keepdim=True))
        )  # a foreign entry repeats the first own one, if there is any
        columns, own_q = found.columns.gather(1, at), found.whole_q.gather(1, at)
        whole = Entries(columns, torch.ones_like(mine), rows.at(columns), q, q, p, delta)
        return whole, whole._replace(live=mine, whole_q=own_q)

    def _listed(
        self, rows: Rows, stats: Tensor, spec: RowSpec, restriction: Support, ids: Tensor, logprobs: Tensor
    ) -> tuple[Entries, Entries]:
        """The rank with an entry's column knows the student there: to it the list is its own entries and padding."""
        local = self.local(ids)
        own = topk_support.entries(
            rows, stats, spec, restriction, local.clamp(min=0), torch.where(local >= 0, logprobs, -torch.inf)
        )
        summed = torch.stack([own.q, own.p, own.delta])  # zeros but on one rank: exact
        dist.all_reduce(summed, group=self.group)
        q, p, delta = summed
        return own._replace(live=logprobs > -torch.inf, q=q, p=p, delta=delta), own


def shard_of(group: object, weight: Tensor) -> VocabShard:
    """What `group`, a process group or a shard, says of a head of which `weight` is this rank's part."""
    if isinstance(group, VocabShard):
        return group
    expect(
        isinstance(group, dist.ProcessGroup),
        "group",
        "a torch.distributed process group, a VocabShard or None",
        type(group).__name__,
        TypeError,
    )
    if is_dtensor(weight):  # cut as torch.chunk cuts
        each = -(-weight.shape[0] // group.size())
        return VocabShard(tuple(min(rank * each, weight.shape[0]) for rank in range(group.size() + 1)), group)
    return VocabShard.from_rows(weight.shape[0], weight.device, group)


def local_head(
    side: str, weight: Tensor, bias: Tensor | None, shard: VocabShard | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as plain tensors of this rank. Raises ValueError for a DTensor without a group, or with another layout than its rows over one mesh."""
    parts = []
    for name, tensor in (
        (f"{side}_{part}".lstrip("_"), tensor) for part, tensor in (("weight", weight), ("bias", bias))
    ):
        if is_dtensor(tensor):
            expect(
                shard is not None,
                name,
                "a plain tensor, or a DTensor with `group` (its rows are a shard); `gathered` makes it whole",
                "a DTensor",
            )
            layout = tensor.placements
            expect(
                len(layout) == 1 and layout[0].is_shard(0),
                name,
                "a DTensor sharded on dimension 0 over a mesh of one dimension",
                layout,
            )
            tensor = tensor.to_local()
        if shard is not None and isinstance(tensor, Tensor):
            expect(tensor.dim() > 0 and tensor.shape[0] == shard.stop - shard.start, name, f"{shard.stop - shard.start} rows, those of rank {shard.rank}",
                   tuple(tensor.shape))  # fmt: skip
        parts.append(tensor)
    return parts[0], parts[1]


def is_dtensor(tensor: object) -> bool:
    """Without loading DTensor where nobody has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gathered(weight: Tensor, gradient: str = "mean") -> Tensor:
    """A DTensor head made whole once, for ranks that hold different tokens (FSDP2). A plain tensor is returned as it is.

    In backward each rank's gradient of the whole head is scattered to where its rows are: their `mean` over the ranks, as FSDP2 and DDP average, or `sum`.
    """
    check_choice("gradient", gradient, ("mean", "sum"))
    if not is_dtensor(weight):
        return weight
    from torch.distributed.tensor import Partial

    return weight.full_tensor(
        grad_placements=[Partial("avg" if gradient == "mean" else "sum")] * weight.device_mesh.ndim
    )


def _gathered(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(world, ...) what every rank has."""
    parts = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(parts, values, group=group)
    return torch.stack(parts)


@dataclass(frozen=True)
class ShardedRows:
    """A row backend (contract.py) whose rows go on in other ranks. S, T, biases and G are slices; statistics, losses, factors and labels are of whole rows."""

    backend: RowBackend
    shard: VocabShard

    def row_stats(
        self, S: Tensor, T: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None, metrics: bool
    ) -> Tensor:
        own = self.backend.row_stats(S, T, spec, bias_s, bias_t, metrics)
        own[:, Column.STUDENT_ARGMAX : Column.CLIPPED] += self.shard.start
        sent = own[:, : Column.CLIPPED if metrics else Column.STUDENT_ENTROPY].contiguous()
        merged = merge(_gathered(sent, self.shard.group), spec.linear_difference(bias_s is bias_t))
        own.zero_()
        own[:, : merged.shape[1]] = merged
        return own

    def row_dot(
        self, S: Tensor, T: Tensor, stats: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if spec.one_sweep:
            return plain_kl(stats, spec)
        part = self.backend.row_dot(S, T, stats, replace(spec, token_clip=torch.inf), bias_s, bias_t)
        share = stats[:, Column.CLIPPED] * (S.shape[1] / self.shard.vocab_size)
        loss, A, clipped = (
            _gathered(torch.stack([*part, share]), self.shard.group).double().sum(0).to(stats.dtype)
        )
        stats[:, Column.CLIPPED] = clipped
        return clip_tokens(loss, stats, spec), A

    def row_grad_(
        self,
        S: Tensor,
        T: Tensor,
        stats: Tensor,
        A: Tensor,
        factor: Tensor,
        spec: RowSpec,
        bias_s: Tensor | None,
        bias_t: Tensor | None,
        G: Tensor,
        policy: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        own = None if labels is None else self.shard.local(labels)
        self.backend.row_grad_(S, T, stats, A, factor, spec, bias_s, bias_t, G, policy, own)

    def row_fused_(
        self,
        S: Tensor,
        T: Tensor,
        factor: Tensor,
        spec: RowSpec,
        bias_s: Tensor | None,
        bias_t: Tensor | None,
        metrics: bool,
        G: Tensor,
        policy: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Not fused: the other ranks' part of a row must come between the sweeps."""
        stats = self.row_stats(S, T, spec, bias_s, bias_t, metrics)
        loss, A = self.row_dot(S, T, stats, spec, bias_s, bias_t)
        self.row_grad_(S, T, stats, A, factor, spec, bias_s, bias_t, G, policy, labels)
        return stats, loss, A


class _Masses(NamedTuple):
    """Shards as entries of a row, (R, n) each, and the row's own (n,)."""

    q: Tensor  # share of the student's mass
    p: Tensor
    log_ratio: Tensor  # log q - log p
    references: tuple[Tensor, ...]  # STUDENT_MAX to SPREAD of the merged row
    peak: Tensor  # (n,) rank of the student's first maximum


def merge(parts: Tensor, linear: bool) -> Tensor:
    """Statistics of whole rows, (n, k), from those of their shards, (R, n, k), whose largest entries are named by their columns in the whole.

    `linear`: the sweeps take d from the difference buffer (Logits.linear).
    """
    column = {c: parts[:, :, c].double() for c in Column if c < parts.shape[2]}
    masses = _masses(column, parts, linear)
    q, p, log_ratio, references, peak = masses
    columns = [
        *references,
        _mean(q, column[Column.REVERSE_KL], log_ratio, p == 0),
        _mean(p, column[Column.FORWARD_KL], -log_ratio, q == 0),
    ]
    if Column.STUDENT_ENTROPY in column:
        none = torch.zeros_like(p, dtype=torch.bool)
        top_s, top_t = (
            q * column[Column.STUDENT_MAX_PROB],
            torch.where(p > 0, p * column[Column.TEACHER_MAX_PROB], 0.0),
        )
        columns += [
            _mean(q, column[Column.STUDENT_ENTROPY], -q.log(), none),
            _mean(p, column[Column.TEACHER_ENTROPY], -p.log(), none),
            torch.where(q > 0, top_s, 0.0).amax(0),
            top_t.amax(0),
            _at(column[Column.STUDENT_ARGMAX], peak),
            _at(column[Column.TEACHER_ARGMAX], top_t.argmax(0)),
        ]
    invalid = torch.isnan(references[1]) | torch.isnan(references[3])  # a side without a distribution
    merged = torch.stack(columns, dim=1)
    merged[:, Column.SPREAD + 1 :] = torch.where(invalid[:, None], torch.nan, merged[:, Column.SPREAD + 1 :])
    return merged.to(parts.dtype)


def _masses(column: dict[Column, Tensor], parts: Tensor, linear: bool) -> _Masses:
    max_s, max_t = column[Column.STUDENT_MAX], column[Column.TEACHER_MAX]
    lse_s = torch.where(max_s == -torch.inf, -torch.inf, max_s + column[Column.STUDENT_LOGSUM])
    lse_t = torch.where(max_t == -torch.inf, -torch.inf, max_t + column[Column.TEACHER_LOGSUM])
    # What the sweeps take for c: they round the difference of the maxima where d is exact, else they subtract each side's own.
    c = (
        (parts[:, :, Column.TEACHER_MAX] - parts[:, :, Column.STUDENT_MAX]).double()
        if linear
        else max_t - max_s
    )
    peak = max_s.argmax(0)
    of_row = _at(c, peak)
    spread = torch.nan_to_num(
        column[Column.SPREAD] + (c - of_row).abs(), nan=torch.inf, posinf=torch.inf
    ).amax(0)  # at least the row's own
    near = spread <= SPREAD_LIMIT
    reference_s, reference_t = _at(max_s, peak), torch.where(near, _at(max_t, peak), max_t.amax(0))
    whole_s = torch.logsumexp(lse_s, 0)
    q = torch.exp(lse_s - whole_s)
    excess = c - of_row + column[Column.GAP]  # L_r - c
    gap = torch.log1p((q * torch.expm1(excess)).sum(0))
    logsum_s = whole_s - reference_s
    logsum_t = torch.where(near, logsum_s + gap, torch.logsumexp(lse_t, 0) - reference_t)
    gap = torch.where(near, gap, logsum_t - logsum_s)
    whole_t = reference_t + logsum_t
    log_ratio = torch.where(near, gap - excess, (lse_s - whole_s) - (lse_t - whole_t))
    p = torch.where(near, q * torch.exp(-log_ratio), torch.exp(lse_t - whole_t))
    return _Masses(q, p, log_ratio, (reference_s, logsum_s, reference_t, logsum_t, gap, spread), peak)


def _mean(mass: Tensor, within: Tensor, between: Tensor, infinite: Tensor) -> Tensor:
    """sum mass * (within + between) over the shards; one without mass counts nothing, one where the other side has none is infinite."""
    terms = torch.where(infinite, torch.inf, mass * (within + between))
    return torch.where(mass > 0, terms, 0.0).sum(0)


def _at(values: Tensor, rank: Tensor) -> Tensor:
    """(n,) of (R, n): each row's value in one rank."""
    return values.gather(0, rank[None])[0]
