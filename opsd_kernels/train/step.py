"""One optimisation step: for each micro-batch two trunk forwards and one fused loss, then clip, update, and the metrics of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd_kernels import TokenStats
from opsd_kernels.train.batch import micro_batches
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.objective import distillation
from opsd_kernels.train.teacher import Teacher
from opsd_kernels.train.types import Batch, Context, NonFiniteLoss, Rollout, StepMetrics

DIVERGENCE_METRICS = ("loss", "grad_norm", "divergence", "divergence_p95", "divergence_by_position", "student_entropy", "teacher_entropy")
NAMED_ROWS = 8  # how many bad rows an error lists


@dataclass(frozen=True)
class Update:
    """What an optimisation step leaves for the metrics; statistics are those of before the update."""

    loss: float
    grad_norm: float
    stats: tuple[TokenStats, ...]


def make_optimizer(model: PreTrainedModel, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW. Simplification: no fp32 master copy of bf16 weights."""
    return torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear over `lr_warmup_steps`, then constant. The first step is 1."""
    return config.learning_rate * min(1.0, step / max(1, config.lr_warmup_steps))


def optimisation_step(student: PreTrainedModel, teacher: Teacher, optimizer: torch.optim.Optimizer, batch: Batch, config: TrainConfig, step: int) -> Update:
    """Updates student and teacher. Raises NonFiniteLoss before any weight has changed."""
    student.train()  # gradient checkpointing of transformers works in this mode only
    loss, stats = gradients(student, teacher.model, batch, config)
    grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm)
    if not (torch.isfinite(loss) and torch.isfinite(grad_norm)):
        optimizer.zero_grad()  # a caller that catches this must not find the bad gradient
        raise NonFiniteLoss(describe_bad_rows(step, float(loss), float(grad_norm), batch, stats))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.step()
    optimizer.zero_grad()  # to None: the next step's first micro-batch writes, it does not add
    teacher.update(student)
    return Update(float(loss), float(grad_norm), stats)


def gradients(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, config: TrainConfig) -> tuple[Tensor, tuple[TokenStats, ...]]:
    """Adds the step's gradient to the student's; how the batch is cut into micro-batches does not matter. Returns the loss, 0-dim, in nats."""
    total, stats = torch.zeros((), device=batch.labels_BT.device), []
    for micro in micro_batches(batch, config.micro_batch):
        loss, tokens = distillation(student, teacher, micro, config, batch.num_tokens, batch.size)
        loss.backward()
        total = total + loss.detach()
        stats.append(tokens)
    return total, tuple(stats)


def describe_bad_rows(step: int, loss: float, grad_norm: float, batch: Batch, stats: Sequence[TokenStats]) -> str:
    """Which rollouts, and which tokens of theirs, have a divergence that is not finite."""
    divergence_BT = torch.cat([part.divergence for part in stats])
    bad = (~torch.isfinite(divergence_BT) & batch.mask_BT).nonzero().tolist()
    rows = [f"prompt {batch.rollouts[b].prompt.problem}, sample {batch.rollouts[b].sample}, token {t}" for b, t in bad[:NAMED_ROWS]]
    more = f" and {len(bad) - NAMED_ROWS} more" if len(bad) > NAMED_ROWS else ""
    where = "; ".join(rows) + more if rows else "every token's divergence is finite, the gradient is not"
    return f"step {step}: expected a finite loss and gradient, got loss {loss} and gradient norm {grad_norm}; rows: {where}"


def rollout_metrics(rollouts: Sequence[Rollout], contexts: Sequence[Context | None]) -> StepMetrics:
    """What happened before the loss: rewards, and who got which context."""
    groups = {rollout.group for rollout in rollouts}
    solved = {rollout.group for rollout in rollouts if rollout.verdict.success}
    tokens = sum(len(rollout.tokens) for rollout in rollouts)
    kept = sum(len(rollout.tokens) for rollout, context in zip(rollouts, contexts, strict=True) if context is not None)
    given = [context for context in contexts if context is not None]
    return {
        "reward": sum(rollout.verdict.reward for rollout in rollouts) / len(rollouts),
        "groups_with_success": len(solved) / len(groups),
        "samples_with_demonstration": sum(context.demonstration is not None for context in given) / len(rollouts),
        "samples_with_feedback": sum(context.feedback is not None for context in given) / len(rollouts),
        "samples_in_loss": len(given) / len(rollouts),
        "tokens_in_loss": kept / tokens,
        "completion_tokens": tokens,
    }


def update_metrics(update: Update | None, batch: Batch | None) -> StepMetrics:
    """Means over the tokens of the loss, in nats; null where no rollout had a context."""
    if update is None or batch is None:
        return dict.fromkeys((*DIVERGENCE_METRICS, "sampled_logprob_gap", "top1_agreement"))
    mask_BT = batch.mask_BT

    def tokens(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in update.stats])

    divergence_BT = tokens("divergence")
    gap_BT = tokens("teacher_logprob") - tokens("student_logprob")
    return {
        "loss": update.loss,
        "grad_norm": update.grad_norm,
        "divergence": divergence_BT[mask_BT].mean().item(),
        "divergence_p95": divergence_BT[mask_BT].quantile(0.95).item(),
        # Position 0 is the answer's first token; every column has a token, since the longest answer made it.
        "divergence_by_position": ((divergence_BT * mask_BT).sum(0) / mask_BT.sum(0)).tolist(),
        "student_entropy": tokens("student_entropy")[mask_BT].mean().item(),
        "teacher_entropy": tokens("teacher_entropy")[mask_BT].mean().item(),
        "sampled_logprob_gap": _finite(gap_BT[mask_BT].mean().item()),
        "top1_agreement": tokens("top1_agreement")[mask_BT].float().mean().item(),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity: a teacher may give a sampled token probability zero
