"""Test the accuracy against float64 as the teacher approaches the student: KL from 2 to 1e-4.

Most tokens of a self-distillation run lie in this range.
"""

import functools
from dataclasses import replace

import pytest
import torch

from opsd_kernels import linear_divergence
from opsd_kernels.spec import KIND_NAMES
from opsd_kernels.testing import (
    Case,
    Outcome,
    assert_no_worse,
    assert_on_target,
    evaluate,
    hard_case,
    plain_outcomes,
)
from opsd_kernels.testing.reference import linear_divergence_reference

KLS = (2.0, 1e-1, 1e-2, 1e-3, 1e-4)
WIDTHS = {"normal": 4.0, "wide": 16.0}


@functools.cache
def curve_case(kl: float, width: str, dtype: torch.dtype, shared_head: bool) -> Case:
    """Return a case of the given float64 KL, after the hidden states are rounded to 16 bits."""
    case = hard_case(
        48,
        2048,
        64,
        dtype,
        shared_head=shared_head,
        near=kl,
        largest_logit=WIDTHS[width],
        widths=(1.0,),
        bias=False,
        seed=1,
    )
    case = replace(case, token_weights=None)
    actual = evaluate(linear_divergence_reference, case.double(), divergence="forward_kl").loss.item()
    assert kl / 2 < actual < 2 * kl, f"the case stands at KL {actual}, not {kl}"
    return case


def off_kinks(case: Case) -> Case:
    """Leave out tokens with an entry at p = q, where the gradient of TVD jumps and is arbitrary.

    They have a probable entry near it, or more than a trace within a few roundings of fp32 logits, which fall
    on either side on one processor and another.
    """
    s, t = (
        h.double() @ w.double().T
        for h, w in ((case.student_hidden, case.student_weight), (case.teacher_hidden, case.teacher_weight))
    )
    delta, q = t.log_softmax(-1) - s.log_softmax(-1), s.softmax(-1)
    jump = (q * (delta.abs() < 0.05 * (q * delta**2).sum(-1, keepdim=True).sqrt())).amax(-1)
    rounding = 8 * torch.finfo(torch.float32).eps * s[s.isfinite()].abs().amax()
    keep = (jump < 0.01) & ((q * (delta.abs() < rounding)).sum(-1) < 1e-5)
    assert keep.sum() >= 8
    return replace(case, mask=case.mask & keep)


@functools.cache
def judged(
    kl: float, width: str, dtype: torch.dtype, shared_head: bool, divergence: str
) -> tuple[Case, Outcome]:
    """Return (case, truth)."""
    case = curve_case(kl, width, dtype, shared_head)
    case = off_kinks(case) if divergence == "tvd" else case
    return case, evaluate(linear_divergence_reference, case.double(), divergence=divergence)


@pytest.mark.parametrize("divergence", KIND_NAMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kl", KLS)
def test_bf16_shared_head(backend, kl, width, divergence):
    case, truth = judged(kl, width, torch.bfloat16, True, divergence)
    for options, target in (({}, "default"), ({"logits_dtype": torch.float32}, "fp32_logits")):
        assert_on_target(
            evaluate(linear_divergence, case, divergence=divergence, backend=backend, **options),
            truth,
            target,
        )


@pytest.mark.parametrize("divergence", KIND_NAMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kl", KLS)
def test_bf16_two_heads(backend, kl, width, divergence):
    """For two equal heads in separate memory the default keeps fp32 logits, and meets their target."""
    case, truth = judged(kl, width, torch.bfloat16, False, divergence)
    assert_on_target(
        evaluate(linear_divergence, case, divergence=divergence, backend=backend), truth, "fp32_logits"
    )


@pytest.mark.parametrize("divergence", KIND_NAMES)
@pytest.mark.parametrize("shared_head", [True, False], ids=["shared head", "two heads"])
@pytest.mark.parametrize(
    "kl", [kl if kl in (1e-1, 1e-4) else pytest.param(kl, marks=pytest.mark.slow) for kl in KLS]
)
def test_fp32(backend, kl, shared_head, divergence):
    for width in WIDTHS:
        case, truth = judged(kl, width, torch.float32, shared_head, divergence)
        plain = plain_outcomes(case, divergence=divergence)
        assert_no_worse(
            evaluate(linear_divergence, case, divergence=divergence, backend=backend), plain, truth
        )


def test_the_curve_can_fail():
    """Rounding both logits to bf16, as older fused losses do, misses the target by far near the teacher."""
    case, truth = judged(1e-3, "wide", torch.bfloat16, True, "reverse_kl")

    def rounded_pair(student_hidden, student_weight, teacher_hidden, teacher_weight, **options):
        identity = torch.eye(student_weight.shape[0], dtype=torch.float32)
        s, t = (
            (h @ w.T).float() for h, w in ((student_hidden, student_weight), (teacher_hidden, teacher_weight))
        )
        return linear_divergence_reference(s, identity, t, identity, **options)

    with pytest.raises(AssertionError, match="gradient of student_hidden: relative error"):
        assert_on_target(replace(evaluate(rounded_pair, case), loss=truth.loss), truth, "default")
