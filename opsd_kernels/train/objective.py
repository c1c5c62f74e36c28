"""Compute the loss of one micro-batch at the student's own tokens.

The loss is a divergence between the student's and the teacher's next-token distributions, a policy gradient,
or a convex mix of both. Two trunk forwards give hidden states; `linear_policy_divergence` takes them and the
two heads, so logits are never stored. `policy_weight=1` needs no teacher: `linear_logprobs` takes one trunk
and one head.

Simplification: log-probs and ratios of the rollout policy and the current one are at `distill_temperature`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd_kernels import TokenStats, linear_divergence, linear_logprobs
from opsd_kernels.integrations.transformers import Head, without_adapter
from opsd_kernels.objectives import Mix, OnPolicyDistillation, PPOClip, linear_policy_divergence
from opsd_kernels.spec import CLIPS
from opsd_kernels.train.batch import IGNORE
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.config.weight_text import TokenData, parse_weights
from opsd_kernels.train.models.routers import routed_hidden_states, router_weight
from opsd_kernels.train.shared_prompts import hidden_states
from opsd_kernels.train.teacher import Teacher
from opsd_kernels.train.types import Batch, Totals
from opsd_kernels.weights import Given, ImportanceRatio


def needs_old_logprobs(config: TrainConfig) -> bool:
    """True if the loss reads a ratio to the policy that sampled. It differs from 1 after the first update."""
    return config.updates_per_batch > 1 or "ImportanceRatio" in (config.token_weights or "")


def is_random(model: PreTrainedModel) -> bool:
    """True if a forward for training draws random numbers, such as dropout's, by the model's config."""
    settings = without_adapter(model).config.get_text_config().to_dict()
    return any(
        isinstance(value, float) and value > 0 and ("drop" in name or "jitter" in name)
        for name, value in settings.items()
    )


@functools.cache
def plain(config: TrainConfig) -> TrainConfig:
    """Return the settings of rehearsal: the full divergence to a teacher and nothing else."""
    unbounded: dict[str, Any] = dict.fromkeys(CLIPS)
    return replace(
        config,
        policy_weight=0.0,
        objective="full",
        token_weights=None,
        updates_per_batch=1,
        topk=None,
        **unbounded,
        router_aux_loss_coef=0.0,
    )


@torch.no_grad()
def teacher_states(teacher: Teacher, batch: Batch, config: TrainConfig) -> Tensor:
    """Shape (B, T, H): the teacher's hidden states at the rows that predict the completion."""
    with teacher.using() as model:
        return hidden_states(model, batch.teacher, config.shares_prompts)


def step_loss(
    student: PreTrainedModel,
    teacher: Teacher,
    batch: Batch,
    config: TrainConfig,
    totals: Totals,
    vocab: int,
    teacher_hidden: Tensor | None = None,
) -> tuple[Tensor, TokenStats]:
    """Return this micro-batch's part of the step's loss, in nats, and the statistics of its tokens.

    `totals` count the whole optimisation step, so that the parts add up to the loss of one large batch.
    `teacher_hidden` are `teacher_states`, if they are known.
    """
    ppo = PPOClip(batch.advantages_B[:, None], batch.old_logprobs_BT, config.clip_low, config.clip_high)
    if config.policy_weight == 1:
        return _policy_alone(student, batch, ppo, config, totals, vocab)
    if teacher_hidden is None:
        teacher_hidden = teacher_states(teacher, batch, config)
    with torch.no_grad(), teacher.using() as model:
        theirs = Head.of(model)
    hidden, mine, balance = _student(student, batch, config, totals)
    weights = _token_weights(batch, config, totals)
    options: dict[str, Any] = {
        **_reduction(config, totals),
        **mine.options("student"),
        **theirs.options("teacher"),
        "divergence": config.divergence,
        "beta": config.beta,
        "temperature": config.distill_temperature,
        "teacher_temperature": config.teacher_temperature,
        "teacher_mix": teacher.mix,
        "vocab_size": _padded(vocab, mine, theirs),
        "labels": batch.labels_BT,
        "ignore_index": IGNORE,
        **{clip: getattr(config, clip) for clip in CLIPS},
        "topk": config.topk,
        "topk_support": config.topk_support,
        "topk_tail": config.topk_tail,
        "return_stats": True,
        "gradient_tolerance": config.gradient_tolerance,
        "backend": config.backend,
    }
    op: Callable[..., Any] = linear_divergence
    if config.objective == "sampled_token":
        distilled = OnPolicyDistillation(
            config.token_reward, config.reward_strength, config.reward_clip, weights
        )
        shares = ((config.policy_weight, ppo), (1 - config.policy_weight, distilled))
        options |= {
            "policy": Mix(tuple((share, term) for share, term in shares if share)),
            "policy_weight": 1.0,
        }
        op = linear_policy_divergence
    else:
        options["token_weights"] = weights
        if config.policy_weight:
            options |= {"policy": ppo, "policy_weight": config.policy_weight}
            op = linear_policy_divergence
    loss, stats = op(hidden, mine.weight, teacher_hidden, theirs.weight, **options)
    return _part(loss, batch, config, totals) + balance, stats


@torch.no_grad()
def sampling_logprobs(student: PreTrainedModel, batch: Batch, config: TrainConfig, vocab: int) -> Tensor:
    """Shape (B, T): log-probs, in nats, of the batch's tokens under the current student."""
    hidden, head = hidden_states(student, batch.student, config.shares_prompts), Head.of(student)
    logprobs_BT = linear_logprobs(hidden, head.weight, batch.labels_BT, **_alone(head, config, vocab))
    assert isinstance(logprobs_BT, Tensor)
    return logprobs_BT


def _student(
    student: PreTrainedModel, batch: Batch, config: TrainConfig, totals: Totals
) -> tuple[Tensor, Head, Tensor | float]:
    """Return hidden states and head, and this micro-batch's part of the routers' auxiliary loss.

    That loss is no sum over tokens: it is averaged over micro-batches by their sequences.
    """
    weight = router_weight(student, config)
    if weight == 0:
        return hidden_states(student, batch.student, config.shares_prompts), Head.of(student), 0.0
    hidden, router = routed_hidden_states(student, batch.student, batch.mask_BT)
    return hidden, Head.of(student), router * (weight * batch.size / totals.sequences)


def _policy_alone(
    student: PreTrainedModel, batch: Batch, ppo: PPOClip, config: TrainConfig, totals: Totals, vocab: int
) -> tuple[Tensor, TokenStats]:
    hidden, head, balance = _student(student, batch, config, totals)
    logprobs_BT, entropy_BT = linear_logprobs(
        hidden, head.weight, batch.labels_BT, return_entropy=True, **_alone(head, config, vocab)
    )
    losses_BT = torch.where(batch.mask_BT, ppo(logprobs_BT, None, batch.mask_BT), 0.0)
    if config.reduction == "sequence_mean":
        loss = (losses_BT.sum(1) / batch.mask_BT.sum(1)).sum() / totals.sequences
    else:
        loss = losses_BT.sum() / totals.tokens
    # Without a teacher neither the divergence nor the largest probability is computed.
    nothing = torch.full_like(logprobs_BT, torch.nan).detach()
    return loss + balance, TokenStats(
        divergence=nothing,
        student_entropy=entropy_BT.detach(),
        student_max_prob=nothing,
        student_logprob=logprobs_BT.detach(),
    )


def _alone(head: Head, config: TrainConfig, vocab: int) -> dict[str, Any]:
    settings = {
        "temperature": config.distill_temperature,
        "vocab_size": _padded(vocab, head),
        "ignore_index": IGNORE,
        "backend": config.backend,
    }
    return {**settings, **head.options()}


def _padded(vocab: int, *heads: Head) -> int | None:
    """Return `vocab_size` for the op: None if no head has rows beyond the tokenizer's."""
    smallest = min(head.weight.shape[0] for head in heads)
    return (
        None if all(head.weight.shape[0] == min(vocab, smallest) for head in heads) else min(vocab, smallest)
    )


def _reduction(config: TrainConfig, totals: Totals) -> dict[str, Any]:
    if config.reduction == "sequence_mean":
        return {"reduction": "sequence_mean"}
    return {"reduction": "mean", "normalizer": totals.tokens}


def _part(loss: Tensor, batch: Batch, config: TrainConfig, totals: Totals) -> Tensor:
    # The op's `sequence_mean` divides by the sequences of this micro-batch, all of which have a token.
    return loss * (batch.size / totals.sequences) if config.reduction == "sequence_mean" else loss


def _token_weights(batch: Batch, config: TrainConfig, totals: Totals) -> Any:
    """Multiply the configured weights, the importance ratio of a reused batch, and 0 if not distilled."""
    factors = []
    if config.token_weights is not None:
        factors.append(
            parse_weights(config.token_weights)(TokenData(batch.old_logprobs_BT, batch.boundaries_BT))
        )
    if batch.old_logprobs_BT is not None and "ImportanceRatio" not in (config.token_weights or ""):
        factors.append(ImportanceRatio(batch.old_logprobs_BT, config.importance_clip))
    if totals.distilled_sequences < totals.sequences:
        # Each side of a mix is a mean over its own tokens; the op divides both by the tokens of the step.
        whole, distilled = totals.tokens, totals.distilled_tokens
        if config.reduction == "sequence_mean":
            whole, distilled = totals.sequences, totals.distilled_sequences
        share = whole / distilled if distilled else 0.0
        factors.append(Given((batch.distilled_B[:, None] * share).expand(batch.mask_BT.shape).contiguous()))
    if not factors:
        return None
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return product
