"""Combine all options: divergences x clips x supports x weights x transforms x routes.

Every combination is compared with the dense reference in float64.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opsd_kernels import linear_divergence, linear_logprobs, linear_topk_divergence, weights
from opsd_kernels.spec import KIND_NAMES, TAILS
from opsd_kernels.testing import Case, assert_no_worse, evaluate, hard_case
from opsd_kernels.testing.reference import (
    linear_divergence_reference,
    linear_logprobs_reference,
    linear_topk_divergence_reference,
)

many = settings(
    max_examples=500, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
some = settings(many, max_examples=200)

B, T = 3, 4
TRANSFORMS = (
    {},
    {"temperature": 0.7},
    {"temperature": 1.5, "teacher_temperature": 0.8},
    {"student_softcap": 9.0, "teacher_softcap": 9.0, "student_logit_scale": 1.3, "teacher_logit_scale": 1.3},
    {"student_softcap": 6.0, "teacher_logit_scale": -0.5},
)


@dataclass(frozen=True)
class AllButStats:
    """Stand for a user's own weighting: a scope and a call."""

    scope: str = "row"

    def __call__(self, stats, mask):
        return 0.5 + stats.student_max_prob * stats.teacher_max_prob


def weightings(case: Case):
    gen = torch.Generator().manual_seed(1)
    old = -3 * torch.rand(B, T, generator=gen, dtype=torch.float64)
    starts = torch.rand(B, T, generator=gen) < 0.4
    return {
        "tensor": case.token_weights,
        "first": weights.FirstFraction(0.5),
        "decay": weights.ExponentialDecay(1.0) * weights.Sigmoid(0.2, 0.5, 0.1),
        "ratio": weights.ImportanceRatio(old),
        "gate": weights.EntropyGate("teacher", above=0.7),
        "trust": weights.TrustGate(0.1) * weights.LinearDecay(0.3),
        "prefix": weights.PrefixDiscrepancy(0.5),
        "prefix of divergence": weights.PrefixDiscrepancy(-0.4, of="divergence"),
        "mean one": weights.MeanOne(weights.ImportanceRatio(old)),
        "segments": weights.SegmentMean(weights.ImportanceRatio(old), starts) * 0.5,
        "packed": weights.PackedSequences(weights.PrefixDiscrepancy(0.3), (5, 0, 4, 3)),
        "user's": AllButStats(),
    }


WEIGHTS = (
    "none",
    "tensor",
    "first",
    "decay",
    "ratio",
    "gate",
    "trust",
    "prefix",
    "prefix of divergence",
    "mean one",
    "segments",
    "packed",
    "user's",
)
LOSSES = {
    "divergence": st.sampled_from(tuple(KIND_NAMES)),
    "beta": st.sampled_from((0.1, 0.5, 0.8)),
    "z_loss": st.sampled_from((None, None, 0.03)),
    "entry_clip": st.sampled_from((None, 0.01, 0.2)),
    "token_clip": st.sampled_from((None, None, 0.5)),
    "reduction": st.sampled_from(("mean", "sum", "none", "sequence_mean")),
}
DIVERGENCES = st.fixed_dictionaries(
    {
        **LOSSES,
        "teacher_mix": st.sampled_from((0.0, 0.0, 0.3)),
        "topk": st.sampled_from((None, None, 1, 4, 100)),
        "topk_support": st.sampled_from(("student", "teacher")),
        "topk_tail": st.sampled_from(TAILS),
    }
)
CASES = st.fixed_dictionaries(
    {
        "V": st.sampled_from((2, 7, 13, 33)),
        "H": st.sampled_from((1, 5)),
        "seed": st.integers(0, 10**6),
        "shared_head": st.booleans(),
        "frozen_head": st.booleans(),
        "bias": st.booleans(),
        "near": st.sampled_from((None, None, 1e-2)),
        "masked_entry": st.sampled_from((None, "both")),
        "padding": st.sampled_from((0, 3)),
        "largest_logit": st.sampled_from((4.0, 12.0)),
    }
)
ROUTES = st.fixed_dictionaries(
    {"backward": st.sampled_from(("auto", "in_forward", "recompute")), "rows": st.sampled_from((1, 3, 100))}
)


def make_case(made: dict) -> Case:
    made = dict(made)
    if made["V"] < 7:
        made["near"] = None  # with two entries this near there is nothing to bisect
    return hard_case(B * T, made.pop("V"), made.pop("H"), torch.float64, batch=B, views=False, **made)


def flattened(case: Case) -> Case:
    """Return a packed row of tokens."""
    names = ("student_hidden", "teacher_hidden", "mask", "labels", "token_weights")
    return replace(case, **{name: getattr(case, name).flatten(0, 1) for name in names})


def how_to(case: Case, route: dict, options: dict, backend: str) -> dict:
    V = case.vocab_size or case.student_weight.shape[0]
    backward = route["backward"]
    if backward == "in_forward" and options["reduction"] == "none" and "student_weight" in case.trainable:
        backward = "auto"  # in_forward is refused: forward lacks the upstream gradient
    of_row = 8 * (2 * V + 40) + 96 * V  # for any support
    return {"backward": backward, "workspace_bytes": 2 * of_row * route["rows"], "backend": backend}


def compare(op, reference, case: Case, options: dict, how: dict) -> None:
    truth = evaluate(reference, case, **options)
    if not truth.loss.isfinite().all():
        return
    assert_no_worse(evaluate(op, case, **options, **how), truth, truth)


@pytest.mark.slow
@given(
    made=CASES,
    options=DIVERGENCES,
    transform=st.sampled_from(TRANSFORMS),
    weighting=st.sampled_from(WEIGHTS),
    route=ROUTES,
)
@many
def test_all_dialects(backend, made, options, transform, weighting, route):
    if options["topk"] == 1 and options["topk_tail"] == "renormalize":
        options = {**options, "topk": 2}  # one entry would be certain on both sides
    if transform.get("teacher_logit_scale", 1) < 0:
        made = {**made, "masked_entry": None}  # it would be +inf, not a distribution
    case = make_case(made)
    if weighting == "packed":
        if options["reduction"] == "sequence_mean":
            return
        case = flattened(case)
    given_weights = None if weighting == "none" else weightings(case)[weighting]
    case = replace(case, token_weights=None)
    options = {**options, **transform, "token_weights": given_weights}
    compare(
        linear_divergence, linear_divergence_reference, case, options, how_to(case, route, options, backend)
    )


@given(
    made=CASES,
    options=st.fixed_dictionaries({**LOSSES, "tail": st.sampled_from(TAILS)}),
    K=st.sampled_from((2, 3, 9)),
    padded=st.booleans(),
    route=ROUTES,
)
@some
def test_listed_teachers(backend, made, options, K, padded, route):
    case = make_case(made)
    V = case.vocab_size or case.student_weight.shape[0]
    K = min(K, V)
    gen = torch.Generator().manual_seed(made["seed"])
    ids = torch.rand(B, T, V, generator=gen).argsort(-1)[..., :K]
    logprobs = torch.randn(B, T, V, generator=gen, dtype=torch.float64).log_softmax(-1).gather(-1, ids)
    if padded:
        gone = torch.rand(ids.shape, generator=gen) < 0.3
        ids, logprobs = torch.where(gone, -7, ids), torch.where(gone, -torch.inf, logprobs)

    def listed(op):
        return lambda h, W, t, Wt, teacher_bias=None, **rest: op(h, W, ids, logprobs, **rest)

    compare(
        listed(linear_topk_divergence),
        listed(linear_topk_divergence_reference),
        case,
        options,
        how_to(case, route, options, backend),
    )


@given(
    made=CASES,
    softcap=st.sampled_from((None, 7.0)),
    temperature=st.sampled_from((1.0, 0.6)),
    entropy=st.booleans(),
    route=ROUTES,
)
@some
def test_log_probs(backend, made, softcap, temperature, entropy, route):
    case = replace(make_case(made), token_weights=None)

    def call(op, **how):
        def run(h, W, t, Wt, *, student_bias=None, teacher_bias=None, labels, **rest):
            results = op(
                h,
                W,
                labels,
                bias=student_bias,
                softcap=softcap,
                temperature=temperature,
                return_entropy=entropy,
                **rest,
                **how,
            )
            logprobs, entropies = results if entropy else (results, torch.zeros_like(results))
            return torch.stack([logprobs, entropies])

        return run

    how = how_to(case, route, {"reduction": "none"}, backend)
    if entropy and how["backward"] == "in_forward":
        how["backward"] = "auto"
    truth = evaluate(call(linear_logprobs_reference), case)
    if truth.loss.isfinite().all():
        assert_no_worse(evaluate(call(linear_logprobs, **how), case), truth, truth)
