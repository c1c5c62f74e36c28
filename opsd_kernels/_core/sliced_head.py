"""Read a head by slices of its rows where it does not lie as a GEMM takes it.

A head may be of another dtype than the rows that it multiplies, on another device, quantised, or a choice of
the rows of another head. It is then cast, moved, multiplied by its scales or gathered slice by slice into one
buffer, and never whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..quantized import QuantizedHead
from .sizes import COPY_BYTES, SLICE_BYTES

LEAST_ROWS = 64  # of a slice


@dataclass
class SlicedHead:
    """Give the rows [start, stop) of a head (V, H) in the dtype and on the device of a GEMM.

    It stands for the weight of a `Side` in the loop. Indexed by a slice, it is a head of these rows; indexed
    by row numbers (...,), a dense tensor (..., H).
    """

    values: Tensor  # (rows that are stored, H), of any strides
    quantised: QuantizedHead | None  # with the scales of the values
    start: int
    stop: int
    dtype: torch.dtype
    device: torch.device
    ids: Tensor | None = None  # int64: row v of the head is row ids[v] of the values; None: v itself
    scratch: dict[str, Tensor] = field(default_factory=dict)  # shared by the slices of a head

    @property
    def shape(self) -> tuple[int, int]:
        return self.stop - self.start, self.values.shape[1]

    @property
    def step(self) -> int:
        """Return the number of rows of a slice."""
        return min(max(slice_rows(self.values.shape[1], self.dtype), LEAST_ROWS), self.shape[0])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: slice | Tensor) -> Any:
        if isinstance(at, Tensor):
            out = torch.empty((at.numel(), self.shape[1]), dtype=self.dtype, device=self.device)
            self.write(at.reshape(-1), out)
            return out.view(*at.shape, -1)
        start, stop, _ = at.indices(self.shape[0])
        return replace(self, start=self.start + start, stop=self.start + stop)

    def slices(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (columns of the logits, rows (n, H)). The rows of a slice are valid until the next one."""
        buffer = self._buffer("rows", self.step, self.dtype)
        for start in range(0, self.shape[0], self.step):
            part = slice(start, min(start + self.step, self.shape[0]))
            rows = buffer[: part.stop - part.start]
            self.write(part, rows)
            yield part, rows

    def _buffer(self, name: str, rows: int, dtype: torch.dtype) -> Tensor:
        """Return a buffer (rows or more, H) of the whole head's."""
        held = self.scratch.get(name)
        if held is None or held.shape[0] < rows:
            held = torch.empty((rows, self.values.shape[1]), dtype=dtype, device=self.device)
            self.scratch[name] = held
        return held[:rows]

    def write(self, at: slice | Tensor, out: Tensor) -> None:
        """Write rows of the head, [start, stop) or by their numbers (n,), into `out` (n, H)."""
        at = _shifted(at, self.start)
        if self.ids is not None:
            at = self.ids[at if isinstance(at, slice) else at.to(self.ids.device)]
        head, wide = self.quantised, torch.promote_types(self.dtype, torch.float32)
        # A few rows at a time: they are in the cache of a CPU when they are multiplied.
        whole = head is None or self.device.type != "cpu"
        step = len(out) if whole else COPY_BYTES // (wide.itemsize * out.shape[1])
        step = max(step, 1)
        for start in range(0, len(out), step):
            rows = out[start : start + step]
            some = _part(at, start, len(rows))
            here = (self.values.dtype, self.values.device) == (self.dtype, self.device)
            if head is None and here and isinstance(some, Tensor):
                torch.index_select(self.values, 0, some, out=rows)
                continue
            values = self.values[some if isinstance(some, slice) else some.to(self.values.device)]
            values = values.to(self.device)
            if head is None:
                rows.copy_(values)
                continue
            product = rows if self.dtype == wide else self._buffer("wide", len(rows), wide)
            product.copy_(values)
            if head.zero_points is not None:
                _by_blocks(product, self._blocks(head.zero_points, some, wide), Tensor.sub_)
            _by_blocks(product, self._blocks(head.scales, some, wide), Tensor.mul_)
            if product is not rows:
                rows.copy_(product)

    def _blocks(self, grid: Tensor, at: slice | Tensor, wide: torch.dtype) -> tuple[Tensor, int]:
        """Return the entries of a grid for rows of the values, (n, ceil(H / c)), and the width c."""
        assert self.quantised is not None
        height, width = self.quantised.block
        if height == 1 and isinstance(at, slice):
            return grid[at].to(self.device, wide), width
        if isinstance(at, slice):
            at = torch.arange(at.start, at.stop, device=grid.device)
        entries = grid[at.to(grid.device).div(height, rounding_mode="floor")]
        return entries.to(self.device, wide), width


def _shifted(at: slice | Tensor, by: int) -> slice | Tensor:
    return slice(at.start + by, at.stop + by) if isinstance(at, slice) else at + by


def _part(at: slice | Tensor, start: int, count: int) -> slice | Tensor:
    if isinstance(at, slice):
        return slice(at.start + start, at.start + start + count)
    return at[start : start + count]


def _by_blocks(rows: Tensor, blocks: tuple[Tensor, int], write: Callable[..., Any]) -> None:
    """Combine rows (n, H) in place with the entries of their blocks, (n, ceil(H / width)) and the width."""
    entries, width = blocks
    whole = rows.shape[1] // width
    if entries.shape[1] == 1:
        write(rows, entries)
        return
    write(rows[:, : whole * width].unflatten(1, (whole, width)), entries[:, :whole, None])
    if whole < entries.shape[1]:
        write(rows[:, whole * width :], entries[:, whole:])


def slice_rows(hidden: int, dtype: torch.dtype) -> int:
    """Return the number of rows of a slice whose buffer has SLICE_BYTES."""
    return SLICE_BYTES // (hidden * dtype.itemsize)


@dataclass(frozen=True)
class MovedRows:
    """Give rows of hidden states (N, H) in the dtype and on the device of a GEMM."""

    hidden: Tensor
    dtype: torch.dtype
    device: torch.device

    @property
    def shape(self) -> torch.Size:
        return self.hidden.shape

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def __getitem__(self, at: slice | Tensor) -> Tensor:
        at = at.to(self.hidden.device) if isinstance(at, Tensor) else at
        return self.hidden[at].to(self.device, self.dtype)
