"""Heads whose rows are spread over the ranks of a group (tensor parallelism): the shard of a rank, and its collectives.

Every rank holds the same hidden states and [start, stop) of both heads. Their rows' statistics: merged_rows.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .._rows import torch_rows
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
        return cls(tuple(packed[1:]), _GROUPS[name], bool(packed[0])) if packed and name is not None else None

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
        if ids is not None and logprobs is not None:
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
        every = gather_ranks(candidates, self.group).permute(1, 2, 0, 3).reshape(4, n, -1)
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
    if not isinstance(group, dist.ProcessGroup):
        expected = "a torch.distributed process group, a VocabShard or None"
        raise TypeError(f"group: expected {expected}, got {type(group).__name__}")
    if is_dtensor(weight):  # cut as torch.chunk cuts
        each = -(-weight.shape[0] // group.size())
        return VocabShard(tuple(min(rank * each, weight.shape[0]) for rank in range(group.size() + 1)), group)
    return VocabShard.from_rows(weight.shape[0], weight.device, group)


def local_head(prefix: str, weight: Any, bias: Any, shard: VocabShard | None) -> tuple[Any, Any]:
    """Return weight and bias as plain tensors of this rank. `prefix` ("student_") starts the names of the arguments.

    Raises ValueError for a DTensor without a group, or with another layout than its rows over one mesh dimension.
    """
    parts = []
    for name, tensor in ((prefix + part, tensor) for part, tensor in (("weight", weight), ("bias", bias))):
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
            rows = shard.stop - shard.start
            good = tensor.dim() > 0 and tensor.shape[0] == rows
            expect(good, name, f"{rows} rows, those of rank {shard.rank}", tuple(tensor.shape))
        parts.append(tensor)
    return parts[0], parts[1]


def is_dtensor(tensor: object) -> bool:
    """Without loading DTensor where nobody has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gathered(weight: Any, gradient: str = "mean") -> Tensor:
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


def gather_ranks(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(world, ...) what every rank has."""
    parts = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(parts, values, group=group)
    return torch.stack(parts)
