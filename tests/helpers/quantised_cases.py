"""Heads in every form that is read by slices, made from dense ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from opsd_kernels import QuantizedHead, cache_forward_kl, linear_cached_forward_kl, linear_divergence
from opsd_kernels.testing import Case, hard_case

BLOCK = (32, 10)  # divides neither side of the heads below
FLOAT8 = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def _scales(weight: Tensor, block: tuple[int, int], largest: float) -> tuple[Tensor, Tensor]:
    """Return the scale of each block, and of each entry."""
    (V, H), (b, c) = weight.shape, block
    rows, columns = -(-V // b), -(-H // c)
    padded = weight.new_zeros(rows * b, columns * c)
    padded[:V, :H] = weight.abs()
    scales = padded.view(rows, b, columns, c).amax((1, 3)).clamp(min=1e-3) / largest
    return scales, scales.repeat_interleave(b, 0)[:V].repeat_interleave(c, 1)[:, :H]


def float8(dtype: torch.dtype, by_blocks: bool, scale_dtype: torch.dtype = torch.float32):
    def make(weight: Tensor) -> QuantizedHead:
        block = BLOCK if by_blocks else (1, weight.shape[1])
        scales, entries = _scales(weight.float(), block, FLOAT8[dtype])
        scales, entries = scales.to(scale_dtype), entries.to(scale_dtype).float()
        values = (weight.float() / entries).clamp(-FLOAT8[dtype], FLOAT8[dtype]).to(dtype)
        return QuantizedHead(values, scales if by_blocks else scales[:, 0], block_size=block)

    return make


def int8(bits: int, block_columns: int | None, zero_points: bool):
    def make(weight: Tensor) -> QuantizedHead:
        block = (1, block_columns or weight.shape[1])
        largest = 2 ** (bits - 1) - 1
        scales, entries = _scales(weight.float(), block, largest)
        values = (weight.float() / entries).round().clamp(-largest, largest).to(torch.int8)
        zeros = None
        if zero_points:
            zeros = torch.arange(scales.numel()).view(scales.shape).remainder(5).sub(2).to(torch.int8)
        return QuantizedHead(values, scales, zeros, block)

    return make


QUANTISED: dict[str, Callable[[Tensor], QuantizedHead]] = {
    "float8_e4m3fn, rows": float8(torch.float8_e4m3fn, False),
    "float8_e4m3fn, blocks": float8(torch.float8_e4m3fn, True),
    "float8_e5m2, rows, bf16 scales": float8(torch.float8_e5m2, False, torch.bfloat16),
    "int8, rows": int8(8, None, False),
    "int4 in int8, groups, zero points": int8(4, 8, True),
}


def quantised_case(
    kind: str, role: str, dtype: torch.dtype, **made
) -> tuple[Case, Callable[..., Tensor], QuantizedHead]:
    """Return a case with dequantised heads, the op on the quantised ones, and the (student's) head.

    `role`: "teacher", "student", or "shared".
    """
    shape = {"N": 31, "V": 203, "H": 24, **made}
    case = hard_case(*(shape.pop(name) for name in "NVH"), dtype, shared_head=role == "shared", **shape)
    case, head = with_quantised_head(case, kind, role)
    return case, on_head(linear_divergence, role, head), head


def with_quantised_head(case: Case, kind: str, role: str) -> tuple[Case, QuantizedHead]:
    """Return the case with the dequantised head in place of one or both, and the head.

    A quantised head of the student has no gradient.
    """
    field = "teacher_weight" if role == "teacher" else "student_weight"
    head = QUANTISED[kind](getattr(case, field))
    dense = head.dequantize(case.student_hidden.dtype)
    fields = ("student_weight", "teacher_weight") if role == "shared" else (field,)
    case = replace(case, **dict.fromkeys(fields, dense))
    if role != "teacher":
        case = replace(case, trainable=tuple(name for name in case.trainable if name != "student_weight"))
    return case, head


def on_head(op: Callable[..., Tensor], role: str, head: QuantizedHead) -> Callable[..., Tensor]:
    """Return an op in the signature of linear_divergence with the quantised head in its place."""

    def run(student_hidden, student_weight, teacher_hidden, teacher_weight, **options):
        student = student_weight if role == "teacher" else head
        teacher = teacher_weight if role == "student" else head
        return op(student_hidden, student, teacher_hidden, teacher, **options)

    return run


def through_cache(role: str, head: QuantizedHead) -> Callable[..., Tensor]:
    """Return a call through a fresh cache, in the signature of linear_divergence."""

    def run(
        h, W, t, Wt, *, labels, mask, divergence, token_weights=None, student_bias=None, teacher_bias=None,
        **options,
    ):  # fmt: skip
        W, Wt = W if role == "teacher" else head, Wt if role == "student" else head
        told = {"mask": mask & (labels != -100), "student_bias": student_bias, **options}
        cache = cache_forward_kl(t, Wt, W, teacher_bias=teacher_bias, **told)
        return linear_cached_forward_kl(h, W, cache, token_weights=token_weights, **told)

    return run
