"""Make one optimisation step: per micro-batch two trunk forwards and one fused loss, then clip and update.

The step's metrics are computed here too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd_kernels import TokenStats
from opsd_kernels.train import objective
from opsd_kernels.train.batch import micro_batches
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.distributed import sharding
from opsd_kernels.train.distributed.ranks import ALONE, Ranks
from opsd_kernels.train.optimizer import MasterAdamW, collect_gradients, masters_of
from opsd_kernels.train.teacher import Teacher
from opsd_kernels.train.types import Batch, Context, NonFiniteLoss, Rollout, StepMetrics

DIVERGENCE_METRICS = (
    "loss",
    "grad_norm",
    "divergence",
    "divergence_p95",
    "divergence_by_position",
    "student_entropy",
    "teacher_entropy",
)
# How many bad rows an error lists.
NAMED_ROWS = 8


@dataclass(frozen=True)
class Update:
    """Values of an optimisation step for the metrics; the statistics are from before the update."""

    loss: float
    grad_norm: float
    stats: tuple[TokenStats, ...]
    rehearsal_loss: float | None = None
    # Of a chunk's gradient, rehearsal included; None if `gradient_tolerance` is.
    gradient_dropped: float | None = None


def make_optimizer(model: PreTrainedModel, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW over the trainable parameters, with fp32 masters of those in 16 bits."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {"lr": config.learning_rate, "betas": (0.9, 0.98), "weight_decay": config.weight_decay}
    # A sixth of the time of 55 M parameters, rounded otherwise: recorded runs of the tiny model would change.
    fused = config.device == "cpu" and config.shard == "none" and config.model != "tiny"
    return MasterAdamW(trained, **options, fused=True if fused else None)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of a step (the first is 1): linear over `lr_warmup_steps`, then constant."""
    return config.learning_rate * min(1.0, step / max(1, config.lr_warmup_steps))


@dataclass(frozen=True)
class Rehearsal:
    """The student's answers to prompts of skills to keep, and the model as it was before the run."""

    batch: Batch
    reference: Teacher


@dataclass
class Trainer:
    """Student, teacher and optimiser, which an optimisation step changes, and the size of the vocabulary."""

    student: PreTrainedModel
    teacher: Teacher
    optimizer: torch.optim.Optimizer
    vocab: int
    ranks: Ranks = ALONE


def update_on(
    trainer: Trainer, batch: Batch, config: TrainConfig, step: int, rehearsal: Rehearsal | None = None
) -> Update:
    """Make `updates_per_batch` optimisation steps on one batch.

    Returns the first update, at which the student is still the policy that sampled the batch, with the
    largest `gradient_dropped` of all. A ratio to that policy is 1 there, and the first update's log-probs are
    the policy's for the others.
    """
    ratio = objective.needs_old_logprobs(config)
    if ratio and objective.is_random(trainer.student):
        batch = replace(batch, old_logprobs_BT=_sampling_logprobs(trainer, batch, config))
    updates: list[Update] = []
    known: dict[int, Tensor] | None = {} if knows_teacher(trainer, config) else None
    try:
        while len(updates) < config.updates_per_batch:
            updates.append(optimisation_step(trainer, batch, config, step, rehearsal, known))
            if ratio and batch.old_logprobs_BT is None:
                logprobs = [given(part.student_logprob) for part in updates[0].stats]
                batch = replace(batch, old_logprobs_BT=torch.cat(logprobs))
    except NonFiniteLoss as error:
        error.updates = len(updates)
        raise
    shares = [update.gradient_dropped for update in updates if update.gradient_dropped is not None]
    return replace(updates[0], gradient_dropped=max(shares, default=None))


def knows_teacher(trainer: Trainer, config: TrainConfig) -> bool:
    """True if the teacher's states of one update serve the next ones.

    Not those of a sharded teacher, whose head is readable after a forward only.
    """
    return (
        config.updates_per_batch > 1
        and config.policy_weight < 1
        and trainer.teacher.fixed
        and not sharding.is_sharded(trainer.teacher.model)
    )


def _sampling_logprobs(trainer: Trainer, batch: Batch, config: TrainConfig) -> Tensor:
    trainer.student.eval()
    mine, filler = share(batch, config, trainer.ranks, sharding.is_sharded(trainer.student))
    parts = [
        objective.sampling_logprobs(trainer.student, micro, config, trainer.vocab)
        for micro in (*mine, *filler)
    ]
    return torch.cat(trainer.ranks.together(parts[: len(mine)]))


def optimisation_step(
    trainer: Trainer,
    batch: Batch,
    config: TrainConfig,
    step: int,
    rehearsal: Rehearsal | None = None,
    known: dict[int, Tensor] | None = None,
) -> Update:
    """Update student and teacher. Raises NonFiniteLoss before any weight changes.

    `known` holds the teacher's hidden states of micro-batches on the host; missing ones are added.
    """
    student, optimizer = trainer.student, trainer.optimizer
    # transformers' gradient checkpointing works in training mode only.
    student.train()
    collect = functools.partial(collect_gradients, optimizer)
    settings = (config, trainer.vocab, 1.0, collect)
    loss, stats = gradients(student, trainer.teacher, batch, *settings, ranks=trainer.ranks, known=known)
    parts = [(batch, stats)]
    kept = None
    if rehearsal is not None:
        settings = (objective.plain(config), trainer.vocab, config.rehearsal_weight, collect)
        kept, kept_stats = gradients(
            student, rehearsal.reference, rehearsal.batch, *settings, ranks=trainer.ranks
        )
        parts.append((rehearsal.batch, kept_stats))
    updated = [p for group in optimizer.param_groups for p in group["params"]]
    # FSDP's backward has summed the gradients of a sharded model already.
    if not sharding.is_sharded(student):
        trainer.ranks.sum_gradients(updated)
    grad_norm = torch.nn.utils.clip_grad_norm_(updated, config.max_grad_norm)
    grad_norm = sharding.full(grad_norm)
    whole = loss if kept is None else loss + kept
    if not (torch.isfinite(whole) and torch.isfinite(grad_norm)):
        # A caller that catches the error must not find the bad gradient.
        optimizer.zero_grad()
        raise NonFiniteLoss(describe_bad_rows(step, float(whole), float(grad_norm), parts))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.step()
    # Sets gradients to None: the first micro-batch of the next step writes them and does not add.
    optimizer.zero_grad()
    trainer.teacher.update(student, masters_of(optimizer))
    return Update(
        float(loss),
        float(grad_norm),
        stats,
        rehearsal_loss=None if kept is None else float(kept),
        gradient_dropped=None if config.gradient_tolerance is None else largest_dropped(parts),
    )


def largest_dropped(parts: Sequence[tuple[Batch, Sequence[TokenStats]]]) -> float:
    """Return the largest share of a chunk's gradient that was left out, over all micro-batches and ranks.

    A policy gradient alone has no such share and counts as 0.
    """
    shares = [part.gradient_dropped for _, stats in parts for part in stats]
    known = [share for share in shares if share is not None]
    return float(torch.stack(known).amax()) if known else 0.0


def share(
    batch: Batch, config: TrainConfig, ranks: Ranks, equally: bool = False
) -> tuple[list[Batch], list[Batch]]:
    """Return this rank's micro-batches: at least one for every rank if there are enough rollouts.

    With `equally`, the second list holds a filler on ranks that have one micro-batch fewer than others.
    """
    parts = list(micro_batches(batch, min(config.micro_batch, -(-batch.size // ranks.world))))
    mine = ranks.share(parts)
    short = equally and len(mine) * ranks.world < len(parts)
    return mine, list(micro_batches(batch, 1))[:1] if short else []


def gradients(
    student: PreTrainedModel,
    teacher: Teacher,
    batch: Batch,
    config: TrainConfig,
    vocab: int,
    weight: float = 1.0,
    collect: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
    known: dict[int, Tensor] | None = None,
) -> tuple[Tensor, tuple[TokenStats, ...]]:
    """Add this rank's part of the step's gradient to the student's; `collect` runs after each backward.

    The result does not depend on the number of micro-batches or of ranks, except with `gradient_tolerance`:
    each chunk then chooses its own columns. Returns the loss of the whole batch (0-dim, in nats) and its
    statistics.
    """
    total, stats, totals = torch.zeros((), device=batch.labels_BT.device), [], batch.totals
    mine, filler = share(batch, config, ranks, sharding.is_sharded(student))
    for number, micro in enumerate(mine):
        states = None
        if known is not None:
            if number not in known:
                known[number] = objective.teacher_states(teacher, micro, config).cpu()
            states = known[number].to(micro.labels_BT.device)
        loss, tokens = objective.step_loss(student, teacher, micro, config, totals, vocab, states)
        (loss * weight).backward()
        collect()
        total = total + loss.detach()
        stats.append(tokens)
    # Under FSDP the forward and backward of the other ranks would hang without a matching one here.
    for micro in filler:
        (objective.step_loss(student, teacher, micro, config, totals, vocab)[0] * 0.0).backward()
        collect()
    sharding.release(teacher.model)
    return ranks.total(total) * weight, tuple(ranks.together(stats))


def describe_bad_rows(
    step: int, loss: float, grad_norm: float, parts: Sequence[tuple[Batch, Sequence[TokenStats]]]
) -> str:
    """Name the rollouts and tokens whose divergence (or log-prob, without a teacher) is not finite."""
    rows = []
    for batch, stats in parts:
        values_BT = torch.cat(
            [
                given(part.student_logprob) if part.teacher_logprob is None else part.divergence
                for part in stats
            ]
        )
        for b, t in (~torch.isfinite(values_BT) & batch.mask_BT).nonzero().tolist():
            rows.append(
                f"prompt {batch.rollouts[b].prompt.problem}, sample {batch.rollouts[b].sample}, token {t}"
            )
    more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
    where = "; ".join(rows[:NAMED_ROWS]) + more
    if not rows:
        where = "every token's divergence is finite, the gradient is not"
    return (
        f"step {step}: expected a finite loss and gradient, got loss {loss} and gradient norm {grad_norm}; "
        f"rows: {where}"
    )


def given(tensor: Tensor | None) -> Tensor:
    """Narrow an optional statistic. The trainer always passes labels, so its statistics hold log-probs."""
    assert tensor is not None
    return tensor


def rollout_metrics(rollouts: Sequence[Rollout], contexts: Sequence[Context | None]) -> StepMetrics:
    """Return the metrics that need no loss: rewards, and how many rollouts have which context."""
    groups = {rollout.group for rollout in rollouts}
    solved = {rollout.group for rollout in rollouts if rollout.verdict.success}
    tokens = sum(len(rollout.tokens) for rollout in rollouts)
    kept = sum(
        len(rollout.tokens)
        for rollout, context in zip(rollouts, contexts, strict=True)
        if context is not None
    )
    present = [context for context in contexts if context is not None]
    return {
        "reward": sum(rollout.verdict.reward for rollout in rollouts) / len(rollouts),
        "groups_with_success": len(solved) / len(groups),
        "samples_with_demonstration": sum(bool(context.demonstrations) for context in present)
        / len(rollouts),
        "samples_with_feedback": sum(context.feedback is not None for context in present) / len(rollouts),
        "samples_in_loss": len(present) / len(rollouts),
        "tokens_in_loss": kept / tokens,
        "completion_tokens": tokens,
    }


def update_metrics(update: Update | None, batch: Batch | None) -> StepMetrics:
    """Return means over the distilled tokens, in nats; null if no rollout has a context."""
    if update is None or batch is None:
        return dict.fromkeys((*DIVERGENCE_METRICS, "sampled_logprob_gap", "top1_agreement"))

    def tokens(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in update.stats])

    metrics: StepMetrics = {"loss": update.loss, "grad_norm": update.grad_norm}
    optional = {"rehearsal_loss": update.rehearsal_loss, "gradient_dropped": update.gradient_dropped}
    metrics |= {name: value for name, value in optional.items() if value is not None}
    mask_BT = batch.mask_BT & batch.distilled_B[:, None]
    if update.stats[0].teacher_logprob is None or not mask_BT.any():
        values = dict.fromkeys((*DIVERGENCE_METRICS, "sampled_logprob_gap", "top1_agreement"))
        return {
            **values,
            **metrics,
            "student_entropy": tokens("student_entropy")[batch.mask_BT].mean().item(),
        }
    divergence_BT = tokens("divergence")
    gap_BT = tokens("teacher_logprob") - tokens("student_logprob")
    return {
        **metrics,
        "divergence": divergence_BT[mask_BT].mean().item(),
        "divergence_p95": _quantile(divergence_BT[mask_BT], 0.95),
        # Position 0 is the answer's first token; a column without a distilled token is null.
        "divergence_by_position": [
            _finite(value) for value in ((divergence_BT * mask_BT).sum(0) / mask_BT.sum(0)).tolist()
        ],
        "student_entropy": tokens("student_entropy")[mask_BT].mean().item(),
        "teacher_entropy": _mean(tokens("teacher_entropy")[mask_BT])
        if update.stats[0].teacher_entropy is not None
        else None,
        "sampled_logprob_gap": _mean(gap_BT[mask_BT]),
        "top1_agreement": _mean(tokens("top1_agreement")[mask_BT].float())
        if update.stats[0].top1_agreement is not None
        else None,
    }


def reading_metrics(update: Update | None, batch: Batch | None) -> StepMetrics:
    """Count the tokens that the teacher read for the distilled rollouts: prompt with context plus completion.

    `context_tokens` is the excess of the teacher's prompts over the student's. Both count one update without
    rehearsal, and are 0 if no teacher ran.
    """
    if update is None or batch is None or update.stats[0].teacher_logprob is None:
        return {"teacher_tokens": 0, "context_tokens": 0}
    # The first row is the prompt's last token.
    prompts_2B = torch.stack([side.rows_BT[:, 0] + 1 for side in (batch.teacher, batch.student)])
    theirs, mine = (prompts_2B * batch.distilled_B).sum(1).tolist()
    return {"teacher_tokens": theirs + batch.totals.distilled_tokens, "context_tokens": theirs - mine}


def _mean(values: Tensor) -> float | None:
    return _finite(values.mean().item())


def _quantile(values: Tensor, q: float) -> float:
    # Tensor.quantile refuses more than 2**24 values.
    return float(np.quantile(values.cpu().numpy(), q))


def _finite(value: float) -> float | None:
    # JSON has no infinity, and a teacher may give a sampled token probability zero.
    return value if math.isfinite(value) else None
