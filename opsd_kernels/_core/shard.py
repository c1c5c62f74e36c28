"""Define the shard of a vocabulary-parallel head, and its collectives.

Every rank of a group holds the same hidden states and the rows [start, stop) of both heads. Statistics of
whole rows: merged_rows.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .._rows import torch_rows
from ..quantized import QuantizedHead, stored_head
from ..spec import RowSpec, Support, check_choice, check_tensor, expect
from . import topk_support
from .topk_support import Entries, Rows

# An operator's schema holds the name of a group, not the group.
_GROUPS: WeakValueDictionary[str, dist.ProcessGroup] = WeakValueDictionary()


@dataclass(frozen=True)
class VocabShard:
    """Describe the rows [start, stop) of a head with vocab_size rows that this rank of `group` holds.

    `bounds` are the starts of all shards and the end of the last. With `reduce_hidden_grad` the gradient of
    the hidden states is summed over the group; without it each rank keeps its partial sum, for a caller that
    sums or scatters it. Raises TypeError for other things than numbers and a process group, ValueError for
    bounds that do not fit the group, or that leave a rank without rows.
    """

    bounds: tuple[int, ...]
    group: dist.ProcessGroup
    reduce_hidden_grad: bool = True

    def __post_init__(self) -> None:
        world = check_group(self.group).size()
        whole = isinstance(self.bounds, (tuple, list)) and all(map(is_whole, self.bounds))
        expect(whole, "bounds", "ints", repr(self.bounds), TypeError)
        widths = [b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)]
        expected = f"{world + 1} numbers for a group of {world} ranks"
        expect(len(widths) == world, "bounds", expected, self.bounds)
        expected = "ascending numbers from 0, at least one row for each rank"
        expect(self.bounds[0] == 0 and min(widths) >= 1, "bounds", expected, self.bounds)

    @classmethod
    def from_vocab(cls, V: int, group: dist.ProcessGroup, reduce_hidden_grad: bool = True) -> VocabShard:
        """Split V rows evenly over the ranks; the first V % world ranks hold one more.

        Raises ValueError for fewer rows than ranks.
        """
        expect(is_whole(V), "V", "an int", type(V).__name__, TypeError)
        each, more = divmod(V, check_group(group).size())
        bounds = tuple(rank * each + min(rank, more) for rank in range(group.size() + 1))
        return cls(bounds, group, reduce_hidden_grad)

    @classmethod
    def from_rows(cls, rows: int, device: torch.device, group: dist.ProcessGroup) -> VocabShard:
        """Build the shard from the rows of this rank. Gathers the numbers of all ranks, and syncs."""
        counts = gather_ranks(torch.tensor([rows], device=device), group).reshape(-1).tolist()
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
        """Return the number of rows of the largest shard."""
        return max(b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False))

    def cut(self, vocab: int) -> VocabShard:
        """Return the shard without the columns from `vocab` on, which have probability zero.

        Raises ValueError if that leaves a rank without columns.
        """
        expect(
            vocab > self.bounds[-2],
            "vocab_size",
            f"a size above {self.bounds[-2]}, so that every rank has a column",
            vocab,
        )
        return replace(self, bounds=tuple(min(bound, vocab) for bound in self.bounds))

    # The flat form, for an operator's schema.

    def pack(self) -> tuple[list[int], str]:
        """Return the numbers and the name of the group, from which `unpack` rebuilds the shard."""
        _GROUPS[self.group.group_name] = self.group
        return [int(self.reduce_hidden_grad), *self.bounds], self.group.group_name

    @classmethod
    def unpack(cls, packed: Sequence[int], name: str) -> VocabShard:
        """Rebuild the shard of `pack`."""
        return cls(tuple(packed[1:]), _GROUPS[name], bool(packed[0]))

    # Columns and collectives of the loop.

    def local(self, labels: Tensor) -> Tensor:
        """Return labels as columns of this shard, -1 where another shard holds the label."""
        return torch.where((labels >= self.start) & (labels < self.stop), labels - self.start, -1)

    def of_owner(self, values: Tensor, labels: Tensor) -> Tensor:
        """Return on all ranks the (n, k) values of the rank that holds the label. An all-reduce."""
        mine = torch.where(self.local(labels)[:, None] >= 0, values, 0.0)
        dist.all_reduce(mine, group=self.group)
        return mine

    def of_largest(self, values: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
        """Return on all ranks the largest of `values`, (n,), and `beside` of the rank that holds it.

        Two all-reduces. Where ranks tie, the largest `beside`.
        """
        largest = values.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        beside = torch.where(values == largest, beside, -torch.inf)
        dist.all_reduce(beside, op=dist.ReduceOp.MAX, group=self.group)
        return largest, beside

    def sum_hidden_grad(self, dh: Tensor) -> None:
        """Sum (n, H) over the ranks in place, if `reduce_hidden_grad`."""
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
        """Return the support over all shards, and the same with only this rank's columns live.

        The support is the listed entries, or the K largest of a side; it is equal on all ranks.
        """
        if ids is not None and logprobs is not None:
            return self._listed(rows, stats, spec, restriction, ids, logprobs)
        n = rows.S.shape[0]
        found = topk_support.entries(rows, stats, spec, restriction, None, None)
        raw = found.raw
        logits = torch_rows.logits(raw.S, raw.T, spec, raw.bias_s, raw.bias_t)
        order = logits.s if restriction.side == "student" else logits.t
        k = min(restriction.k, self.widest)
        candidates = order.new_full((4, n, k), -torch.inf)
        # Clamped, so that an entry of -inf is chosen before the padding of a narrow shard.
        clamped = order.clamp(min=torch.finfo(order.dtype).min)
        candidates[:, :, : order.shape[1]] = torch.stack([clamped, found.p, found.delta, found.log_q])
        every = gather_ranks(candidates, self.group).permute(1, 2, 0, 3).reshape(4, n, -1)
        # A stable sort, so that all ranks break ties alike.
        chosen = every[0].argsort(dim=-1, descending=True, stable=True)
        chosen = chosen[:, : min(restriction.k, self.vocab_size)]
        p, delta, log_q = (part.gather(1, chosen) for part in every[1:])
        q = log_q.exp()
        mine = torch.div(chosen, k, rounding_mode="floor") == self.rank
        # An entry of another rank repeats the first one of this rank, if there is any.
        at = torch.where(mine, chosen % k, 0)
        at = torch.where(mine, at, at.gather(1, mine.to(torch.int8).argmax(1, keepdim=True)))
        columns, own_q = found.columns.gather(1, at), found.whole_q.gather(1, at)
        whole = Entries(columns, torch.ones_like(mine), rows.at(columns), q, q, p, delta, log_q)
        return whole, whole._replace(live=mine, whole_q=own_q)

    def _listed(
        self, rows: Rows, stats: Tensor, spec: RowSpec, restriction: Support, ids: Tensor, logprobs: Tensor
    ) -> tuple[Entries, Entries]:
        """Return `entries` of a teacher's list.

        Only the rank that holds an entry's column has the student's logit there. On each rank the entries of
        other ranks are padding.
        """
        local = self.local(ids)
        own = topk_support.entries(
            rows, stats, spec, restriction, local.clamp(min=0), torch.where(local >= 0, logprobs, -torch.inf)
        )
        summed = torch.stack([own.p, own.delta, own.log_q])  # non-zero on one rank alone: an exact sum
        dist.all_reduce(summed, group=self.group)
        p, delta, log_q = summed
        live = logprobs > -torch.inf
        q = torch.where(live, log_q.exp(), 0.0)
        return own._replace(live=live, q=q, p=p, delta=delta, log_q=log_q), own


def is_whole(value: object) -> bool:
    """Return True for an int, numpy's and those of torch.compile included."""
    return isinstance(value, (int, Integral, torch.SymInt)) and not isinstance(value, bool)


def check_group(group: object, expected: str = "a torch.distributed process group") -> dist.ProcessGroup:
    """Return a process group. Raises TypeError for anything else."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected {expected}, got {type(group).__name__}")
    return group


def shard_of(group: object, weight: Any, name: str) -> VocabShard:
    """Return the shard of the head of which `weight`, the argument `name`, is this rank's part.

    `group` is a VocabShard or a process group. Raises TypeError for anything else, and TypeError or
    ValueError for a weight without rows, before a collective would wait for the other ranks.
    """
    if isinstance(group, VocabShard):
        return group
    group = check_group(group, "a torch.distributed process group, a VocabShard or None")
    weight = stored_head(name, weight)
    if not (isinstance(weight, QuantizedHead) or is_dtensor(weight)):
        check_tensor(name, weight)
    expect(len(weight.shape) == 2, name, "shape (V, H) with V, H >= 1", tuple(weight.shape))
    if is_dtensor(weight):  # bounds as those of torch.chunk
        each = -(-weight.shape[0] // group.size())
        return VocabShard(tuple(min(rank * each, weight.shape[0]) for rank in range(group.size() + 1)), group)
    return VocabShard.from_rows(weight.shape[0], weight.device, group)


def local_head(prefix: str, weight: Any, bias: Any, shard: VocabShard) -> tuple[Any, Any]:
    """Return weight and bias as plain tensors of this rank.

    `prefix` ("student_") starts the names of the arguments. Raises ValueError for a DTensor with another
    layout than its rows over one mesh dimension, and for a number of rows that is not this rank's.
    """
    parts = []
    for name, tensor in ((prefix + part, tensor) for part, tensor in (("weight", weight), ("bias", bias))):
        if is_dtensor(tensor):
            layout = tensor.placements
            expected = "a DTensor sharded on dimension 0 over a mesh of one dimension"
            expect(len(layout) == 1 and layout[0].is_shard(0), name, expected, layout)
            tensor = tensor.to_local()
        if isinstance(tensor, Tensor):
            rows = shard.stop - shard.start
            good = tensor.dim() > 0 and tensor.shape[0] == rows
            expect(good, name, f"{rows} rows, those of rank {shard.rank}", tuple(tensor.shape))
        parts.append(tensor)
    return parts[0], parts[1]


def is_dtensor(tensor: object) -> bool:
    """Return True for a DTensor, without importing DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gathered(weight: Any, gradient: str = "mean") -> Tensor:
    """Gather a DTensor head into a plain tensor, for ranks that hold different tokens (FSDP2).

    A plain tensor is returned unchanged. In backward the gradients of the whole head are reduced over the
    ranks, by "mean" as in FSDP2 and DDP or by "sum", and scattered to the shards. Raises ValueError for
    another `gradient`.
    """
    check_choice("gradient", gradient, ("mean", "sum"))
    if not is_dtensor(weight):
        return weight
    from torch.distributed.tensor import Partial

    return weight.full_tensor(
        grad_placements=[Partial("avg" if gradient == "mean" else "sum")] * weight.device_mesh.ndim
    )


def gather_ranks(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the values of all ranks, (world, ...). An all-gather."""
    parts = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(parts, values, group=group)
    return torch.stack(parts)
