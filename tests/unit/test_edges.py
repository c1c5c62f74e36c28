"""Test edge cases: no tokens, no valid ones, garbage in ignored ones, V = 1, infinities, 16-bit underflow."""

import math
from dataclasses import replace

import pytest
import torch

from opsd_kernels import linear_divergence, linear_logprobs
from opsd_kernels.spec import KIND_NAMES
from opsd_kernels.testing import (
    Case,
    assert_no_worse,
    assert_on_target,
    assert_one_rounding,
    assert_same_bits,
    evaluate,
    hard_case,
    plain_outcomes,
)
from opsd_kernels.testing.reference import linear_divergence_reference

DIVERGENCES = tuple(KIND_NAMES)


def zeros(outcome) -> bool:
    return all((value == 0).all() for _, value in outcome.named())


# ---------------------------------------------------------------- nothing


@pytest.mark.parametrize("leading", [(0,), (0, 5), (3, 0)], ids=str)
@pytest.mark.parametrize("frozen_head", [True, False], ids=["frozen", "trainable"])
def test_zero_tokens(backend, leading, frozen_head):
    case = hard_case(4, 17, 6, frozen_head=frozen_head, bias=True)
    empty = {
        name: getattr(case, name)[:0].reshape(*leading, *getattr(case, name).shape[1:])
        for name in ("student_hidden", "teacher_hidden")
    }
    case = replace(case, **empty, mask=None, labels=None, token_weights=None)
    for reduction in ("mean", "sum", "none") + (("sequence_mean",) if len(leading) == 2 else ()):
        outcome = evaluate(linear_divergence, case, reduction=reduction, backend=backend)
        assert outcome.loss.shape == (leading if reduction == "none" else ())
        assert outcome.student_hidden.shape == (*leading, 6)
        assert zeros(outcome)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sequence_mean"])
@pytest.mark.parametrize("by", ["mask", "labels"])
def test_nothing_valid_is_zero_and_still_in_the_graph(backend, reduction, by):
    case = hard_case(12, 17, 6, batch=3)
    case = replace(
        case, **({"mask": torch.zeros(3, 4)} if by == "mask" else {"labels": torch.full((3, 4), -100)})
    )
    for trainable in (("student_hidden",), case.trainable):
        outcome = evaluate(
            linear_divergence, replace(case, trainable=trainable), reduction=reduction, backend=backend
        )
        assert zeros(outcome), outcome
    live = case.leaves()
    assert linear_divergence(
        *live.inputs(), **live.options(), reduction=reduction, backend=backend
    ).requires_grad


@pytest.mark.parametrize("padding", [0, 5])
def test_a_capped_uniform_head(backend, padding):
    """Softcap 1 and bias -50 over 1003 columns: each log-prob is -log 1003, padding or not."""
    V, labels = 1003, torch.tensor([0, 500, 1002])
    weight = torch.randn(V + padding, 4, generator=torch.Generator().manual_seed(0))
    bias = torch.full((V + padding,), -50.0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        hidden, head = torch.zeros(3, 4, dtype=dtype), weight.to(dtype)
        options = {"bias": bias, "softcap": 1.0, "vocab_size": V, "backend": backend}
        logprobs, entropies = linear_logprobs(hidden, head, labels, return_entropy=True, **options)
        expected = torch.full((3,), math.log(V), dtype=torch.float64)
        assert_one_rounding(-logprobs, expected, logprobs.dtype, name="log-probs")
        assert_one_rounding(entropies, expected, logprobs.dtype, name="entropies")


def test_a_vocabulary_of_one(backend):
    """With V = 1 every divergence and gradient is 0, up to the rounding of a row."""
    for shared_head in (False, True):
        for divergence in DIVERGENCES:
            outcome = evaluate(
                linear_divergence,
                hard_case(7, 1, 3, shared_head=shared_head),
                divergence=divergence,
                reduction="none",
                backend=backend,
            )
            assert_one_rounding(outcome.loss, torch.zeros(7), torch.float32, name=divergence)
            assert_one_rounding(
                outcome.student_bias,
                torch.zeros(1),
                torch.float32,
                magnitude=3 * 40 * 7,
                name=f"{divergence}, sum of seven rows",
            )


def test_a_single_token_without_a_leading_dimension(backend):
    case = hard_case(1, 17, 6, views=False)
    flat = replace(
        case,
        student_hidden=case.student_hidden[0],
        teacher_hidden=case.teacher_hidden[0],
        mask=None,
        labels=None,
        token_weights=None,
    )
    ours, truth = (
        evaluate(linear_divergence, flat, reduction="none", backend=backend),
        evaluate(linear_divergence_reference, flat.double(), reduction="none"),
    )
    assert ours.loss.shape == () and ours.student_hidden.shape == (6,)
    assert_no_worse(ours, evaluate(linear_divergence_reference, flat, reduction="none"), truth)


# ---------------------------------------------------------------- ignored tokens


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf, 1e38], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_ignored_tokens_influence_nothing(backend, divergence, rubbish):
    """Garbage gives the same bits as finite content, and per token those of a call without these tokens."""
    case = hard_case(12, 67, 8, views=False)
    keep = (case.mask != 0) & (case.labels != -100)

    def holding(value: float):
        filled = [
            torch.where(keep.view(-1, *[1] * (x.dim() - 1)), x, value)
            for x in (case.student_hidden, -case.teacher_hidden, case.token_weights)
        ]
        return replace(
            case, **dict(zip(("student_hidden", "teacher_hidden", "token_weights"), filled, strict=True))
        )

    for options in (
        {"reduction": "mean"},
        {"reduction": "sum", "backward": "recompute"},
        {"reduction": "none"},
    ):
        spoilt, harmless = (
            evaluate(linear_divergence, holding(value), divergence=divergence, backend=backend, **options)
            for value in (rubbish, 0.5)
        )
        assert_same_bits(spoilt, harmless)
        assert_same_bits(spoilt.student_hidden[~keep], torch.zeros(2, 8))
        assert all(value.isfinite().all() for _, value in spoilt.named())
    assert (spoilt.loss[~keep] == 0).all()
    tokens = holding(rubbish)
    per_token = ("student_hidden", "teacher_hidden", "mask", "labels", "token_weights")
    packed = replace(tokens, **{name: getattr(tokens, name)[keep] for name in per_token})
    assert_same_bits(
        spoilt.loss[keep],
        evaluate(linear_divergence, packed, divergence=divergence, backend=backend, reduction="none").loss,
    )


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32, torch.uint8], ids=str)
def test_masks_of_any_type(backend, kind):
    case = hard_case(12, 67, 8)
    assert_same_bits(
        *(
            evaluate(linear_divergence, replace(case, mask=mask), backend=backend)
            for mask in (case.mask.to(kind), case.mask)
        )
    )


def test_ignore_index_may_be_a_token(backend):
    case = hard_case(12, 67, 8)
    as_pad = replace(case, labels=torch.where(case.labels == -100, 66, case.labels))
    assert_same_bits(
        evaluate(linear_divergence, as_pad, ignore_index=66, backend=backend),
        evaluate(linear_divergence, case, backend=backend),
    )


def test_a_weight_of_zero_still_counts_as_a_token(backend):
    case = replace(hard_case(6, 17, 4), token_weights=torch.tensor([0.0, 1, 1, 1, 1, 1]))
    truth, plain = evaluate(linear_divergence_reference, case.double()), plain_outcomes(case)
    ours = evaluate(linear_divergence, case, backend=backend)
    assert_no_worse(ours, plain, truth)
    assert (ours.student_hidden[0] == 0).all()


# ---------------------------------------------------------------- infinities


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_an_entry_that_only_the_student_has(backend, divergence, reduction):
    """A teacher's -inf at a probable token makes a KL of the student +inf; the others stay exact."""
    case = replace(
        hard_case(9, 67, 8, masked_entry="teacher", largest_logit=6.0),
        labels=None,
        mask=None,
        token_weights=None,
    )
    case.student_hidden.copy_(case.student_hidden.nan_to_num(0.5, 0.5, 0.5))
    case.teacher_hidden.copy_(case.teacher_hidden.nan_to_num(0.5, 0.5, 0.5))
    if divergence in ("reverse_kl", "mixed_kl"):
        told = {"divergence": divergence, "reduction": reduction, "backend": backend}
        loss = linear_divergence(*case.inputs(), **case.options(), **told)
        assert (loss == math.inf).all(), loss
        return
    options = {"divergence": divergence, "reduction": reduction, "beta": 0.4}
    truth, plain = (
        evaluate(linear_divergence_reference, case.double(), **options),
        plain_outcomes(case, **options),
    )
    assert all(value.isfinite().all() for _, value in truth.named())
    assert_no_worse(evaluate(linear_divergence, case, **options, backend=backend), plain, truth)


def test_an_infinite_token_of_weight_zero_spoils_nothing(backend):
    case = hard_case(6, 17, 4, masked_entry="teacher", views=False)
    case = replace(case, token_weights=torch.zeros(6), mask=None, labels=None)
    case.student_hidden.copy_(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    case.teacher_hidden.copy_(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)))
    assert zeros(evaluate(linear_divergence, case, divergence="reverse_kl", backend=backend))


# ---------------------------------------------------------------- 16 bits


@pytest.mark.parametrize("normalizer", [1.0, 1e6])
def test_fp16_gradients_do_not_underflow_inside(backend, normalizer):
    """A loss scale of 1e6 keeps gradients of 1e-6 per logit, though 1e-6 * 1e-2 underflows in fp16."""
    case = replace(
        hard_case(64, 1003, 32, torch.float16, shared_head=True, near=1e-3, largest_logit=6.0),
        upstream=normalizer,
    )
    options = {"reduction": "mean", "normalizer": normalizer}
    ours, truth = (
        evaluate(op, c, **options)
        for op, c in ((linear_divergence, case), (linear_divergence_reference, case.double()))
    )
    assert_on_target(replace(ours, student_bias=None), replace(truth, student_bias=None), "default")


def test_fp16_does_not_overflow_inside(backend):
    case = replace(hard_case(64, 1003, 32, torch.float16, shared_head=True, largest_logit=8.0), upstream=1e-4)
    case = replace(case, token_weights=case.token_weights * 1e4)
    truth = evaluate(linear_divergence_reference, case.double(), reduction="sum")
    ours = evaluate(linear_divergence, case, reduction="sum", logits_dtype=torch.float32, backend=backend)
    assert_on_target(ours, truth, "fp32_logits")


def test_one_hot_rows_at_the_edge_of_bf16(backend):
    """With logits of 3e4 every probability is 0 or 1, and no result is NaN."""
    eye = torch.eye(4)
    case = Case(
        (eye * 3e4).to(torch.bfloat16),
        eye.to(torch.bfloat16),
        (eye.roll(1, 0) * 3e4).to(torch.bfloat16),
        eye.to(torch.bfloat16),
    )
    for divergence in DIVERGENCES:
        truth = evaluate(linear_divergence_reference, case.double(), divergence=divergence)
        ours = evaluate(linear_divergence, case, divergence=divergence, backend=backend)
        assert_on_target(ours, truth, "default")
