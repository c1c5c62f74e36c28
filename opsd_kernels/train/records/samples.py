"""Build samples.jsonl: a few answers of every `samples_every`-th step.

Each has its verdict, the teacher's prompt, and the gap between the two sides at each token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from opsd_kernels.train import seeds
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.sampling.prompts import PromptEncoder
from opsd_kernels.train.step import Update, given
from opsd_kernels.train.types import Batch, Context, Rollout

# Stream of random numbers.
SAMPLES = 21
# Significant digits of a gap.
DIGITS = 4


def samples_due(config: TrainConfig, step: int) -> bool:
    """True at the first step, and at every `samples_every`-th."""
    return config.samples_kept > 0 and (step == 1 or step % config.samples_every == 0)


def sample_lines(
    step: int,
    rollouts: Sequence[Rollout],
    contexts: Sequence[Context | None],
    batch: Batch | None,
    update: Update | None,
    encoder: PromptEncoder,
    config: TrainConfig,
) -> list[dict[str, Any]]:
    """Return a line for each of `samples_kept` rollouts, drawn uniformly at random."""
    drawn = sorted(seeds.shuffled(range(len(rollouts)), config.seed, SAMPLES, step)[: config.samples_kept])
    gaps = token_gaps({(rollouts[i].group, rollouts[i].sample) for i in drawn}, batch, update)
    return [
        record(step, rollouts[i], contexts[i], gaps.get((rollouts[i].group, rollouts[i].sample)), encoder)
        for i in drawn
    ]


def record(
    step: int,
    rollout: Rollout,
    context: Context | None,
    gap: list[float | None] | None,
    encoder: PromptEncoder,
) -> dict[str, Any]:
    """Return one line of samples.jsonl.

    `teacher_view` is the user's turn in the teacher's prompt, null if there is none; `gap` is null for a
    rollout that is not distilled.
    """
    view = None
    if context is not None:
        view = encoder.template.render(rollout.prompt.text, context, encoder.markers)
    return {
        "step": step,
        "problem": rollout.prompt.problem,
        **({"before": list(rollout.prompt.before)} if rollout.prompt.before else {}),
        "prompt": rollout.prompt.text,
        "answer": rollout.text,
        "reward": rollout.verdict.reward,
        "feedback": rollout.verdict.feedback,
        "teacher_view": view,
        "tokens": [encoder.tokenizer.decode([token]) for token in rollout.tokens],
        "gap": gap,
    }


def token_gaps(
    wanted: set[tuple[int, int]], batch: Batch | None, update: Update | None
) -> dict[tuple[int, int], list[float | None]]:
    """Map (group, sample) to the teacher's minus the student's log-probs, in nats; None if not finite."""
    if batch is None or update is None or update.stats[0].teacher_logprob is None:
        return {}
    teacher_BT = torch.cat([given(part.teacher_logprob) for part in update.stats])
    gap_BT = teacher_BT - torch.cat([given(part.student_logprob) for part in update.stats])
    places = [(rollout.group, rollout.sample) for rollout in batch.rollouts]
    rows = [b for b, place in enumerate(places) if place in wanted and batch.distilled_B[b]]
    return {
        places[b]: [_rounded(value) for value in gap_BT[b, : len(batch.rollouts[b].tokens)].tolist()]
        for b in rows
    }


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
