"""The methods: losses against dense logits, teachers, several updates on a batch, and accumulation."""

import copy
from dataclasses import replace

import pytest
import torch

from opsd_kernels import weights
from opsd_kernels.testing import assert_no_worse, assert_same_bits
from opsd_kernels.train import objective
from opsd_kernels.train import step as steps
from opsd_kernels.train.batch import advantages, make_batch
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.config.weight_text import TokenData, parse_weights
from opsd_kernels.train.contexts import build_contexts
from opsd_kernels.train.sampling.rollout import requests
from opsd_kernels.train.shared_prompts import hidden_states
from opsd_kernels.train.teacher import AdapterOff, Copy, Live, make_reference, make_teacher


@pytest.fixture
def rollouts(sampler, model, task):
    """Make rollouts of lengths from 1 to 4 with synthetic rewards, as random weights are never correct."""
    sampled = sampler.sample(
        model, task, requests([task.env(problem, 0).prompt() for problem in task.train[:4]], 4), 0
    )
    rewarded = [
        replace(r, verdict=replace(r.verdict, reward=float((7 * i) % 5) / 5)) for i, r in enumerate(sampled)
    ]
    return [
        replace(rollout, tokens=rollout.tokens[: 1 + index % 4]) for index, rollout in enumerate(rewarded)
    ]


@pytest.fixture
def batch(rollouts, encoder):
    """Make a batch in which half of the rollouts are distilled."""
    contexts = build_contexts(rollouts, TrainConfig(), 0)
    views = encoder.encode([rollout.prompt for rollout in rollouts], contexts)
    separators = frozenset({rollouts[3].tokens[1]})
    return make_batch(
        rollouts,
        [None if i % 2 else view for i, view in enumerate(views)],
        0,
        advantages=advantages(rollouts, False),
        separators=separators,
    )


@pytest.fixture
def other(model):
    """Make a teacher that differs from the student."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for index, parameter in enumerate(moved.parameters()):
            parameter.add_(
                0.3
                * torch.sin(torch.arange(parameter.numel(), dtype=parameter.dtype) + index).view_as(parameter)
                * parameter.std()
            )
    return moved


def settings(**changes):
    return TrainConfig(**{"micro_batch": 100, "backend": "torch", **changes})


def fused(student, teacher, batch, config):
    student = copy.deepcopy(student)
    loss, _ = steps.gradients(student, teacher, batch, config, student.vocab_size)
    return [loss, *(p.grad for p in student.parameters())]


def dense(student, teacher, batch, config, dtype, token_loss):
    """Evaluate `token_loss(log_q, log_p, labels, batch)`, (distillation, policy) per token, on logits."""
    student, teacher = (copy.deepcopy(m).to(dtype) for m in (student, teacher))
    old = None if batch.old_logprobs_BT is None else batch.old_logprobs_BT.to(dtype)
    batch = replace(batch, old_logprobs_BT=old, advantages_B=batch.advantages_B.to(dtype))
    log_q = student.lm_head(hidden_states(student, batch.student)).log_softmax(-1)
    with torch.no_grad():
        log_p = teacher.lm_head(hidden_states(teacher, batch.teacher)).log_softmax(-1)
    distilled, policy = token_loss(log_q, log_p, batch.labels_BT.clamp(min=0)[..., None], batch)
    of_teacher = batch.mask_BT & batch.distilled_B[:, None]
    loss = (1 - config.policy_weight) * mean(distilled, of_teacher, config) + config.policy_weight * mean(
        policy, batch.mask_BT, config
    )
    loss.backward()
    return [loss.detach(), *(p.grad for p in student.parameters())]


def mean(values, mask, config):
    if config.reduction == "token_mean":
        return torch.where(mask, values, 0.0).sum() / mask.sum()
    counted = mask.any(1)
    return (torch.where(mask, values, 0.0).sum(1)[counted] / mask.sum(1)[counted]).mean()


def check(student, teacher, batch, config, token_loss):
    truth, peer = (
        dense(student, teacher, batch, config, dtype, token_loss) for dtype in (torch.float64, torch.float32)
    )
    for actual, p, t in zip(fused(student, Copy(teacher, 0.0), batch, config), peer, truth, strict=True):
        assert_no_worse(actual, p, t)


def at(log_probs, labels):
    return log_probs.gather(-1, labels)[..., 0]


def reverse_kl(log_q, log_p, labels, batch):
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def ppo(log_q, log_p, labels, batch, low=0.2, high=0.2):
    now = at(log_q, labels)
    ratio = torch.exp(now - (now.detach() if batch.old_logprobs_BT is None else batch.old_logprobs_BT))
    gain = batch.advantages_B[:, None]
    return -torch.minimum(ratio * gain, ratio.clamp(1 - low, 1 + high) * gain)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_mix_is_a_mean_of_each_over_its_own_tokens(model, other, batch, share, reduction):
    config = settings(policy_weight=share, reduction=reduction)
    check(model, other, batch, config, lambda *args: (reverse_kl(*args), ppo(*args)))


def test_a_ratio_to_an_older_policy_is_clipped(model, other, batch):
    old = torch.linspace(-6, -0.5, batch.mask_BT.numel()).view(batch.mask_BT.shape)
    config = settings(
        policy_weight=0.4, clip_low=0.1, clip_high=0.3, importance_clip=1.5, updates_per_batch=2
    )

    def token_loss(log_q, log_p, labels, batch):
        weight = (at(log_q, labels).detach() - batch.old_logprobs_BT).exp().clamp(max=1.5)
        return weight * reverse_kl(log_q, log_p, labels, batch), ppo(log_q, log_p, labels, batch, 0.1, 0.3)

    check(model, other, replace(batch, old_logprobs_BT=old), config, token_loss)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_sampled_tokens(model, other, batch, share):
    def token_loss(log_q, log_p, labels, batch):
        reward = (at(log_p, labels) - at(log_q, labels)).detach()
        return -reward * at(log_q, labels), ppo(log_q, log_p, labels, batch)

    check(model, other, batch, settings(objective="sampled_token", policy_weight=share), token_loss)


def test_iw_opd_weighs_sampled_tokens(model, other, batch):
    def token_loss(log_q, log_p, labels, batch):
        gap = torch.where(batch.mask_BT, (at(log_p, labels) - at(log_q, labels)).detach(), 0.0)
        before = gap.abs().cumsum(1) - gap.abs()
        return -(1 + 0.5 * (1 - before / gap.abs().sum(1, keepdim=True))) * gap * at(
            log_q, labels
        ), torch.zeros_like(gap)

    check(
        model,
        other,
        batch,
        settings(objective="sampled_token", token_weights="PrefixDiscrepancy(0.5)"),
        token_loss,
    )


def test_a_trust_region_teacher_mixes_logits(model, other, batch):
    config = settings(teacher="trust_region", trust_region=0.3)

    def token_loss(log_q, log_p, labels, batch):
        return reverse_kl(log_q, (0.7 * log_p + 0.3 * log_q.detach()).log_softmax(-1), labels, batch), 0 * at(
            log_q, labels
        )

    truth, peer = (
        dense(model, other, batch, config, dtype, token_loss) for dtype in (torch.float64, torch.float32)
    )
    for actual, p, t in zip(
        fused(model, make_teacher(other, config), batch, config), peer, truth, strict=True
    ):
        assert_no_worse(actual, p, t)


TEXTS = {
    "Constant(2)": lambda data: weights.Constant(2.0),
    "FirstFraction(0.3) * EntropyGate('teacher', below=2.0)": lambda data: (
        weights.FirstFraction(0.3) * weights.EntropyGate("teacher", below=2.0)
    ),
    "0.5 * LastFraction(p=0.5)": lambda data: 0.5 * weights.LastFraction(0.5),
    "LinearDecay(0)": lambda data: weights.LinearDecay(0.0),
    "ExponentialDecay(2)": lambda data: weights.ExponentialDecay(2.0),
    "Sigmoid(0.1, 0.5, -0.2)": lambda data: weights.Sigmoid(0.1, 0.5, -0.2),
    "MeanOne(PrefixDiscrepancy(gamma=-0.5, of='divergence'))": lambda data: weights.MeanOne(
        weights.PrefixDiscrepancy(-0.5, "divergence")
    ),
    "TrustGate(0.2)": lambda data: weights.TrustGate(0.2),
    "ImportanceRatio(1.5)": lambda data: weights.ImportanceRatio(data.old_logprobs_BT, 1.5),
    "SegmentMean(TrustGate(0.5))": lambda data: weights.SegmentMean(
        weights.TrustGate(0.5), data.boundaries_BT
    ),
}


def test_every_scheme_has_a_text():
    schemes = {name for name in weights.__all__ if isinstance(getattr(weights, name), type)} - {
        "TokenWeighting",
        "Product",
        "Given",
        "PackedSequences",
    }
    assert schemes == {name for name in schemes if any(name in text for text in TEXTS)}


@pytest.mark.parametrize("text", TEXTS)
def test_token_weights_are_those_of_the_text(model, other, batch, text):
    batch = replace(
        batch, old_logprobs_BT=torch.full(batch.mask_BT.shape, -2.0) if "Importance" in text else None
    )
    _, stats = objective.step_loss(model, Copy(other, 0.0), batch, settings(), batch.totals, model.vocab_size)
    data = TokenData(batch.old_logprobs_BT, batch.boundaries_BT)
    expected = TEXTS[text](data)(stats, batch.mask_BT)
    assert_same_bits(parse_weights(text)(data)(stats, batch.mask_BT), expected)
    assert expected.count_nonzero(), "a weighting of nothing but zeros proves nothing"
    loss, _ = objective.step_loss(
        model, Copy(other, 0.0), batch, settings(token_weights=text), batch.totals, model.vocab_size
    )
    kept = (batch.mask_BT & batch.distilled_B[:, None]).double()
    divergence = stats.divergence.double()
    assert_no_worse(
        loss,
        ((divergence * expected).float() * kept).sum() / kept.sum(),
        (divergence * expected * kept).sum() / kept.sum(),
    )


def test_segments_start_behind_a_separator(batch, rollouts):
    separator = rollouts[3].tokens[1]
    for b, rollout in enumerate(rollouts):
        starts = [t for t in range(1, len(rollout.tokens)) if rollout.tokens[t - 1] == separator]
        assert [
            t for t in batch.boundaries_BT[b].nonzero().flatten().tolist() if t < len(rollout.tokens)
        ] == starts
    assert batch.boundaries_BT.any()


def test_advantages_are_of_the_group(rollouts):
    shuffled = rollouts[::-1]
    for order in (rollouts, shuffled):
        for rollout, gain in zip(order, advantages(order, False), strict=True):
            group = [r.verdict.reward for r in rollouts if r.group == rollout.group]
            assert_no_worse(
                torch.tensor(gain),
                torch.tensor(rollout.verdict.reward - sum(group) / len(group)),
                torch.tensor(rollout.verdict.reward).double() - sum(group) / len(group),
            )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"policy_weight": 0.5},
        {"policy_weight": 1.0},
        {"objective": "sampled_token", "reduction": "sequence_mean"},
    ],
)
def test_accumulation_does_not_change_the_update(model, other, batch, changes):
    """Compare the weights after a step in 1 and in 4 micro-batches with the same step in float64."""

    def updated(dtype, micro):
        student, teacher = (copy.deepcopy(m).to(dtype) for m in (model, other))
        # The update exceeds the weights, without a clip, so that a wrong factor shows.
        config = settings(
            **changes, micro_batch=micro, lr_warmup_steps=0, learning_rate=1e3, max_grad_norm=1e9
        )
        # SGD: Adam's first step is the gradient's sign, which rounding decides for entries near zero.
        trainer = steps.Trainer(
            student, Copy(teacher, 0.0), torch.optim.SGD(student.parameters(), 1.0), student.vocab_size
        )
        steps.optimisation_step(trainer, batch, config, 1)
        return list(student.parameters())

    for four, one, truth in zip(
        updated(torch.float32, 4), updated(torch.float32, 16), updated(torch.float64, 16), strict=True
    ):
        assert_no_worse(four, one, truth)


def watched_updates(model, other, batch, monkeypatch, rate=0.0, **changes):
    """Return (old log-probs given, log-probs of the student at that time) of each update, and the trunks."""
    seen, trunks = [], []
    original, hidden = objective.step_loss, objective.hidden_states
    own = objective.sampling_logprobs

    def watched(student, teacher, micro, *rest):
        with monkeypatch.context() as patch:
            patch.setattr(objective, "hidden_states", hidden)
            seen.append((micro.old_logprobs_BT, own(student, micro, *rest[::2])))
        return original(student, teacher, micro, *rest)

    def counted(model, *rest):
        trunks.append(model)
        return hidden(model, *rest)

    monkeypatch.setattr(objective, "step_loss", watched)
    monkeypatch.setattr(objective, "hidden_states", counted)
    config = settings(learning_rate=1e-2, lr_warmup_steps=0, **changes)
    trainer = steps.Trainer(model, Copy(other, rate), steps.make_optimizer(model, config), model.vocab_size)
    steps.update_on(trainer, batch, config, 1)
    return seen, [each is model for each in trunks]


@pytest.mark.parametrize("weights", [None, "ImportanceRatio(1.5)"])
def test_several_updates_know_the_policy_that_sampled(model, other, batch, monkeypatch, weights):
    exact = objective.sampling_logprobs(copy.deepcopy(model).double(), batch, settings(), model.vocab_size)
    seen, students = watched_updates(
        model, other, batch, monkeypatch, updates_per_batch=3, token_weights=weights
    )
    (none, first), (old, second), (same, third) = seen
    assert none is None and old.equal(same)
    assert_no_worse(*(values[batch.mask_BT] for values in (old, first, exact)))
    assert not second.equal(old) and not third.equal(second)
    assert sum(students) == 3, "no forward beside those of the updates"


@pytest.mark.parametrize("rate, forwards", [(0.0, 2), (0.01, 6)])
def test_a_fixed_teacher_reads_a_batch_once(model, other, batch, monkeypatch, rate, forwards):
    """In two micro-batches and three updates, with the gradient of a teacher that reads it each time."""
    again = copy.deepcopy(model)
    changes = {"updates_per_batch": 3, "micro_batch": -(-batch.size // 2)}
    _, students = watched_updates(model, other, batch, monkeypatch, rate, **changes)
    assert (sum(students), len(students) - sum(students)) == (6, forwards)
    monkeypatch.setattr(steps, "knows_teacher", lambda *_: False)
    _, students = watched_updates(again, other, batch, monkeypatch, rate, **changes)
    assert len(students) == 12
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert_same_bits(one, two)


def test_a_student_with_dropout_is_read_without_it(model, other, batch, monkeypatch):
    assert not objective.is_random(model)
    model.config.attention_dropout = 0.1
    assert objective.is_random(model)
    seen, students = watched_updates(model, other, batch, monkeypatch, updates_per_batch=2)
    model.config.attention_dropout = 0.0
    assert_same_bits(seen[0][0], seen[0][1])
    assert seen[1][0].equal(seen[0][0]) and sum(students) == 3


def test_a_ratio_of_a_policy_to_itself_is_one():
    mask = torch.ones(2, 3, dtype=torch.bool)
    for text, value in {"ImportanceRatio(1.5)": 1.0, "ImportanceRatio(clip=0.5)": 0.5}.items():
        weighting = parse_weights(text)(TokenData(None, None))
        assert weighting(None, mask).unique().tolist() == [value]


def test_teachers(model, other):
    assert isinstance(make_teacher(model, settings(teacher="live")), Live)
    assert make_teacher(model, settings(teacher="frozen")).rate == 0
    assert (
        make_teacher(model, settings(teacher="trust_region", trust_region=0.2)).mix,
        make_teacher(model, settings()).rate,
    ) == (0.2, 0.003)
    external = make_teacher(model, settings(teacher="external", teacher_model="x"), other)
    assert (
        external.model is other
        and not any(p.requires_grad for p in other.parameters())
        and external.state() == {}
    )
    assert make_teacher(model, settings(teacher="adapter_off", lora_rank=2)).__class__ is AdapterOff
    model.train()
    with Live(model).using() as lent:
        assert lent is model and not model.training
    assert model.training


def test_the_reference_is_the_model_before_the_run(model):
    for teacher, same in (("ema", False), ("frozen", True), ("trust_region", True), ("live", False)):
        config = settings(teacher=teacher, rehearsal_prompts=4)
        mine = make_teacher(model, config)
        reference = make_reference(model, config, mine)
        assert (reference is mine) is same
        assert reference.model is not model and reference.rate == 0
    assert make_reference(model, settings(rehearsal_prompts=0), mine) is None


def test_rehearsal_adds_its_divergence_to_the_reference(model, other, batch):
    config = settings(rehearsal_weight=0.5, policy_weight=1.0)
    student = copy.deepcopy(model)
    trainer = steps.Trainer(
        student, Copy(other, 0.0), torch.optim.SGD(student.parameters(), 1.0), student.vocab_size
    )
    kept = make_batch(batch.rollouts[:5], [r.prompt_tokens for r in batch.rollouts[:5]], 0)
    update = steps.optimisation_step(
        trainer,
        batch,
        replace(config, max_grad_norm=1e9, lr_warmup_steps=0),
        1,
        steps.Rehearsal(kept, Copy(other, 0.0)),
    )
    alone = fused(model, Copy(other, 0.0), kept, settings())
    policy = fused(model, Copy(other, 0.0), batch, config)
    exact = [p.double() + 0.5 * a.double() for p, a in zip(policy[1:], alone[1:], strict=True)]
    assert_no_worse(torch.tensor(update.rehearsal_loss), 0.5 * alone[0], 0.5 * alone[0].double())
    lr = steps.learning_rate(config, 10)
    for before, after, gradient in zip(model.parameters(), student.parameters(), exact, strict=True):
        assert_no_worse(after, before - lr * gradient.float(), before.double() - lr * gradient)
