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
from ..spec import check_choice
from .sizes import COPIED_BYTES, SLICED_BYTES

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
    scratch: dict[str, Tensor] = field(default_factory=dict)  # uint8, shared by slices, and by heads in turn

    @property
    def shape(self) -> tuple[int, int]:
        return self.stop - self.start, self.values.shape[1]

    @property
    def step(self) -> int:
        """Return the number of rows of a slice."""
        return slice_rows(*self.shape, self.dtype, self.device.type)

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
        """Return scratch (rows, H). One head is read after another, each by its slices."""
        nbytes = rows * self.values.shape[1] * dtype.itemsize
        held = self.scratch.get(name)
        if held is None or held.numel() < nbytes:
            self.scratch.pop(name, None)  # freed before it is replaced
            held = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            self.scratch[name] = held
        return held[:nbytes].view(dtype).view(rows, -1)

    def write(self, at: slice | Tensor, out: Tensor) -> None:
        """Write rows of the head, [start, stop) or by their numbers (n,), into `out` (n, H)."""
        at = _shifted(at, self.start)
        if self.ids is not None:
            at = self.ids[at if isinstance(at, slice) else at.to(self.ids.device)]
        head, wide = self.quantised, torch.promote_types(self.dtype, torch.float32)
        here = (self.values.dtype, self.values.device) == (self.dtype, self.device)
        if head is None and here and isinstance(at, Tensor):
            torch.index_select(self.values, 0, at, out=out)
            return
        for start in range(0, len(out), self._few(wide)):
            rows = out[start : start + self._few(wide)]
            some = _part(at, start, len(rows))
            values = self.values[some if isinstance(some, slice) else some.to(self.values.device)]
            values = values.to(self.device)
            if head is None:
                rows.copy_(values)
                continue
            product, missing = rows if self.dtype == wide else self._buffer("wide", len(rows), wide), 1.0
            if self.device.type == "cpu" and values.dtype != torch.int8:
                halves = [self._buffer(name, len(rows), torch.int16) for name in ("bits", "sign", "nan")]
                missing = _float8_to(product, values, *halves)
            else:
                product.copy_(values)
            if head.zero_points is not None:
                _by_blocks(product, self._blocks(head.zero_points, some, wide), Tensor.sub_)
            scales, width = self._blocks(head.scales, some, wide)
            _by_blocks(product, (scales * missing, width), Tensor.mul_)
            if product is not rows:
                rows.copy_(product)

    def _few(self, wide: torch.dtype) -> int:
        """Return how many rows are written at a time: on a CPU so few that they stay in its cache."""
        if self.quantised is None and self.ids is None:
            return self.shape[0]
        return max(COPIED_BYTES[device_kind(self.device.type)] // (wide.itemsize * self.values.shape[1]), 1)

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


def _float8_to(out: Tensor, values: Tensor, bits: Tensor, sign: Tensor, nan: Tensor) -> float:
    """Write float8 values (n, H) times a power of two into `out`; return the factor that undoes it.

    By their bits: torch converts float8_e4m3fn one by one on a CPU, which takes as long as a GEMM of a chunk.
    The last three are scratch, int16.
    """
    bits.copy_(values.view(torch.int8))
    if values.dtype == torch.float8_e5m2:  # the upper half of an fp16 number
        out.copy_(bits.bitwise_left_shift_(8).view(torch.float16))
        return 1.0
    torch.bitwise_and(bits, -0x8000, out=sign)
    bits.bitwise_and_(0x7F)
    # All ones are the one NaN of float8_e4m3fn: there the exponent of the fp16 number becomes all ones.
    torch.add(bits, 1, out=nan).bitwise_and_(0x80).mul_(0xF8)
    bits.bitwise_left_shift_(7).bitwise_or_(sign).bitwise_or_(nan)
    out.copy_(bits.view(torch.float16))  # the exponents' biases are 7 and 15
    return 256.0


def slice_rows(V: int, H: int, dtype: torch.dtype, device_type: str) -> int:
    """Return the number of rows of a slice of a head (V, H)."""
    rows = SLICED_BYTES[device_kind(device_type)] // (H * dtype.itemsize)
    return min(max(rows, LEAST_ROWS), V)


def device_kind(device_type: str) -> str:
    return "cpu" if device_type == "cpu" else "cuda"


HEADS = ("whole", "sliced", "quantised")  # forms of a head in a plan


@dataclass(frozen=True)
class SlicePlan:
    """Hold the dtypes of a call whose sides differ, and the bytes that heads read by slices add to it."""

    dtype: torch.dtype  # of the student's GEMMs
    widest: torch.dtype  # of both sides
    per_row: int  # of a chunk
    scratch: int

    @classmethod
    def of(
        cls,
        V: int,
        widths: tuple[int, int],
        heads: tuple[str, str],
        dtypes: tuple[torch.dtype, torch.dtype],
        shared: bool,
        device_type: str,
    ) -> SlicePlan:
        """Count what the SlicedHeads of both sides allocate. Raises ValueError for an unknown form."""
        for head in heads:
            check_choice("heads", head, HEADS)
        widest = torch.promote_types(*dtypes)
        both = (widest, widest) if shared or widest == torch.float64 else dtypes
        kind, scratch = device_kind(device_type), 0
        for H, head, dtype in zip(widths, heads, both, strict=True):
            if head != "whole" and H:
                rows = slice_rows(V, H, dtype, device_type)
                scratch = max(scratch, rows * H * dtype.itemsize + 2 * COPIED_BYTES[kind])
        # Sums of dh over slices are in fp32; packed rows of the teacher
        sums = 4 * widths[0] * (heads[0] != "whole" and both[0].itemsize == 2)
        return cls(both[0], widest, sums + widths[1] * (both[1].itemsize - both[0].itemsize), scratch)


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
