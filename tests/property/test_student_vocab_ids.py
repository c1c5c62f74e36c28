"""Test properties of `student_vocab_ids` on inputs drawn by hypothesis, in float64."""

from dataclasses import replace

import torch
from draft_cases import draft_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opsd_kernels import linear_divergence
from opsd_kernels.spec import KIND_NAMES
from opsd_kernels.testing import Outcome, assert_one_rounding, evaluate
from opsd_kernels.testing.heads import with_student_vocab
from opsd_kernels.testing.reference import linear_divergence_reference

few = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
sizes = st.tuples(st.integers(1, 12), st.integers(1, 60), st.integers(0, 60), st.integers(1, 9))
seeds = st.integers(0, 10**6)
divergences = st.sampled_from(tuple(KIND_NAMES))


def assert_equal(ours: Outcome, other: Outcome) -> None:
    """Assert equality up to the rounding of logits of up to 40 in float64."""
    expected = dict(other.named())
    for name, value in ours.named():
        assert_one_rounding(value, expected[name], torch.float64, magnitude=100.0, name=name)


@given(shape=sizes, seed=seeds, divergence=divergences, budget=st.sampled_from([None, 3000, 60_000]))
@few
def test_any_ids_equal_the_dense_restriction(backend, shape, seed, divergence, budget):
    N, V, more, H = shape
    draft = draft_case(N, V, V + more, H, torch.float64, seed=seed)
    told = {"divergence": divergence, "student_vocab_ids": draft.ids, "reduction": "sum"}
    truth = evaluate(with_student_vocab(linear_divergence_reference), draft.case, **told)
    row = 2 * V * 8 + 3 * H * 8
    ours = evaluate(
        linear_divergence,
        draft.case,
        **told,
        backend=backend,
        workspace_bytes=budget and max(budget, 8 * row),
    )
    assert_equal(ours, truth)


@given(shape=sizes, seed=seeds, divergence=divergences)
@few
def test_the_order_of_the_ids_is_that_of_the_student_s_rows(backend, shape, seed, divergence):
    N, V, more, H = shape
    draft = draft_case(N, V, V + more, H, torch.float64, seed=seed)
    order = torch.randperm(V, generator=torch.Generator().manual_seed(seed))
    turned = replace(
        draft.case,
        student_weight=draft.case.student_weight[order],
        student_bias=draft.case.student_bias[order],
    )
    told = {"divergence": divergence, "backend": backend}
    one = evaluate(linear_divergence, draft.case, student_vocab_ids=draft.ids, **told)
    other = evaluate(linear_divergence, turned, student_vocab_ids=draft.ids[order], **told)
    back = order.argsort()
    other = replace(other, student_weight=other.student_weight[back], student_bias=other.student_bias[back])
    assert_equal(other, one)


@given(shape=sizes, seed=seeds)
@few
def test_rows_of_the_teacher_that_the_student_lacks_do_not_matter(backend, shape, seed):
    N, V, more, H = shape
    draft = draft_case(N, V, V + more, H, torch.float64, seed=seed)
    weight, bias = draft.case.teacher_weight.clone(), draft.case.teacher_bias.clone()
    lacking = torch.ones(V + more, dtype=torch.bool)
    lacking[draft.ids] = False
    weight[lacking], bias[lacking] = torch.nan, torch.inf
    other = replace(draft.case, teacher_weight=weight, teacher_bias=bias)
    one, two = (
        evaluate(linear_divergence, case, student_vocab_ids=draft.ids, backend=backend)
        for case in (draft.case, other)
    )
    assert_equal(two, one)
