"""Test properties of any input drawn by hypothesis, in float64 or bitwise."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opsd_kernels import linear_divergence
from opsd_kernels.spec import KIND_NAMES
from opsd_kernels.testing import assert_no_growth, assert_one_rounding, assert_same_bits, evaluate, hard_case

DIVERGENCES = tuple(KIND_NAMES)
few = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 70), st.integers(1, 9))
seeds = st.integers(0, 10**6)


def per_token(case, **options):
    return linear_divergence(*case.inputs(), **case.options(), reduction="none", **options)


def clean(N, V, H, seed, **made):
    """Return a float64 case without ignored tokens, weights and biases."""
    case = hard_case(N, V, H, torch.float64, seed=seed, bias=False, views=False, **made)
    gen = torch.Generator().manual_seed(seed)
    student = torch.where(
        case.student_hidden.isfinite(),
        case.student_hidden,
        torch.randn(case.student_hidden.shape, generator=gen, dtype=torch.float64),
    )
    teacher = torch.where(
        case.teacher_hidden.isfinite(),
        case.teacher_hidden,
        torch.randn(case.teacher_hidden.shape, generator=gen, dtype=torch.float64),
    )
    return replace(
        case, student_hidden=student, teacher_hidden=teacher, mask=None, labels=None, token_weights=None
    )


@given(shape=sizes, seed=seeds, beta=st.floats(0.01, 0.99))
@few
def test_never_negative_and_bounded_where_it_is(backend, shape, seed, beta):
    case = clean(*shape, seed)
    bounds = {"tvd": 1.0, "skew_reverse_kl": -math.log1p(-beta), "skew_forward_kl": -math.log(beta)}
    for divergence in DIVERGENCES:
        loss = per_token(case, divergence=divergence, beta=beta, backend=backend)
        assert (loss >= -1e-12).all(), (divergence, loss)
        assert (loss <= bounds.get(divergence, float("inf")) + 1e-12).all(), (divergence, loss)


@given(shape=sizes, seed=seeds, shared_head=st.booleans())
@few
def test_zero_for_equal_sides_and_only_there(backend, shape, seed, shared_head):
    case = clean(*shape, seed)
    same = replace(
        case,
        teacher_hidden=case.student_hidden,
        teacher_weight=case.student_weight if shared_head else case.student_weight.clone(),
    )
    for divergence in DIVERGENCES:
        loss = per_token(same, divergence=divergence, backend=backend)
        assert_one_rounding(loss, torch.zeros_like(loss), torch.float64, magnitude=40.0, name=divergence)
        if shape[1] > 1:
            other = replace(same, teacher_hidden=case.student_hidden * 1.01 + 0.01)
            moved = (other.teacher_hidden - same.teacher_hidden) @ case.student_weight.T
            differs = (moved.amax(-1) - moved.amin(-1)) > 1e-3
            # In sharp rows the change of the probabilities underflows.
            sharp = (case.student_hidden @ case.student_weight.T).softmax(-1).amax(-1) > 1 - 1e-6
            assert (per_token(other, divergence=divergence, backend=backend)[differs & ~sharp] > 0).all(), (
                divergence
            )


@given(shape=sizes, seed=seeds, shift=st.floats(-30, 30))
@few
def test_a_constant_added_to_all_logits_changes_nothing(backend, shape, seed, shift):
    """Shifting all logits of one side, by its bias, changes nothing."""
    case = clean(*shape, seed)
    V = shape[1]
    for divergence in DIVERGENCES:
        expected = per_token(case, divergence=divergence, backend=backend)
        for side in ("student_bias", "teacher_bias"):
            shifted = per_token(
                replace(case, **{side: torch.full((V,), shift, dtype=torch.float64)}),
                divergence=divergence,
                backend=backend,
            )
            assert_one_rounding(
                shifted, expected, torch.float64, magnitude=100.0, name=f"{divergence}, {side}"
            )


@given(shape=sizes, seed=seeds)
@few
def test_the_order_of_the_vocabulary_and_of_the_tokens_is_free(backend, shape, seed):
    case = clean(*shape, seed)
    gen = torch.Generator().manual_seed(seed)
    entries, tokens = torch.randperm(shape[1], generator=gen), torch.randperm(shape[0], generator=gen)
    turned = replace(
        case, student_weight=case.student_weight[entries], teacher_weight=case.teacher_weight[entries]
    )
    turned = replace(
        turned, student_hidden=case.student_hidden[tokens], teacher_hidden=case.teacher_hidden[tokens]
    )
    for divergence in DIVERGENCES:
        expected = per_token(case, divergence=divergence, backend=backend)[tokens]
        assert_one_rounding(
            per_token(turned, divergence=divergence, backend=backend),
            expected,
            torch.float64,
            magnitude=100.0,
            name=divergence,
        )


@given(
    shape=st.tuples(st.integers(2, 40), st.integers(2, 70), st.integers(1, 9)),
    seed=seeds,
    rows=st.integers(1, 7),
    divergence=st.sampled_from(DIVERGENCES),
)
@few
def test_chunks_of_any_size(backend, shape, seed, rows, divergence):
    case = hard_case(*shape, torch.float64, seed=seed)
    row = 2 * shape[1] * 8 + 3 * shape[2] * 8
    whole = evaluate(linear_divergence, case, divergence=divergence, reduction="sum", backend=backend)
    parts = evaluate(
        linear_divergence,
        case,
        divergence=divergence,
        reduction="sum",
        backend=backend,
        workspace_bytes=(rows + 3) * row,
    )
    for (name, part), (_, one) in zip(parts.named(), whole.named(), strict=True):
        size = max(1.0, 100 * one.abs().max().item()) * shape[0]
        assert_one_rounding(part, one, torch.float64, magnitude=size, name=name)


@given(seed=seeds, first=st.integers(1, 11), divergence=st.sampled_from(DIVERGENCES))
@few
def test_a_batch_is_its_parts(backend, seed, first, divergence):
    """The sum over a batch equals the sum over its halves, in value and gradient."""
    case = hard_case(12, 67, 8, torch.float64, seed=seed)
    names = ("student_hidden", "teacher_hidden", "mask", "labels", "token_weights")
    options = {"divergence": divergence, "reduction": "sum", "backend": backend}
    whole = evaluate(linear_divergence, case, **options)
    parts = [
        evaluate(linear_divergence, replace(case, **{n: getattr(case, n)[rows] for n in names}), **options)
        for rows in (slice(first), slice(first, None))
    ]
    joined = replace(
        whole,
        loss=parts[0].loss + parts[1].loss,
        student_hidden=torch.cat([part.student_hidden for part in parts]),
        student_weight=parts[0].student_weight + parts[1].student_weight,
        student_bias=parts[0].student_bias + parts[1].student_bias,
    )
    for (name, value), (_, one) in zip(joined.named(), whole.named(), strict=True):
        assert_one_rounding(
            value, one, torch.float64, magnitude=max(1.0, 100 * one.abs().max().item()), name=name
        )


@given(seed=seeds, factor=st.sampled_from([0.5, -2.0, 4.0, 0.0]), divergence=st.sampled_from(DIVERGENCES))
@few
def test_linear_in_the_weights(backend, seed, factor, divergence):
    """Scaling by a power of two changes exponents alone."""
    case = hard_case(12, 67, 8, torch.float32, seed=seed)
    options = {"divergence": divergence, "reduction": "sum", "backend": backend}
    once = evaluate(linear_divergence, case, **options)
    scaled = evaluate(linear_divergence, replace(case, token_weights=factor * case.token_weights), **options)
    for (name, value), (_, one) in zip(scaled.named(), once.named(), strict=True):
        assert torch.equal(value, one * factor), name


@given(shape=sizes, seed=seeds, beta=st.floats(0.05, 0.95))
@few
def test_jsd_of_swapped_sides_is_jsd_of_one_minus_beta(backend, shape, seed, beta):
    """JSD at beta 1/2 is symmetric."""
    case = clean(*shape, seed)
    swapped = replace(
        case,
        student_hidden=case.teacher_hidden,
        student_weight=case.teacher_weight,
        teacher_hidden=case.student_hidden,
    )
    swapped = replace(swapped, teacher_weight=case.student_weight)
    for weight in (beta, 0.5):
        one, other = (
            per_token(c, divergence="jsd", beta=b, backend=backend)
            for c, b in ((case, weight), (swapped, 1 - weight))
        )
        assert_one_rounding(other, one, torch.float64, magnitude=100.0)


@given(shape=sizes, seed=seeds)
@few
def test_the_two_plain_kls_are_each_other_with_the_sides_swapped(backend, shape, seed):
    case = clean(*shape, seed)
    swapped = replace(
        case,
        student_hidden=case.teacher_hidden,
        student_weight=case.teacher_weight,
        teacher_hidden=case.student_hidden,
    )
    swapped = replace(swapped, teacher_weight=case.student_weight)
    assert_one_rounding(
        per_token(swapped, divergence="forward_kl", backend=backend),
        per_token(case, backend=backend),
        torch.float64,
        magnitude=100.0,
    )


@given(seed=seeds, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@few
def test_bits_do_not_depend_on_the_run(backend, seed, dtype):
    case = hard_case(7, 67, 8, dtype, seed=seed)
    one, two = (evaluate(linear_divergence, case, divergence="jsd", backend=backend) for _ in range(2))
    assert_same_bits(one, two)
    assert_no_growth(one, two, one)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_gradient_step_lowers_the_divergence(backend, divergence):
    case = hard_case(12, 67, 8, torch.float64, largest_logit=4.0)
    before = evaluate(linear_divergence, case, divergence=divergence, backend=backend)
    step = replace(
        case,
        student_hidden=torch.where(
            case.student_hidden.isfinite(),
            case.student_hidden - 1e-3 * before.student_hidden,
            case.student_hidden,
        ),
    )
    assert evaluate(linear_divergence, step, divergence=divergence, backend=backend).loss < before.loss
