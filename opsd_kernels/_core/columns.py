"""Choose the columns of a logit gradient that enter the backward GEMMs, within a bound.

For a chunk's gradient G, (C, V) with rows scaled by s, the squared norm of column v is
n_v = sum_i (s_i G_iv)^2. The smallest columns are dropped while the sum of their n_v stays within
tolerance^2 * sum_v n_v, so the share of the Frobenius norm that is left out is known. The columns that are
kept are gathered by slices, and the GEMMs are dense products of those (loop.py):

    dh = G[:, kept] @ W[kept] + r m^T,    dW[kept] += G[:, kept].T @ (s * h).

r_i is the sum of row i over the dropped columns, and m the mean of some rows of the head. A row of G sums to
zero over the vocabulary, so the sum of what is dropped is not small, and its product with what all rows of a
head have in common is most of the error of dh. Measurements: docs/results/log.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._rows.contract import RowBackend
from .accumulate import accumulate_weight_grad
from .problem import Problem
from .sizes import KEPT_BYTES

# Rows of the head, evenly spaced. With all rows of SmolLM2's the error of dh falls by a hundredth.
MEAN_ROWS = 2048
# Above this share of kept columns the exact GEMMs cost less.
LARGEST_KEPT = 0.75
# Shares of the squared norm are integers, in units of 1 / ONE: their sums have the same bits in any order.
ONE = 2**60
# The leading bits of an fp32 number: columns with the same ones are kept or dropped together.
GROUP_BITS = 16


@dataclass(frozen=True)
class Kept:
    """Hold the columns of a chunk that enter the GEMMs."""

    columns: Tensor  # (K,) int64, ascending
    sums: Tensor  # (C,): the row sums of G; after the columns are gathered, those of the dropped ones
    mean: Tensor  # (H,), by which the sums are multiplied
    scratch: list[Tensor]  # of the call: see `buffers`

    def buffers(self, G: Tensor, H: int, wide: torch.dtype) -> list[Tensor]:
        """Return buffers for a slice of kept columns of G, of as many rows of the head, and of their dW.

        They are made once a call: fresh ones in each chunk left holes of 19 MiB in the heap of a CPU.
        """
        if not self.scratch or len(self.scratch[0]) < len(G):
            length = slice_length(len(G), H, G.dtype)
            rows = G.new_empty(length, H)
            self.scratch[:] = G.new_empty(len(G), length), rows, torch.empty_like(rows, dtype=wide)
        return self.scratch


@dataclass(frozen=True)
class ColumnFilter:
    """Select the columns of each chunk of a call."""

    tolerance: float
    backend: RowBackend
    mean: Tensor  # (H,) of rows of the head, in the accumulator's dtype
    dropped: Tensor  # 0-dim: the largest share that a chunk has left out so far
    scratch: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, problem: Problem, backend: RowBackend, dropped: Tensor) -> ColumnFilter | None:
        """Return None where all columns enter: while a CUDA graph is captured, and for a bias alone.

        A graph's shapes are fixed, and the number of columns is read on the host.
        """
        tolerance, weight = problem.gradient_tolerance, problem.student.weight
        assert tolerance is not None, "without a tolerance nothing is selected"
        capturing = weight.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing or not any(problem.wants[:2]):
            return None
        at = torch.arange(0, weight.shape[0], -(-weight.shape[0] // MEAN_ROWS), device=weight.device)
        rows = weight[at]
        return cls(tolerance, backend, rows.to(dropped.dtype).mean(0), dropped)

    def select(self, G: Tensor, scale: Tensor | None) -> Kept | None:
        """Return the columns to keep, or None if all of them enter the GEMMs.

        On a GPU this reads one value on the host: the number of columns.
        """
        norms, sums = self.backend.column_norms(G, scale)
        total, lost = norms.sum(dtype=torch.float64), G.numel() * torch.finfo(norms.dtype).tiny
        # At least the true share of a column, whatever G, its sum and the fp32 result lose to rounding and
        # underflow.
        rounding = 1 + 4 * torch.finfo(G.dtype).eps + (len(G) + 64) * torch.finfo(torch.float32).eps
        shares = norms.double().add_(lost / G.shape[1]).mul_(rounding / total)
        usable = torch.isfinite(total) & (total * self.tolerance**2 > lost)
        shares.masked_fill_(~usable, 0)
        group = shares.float().view(torch.int32).bitwise_right_shift_(GROUP_BITS).long()
        sizes = torch.zeros(1 << (31 - GROUP_BITS), dtype=torch.int64, device=G.device)
        upto = sizes.scatter_add_(0, group, shares.mul_(ONE).ceil_().long()).cumsum(0)
        groups = torch.where(usable, (upto <= int(self.tolerance**2 * ONE)).sum(), 0)
        columns = (group >= groups).nonzero().squeeze(1)
        if columns.numel() > LARGEST_KEPT * G.shape[1]:
            return None
        share = torch.where(groups > 0, upto[(groups - 1).clamp(min=0)], 0).double().div(ONE).sqrt()
        torch.maximum(self.dropped, share.to(self.dropped.dtype), out=self.dropped)
        return Kept(columns, sums, self.mean, self.scratch)


def slice_length(rows: int, hidden: int, dtype: torch.dtype) -> int:
    """Return the number of kept columns that are gathered at a time."""
    wide = torch.promote_types(dtype, torch.float32).itemsize
    return max(KEPT_BYTES // (rows * dtype.itemsize + hidden * (dtype.itemsize + wide)), 64)


def accumulate_kept(
    walk: Any, G: Tensor, scaled: Tensor, kept: Kept, dW: Tensor | None, first: bool
) -> Tensor:
    """Add the products of the kept columns of G, (C, V), to dW, (V, H). Return dh, (C, H), unscaled."""
    weight = walk.problem.student.weight
    dh = kept.mean.new_zeros(G.shape[0], weight.shape[1])
    if dW is not None and first:
        dW.zero_()
    gathered, rows, update = kept.buffers(G, weight.shape[1], dh.dtype)
    for columns in kept.columns.split(len(rows)):
        n = columns.numel()
        part = gathered[: len(G), :n]
        walk.backend.gather_columns_(G, columns, part, kept.sums)
        if walk.out.dh is not None:
            if isinstance(weight, Tensor):
                torch.index_select(weight, 0, columns, out=rows[:n])
            else:
                weight.write(columns, rows[:n])
            accumulate_weight_grad(part.t(), rows[:n], dh, first=False)
        if dW is not None:
            accumulate_weight_grad(part, scaled, update[:n], first=True)
            dW.index_add_(0, columns, update[:n].to(dW.dtype))
    return dh.addr_(kept.sums, kept.mean)
