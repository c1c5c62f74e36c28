"""Heads in every form that is read by slices, made from dense ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from opsd_kernels import QuantizedHead, cache_forward_kl, linear_cached_forward_kl, linear_divergence
from opsd_kernels.testing import Case, hard_case
from opsd_kernels.testing.heads import quantise

BLOCK = (32, 10)  # divides neither side of the heads below


def _quantised(weight: Tensor, zero_points: bool = False, **how) -> QuantizedHead:
    values, scales, block = quantise(weight.float(), **how)
    zeros = torch.arange(scales.numel()).view(scales.shape).remainder(5).sub(2).to(torch.int8)
    scales = scales if "block" in how else scales[:, 0]
    return QuantizedHead(values, scales, zeros if zero_points else None, block)


QUANTISED: dict[str, Callable[[Tensor], QuantizedHead]] = {
    "float8_e4m3fn, rows": partial(_quantised, dtype=torch.float8_e4m3fn),
    "float8_e4m3fn, blocks": partial(_quantised, dtype=torch.float8_e4m3fn, block=BLOCK),
    "float8_e5m2, rows, bf16 scales": partial(
        _quantised, dtype=torch.float8_e5m2, scale_dtype=torch.bfloat16
    ),
    "int8, rows": partial(_quantised, dtype=torch.int8),
    "int4 in int8, groups, zero points": partial(
        _quantised, dtype=torch.int8, block=(1, 8), bits=4, zero_points=True
    ),
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
