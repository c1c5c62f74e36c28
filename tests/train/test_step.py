"""One optimisation step: the loss, micro-batches, the teacher's update, and non-finite losses."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from opsd_kernels import TokenStats
from opsd_kernels.integrations.transformers import Head
from opsd_kernels.testing import assert_no_worse, assert_same_bits
from opsd_kernels.train import step as steps
from opsd_kernels.train.batch import make_batch
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.contexts import build_contexts
from opsd_kernels.train.optimizer import masters_of
from opsd_kernels.train.sampling.rollout import requests
from opsd_kernels.train.shared_prompts import hidden_states
from opsd_kernels.train.teacher import Copy
from opsd_kernels.train.types import NonFiniteLoss


@pytest.fixture
def rollouts(sampler, model, task):
    """Make rollouts cut to lengths from 1 to 4: equal lengths would hide a wrong normaliser."""
    sampled = sampler.sample(
        model, task, requests([task.env(problem, 0).prompt() for problem in task.train[:5]], 3), 0
    )
    return [replace(rollout, tokens=rollout.tokens[: 1 + index % 4]) for index, rollout in enumerate(sampled)]


@pytest.fixture
def batch(rollouts, encoder):
    views = encoder.encode(
        [rollout.prompt for rollout in rollouts], build_contexts(rollouts, TrainConfig(), 0)
    )
    return make_batch(rollouts, views, 0)


def settings(**changes):
    return TrainConfig(micro_batch=100, **changes)


def trainer(student, teacher, config):
    return steps.Trainer(student, teacher, steps.make_optimizer(student, config), student.vocab_size)


def loss_and_gradients(student, teacher, batch, config):
    student = copy.deepcopy(student)
    loss, _ = steps.gradients(student, Copy(teacher, 0.0), batch, config, student.vocab_size)
    return [loss, *(p.grad for p in student.parameters())]


def check_against(actual, peer, truth):
    for a, p, t in zip(actual, peer, truth, strict=True):
        assert_no_worse(a, p, t)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("micro", [1, 4, 15])
def test_micro_batches_do_not_change_the_step(model, batch, reduction, micro):
    whole = loss_and_gradients(model, model, batch, settings(reduction=reduction))
    exact = copy.deepcopy(model).double()
    truth = loss_and_gradients(exact, exact, batch, settings(reduction=reduction))
    config = TrainConfig(micro_batch=micro, reduction=reduction)
    check_against(loss_and_gradients(model, model, batch, config), whole, truth)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_loss_is_the_reverse_kl_of_the_two_views(model, batch, reduction):
    def dense(model):
        model = copy.deepcopy(model)
        log_q = model.lm_head(hidden_states(model, batch.student)).log_softmax(-1)
        log_p = model.lm_head(hidden_states(model, batch.teacher)).detach().log_softmax(-1)
        kl_BT = (log_q.exp() * (log_q - log_p)).sum(-1) * batch.mask_BT
        loss = (
            kl_BT.sum() / batch.totals.tokens
            if reduction == "token_mean"
            else (kl_BT.sum(1) / batch.mask_BT.sum(1)).mean()
        )
        loss.backward()
        return [loss, *(p.grad for p in model.parameters())]

    actual = loss_and_gradients(model, model, batch, settings(reduction=reduction))
    check_against(actual, dense(model), dense(copy.deepcopy(model).double()))


def test_ema_teacher_follows_and_frozen_does_not(model, batch):
    config = settings(learning_rate=1e-2, lr_warmup_steps=0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for rate in (0.25, 0.0):
        student = copy.deepcopy(model)
        teacher = Copy(student, rate)
        steps.optimisation_step(trainer(student, teacher, config), batch, config, 1)
        moved = dict(student.named_parameters())
        assert not moved["lm_head.weight"].equal(before["lm_head.weight"])
        for name, parameter in teacher.model.named_parameters():
            assert_same_bits(parameter, torch.lerp(before[name], moved[name].detach(), rate))


def test_bf16_teacher_keeps_small_steps(model):
    """A hundred steps of .01 from 1 to 1.01 arrive in fp32; in bf16 each is lost."""
    student = copy.deepcopy(model).to(torch.bfloat16)
    student.lm_head.weight.data.fill_(1.0)
    teacher = Copy(student, 0.01)
    student.lm_head.weight.data.fill_(1.0078125)
    for _ in range(300):
        teacher.update(student)
    assert teacher.model.lm_head.weight.eq(1.0078125).all()


@pytest.fixture
def sixteen(model):
    """Round the model's weights to bf16, so that it is the same in both types."""
    return copy.deepcopy(model).to(torch.bfloat16)


def moved_by_steps(student, batch, config, dtype):
    """Return the change of the masters in ten steps, the optimiser, the student and its teacher."""
    student = copy.deepcopy(student).to(dtype)
    start = torch.cat([p.detach().float().flatten() for p in student.parameters()])
    teacher = Copy(student, 0.5)
    made = trainer(student, teacher, config)
    for number in range(10):
        steps.optimisation_step(made, batch, config, number + 1)
    masters = [masters_of(made.optimizer).get(p, p).detach() for p in student.parameters()]
    return torch.cat([p.flatten() for p in masters]) - start, made


@pytest.mark.parametrize("micro", [4, 100])
def test_bf16_weights_move_as_fp32_ones(sixteen, batch, micro):
    """At a rate of 1e-6, where bf16 weights alone moved a ninth as far and most of them not at all."""
    config = TrainConfig(micro_batch=micro, learning_rate=1e-6, lr_warmup_steps=0)
    expected, _ = moved_by_steps(sixteen, batch, config, torch.float32)
    actual, made = moved_by_steps(sixteen, batch, config, torch.bfloat16)
    assert 0.9 < actual.norm() / expected.norm() < 1.1
    # The gradients' own rounding turns the direction.
    assert torch.nn.functional.cosine_similarity(actual, expected, dim=0) > 0.95
    average = made.teacher.state()
    for name, weight in made.student.named_parameters():
        master = masters_of(made.optimizer)[weight]
        assert weight.dtype == torch.bfloat16 and master.dtype == torch.float32 and weight.grad is None
        assert_same_bits(weight.detach(), master.detach().to(torch.bfloat16))
        # The teacher follows the masters: the average of a weight that moves in one direction lags behind it.
        before = dict(sixteen.named_parameters())[name].float()
        far = (master - before).abs() > 5e-6
        assert ((average[name] - before)[far] / (master - before)[far] > 0.5).all()


def test_fp32_weights_have_no_second_copy(model):
    optimizer = steps.make_optimizer(model, settings())
    assert not masters_of(optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


def test_a_loss_that_is_not_finite_names_step_and_rows_and_changes_nothing(model, batch):
    config = settings()
    teacher = Copy(model, 0.1)
    token = batch.rollouts[7].tokens[0]
    # Affects the positions after the token, wherever it occurs.
    teacher.model.model.embed_tokens.weight.data[token] = torch.nan
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(
        NonFiniteLoss, match=r"step 41: expected a finite loss .*prompt \d+, sample \d+, token \d+"
    ):
        steps.optimisation_step(trainer(model, teacher, config), batch, config, 41)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(parameter.detach(), old.detach())


def test_metrics_count_what_entered_the_loss(rollouts):
    contexts = [
        None if rollout.sample == 0 else context
        for rollout, context in zip(rollouts, build_contexts(rollouts, TrainConfig(), 0), strict=True)
    ]
    metrics = steps.rollout_metrics(rollouts, contexts)
    tokens = [len(rollout.tokens) for rollout in rollouts]
    assert metrics["samples_in_loss"] == 10 / 15
    assert metrics["tokens_in_loss"] == sum(
        n for n, rollout in zip(tokens, rollouts, strict=True) if rollout.sample
    ) / sum(tokens)
    assert metrics["completion_tokens"] == sum(tokens)


def test_a_step_without_a_context_has_null_divergences():
    assert set(steps.update_metrics(None, None).values()) == {None}
    assert set(steps.reading_metrics(None, None).values()) == {0}


@pytest.mark.parametrize("answers, length", [(3, 7), (513, 32769)])
def test_metrics_of_a_step_of_any_size(answers, length):
    """More than 2**24 tokens, which Tensor.quantile refuses."""
    ramp = torch.arange(length, dtype=torch.float32) / (length - 1)
    values_BT = ramp.expand(answers, length)
    mask_BT = torch.ones(answers, length, dtype=torch.bool)
    stats = TokenStats(
        values_BT, values_BT, values_BT, student_logprob=-values_BT, teacher_logprob=-values_BT
    )
    batch = SimpleNamespace(mask_BT=mask_BT, distilled_B=torch.ones(answers, dtype=torch.bool))
    metrics = steps.update_metrics(steps.Update(0.5, 1.0, (stats,)), batch)
    assert abs(metrics["divergence_p95"] - 0.95) < 1 / length and abs(metrics["divergence"] - 0.5) < 1e-4
    positions = metrics["divergence_by_position"]
    assert len(positions) == length and (positions[0], positions[-1]) == (0.0, 1.0)


@pytest.mark.parametrize("policy_weight, read", [(0.0, True), (0.5, True), (1.0, False)])
def test_metrics_count_what_the_teacher_read(model, rollouts, encoder, policy_weight, read):
    """Counted from the tokens of distilled rollouts; a policy gradient alone has no teacher."""
    contexts = build_contexts(rollouts, TrainConfig(), 0)
    views = encoder.encode([rollout.prompt for rollout in rollouts], contexts)
    views[::4] = [None] * len(views[::4])
    batch = make_batch(rollouts, views, 0)
    config = TrainConfig(micro_batch=4, policy_weight=policy_weight)
    update = steps.optimisation_step(
        trainer(copy.deepcopy(model), Copy(model, 0.0), config), batch, config, 1
    )
    pairs = [(rollout, view) for rollout, view in zip(rollouts, views, strict=True) if view is not None]
    assert len(pairs) == 11
    assert steps.reading_metrics(update, batch) == {
        "teacher_tokens": read * sum(len(view) + len(rollout.tokens) for rollout, view in pairs),
        "context_tokens": read * sum(len(view) - len(rollout.prompt_tokens) for rollout, view in pairs),
    }


@pytest.mark.parametrize(
    "attribute, value, field, expected",
    [
        ("logit_scale", 0.25, "logit_scale", 0.25),
        ("logits_scaling", 8.0, "logit_scale", 0.125),
        ("final_logit_softcapping", 30.0, "softcap", 30.0),
    ],
)
def test_head_reads_scale_and_softcap(model, attribute, value, field, expected):
    assert (Head.of(model).logit_scale, Head.of(model).softcap) == (1.0, None)
    setattr(model.config, attribute, value)
    assert getattr(Head.of(model), field) == expected
