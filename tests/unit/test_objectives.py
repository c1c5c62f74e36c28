"""Test policy terms, alone and mixed, against autograd through dense log-probs in float64."""

import math
from dataclasses import replace

import pytest
import torch

from opsd_kernels import TokenStats, linear_logprobs, weights
from opsd_kernels._core import loop
from opsd_kernels.objectives import (
    Mix,
    OnPolicyDistillation,
    PolicyGradient,
    PPOClip,
    group_advantages,
    linear_policy_divergence,
)
from opsd_kernels.testing import Outcome, assert_no_worse, assert_on_target, evaluate, hard_case
from opsd_kernels.testing.reference import linear_divergence_reference

B, T, V, H = 4, 7, 211, 24
GEN = torch.Generator().manual_seed(2)
ADVANTAGES = torch.randn(B, 1, generator=GEN, dtype=torch.float64)
OLD = -6 * torch.rand(B, T, generator=GEN, dtype=torch.float64)
TERMS = {
    "reinforce": PolicyGradient(ADVANTAGES),
    "grpo, on policy": PPOClip(ADVANTAGES),
    "grpo": PPOClip(ADVANTAGES, OLD, high=0.3),
    "dual clip": PPOClip(ADVANTAGES, OLD, dual_clip=1.4),
    "gspo, on policy": PPOClip(ADVANTAGES, per_sequence=True),
    "gspo": PPOClip(ADVANTAGES, OLD / 4 - 3, low=0.9, high=0.9, per_sequence=True),
    "k1": OnPolicyDistillation(),
    "k1, clipped": OnPolicyDistillation(clip=0.5),
    "top-d": OnPolicyDistillation("proximal", strength=0.7),
    "power": OnPolicyDistillation("power", strength=0.5),
    "iw-opd": OnPolicyDistillation(weights=weights.PrefixDiscrepancy(0.5)),
    "iw-opd, old": OnPolicyDistillation(weights=weights.PrefixDiscrepancy(0.5), old_logprobs=OLD),
    "first third": OnPolicyDistillation(weights=weights.FirstFraction(0.3)),
    "a mix": Mix(
        ((0.3, PPOClip(ADVANTAGES, OLD, per_sequence=True)), (ADVANTAGES.abs(), OnPolicyDistillation()))
    ),
}


def reference(term, share):
    """Compute the mix by autograd through dense logits, in the signature of the op."""

    def run(
        h, W, t, Wt, *, labels, mask, student_bias=None, teacher_bias=None, token_weights=None, **options
    ):
        heads = {"student_bias": student_bias, "teacher_bias": teacher_bias}
        loss, stats = linear_divergence_reference(
            h,
            W,
            t,
            Wt,
            labels=labels,
            mask=mask,
            token_weights=token_weights,
            return_stats=True,
            **heads,
            **options,
        )
        valid = mask & (labels != -100)
        safe = torch.where(valid[..., None], h, 0.0)
        logits = safe @ W.T if student_bias is None else safe @ W.T + student_bias
        logprob = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        seen = TokenStats(**{name: value.detach() for name, value in stats.items()})
        policy = torch.where(valid, term(logprob, seen, valid), 0.0)
        return (1 - share) * loss + share * policy.sum() / valid.sum()

    return run


def mix(term, share, **how):
    return lambda *heads, **options: linear_policy_divergence(
        *heads, policy=term, policy_weight=share, **options, **how
    )


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_mix_is_the_sum_of_its_parts(backend, term, share, dtype):
    for frozen in (True, False):
        case = hard_case(B * T, V, H, dtype, batch=B, largest_logit=8.0, frozen_head=frozen)
        truth = evaluate(reference(TERMS[term], share), case.double(), divergence="jsd")
        plain = evaluate(reference(TERMS[term], share), case, divergence="jsd")
        for rows in (5, 100):
            how = {"backend": backend, "workspace_bytes": rows * 2 * V * 2 * dtype.itemsize}
            assert_no_worse(
                evaluate(mix(TERMS[term], share, **how), case, divergence="jsd"),
                [plain, truth if dtype == torch.float64 else plain],
                truth,
            )


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "none"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_mix_on_a_support(backend, tail, side):
    case = hard_case(B * T, V, H, torch.float64, batch=B, largest_logit=8.0)
    options = {"topk": 6, "topk_tail": tail, "topk_support": side}
    for term in ("grpo", "k1"):
        truth = evaluate(reference(TERMS[term], 0.4), case, **options)
        assert_no_worse(
            evaluate(mix(TERMS[term], 0.4, backend=backend, workspace_bytes=40_000), case, **options),
            truth,
            truth,
        )


def test_weights_of_the_divergence_and_a_policy_from_statistics(backend):
    case = hard_case(B * T, V, H, torch.float64, batch=B, largest_logit=8.0)
    options = {"token_weights": weights.MeanOne(weights.TrustGate(0.1) * weights.LinearDecay(0.2))}
    truth = evaluate(reference(TERMS["grpo"], 0.4), case, **options)
    for budget in (10_000, 40_000, 10**7):
        assert_no_worse(
            evaluate(mix(TERMS["grpo"], 0.4, backend=backend, workspace_bytes=budget), case, **options),
            truth,
            truth,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs(backend, dtype):
    case = hard_case(B * T, V, H, dtype, batch=B, largest_logit=8.0)
    for term in ("grpo, on policy", "k1"):
        truth = evaluate(reference(TERMS[term], 0.5), case.double())
        assert_on_target(evaluate(mix(TERMS[term], 0.5, backend=backend), case), truth, "fp32_logits")


@pytest.mark.parametrize("size", [1e-7, 1e4])
def test_fp16_holds_for_factors_of_any_size(backend, size):
    case = replace(hard_case(B * T, V, H, torch.float16, batch=B, largest_logit=8.0), upstream=1 / size)
    case = replace(case, token_weights=None)
    options = {"token_weights": size * weights.TrustGate(0.2) * weights.LinearDecay(0.5)}
    share = min(size, 0.5)
    truth = evaluate(reference(TERMS["k1"], share), case.double(), **options)
    ours = evaluate(mix(TERMS["k1"], share, backend=backend), case, **options)
    assert_on_target(ours, truth, "fp32_logits")


def test_a_policy_reads_the_whole_row_beside_packed_weights(backend):
    """Chunks end with the packed sequences only if the policy term needs no more than those."""
    case = hard_case(B * T, V, H, torch.float64, batch=1, largest_logit=8.0)
    flat = [x.reshape(1, -1) for x in (ADVANTAGES.expand(B, T), OLD)]
    term = PPOClip(*flat, low=0.9, high=0.9, per_sequence=True)
    for inner in (weights.FirstFraction(0.5), weights.PrefixDiscrepancy(0.5, of="divergence")):
        options = {"token_weights": weights.PackedSequences(inner, (T,) * B)}
        truth = evaluate(reference(term, 0.4), case, **options)
        for budget in (70_000, 10**7):
            ours = evaluate(mix(term, 0.4, backend=backend, workspace_bytes=budget), case, **options)
            assert_no_worse(ours, truth, truth)


def test_a_mix_costs_no_gemm(backend, monkeypatch):
    calls = []
    for name in ("project", "accumulate_weight_grad"):
        inner = getattr(loop, name)
        monkeypatch.setattr(
            loop, name, lambda *args, inner=inner, name=name: (calls.append(name), inner(*args))
        )
    case = hard_case(B * T, V, H, torch.float32, batch=B, largest_logit=8.0)
    evaluate(
        lambda *h, **o: linear_policy_divergence(
            *h, policy=PPOClip(ADVANTAGES), policy_weight=0.0, **o, backend=backend
        ),
        case,
    )
    without, calls[:] = list(calls), []
    for term in ("grpo", "k1", "reinforce"):
        evaluate(mix(TERMS[term], 0.5, backend=backend), case)
        assert calls == without, term
        calls.clear()


def test_terms_on_log_probs_alone(backend):
    """Without a teacher the GRPO gradient is that of a mix with policy_weight 1."""
    case = hard_case(B * T, V, H, torch.float64, batch=B, largest_logit=8.0)
    valid = case.mask & (case.labels != -100)

    def alone(h, W, t, Wt, *, labels, mask, student_bias, teacher_bias, token_weights):
        logprob = linear_logprobs(h, W, labels, bias=student_bias, mask=mask, backend=backend)
        return TERMS["grpo"](logprob, None, valid)[valid].mean()

    mixed = evaluate(mix(TERMS["grpo"], 1.0, backend=backend), case)
    assert_no_worse(evaluate(alone, case), mixed, mixed)


def test_rewards_are_bounded_and_meet_in_their_limits():
    gen = torch.Generator().manual_seed(5)
    student, teacher = (
        -8 * torch.rand(100, generator=gen, dtype=torch.float64),
        -8 * torch.rand(100, generator=gen, dtype=torch.float64),
    )
    teacher[0] = -math.inf
    proximal = OnPolicyDistillation("proximal", strength=0.7).rewards(student, teacher)
    assert (proximal >= math.log1p(-0.7)).all() and proximal.isfinite().all()
    power = OnPolicyDistillation("power", strength=0.5).rewards(student, teacher)
    assert (power.abs() <= 2).all() and (power.sign() == (teacher - student).sign()).all()
    exact = OnPolicyDistillation().rewards(student[1:], teacher[1:])
    nearly = OnPolicyDistillation("power", strength=1e-6).rewards(student[1:], teacher[1:])
    assert_on_target(Outcome(nearly), Outcome(exact), "loss")
    assert OnPolicyDistillation(clip=0.5).rewards(student, teacher).abs().max() == 0.5


def test_group_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert group_advantages(rewards).tolist() == [[0.5, -0.5, -0.5, 0.5], [0.0] * 4]
    assert group_advantages(rewards, normalize_std=True).tolist() == [[1.0, -1.0, -1.0, 1.0], [0.0] * 4]


def test_missing_rewards_and_other_dtypes():
    """A missing reward gets 0, and the others their advantages without it, in both forms."""
    rewards = torch.tensor([[1.0, math.nan, 0.0], [math.nan] * 3, [math.inf, 3.0, 3.0], [0.1] * 3])
    expected = [[0.5, 0.0, -0.5], [0.0] * 3, [0.0] * 3, [0.0] * 3]
    assert group_advantages(rewards).tolist() == expected
    assert group_advantages(rewards, normalize_std=True).tolist() == [[1.0, 0.0, -1.0], *expected[1:]]
    for dtype in (torch.int64, torch.uint8, torch.bool):
        whole = torch.tensor([1, 0, 0, 1], dtype=dtype)
        assert group_advantages(whole).tolist() == [0.5, -0.5, -0.5, 0.5]
    assert group_advantages(torch.empty(2, 0)).shape == (2, 0)


FAR = torch.full((B, T), -200.0)
EXTREME = {
    # term, and whether its losses are 0
    "no advantage, ratio e^190": (PPOClip(torch.zeros(B, 1), FAR), True),
    "no advantage, per sequence": (PPOClip(torch.zeros(B, 1), FAR, per_sequence=True), True),
    "no advantage, infinite ratio": (PPOClip(torch.zeros(B, 1), FAR * math.inf), True),
    "negative advantage, ratio e^190": (PPOClip(-torch.ones(B, 1), FAR), False),
    "negative advantage, infinite ratio": (
        PPOClip(-torch.ones(B, 1), FAR * math.inf, per_sequence=True),
        False,
    ),
    "ratio 0": (PPOClip(torch.ones(B, 1), -FAR * math.inf), False),
    "share 0 of a large ratio": (Mix(((0.0, PPOClip(-torch.ones(B, 1), FAR)),)), True),
    "weight 0 of an infinite reward": (
        OnPolicyDistillation(old_logprobs=FAR * math.inf, weights=0.0 * weights.LinearDecay(1.0)),
        True,
    ),
}


@pytest.mark.parametrize("extreme", EXTREME)
def test_extreme_ratios_are_finite(backend, extreme):
    """Losses and gradients, in a mix and on log-probs alone; nothing is 0 * inf."""
    term, nothing = EXTREME[extreme]
    case = hard_case(B * T, V, H, torch.float32, batch=B, largest_logit=8.0)
    outcome = evaluate(mix(term, 1.0, backend=backend), case)
    for name, value in outcome.named():
        assert value.isfinite().all(), name
        assert not nothing or (value == 0).all(), name


@pytest.mark.parametrize("term", [term for term in TERMS if not term.endswith("old")])
def test_invalid_tokens_reach_no_policy_gradient(term):
    """NaN in the log-probs, advantages and old log-probs of invalid tokens changes no bit of the others."""
    valid = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.6
    valid[:, 0] = True

    def spoilt(value):
        if isinstance(value, torch.Tensor):
            return torch.where(valid, value.expand(B, T), math.nan)
        return value

    def changed(part):
        if isinstance(part, Mix):
            return Mix(tuple((spoilt(share), changed(inner)) for share, inner in part.parts))
        fields = {name: spoilt(value) for name, value in vars(part).items() if name != "weights"}
        return replace(part, **fields)

    results = []
    for used, fill in ((TERMS[term], 0.0), (changed(TERMS[term]), math.nan)):
        logprob = torch.where(valid, OLD.roll(1, 0), fill).requires_grad_()
        stats = TokenStats(*[torch.where(valid, OLD.roll(2, 0), fill)] * 9)
        losses = used(logprob, replace(stats, student_logprob=logprob.detach()), valid)
        (slope,) = torch.autograd.grad(losses.sum(), logprob)
        results.append((losses.detach(), slope))
    for plain, dirty in zip(*results, strict=True):
        assert torch.equal(plain, dirty) and (dirty[~valid] == 0).all()


def test_a_share_of_zero_of_an_infinite_loss(backend):
    case = hard_case(B * T, V, H, torch.float32, batch=B, largest_logit=8.0)
    infinite = OnPolicyDistillation(old_logprobs=FAR * math.inf)
    outcome = evaluate(mix(infinite, 0.0, backend=backend), case)
    assert all(value.isfinite().all() for _, value in outcome.named())


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"policy": lambda *a: 0}, TypeError, "policy: expected a policy term"),
        ({"policy_weight": 1.5}, ValueError, "policy_weight: expected a number in .0, 1., got 1.5"),
        ({"reduction": "none"}, ValueError, "reduction: expected 'mean', 'sum' or 'sequence_mean'"),
        ({"backward": "recompute"}, ValueError, "backward: expected 'auto' or 'in_forward'"),
        ({"labels": None}, TypeError, "labels: expected a tensor, the sampled tokens, got NoneType"),
    ],
    ids=["policy", "policy_weight", "reduction", "backward", "labels"],
)
def test_errors_name_the_argument(changes, error, message):
    case = hard_case(4, 11, 3)
    with pytest.raises(error, match=message):
        linear_policy_divergence(
            *case.inputs(), **{**case.options(), "policy": PPOClip(torch.ones(4)), **changes}
        )


class Own:
    """A policy term of a user."""

    def __init__(self, losses, scope="row"):
        self.losses, self.scope = losses, scope

    def __call__(self, logprob, stats, mask):
        return self.losses(logprob)


@pytest.mark.parametrize(
    "term, error, message",
    [
        (Own(lambda x: -x, "token"), ValueError, "policy.scope: expected one of .*got 'token'"),
        (Own(lambda x: -x.sum()), ValueError, r"policy: .*returns shape \(1, 4\), got \(\)"),
        (Own(lambda x: [-x]), TypeError, "policy: .*returns a tensor, got list"),
        (Own(lambda x: (x < 0).long()), TypeError, "policy: .*floating-point numbers, got torch.int64"),
        (Own(torch.zeros_like), ValueError, "policy: .*depend on the log-probs.*losses without a gradient"),
    ],
    ids=["scope", "shape", "list", "integers", "constant"],
)
def test_a_term_of_a_user_is_checked(term, error, message):
    case = hard_case(4, 11, 3)
    with pytest.raises(error, match=message):
        evaluate(mix(term, 0.5), case)


def test_terms_refuse_what_they_cannot_be():
    for options, message in (
        ({"reward": "k2"}, "reward"),
        ({"reward": "proximal", "strength": 1.0}, "strength"),
        ({"clip": 0.0}, "clip"),
    ):
        with pytest.raises(ValueError, match=message):
            OnPolicyDistillation(**options)
    with pytest.raises(ValueError, match="low"):
        PPOClip(ADVANTAGES, low=-1)
