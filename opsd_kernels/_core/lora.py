"""Define low-rank adapters of a head: W + scaling * B @ A, which is never formed.

The products of the loop: adapted.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._rows import extension
from ..spec import check_number, check_tensor, expect
from .sizes import ADAPTED_BYTES, COPY_BYTES


@dataclass(frozen=True)
class Lora:
    """Hold an adapter of a head (V, H), of any floating-point dtype."""

    A: Tensor  # (r, H)
    B: Tensor  # (V, r)
    scaling: float

    @classmethod
    def parse(cls, name: str, value: object) -> Lora | None:
        """Check the argument `name`: None or (A, B, scaling). Raises TypeError or ValueError."""
        if value is None or isinstance(value, Lora):
            return value
        expected = "None or (A, B, scaling), with A (r, H) and B (V, r)"
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
        expect(len(value) == 3, name, expected, f"{len(value)} values")
        A, B, scaling = value
        for part, tensor in (("A", A), ("B", B)):
            expect(not hasattr(tensor, "placements"), f"{name} {part}", "a plain tensor", "a DTensor")
            check_tensor(f"{name} {part}", tensor)
            expect(
                tensor.is_floating_point(),
                f"{name} {part}",
                "a floating-point tensor",
                tensor.dtype,
                TypeError,
            )
        return cls(A, B, check_number(f"{name} scaling", scaling))

    def check(self, name: str, shape: torch.Size, device: torch.device) -> None:
        """Raise ValueError unless the adapter is on the device, and fits a head of this rank's (V, H)."""
        V, H = shape
        rank = self.A.shape[0] if self.A.dim() else 0
        expect(
            rank >= 1 and self.A.shape == (rank, H),
            f"{name} A",
            f"shape (r, {H}) with r >= 1",
            tuple(self.A.shape),
        )
        expect(self.B.shape == (V, rank), f"{name} B", f"shape ({V}, {rank})", tuple(self.B.shape))
        for part, tensor in (("A", self.A), ("B", self.B)):
            expect(tensor.device == device, f"{name} {part}", f"a tensor on {device}", tensor.device)

    def detach(self) -> Lora:
        return replace(self, A=self.A.detach(), B=self.B.detach())

    def coefficients(self, hidden: Tensor) -> Tensor:
        """Return scaling * hidden @ A.T, (C, H) -> (C, r), in fp32, or fp64 for fp64 rows."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        columns = self.A.to(wide).t()
        out = hidden.new_empty(hidden.shape[0], columns.shape[1], dtype=wide)
        for rows in row_slices(hidden):
            torch.mm(hidden[rows].to(wide), columns, out=out[rows])
        return out.mul_(self.scaling)


def row_slices(x: Tensor) -> Sequence[slice]:
    """Return slices of rows whose copies in fp32 have at most COPY_BYTES."""
    step = max(1, COPY_BYTES // (4 * max(x.shape[1], 1)))
    return [slice(start, start + step) for start in range(0, x.shape[0], step)]


def joins(device_type: str, dtype: torch.dtype, H: int) -> bool:
    """Return True if one GEMM of the extension multiplies rows (n, H) by a head and by B."""
    if device_type != "cpu":
        return False
    if dtype == torch.bfloat16:  # whose entries it reads in pairs
        return H % 2 == 0 and extension.gemm_unavailable() is None
    return extension.gemm_fp32_serves(dtype)


@dataclass(frozen=True)
class AdapterPlan:
    """Hold the bytes and operations that adapters add to a call."""

    per_row: int = 0  # of a chunk
    scratch: int = 0
    gradients: int = 0
    forward: int = 0  # multiplications per logit, of the logits and of the gradients
    backward: int = 0

    @classmethod
    def of(
        cls,
        gemms: Any,
        ranks: Sequence[int],
        dtype: torch.dtype,
        buffer: torch.dtype,
        device_type: str,
        whole: bool,
    ) -> AdapterPlan:
        """Count what adapted.Adapters allocates for matrices of the head's dtype.

        `gemms` are the planner's Products, `ranks` those of the student and of each teacher. `whole`: no head
        is read by slices.
        """
        V, H_student = gemms.V, gemms.H_student
        narrow, wide = dtype.itemsize == 2, torch.promote_types(dtype, torch.float32).itemsize
        trained, theirs = ranks[0] * gemms.grad, max(ranks[1:], default=0)
        both, one = ranks[0] + theirs, whole and joins(device_type, dtype, H_student)
        addends = 2 if narrow else 1
        scratch = (ADAPTED_BYTES[device_type] * (buffer.itemsize == 2 and not one) + COPY_BYTES) * narrow
        # A matrix for the difference of two adapters, or for an odd number of rows to be repeated
        copied = narrow * one * both * (theirs > 0 < ranks[0] or any(rank % 2 for rank in ranks))
        # The rows beside their factors: of one side, or of the stacked rows
        left = (
            (max(H_student, gemms.H_teacher) + addends * both) * dtype.itemsize * one * (1 + gemms.difference)
        )
        # dA, and dB with the products of both addends
        entries = trained * (H_student + V * addends)
        return cls(
            per_row=wide * (H_student * (trained > 0) + 3 * trained + 2 * both) + left,
            scratch=scratch + addends * dtype.itemsize * V * copied,
            gradients=wide * entries,
            forward=both,
            backward=2 * trained,
        )
