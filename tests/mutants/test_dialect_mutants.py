"""Plant bugs in clips, supports, weights from statistics, policy terms and log-probs (see planting.py)."""

import math
from dataclasses import replace

import pytest
import torch
from planting import Mutant, arguments, check, kill, result
from teacher_cases import outcome as outcome_of_several
from teacher_cases import several_case

from opsd_kernels import (
    cache_forward_kl,
    divergence,
    linear_cached_forward_kl,
    linear_divergence,
    linear_divergence_to,
    linear_logprobs,
    linear_logprobs_at,
    linear_topk_divergence,
    objectives,
    weights,
)
from opsd_kernels import cached as cached_ops
from opsd_kernels._core import autograd, library, loop, problem, reductions, teachers, topk_support
from opsd_kernels._core import listed as listed_ops
from opsd_kernels._rows import contract, torch_math, torch_rows
from opsd_kernels.spec import LogitTransform
from opsd_kernels.testing import assert_no_worse, evaluate, hard_case
from opsd_kernels.testing.reference import (
    linear_divergence_reference,
    linear_logprobs_reference,
    linear_topk_divergence_reference,
)
from opsd_kernels.testing.reference_lists import linear_logprobs_at_reference
from opsd_kernels.testing.reference_rows import (
    linear_divergence_by_index_reference,
    linear_divergence_to_reference,
)

B, T, V, H = 4, 6, 61, 12
GEN = torch.Generator().manual_seed(3)
OLD = -4 * torch.rand(B, T, generator=GEN, dtype=torch.float64)
ADVANTAGES = torch.randn(B, 1, generator=GEN, dtype=torch.float64)
HOW = {"backend": "torch", "workspace_bytes": 24_500}


def made(**case):
    return hard_case(B * T, V, H, torch.float64, batch=B, largest_logit=8.0, seed=4, **case)


def dialect(case=None, rows=24_500, **options):
    """Check a call against the reference in float64, in chunks of one or two sequences."""
    case = made(**(case or {}))
    case = replace(case, token_weights=None) if "token_weights" in options else case
    options = {"divergence": "reverse_kl", "reduction": "sum", **options}
    truth = evaluate(linear_divergence_reference, case, **options)
    assert_no_worse(
        evaluate(linear_divergence, case, **options, **{**HOW, "workspace_bytes": rows}), truth, truth
    )


def listed(**options):
    """Check a teacher of five entries per token, some of them padding."""
    case = made()
    ids = torch.rand(B, T, V, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :5]
    logprobs = torch.linspace(-0.8, -4, 5, dtype=torch.float64).expand(B, T, 5).clone()
    logprobs[:, ::2, [0, 4]] = -math.inf

    def run(op, **how):
        return lambda h, W, t, Wt, teacher_bias=None, **rest: op(
            h, W, ids, logprobs, **rest, **options, **how
        )

    truth = evaluate(run(linear_topk_divergence_reference), case)
    assert_no_worse(evaluate(run(linear_topk_divergence, **HOW), case), truth, truth)


def little_outside():
    """Check fp32 buckets whose mass is down to 1e-6, by the bound of float64."""
    case = hard_case(30, 203, 24, largest_logit=20.0, widths=(1.0, 0.8), views=False)
    case, told = replace(case, token_weights=None), {"topk": 20, "divergence": "forward_kl"}
    truth = evaluate(linear_divergence_reference, case.double(), **told)
    assert_no_worse(evaluate(linear_divergence, case, **told, backend="torch"), truth, truth)


def log_probs(frozen=False, entropy=True):
    case = made(frozen_head=frozen)

    def run(op, **how):
        def both(h, W, t, Wt, *, labels, mask, student_bias=None, **rest):
            made = op(h, W, labels, mask=mask, bias=student_bias, return_entropy=entropy, **how)
            return made[0] + 0.7 * made[1] if entropy else made

        return both

    truth = evaluate(run(linear_logprobs_reference), case)
    assert_no_worse(evaluate(run(linear_logprobs, **HOW), case), truth, truth)


def mix(policy, **options):
    """Check the mix against the sum of its parts, both by dense references."""
    case = replace(made(), token_weights=None)
    valid = case.mask & (case.labels != -100)

    def whole(h, W, t, Wt, **rest):
        return objectives.linear_policy_divergence(
            h, W, t, Wt, policy=policy, policy_weight=0.4, **rest, **options, **HOW
        )

    def parts(h, W, t, Wt, *, labels, mask, student_bias, **rest):
        given = {"labels": labels, "mask": mask, "student_bias": student_bias, **rest, **options}
        loss, stats = linear_divergence_reference(h, W, t, Wt, **given, return_stats=True)
        logprob = linear_logprobs_reference(h, W, labels, mask=mask, bias=student_bias)
        seen = type("Stats", (), {name: value.detach() for name, value in stats.items()})
        return 0.6 * loss + 0.4 * torch.where(valid, policy(logprob, seen, valid), 0.0).sum() / valid.sum()

    truth = evaluate(parts, case)
    assert_no_worse(evaluate(whole, case), truth, truth)


def by_index(packed=False, **options):
    """Check several teachers, each token with its own."""
    several = several_case(B * T, V, H, torch.float64, packed=packed, largest_logit=8.0, batch=B)
    truth = outcome_of_several(linear_divergence_by_index_reference, several, **options)
    found = outcome_of_several(linear_divergence, several, **options, **HOW)
    for name, exact in truth.items():
        assert_no_worse(found[name], exact, exact)


def at_ids():
    """Check log-probs at ids, of which some are -1 and some come twice."""
    case = made()
    ids = torch.randint(-1, V, (B, T, 6), generator=torch.Generator().manual_seed(0))
    ids[..., 5] = ids[..., 4]

    def run(op, **how):
        def at(h, W, t, Wt, *, labels, mask, student_bias=None, **rest):
            return op(h, W, ids, bias=student_bias, mask=mask & (labels != -100), **how)

        return at

    truth = evaluate(run(linear_logprobs_at_reference), case)
    assert_no_worse(evaluate(run(linear_logprobs_at, **HOW), case), truth, truth)


def cached():
    """Check the forward KL to a cached teacher."""
    case = replace(made(frozen_head=True), token_weights=None)

    def through(h, W, t, Wt, *, labels, mask, student_bias, teacher_bias):
        shared = {"student_bias": student_bias, "mask": mask & (labels != -100), **HOW}
        cache = cache_forward_kl(t, Wt, W, teacher_bias=teacher_bias, **shared)
        return linear_cached_forward_kl(h, W, cache, **shared)

    truth = evaluate(linear_divergence_reference, case, divergence="forward_kl")
    assert_no_worse(evaluate(through, case), truth, truth)


def to_rows(**options):
    """Check a teacher given as probabilities."""
    case = replace(made(), token_weights=None)
    rows = torch.randn(B, T, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)

    def run(op, **how):
        return lambda h, W, t, Wt, teacher_bias=None, **rest: op(
            h, W, rows, target_is="probs", **rest, **options, **how
        )

    truth = evaluate(run(linear_divergence_to_reference), case)
    assert_no_worse(evaluate(run(linear_divergence_to, **HOW), case), truth, truth)


def planned_apart():
    """Check a sequence that does not fit a chunk."""
    dialect(rows=4_000, token_weights=weights.PrefixDiscrepancy(0.5))


ROW, SEQUENCE = weights.ImportanceRatio(OLD), weights.PrefixDiscrepancy(0.5)
PPO = objectives.PPOClip(ADVANTAGES, OLD)
PER_TOKEN = 0.6 + torch.rand(B, T, generator=GEN, dtype=torch.float64)


def field_zero(*names):
    return lambda made, *_: made._replace(**{name: torch.zeros_like(getattr(made, name)) for name in names})


MUTANTS = {
    "clip keeps its gradient": Mutant(
        torch_rows,
        "terms",
        lambda f: (
            lambda q, p, d, spec: (
                f(q, p, d, spec)[0],
                torch_math.entry(spec.divergence, q, p, d)[1],
                f(q, p, d, spec)[2],
            )
        ),
        check(dialect, entry_clip=0.01, divergence="jsd"),
    ),
    "reverse KL's clipped u is 0": Mutant(
        torch_rows,
        "clipped_u",
        lambda _: lambda divergence, q: torch.zeros_like(q),
        check(dialect, entry_clip=0.01),
    ),
    "a clipped token keeps its gradient": Mutant(
        contract,
        "clip_tokens",
        lambda f: lambda loss, stats, spec: torch.where(loss > spec.token_clip, spec.token_clip, loss),
        check(dialect, token_clip=1.0),
    ),
    "the token clip does not clip": Mutant(
        contract,
        "clip_tokens",
        lambda f: lambda loss, stats, spec: (f(loss, stats, spec), loss)[1],
        check(dialect, token_clip=1.0),
    ),
    "the mix is the other way round": Mutant(
        torch_rows,
        "logits",
        arguments(lambda S, T, spec, *b: (S, T, replace(spec, teacher_mix=1 - spec.teacher_mix), *b)),
        check(dialect, teacher_mix=0.3),
    ),
    "the largest of the other side": Mutant(
        topk_support,
        "_largest",
        arguments(lambda rows, spec, s: (rows, spec, replace(s, side="teacher"))),
        check(dialect, topk=4),
    ),
    "no gradient outside the support": Mutant(
        topk_support, "restricted", result(field_zero("outside")), check(dialect, topk=4, topk_tail="none")
    ),
    "no gradient through the bucket": Mutant(
        topk_support,
        "restricted",
        result(lambda r, *_: r._replace(outside=-r.A)),
        check(dialect, topk=4, topk_tail="bucket", divergence="jsd"),
    ),
    "the bucket's mass is the support's": Mutant(
        topk_support,
        "_bucket",
        arguments(lambda q, p, excess, rest: (1 - q, 1 - p, excess, None)),
        check(dialect, topk=4, topk_tail="bucket"),
    ),
    "the bucket's mass is 1 minus the support's": Mutant(
        topk_support, "without_support", lambda _: lambda *_: None, check(little_outside)
    ),
    "the support's logits stay where it was": Mutant(
        topk_support,
        "write_entries_",
        lambda write: (
            lambda G, columns, values: None if values.isneginf().any() else write(G, columns, values)
        ),
        check(dialect, topk=4, topk_tail="bucket"),
    ),
    "tails not renormalised": Mutant(
        topk_support,
        "_log_ratio",
        lambda _: lambda excess, p, q: torch.zeros_like(p),
        check(dialect, topk=4, topk_tail="renormalize"),
    ),
    "padding counts": Mutant(
        topk_support,
        "entries",
        result(lambda e, *_: e._replace(live=torch.ones_like(e.live))),
        check(listed, tail="none", divergence="jsd"),
    ),
    "padding overwrites an entry": Mutant(
        topk_support,
        "_first",
        lambda _: lambda found, values, otherwise: otherwise,
        check(listed, tail="bucket"),
    ),
    "weights one token late": Mutant(
        reductions, "check_weights", result(lambda w, *_: w.roll(1, -1)), check(dialect, token_weights=ROW)
    ),
    "the gradient is not weighted": Mutant(
        loop,
        "fused",
        result(lambda r, *_: None if r is None else torch.ones_like(r)),
        check(dialect, token_weights=ROW),
    ),
    "the head's gradient is not weighted": Mutant(
        loop,
        "accumulate_weight_grad",
        arguments(lambda G, h, dW, first: (G, h / h.norm(dim=1, keepdim=True), dW, first)),
        check(dialect, token_weights=ROW),
    ),
    "the bias's gradient is not weighted": Mutant(
        torch_rows, "weighted_sum", lambda _: lambda G, scale: G.sum(0), check(dialect, token_weights=ROW)
    ),
    "chunks cut sequences": Mutant(
        library,
        "align",
        lambda _: (
            lambda lengths, rows: [slice(i, min(i + 4, sum(lengths))) for i in range(0, sum(lengths), 4)]
        ),
        check(dialect, token_weights=SEQUENCE),
    ),
    "the aligned chunks lose the last sequence": Mutant(
        library, "align", result(lambda bounds, *_: bounds[:-1]), check(dialect, token_weights=SEQUENCE)
    ),
    "the pass of its own sees half": Mutant(
        reductions.RowWeigher, "factor", result(lambda f, *_: f * 0.5), check(planned_apart)
    ),
    "a policy without its label": Mutant(
        torch_rows,
        "row_grad_",
        lambda f: (
            lambda *args: f(*args[:-1], torch.full_like(args[-1], -1)) if args[-1] is not None else f(*args)
        ),
        check(mix, objectives.PolicyGradient(ADVANTAGES)),
    ),
    "a policy of the wrong sign": Mutant(
        reductions.RowWeigher, "policy_losses", result(lambda r, *_: (r[0], -r[1])), check(mix, PPO)
    ),
    "a policy's value forgotten": Mutant(
        reductions.RowWeigher, "policy_losses", result(lambda r, *_: (0 * r[0], r[1])), check(mix, PPO)
    ),
    "a policy on a support without its label": Mutant(
        topk_support,
        "_values",
        lambda f: lambda *args: f(*args[:-1], torch.full_like(args[-1], 0) if args[-1] is not None else None),
        check(mix, PPO, topk=5),
    ),
    "old log-probs ignored": Mutant(objectives.PPOClip, "scope", lambda _: "index", check(mix, PPO)),
    "each token has the next one's teacher": Mutant(
        teachers,
        "_combined",
        arguments(lambda parts, index: (parts, (index + 1) % 3)),
        check(by_index),
    ),
    "the teachers' scales in reverse": Mutant(
        teachers,
        "Teachers",
        arguments(lambda index, sides, scales, caps: (index, sides, scales[::-1], caps)),
        check(by_index),
    ),
    "packed rows one place late": Mutant(
        teachers,
        "one_of",
        arguments(lambda p, k, place: (p, k, place if place is None else (place - 1).clamp(min=0))),
        check(by_index, packed=True),
    ),
    "log-probs at ids are off by a thousandth": Mutant(
        listed_ops, "_log_q", result(lambda r, *_: r.nan_to_num() + 1e-3), check(at_ids)
    ),
    "an id that comes twice counts once": Mutant(
        listed_ops, "sums_of_equal", lambda _: lambda columns, values: values, check(at_ids)
    ),
    "the cached entropy's sign": Mutant(
        cached_ops,
        "forward_kl_parts",
        result(lambda r, *_: replace(r, negative_entropy=-r.negative_entropy)),
        check(cached),
    ),
    "the cached mean of another token": Mutant(
        cached_ops,
        "forward_kl_parts",
        result(lambda r, *_: replace(r, mean=r.mean.roll(1, 0))),
        check(cached),
    ),
    "the cached bias forgotten": Mutant(
        cached_ops,
        "forward_kl_parts",
        result(lambda r, *_: replace(r, bias=torch.zeros_like(r.bias))),
        check(cached),
    ),
    "probabilities taken for logits": Mutant(
        problem,
        "check_target",
        result(lambda r, *_: replace(r, probs=False)),
        check(to_rows),
    ),
    "a target's temperature is the student's": Mutant(
        divergence,
        "RowSpec",
        arguments(lambda d, s, t: (d, s, replace(t, temperature=s.temperature))),
        check(to_rows, temperature=0.6),
    ),
    "temperatures of the tokens on the other side": Mutant(
        divergence,
        "RowSpec",
        arguments(
            lambda d, s, t: (d, replace(s, temperature=t.temperature), replace(t, temperature=s.temperature))
        ),
        check(dialect, temperature=PER_TOKEN, teacher_temperature=1.3),
    ),
    "temperatures one token late": Mutant(
        LogitTransform,
        "of_tokens",
        result(lambda r, *_: replace(r, temperature=r.temperature.roll(1, 0))),
        check(dialect, temperature=PER_TOKEN, teacher_temperature=PER_TOKEN),
    ),
    "the entropy's gradient forgotten": Mutant(
        autograd,
        "_project_again",
        arguments(lambda ctx, factor, slope: (ctx, torch.zeros_like(factor), slope)),
        check(log_probs),
    ),
    "a log-prob's dh not scaled": Mutant(
        autograd,
        "_scaled",
        lambda _: lambda grad, scale, dtype: -grad.to(dtype),
        check(log_probs, frozen=True, entropy=False),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_killed(monkeypatch, name):
    kill(MUTANTS[name], monkeypatch)
