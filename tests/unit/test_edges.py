"""Test edge cases: no tokens, no valid ones, garbage in ignored ones, V = 1, infinities, 16-bit underflow."""

import math
from dataclasses import replace

import pytest
import torch

from opsd_kernels import (
    cache_forward_kl,
    linear_cached_forward_kl,
    linear_divergence,
    linear_logprobs,
    linear_logprobs_at,
)
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


# ---------------------------------------------------------------- upstream gradients

GEN = torch.Generator().manual_seed(2)
ROWS, HEAD = torch.randn(6, 8, generator=GEN), torch.randn(17, 8, generator=GEN)
IDS = torch.arange(6)
COUNTS = IDS > 1
# Outputs of the tokens. Two are ignored, and of a list of three ids the second is none.
PER_TOKEN = {
    "log-probs": lambda h, W, **how: linear_logprobs(h, W, torch.where(COUNTS, IDS, -100), **how),
    "entropies": lambda h, W, **how: linear_logprobs(h, W, IDS, mask=COUNTS, return_entropy=True, **how)[1],
    "log-probs at ids": lambda h, W, **how: linear_logprobs_at(
        h, W, torch.stack([IDS, torch.full_like(IDS, -1), IDS], 1), mask=COUNTS, **how
    ),
    "divergences": lambda h, W, **how: linear_divergence(
        h, W, ROWS.roll(1).to(h), W.detach(), mask=COUNTS, reduction="none", **how
    ),
}


def assert_zeros_have_no_gradient(outputs_of, leaves, upstream: float, keeps=(True, False)) -> None:
    """Assert that `upstream` at outputs that are 0 changes no bit of the gradients, in each backward."""
    outputs = outputs_of(*leaves)
    zero = (outputs == 0).detach()
    assert zero[:2].all() and not zero.all()
    spoilt, clean = (torch.ones_like(outputs).masked_fill(zero, value) for value in (upstream, 0.0))
    expected = torch.autograd.grad(outputs_of(*leaves), leaves, clean)
    for keep in keeps:
        ours = torch.autograd.grad(outputs, leaves, spoilt, retain_graph=keep)
        for mine, other in zip(ours, expected, strict=True):
            assert other.isfinite().all() and other.any()
            assert_same_bits(mine, other)


@pytest.mark.parametrize("upstream", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trained", [1, 2], ids=["frozen", "trainable"])
@pytest.mark.parametrize("name", PER_TOKEN)
def test_upstream_gradients_of_ignored_tokens_reach_nothing(
    backend, monkeypatch, name, trained, dtype, upstream
):
    """Such as those of exp(log-prob - old) where the old log-prob of padding is -inf."""
    leaves = [x.to(dtype, copy=True).requires_grad_(k < trained) for k, x in enumerate((ROWS, HEAD))]
    for how in [{}] if "at ids" in name else [{}, {"backward": "recompute"}]:
        for pack in ("1", "0"):
            monkeypatch.setenv("OPSD_PACK", pack)
            assert_zeros_have_no_gradient(
                lambda *live, how=how: PER_TOKEN[name](*live, *leaves[trained:], backend=backend, **how),
                leaves[:trained],
                upstream,
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_garbage_in_a_cache_at_an_ignored_token_reaches_nothing(backend, dtype):
    """The teacher had NaN at a token that only the student's call masks."""
    head, teacher = HEAD.to(dtype), ROWS.roll(1).to(dtype).index_fill(0, torch.tensor(0), math.nan)
    cache = cache_forward_kl(teacher, head, head, backend=backend)
    told = {"mask": COUNTS, "reduction": "none", "backend": backend}
    leaf = ROWS.to(dtype, copy=True).requires_grad_()
    for upstream in (1.0, math.nan):
        assert_zeros_have_no_gradient(
            lambda h: linear_cached_forward_kl(h, head, cache, **told), [leaf], upstream
        )


@pytest.mark.parametrize("name", ["log-probs", "log-probs at ids"])
def test_the_same_compiled(backend, name):
    torch._dynamo.reset()

    def run(h):
        return PER_TOKEN[name](h, HEAD, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    # torch keeps no compiled graph for a second backward.
    assert_zeros_have_no_gradient(compiled, [ROWS.clone().requires_grad_()], math.nan, keeps=(False,))


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
