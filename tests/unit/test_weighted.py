"""Test token weights from the op's own statistics: values, ignored tokens and GEMM passes."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from opsd_kernels import linear_divergence, plan, weights
from opsd_kernels._core import loop
from opsd_kernels._core.library import align
from opsd_kernels.testing import (
    assert_no_worse,
    assert_on_target,
    assert_same_bits,
    evaluate,
    hard_case,
    plain_outcomes,
)
from opsd_kernels.testing.reference import linear_divergence_reference
from opsd_kernels.weights.base import Scheme

B, T, V, H = 4, 7, 211, 24
SEQUENCE = weights.PrefixDiscrepancy(0.5)
ROW = weights.TrustGate(0.2) * weights.LinearDecay(0.5)


def weighted_case(dtype=torch.float32, **made):
    return replace(hard_case(B * T, V, H, dtype, batch=B, largest_logit=8.0, **made), token_weights=None)


def budget_of(rows, dtype):
    """Return a budget for about `rows` rows of two heads."""
    accumulator = 4 * V * H if dtype.itemsize == 2 else 0
    return int((rows * (2 * V * 4 + 16 * H) + accumulator) * 2) + 64


@pytest.fixture
def projected(monkeypatch):
    """Record the rows of the logits GEMMs, one entry per GEMM."""
    seen, project = [], loop.project

    def spy(hidden, weight, out, centre=None):
        if out.shape[1] == V:
            seen.append(hidden.shape[0])
        project(hidden, weight, out, centre)

    monkeypatch.setattr(loop, "project", spy)
    return seen


@pytest.mark.parametrize(
    "weighting", [ROW, SEQUENCE, weights.MeanOne(ROW)], ids=["row", "sequence", "mean one"]
)
@pytest.mark.parametrize("rows", [3, 8, 100])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_value_and_gradient(backend, weighting, rows, frozen):
    """fp32 holds in chunks that cut sequences, in chunks of one sequence, and in one chunk."""
    case = weighted_case(frozen_head=frozen)
    options = {"token_weights": weighting, "divergence": "jsd"}
    ours = evaluate(
        linear_divergence, case, **options, backend=backend, workspace_bytes=budget_of(rows, torch.float32)
    )
    assert_no_worse(
        ours, plain_outcomes(case, **options), evaluate(linear_divergence_reference, case.double(), **options)
    )


@pytest.mark.parametrize("weighting", [ROW, SEQUENCE], ids=["row", "sequence"])
@pytest.mark.parametrize("shared_head", [True, False], ids=["shared", "two heads"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs(backend, weighting, shared_head, dtype):
    """Targets hold although the weight scales rounded hidden states instead of the logit gradient."""
    case = weighted_case(dtype, shared_head=shared_head, near=1e-2 if shared_head else None)
    options = {"token_weights": weighting}
    ours = evaluate(linear_divergence, case, **options, backend=backend, workspace_bytes=budget_of(8, dtype))
    assert_on_target(
        ours,
        evaluate(linear_divergence_reference, case.double(), **options),
        "default" if shared_head else "fp32_logits",
    )


@pytest.mark.parametrize("size", [1e-7, 1e5])
@pytest.mark.parametrize("weighting", [ROW, SEQUENCE], ids=["row", "sequence"])
def test_fp16_holds_for_weights_of_any_size(backend, weighting, size):
    """Weights of 1e-7 and an upstream gradient of 1e7: neither their product nor the weights are rounded."""
    case = replace(weighted_case(torch.float16), upstream=1 / size)
    options = {"token_weights": size * weighting, "reduction": "sum"}
    ours = evaluate(
        linear_divergence, case, **options, backend=backend, workspace_bytes=budget_of(8, torch.float16)
    )
    assert_on_target(ours, evaluate(linear_divergence_reference, case.double(), **options), "fp32_logits")


@dataclass(frozen=True)
class Exchanging(Scheme):
    """Uniform weights that count their calls, each of which would issue a collective."""

    calls: list
    scope = "row"
    exchanges = True

    def values(self, stats, mask):
        self.calls.append(mask.shape)
        return mask.double()


@pytest.mark.parametrize(
    "composed",
    [
        lambda inner: inner,
        lambda inner: 0.5 * inner,
        lambda inner: weights.MeanOne(weights.LinearDecay(0.5) * inner),
        lambda inner: weights.PackedSequences(inner, (T,) * B),
    ],
    ids=["alone", "times", "mean one", "packed"],
)
def test_collectives_are_as_many_for_any_number_of_chunks(composed):
    """Else ranks with other numbers of tokens would wait for each other."""
    case, counts = weighted_case(), []
    case = case._map(lambda x: x.reshape(1, B * T, *x.shape[2:]) if x.shape[:2] == (B, T) else x)
    for rows in (3, 8, 100):
        inner = Exchanging([])
        told = {"token_weights": composed(inner), "workspace_bytes": budget_of(rows, torch.float32)}
        evaluate(linear_divergence, case, **told)
        counts.append(len(inner.calls))
    assert counts[0] == counts[1] == counts[2] > 0


def test_passes_of_the_gemms(backend, projected):
    """Rows are projected once for row weights and aligned sequences, twice if a sequence exceeds a chunk."""
    case = weighted_case()
    valid = int((case.mask & (case.labels != -100)).sum())
    for weighting, rows, times in ((ROW, 3, 1), (SEQUENCE, 8, 1), (SEQUENCE, 3, 2)):
        projected.clear()
        evaluate(
            linear_divergence,
            case,
            token_weights=weighting,
            backend=backend,
            workspace_bytes=budget_of(rows, torch.float32),
        )
        assert sum(projected) == 2 * times * valid, (weighting, rows)


def test_the_planner_says_when_and_why():
    shape = {"N": 4096, "V": 32000, "H_student": 64, "dtype": torch.float32, "workspace_bytes": 200 << 20}
    rows = plan(**shape).rows
    assert plan(**shape, weights_scope="row").weighting == "chunk"
    aligned = plan(**shape, weights_scope="sequence", longest_sequence=rows)
    assert (aligned.weighting, aligned.passes) == ("aligned", 4) and str(rows) in aligned.weighting_reason
    apart = plan(**shape, weights_scope="sequence", longest_sequence=4096)
    assert (apart.weighting, apart.passes) == ("own pass", 6) and "4096" in apart.weighting_reason
    assert (
        plan(**shape, weights_scope="sequence", longest_sequence=4096, trainable_head=False).weighting
        == "after"
    )
    assert (
        plan(**shape, weights_scope="sequence", longest_sequence=4096, backward="recompute").weighting
        == "after"
    )
    assert plan(**shape).weighting == "before"
    half = plan(**{**shape, "dtype": torch.float16}, weights_scope="row")
    assert (half.weighting, half.passes) == ("own pass", 6) and "fp16" in half.weighting_reason


def test_chunks_end_with_sequences():
    assert align([3, 3, 3], 6) == [slice(0, 6), slice(6, 9)]
    assert align([0, 5, 0, 2, 9], 6) == [slice(0, 5), slice(5, 7), slice(7, 16)]
    assert align([], 6) == align([0, 0], 6) == []


@pytest.mark.parametrize("weighting", [ROW, SEQUENCE], ids=["row", "sequence"])
def test_weights_are_detached(backend, weighting):
    """The gradient is that of the divergence with the weights as constants."""
    case = weighted_case(torch.float64)
    _, stats = linear_divergence(*case.inputs(), **case.options(), return_stats=True, backend=backend)
    numbers = weighting(stats, case.mask & (case.labels != -100))
    by_scheme = evaluate(linear_divergence, case, token_weights=weighting, backend=backend)
    assert_on_target(
        by_scheme,
        evaluate(linear_divergence, replace(case, token_weights=numbers), backend=backend),
        "fp32_logits",
    )


@pytest.mark.parametrize(
    "weighting", [ROW, SEQUENCE, weights.MeanOne(SEQUENCE)], ids=["row", "sequence", "mean one"]
)
def test_masked_tokens_influence_no_weight(backend, weighting):
    """Other garbage in the hidden states of ignored tokens changes no bit."""
    case = weighted_case()
    ignored = ~(case.mask & (case.labels != -100))
    other = replace(
        case, student_hidden=case.student_hidden.clone(), teacher_hidden=case.teacher_hidden.clone()
    )
    other.student_hidden[ignored], other.teacher_hidden[ignored] = 3.0, -7.0
    before, after = (
        evaluate(linear_divergence, c, token_weights=weighting, backend=backend, workspace_bytes=60_000)
        for c in (case, other)
    )
    assert_same_bits(after, before)


def test_no_discrepancy_at_all(backend):
    """Return a case whose teacher is the student."""
    case = weighted_case(shared_head=True)
    same = replace(case, teacher_hidden=case.student_hidden)
    for of in ("logprob", "divergence"):
        outcome = evaluate(
            linear_divergence,
            same,
            token_weights=weights.PrefixDiscrepancy(of=of),
            divergence="forward_kl",
            backend=backend,
        )
        for _, value in outcome.named():
            assert value.isfinite().all()


@dataclass(frozen=True)
class Unlucky:
    """Give weight 0 where the divergence is infinite, from the statistics alone."""

    scope: str = "row"

    def __call__(self, stats, mask):
        return (stats.divergence < math.inf).float()


def test_a_weight_of_zero_takes_an_infinite_row_out(backend):
    """An inf in the gradient of a row whose weight turns out 0 must not reach the products."""
    case = weighted_case(bias=False)
    excluded = torch.zeros(V)
    excluded[5] = -math.inf
    tilted = case.student_hidden.clone()
    options = {"teacher_bias": excluded, "student_softcap": None}
    case = replace(case, student_hidden=tilted)
    loss, stats = linear_divergence(
        *case.inputs(),
        **case.options(),
        **options,
        return_stats=True,
        reduction="sum",
        backend=backend,
        token_weights=Unlucky(),
    )
    assert loss == 0 and (stats.divergence[case.mask & (case.labels != -100)] == math.inf).all()
    outcome = evaluate(
        linear_divergence, case, **options, token_weights=Unlucky(), reduction="sum", backend=backend
    )
    for name, value in outcome.named():
        assert_same_bits(value, torch.zeros_like(value)), name


def test_backward_twice_and_two_runs(backend):
    case = weighted_case()
    live = case.leaves()
    loss = linear_divergence(*live.inputs(), **live.options(), token_weights=SEQUENCE, backend=backend)
    first = torch.autograd.grad(loss, live.student_weight, retain_graph=True)[0].clone()
    assert_same_bits(torch.autograd.grad(loss, live.student_weight)[0], first)
    again = case.leaves()
    other = linear_divergence(*again.inputs(), **again.options(), token_weights=SEQUENCE, backend=backend)
    assert_same_bits(torch.autograd.grad(other, again.student_weight)[0], first)


def test_schedules_compile_whole_and_others_in_part(backend):
    case = weighted_case()

    def loss(weighting):
        def run(*heads, **options):
            return linear_divergence(*heads, **options, token_weights=weighting, backend=backend)

        return run

    schedule = weights.FirstFraction(0.5)
    whole = torch.compile(loss(schedule), fullgraph=True, backend="aot_eager")
    assert_no_worse(
        evaluate(whole, case),
        evaluate(loss(schedule), case),
        evaluate(linear_divergence_reference, case.double(), token_weights=schedule),
    )
    in_part = torch.compile(loss(ROW), backend="aot_eager")
    assert_no_worse(
        evaluate(in_part, case),
        evaluate(loss(ROW), case),
        evaluate(linear_divergence_reference, case.double(), token_weights=ROW),
    )


@pytest.mark.parametrize("rows", [3, 100])
def test_a_trainable_bias_over_a_frozen_head(backend, rows):
    """The bias's gradient sums weighted rows: the weights of a sequence wait for all of its rows."""
    case = hard_case(12, 33, 5, torch.float64, batch=3, largest_logit=4.0)
    case = replace(case, trainable=("student_hidden", "student_bias"), token_weights=None)
    told = {"token_weights": weights.PrefixDiscrepancy(0.9, of="divergence")}
    truth = evaluate(linear_divergence_reference, case, **told)
    budget = rows * 8 * (2 * 33 + 40)
    assert_no_worse(
        evaluate(linear_divergence, case, **told, backend=backend, workspace_bytes=budget), truth, truth
    )


def test_an_infinite_divergence_of_weight_zero_over_a_frozen_head(backend):
    case = hard_case(12, 33, 5, torch.float64, batch=3, masked_entry="teacher", frozen_head=True)
    case = replace(case, token_weights=None)
    told = {"token_weights": weights.EntropyGate("student", below=1e-9), "divergence": "reverse_kl"}
    ours = evaluate(linear_divergence, case, **told, backend=backend)
    truth = evaluate(linear_divergence_reference, case, **told)
    assert_no_worse(ours, truth, truth)
    assert not ours.student_hidden.any()
