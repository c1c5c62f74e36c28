"""Plant bugs, each of which must be killed by the quick check named with it.

The check passes without the bug, so it can fail, and for the right reason. The bugs are planted in the torch
backend, the loop and the reductions; tests/unit and tests/interp run the same checks on the other backends.
"""

from dataclasses import replace

import pytest
import torch
from planting import Mutant, arguments, check, kill, result

from opsd_kernels import divergence, linear_divergence
from opsd_kernels._core import autograd, centre, late_gradients, loop, problem, reductions
from opsd_kernels._rows import torch_math, torch_rows
from opsd_kernels._rows.contract import Column
from opsd_kernels.spec import Divergence, Kind
from opsd_kernels.testing import (
    LOGSUMEXP_NATS,
    assert_invariant,
    assert_no_growth,
    assert_no_worse,
    assert_on_target,
    assert_same_bits,
    evaluate,
    hard_case,
    plain_outcomes,
)
from opsd_kernels.testing.reference import linear_divergence_reference

# ---------------------------------------------------------------- quick checks


def against_truth(divergence="jsd", made=None, **options):
    """Check a hard case in fp32, in several chunks."""
    case = hard_case(29, 211, 24, seed=1, **(made or {}))
    options = {"divergence": divergence, "beta": 0.3, "reduction": "mean", **options}
    truth, plain = (
        evaluate(linear_divergence_reference, case.double(), **options),
        plain_outcomes(case, **options),
    )
    assert_no_worse(
        evaluate(linear_divergence, case, **options, backend="torch", workspace_bytes=20_000), plain, truth
    )


def near_bf16(target="default", **options):
    case = hard_case(
        64,
        1003,
        48,
        torch.bfloat16,
        shared_head=True,
        near=1e-3,
        largest_logit=16.0,
        widths=(1.0,),
        bias=False,
    )
    truth = evaluate(linear_divergence_reference, case.double())
    assert_on_target(evaluate(linear_divergence, case, backend="torch", **options), truth, target)


def offset_bf16():
    case = hard_case(
        48, 1003, 48, torch.bfloat16, shared_head=True, near=1e-2, widths=(0.3,), bias=False, views=False
    )
    assert_invariant(linear_divergence, replace(case, token_weights=None), backend="torch")


def statistics_bf16():
    """Check many tokens whose two largest logits lie close, in bf16."""
    case = hard_case(2000, 1003, 16, torch.bfloat16, shared_head=True, near=1e-2, widths=(0.5,), bias=False)
    case = replace(case, trainable=())
    ours = evaluate(linear_divergence, case, return_stats=True, backend="torch").stats
    truth = evaluate(linear_divergence_reference, case.double(), return_stats=True).stats
    assert_same_bits(ours.top1_agreement.double(), truth["top1_agreement"])
    assert_same_bits(ours.label_is_top1.double(), truth["label_is_top1"])
    for name in ("student_logsumexp", "teacher_logsumexp"):
        assert (getattr(ours, name) - truth[name]).abs().max() <= LOGSUMEXP_NATS, name


def near_fp32(divergence):
    case = hard_case(48, 1003, 48, torch.float32, shared_head=True, near=1e-4, largest_logit=8.0, bias=False)
    truth, plain = (
        evaluate(linear_divergence_reference, case.double(), divergence=divergence),
        plain_outcomes(case, divergence=divergence),
    )
    assert_no_worse(evaluate(linear_divergence, case, divergence=divergence, backend="torch"), plain, truth)


def many_chunks():
    case = hard_case(1023, 97, 16, torch.bfloat16, shared_head=True, largest_logit=6.0)
    truth = evaluate(linear_divergence_reference, case.double(), reduction="sum")
    one, many = (
        evaluate(linear_divergence, case, reduction="sum", backend="torch", workspace_bytes=size)
        for size in (1 << 26, 8_000)
    )
    assert_no_growth(many, one, truth)


def statistics():
    case = hard_case(29, 211, 24)
    truth, plain = (
        evaluate(linear_divergence_reference, c, return_stats=True).stats for c in (case.double(), case)
    )
    stats = evaluate(linear_divergence, case, return_stats=True, backend="torch").stats
    for name, exact in truth.items():
        assert_no_worse(getattr(stats, name), plain[name], exact)


def twice():
    live = hard_case(13, 67, 8).leaves()
    loss = linear_divergence(*live.inputs(), **live.options(), backend="torch")
    one, two = (
        torch.autograd.grad(
            loss, [live.student_hidden, live.student_weight], torch.tensor(3.0), retain_graph=True
        )
        for _ in range(2)
    )
    for first, second in zip(one, two, strict=True):
        assert_same_bits(first, second)


# ---------------------------------------------------------------- planted bugs


def only_u(transform):
    return result(lambda fu, q, p, delta, beta: (fu[0], transform(fu[1], q, p, delta, beta)))


def only_f(transform):
    return result(lambda fu, q, p, delta, beta: (transform(fu[0], q, p, delta, beta), fu[1]))


def bf16_accumulator(original):
    def mutant(G, hidden, dW, first):
        original(G, hidden, dW, first)
        dW.copy_(dW.bfloat16())

    return mutant


def one_normaliser(original):
    """Compute q as exp(s - lse) of rounded logits, with maximum and log-sum added first."""

    def mutant(logits, stats):
        q, p, delta = original(logits, stats)
        lse = (stats[:, Column.STUDENT_MAX] + stats[:, Column.STUDENT_LOGSUM])[:, None]
        return torch.exp(logits.s.bfloat16().float() - lse), p, delta

    return mutant


def pair_in_bf16(original):
    """Fill the difference buffer with the difference of two rounded logits."""

    def mutant(heads_hidden, weight, out, centre=None):
        original(heads_hidden, weight, out, centre)
        if centre is None:  # the small GEMM that finds a likely column
            return
        rows = heads_hidden.shape[0] // 2
        student, difference = (x.float() @ weight.float().T for x in heads_hidden.split(rows))
        rounded = (student + difference).to(out.dtype).float() - student.to(out.dtype).float()
        out[rows:] = rounded - centre[rows:, None]

    return mutant


def no_maximum(original):
    def mutant(logits):
        max_s, logsum_s, *rest = original(logits)
        return max_s, torch.log(torch.exp(logits.s).sum(-1, keepdim=True)) - max_s, *rest

    return mutant


def forget_tail(original):
    def mutant(S, T, factor, spec, bias_s, bias_t, metrics, G, *policy):
        V = S.shape[1] // 64 * 64
        cut = [None if b is None else b[:V] for b in (bias_s, bias_t)]
        G[:, V:] = 0
        return original(S[:, :V], T[:, :V], factor, spec, *cut, metrics, G[:, :V], *policy)

    return mutant


def last_chunk_lost(original):
    def mutant(problem, plan, backend, rows, *args, **kwargs):
        index = rows.index if rows.index is not None else torch.arange(plan.tokens)
        keep = (plan.tokens - 1) // plan.rows * plan.rows
        cut = replace(rows, index=index[:keep])
        return original(problem, replace(plan, tokens=keep), backend, cut, *args, **kwargs)

    return mutant


FLAT = {"bias": False, "masked_entry": None}
MUTANTS = {
    "A dropped from the gradient": Mutant(
        torch_rows,
        "row_dot",
        result(lambda r, *_: (r[0], torch.zeros_like(r[1]))),
        check(against_truth, "reverse_kl"),
    ),
    "A of forward KL is its value": Mutant(
        torch_rows, "plain_kl", result(lambda r, *_: (r[0], r[0])), check(against_truth, "forward_kl")
    ),
    "beta on the student": Mutant(
        torch_math.ENTRIES,
        Kind.JSD,
        arguments(lambda q, p, d, b: (q, p, d, 1 - b)),
        check(against_truth, "jsd"),
    ),
    "directions swapped": Mutant(
        torch_math.ENTRIES,
        Kind.SKEW_REVERSE_KL,
        lambda _: torch_math.skew_forward_kl,
        check(against_truth, "skew_reverse_kl"),
    ),
    "p / m forgotten": Mutant(
        torch_math.ENTRIES,
        Kind.SKEW_REVERSE_KL,
        only_u(lambda u, q, p, d, b: u - q * b / (b + (1 - b) * torch.exp(-d))),
        check(against_truth, "skew_reverse_kl"),
    ),
    "1 - beta forgotten": Mutant(
        torch_math.ENTRIES,
        Kind.SKEW_FORWARD_KL,
        only_u(lambda u, q, p, d, b: u / (1 - b)),
        check(against_truth, "skew_forward_kl"),
    ),
    "mixed KL weighs the other KL": Mutant(
        torch_rows,
        "plain_kl",
        lambda plain: (
            lambda stats, spec: plain(
                stats, replace(spec, divergence=Divergence(spec.divergence.kind, 1 - spec.divergence.beta))
            )
        ),
        check(against_truth, "mixed_kl", beta=0.2),
    ),
    "mixed KL forgets p in u": Mutant(
        torch_math.ENTRIES,
        Kind.MIXED_KL,
        only_u(lambda u, q, p, d, b: u + b * p),
        check(against_truth, "mixed_kl"),
    ),
    "mixed KL clipped as reverse KL": Mutant(
        Divergence,
        "omitted",
        lambda _: 1.0,
        check(against_truth, "mixed_kl", entry_clip=0.02),
    ),
    "TVD without its half": Mutant(
        torch_math.ENTRIES, Kind.TVD, only_f(lambda f, *_: 2 * f), check(against_truth, "tvd")
    ),
    "TVD gradient of the wrong sign": Mutant(
        torch_math.ENTRIES, Kind.TVD, only_u(lambda u, *_: -u), check(against_truth, "tvd")
    ),
    "1 / T missing in the gradient": Mutant(
        torch_rows,
        "transform_slope",
        result(lambda r, z, t, b: r * t.temperature),
        check(against_truth, "jsd", temperature=1.5),
    ),
    "logit scale missing in the gradient": Mutant(
        torch_rows,
        "transform_slope",
        result(lambda r, z, t, b: r / t.scale),
        check(against_truth, "jsd", student_logit_scale=1.2),
    ),
    "softcap's slope forgotten": Mutant(
        torch_rows,
        "transform_slope",
        lambda _: lambda z, t, b: t.factor,
        check(against_truth, "jsd", student_softcap=20.0),
    ),
    "softcap after the temperature": Mutant(
        torch_rows,
        "transform",
        lambda _: (
            lambda z, t, b: torch_math.transform(
                z, replace(t, scale=t.scale / t.temperature, temperature=1.0), b
            )
        ),
        check(against_truth, "jsd", FLAT, student_softcap=20.0, teacher_softcap=20.0, temperature=2.0),
    ),
    "teacher takes the student's temperature": Mutant(
        divergence,
        "RowSpec",
        arguments(lambda d, s, t: (d, s, replace(t, temperature=s.temperature))),
        check(against_truth, teacher_temperature=2.0),
    ),
    "T squared": Mutant(
        torch_rows,
        "row_dot",
        result(lambda r, *a: (r[0] * a[3].student.temperature ** 2, r[1])),
        check(against_truth, temperature=1.5),
    ),
    "row maximum not subtracted": Mutant(
        torch_rows,
        "_normalisers",
        no_maximum,
        check(against_truth, "reverse_kl", {**FLAT, "largest_logit": 95.0}),
    ),
    "vector tail dropped": Mutant(torch_rows, "row_fused_", forget_tail, check(against_truth, "jsd")),
    "last chunk dropped": Mutant(loop, "run", last_chunk_lost, check(against_truth, "jsd")),
    "probabilities from rounded logits": Mutant(
        torch_rows, "distributions", one_normaliser, check(against_truth, "jsd")
    ),
    "difference of two rounded logits": Mutant(loop, "project", pair_in_bf16, check(near_bf16)),
    "16-bit logits relative to nothing": Mutant(
        centre, "logits_at", result(lambda r, *_: torch.zeros_like(r)), check(offset_bf16)
    ),
    "argmax of 16-bit logits": Mutant(
        loop, "exact_argmax", lambda _: lambda *args: args[-1].clone(), check(statistics_bf16)
    ),
    "log-sum-exps relative to a constant": Mutant(
        late_gradients,
        "logsumexps",
        arguments(lambda stats, spec, _: (stats, spec, (None, None))),
        check(statistics_bf16),
    ),
    "the z-loss's slope without its 2": Mutant(
        late_gradients,
        "pull",
        result(lambda r, *_: (r[0], r[1] / 2, r[2])),
        check(against_truth, z_loss=0.03),
    ),
    "the z-loss's slope at a label": Mutant(
        late_gradients,
        "pull",
        result(lambda r, *_: (r[0], r[1], r[2] + 1)),
        check(against_truth, z_loss=0.03),
    ),
    "the z-loss without the weights of the tokens": Mutant(
        late_gradients,
        "pull",
        result(lambda r, *_: (r[0], r[1] / r[0].clamp(min=1e-9), r[2])),
        check(against_truth, z_loss=0.03),
    ),
    "the z-loss without its square": Mutant(
        autograd,
        "_with_z_loss",
        lambda _: lambda problem, D, logs: D + problem.spec.z_loss * logs[:, 2],
        check(against_truth, z_loss=0.03),
    ),
    "hidden difference in bf16 of fp32 inputs": Mutant(
        loop,
        "stack_difference",
        lambda f: lambda s, t, out: (f(s, t, out), out.copy_(out.bfloat16()))[0],
        check(near_fp32, "reverse_kl"),
    ),
    "dW accumulated in bf16": Mutant(loop, "accumulate_weight_grad", bf16_accumulator, check(many_chunks)),
    "dW of the last chunk only": Mutant(
        loop,
        "accumulate_weight_grad",
        arguments(lambda G, h, dW, first: (G, h, dW, True)),
        check(against_truth),
    ),
    "dW not cleared": Mutant(
        loop,
        "accumulate_weight_grad",
        arguments(lambda G, h, dW, first: (G, h, dW, False)),
        check(against_truth),
    ),
    "masked rows not skipped": Mutant(
        problem, "valid_tokens", result(lambda r, *_: (None, r[1].clamp(min=0))), check(against_truth)
    ),
    "labels do not mask": Mutant(
        problem,
        "valid_tokens",
        result(lambda r, h, labels, i, mask, *_: (mask, r[1].clamp(min=0))),
        check(against_truth),
    ),
    "masked rows counted": Mutant(
        reductions, "_share", lambda _: lambda n, hidden, valid: 1 / hidden.shape[0], check(against_truth)
    ),
    "weights in the denominator": Mutant(
        divergence, "row_scale", result(lambda r, *_: r * 0.93), check(against_truth)
    ),
    "weights applied twice": Mutant(
        reductions.RowWeigher, "_given_weights", result(lambda w, *_: w * w), check(against_truth)
    ),
    "weights forgotten": Mutant(
        reductions.RowWeigher,
        "_given_weights",
        result(lambda w, *_: (w != 0).to(w.dtype)),
        check(against_truth),
    ),
    "padded columns given probability": Mutant(
        problem,
        "vocabulary",
        lambda _: lambda V_s, V_t, size: min(V_s, V_t),
        check(against_truth, "jsd", {"padding": 4}),
    ),
    "teacher's bias is the student's": Mutant(
        torch_rows,
        "row_fused_",
        arguments(lambda S, T, f, sp, bs, bt, *rest: (S, T, f, sp, bs, bs, *rest)),
        check(against_truth),
    ),
    "guard by nothing": Mutant(
        torch_math,
        "_guard",
        lambda _: lambda probability, term: term,
        check(against_truth, "jsd", {"masked_entry": "both"}),
    ),
    "upstream gradient forgotten": Mutant(
        autograd, "_scaled", lambda _: lambda grad, scale, dtype: grad.to(dtype), check(against_truth)
    ),
    "upstream gradient in place": Mutant(
        autograd, "_scaled", lambda _: lambda grad, scale, dtype: grad.data.mul_(scale).clone(), check(twice)
    ),
    "entropy of the wrong side": Mutant(
        autograd,
        "token_stats",
        result(lambda s, *_: replace(s, student_entropy=s.teacher_entropy)),
        check(statistics),
    ),
    "label's log-prob of the wrong row": Mutant(
        torch_rows, "label_logprobs", result(lambda r, *_: r.roll(1, 0)), check(statistics)
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_killed(monkeypatch, name):
    kill(MUTANTS[name], monkeypatch)
