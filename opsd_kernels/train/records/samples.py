"""samples.jsonl: a few answers of every so many steps, each with its verdict, what the teacher saw, and how the two sides differ at each token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from opsd_kernels.train import seeds
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.sampling.prompts import PromptEncoder
from opsd_kernels.train.step import Update
from opsd_kernels.train.types import Batch, Context, Rollout

SAMPLES = 21  # stream of random numbers
DIGITS = 4  # of a gap


def samples_due(config: TrainConfig, step: int) -> bool:
    """The first step, and every `samples_every`-th."""
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
    """A line for each of `samples_kept` rollouts, drawn at random: neither the best nor the worst ones."""
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
    """`teacher_view` is the user's turn as the teacher read it, null where it read none; `gap` is None where the rollout was not distilled."""
    return {
        "step": step,
        "problem": rollout.prompt.problem,
        **({"before": list(rollout.prompt.before)} if rollout.prompt.before else {}),
        "prompt": rollout.prompt.text,
        "answer": rollout.text,
        "reward": rollout.verdict.reward,
        "feedback": rollout.verdict.feedback,
        "teacher_view": None
        if context is None
        else encoder.template.render(rollout.prompt.text, context, encoder.markers),
        "tokens": [encoder.tokenizer.decode([token]) for token in rollout.tokens],
        "gap": gap,
    }


def token_gaps(
    wanted: set[tuple[int, int]], batch: Batch | None, update: Update | None
) -> dict[tuple[int, int], list[float | None]]:
    """(group, sample) -> the teacher's log-prob less the student's at each token of the answer, in nats; null where it is not finite."""
    if batch is None or update is None or update.stats[0].teacher_logprob is None:
        return {}
    gap_BT = torch.cat([part.teacher_logprob for part in update.stats]) - torch.cat(
        [part.student_logprob for part in update.stats]
    )
    places = [(rollout.group, rollout.sample) for rollout in batch.rollouts]
    rows = [b for b, place in enumerate(places) if place in wanted and batch.distilled_B[b]]
    return {
        places[b]: [_rounded(value) for value in gap_BT[b, : len(batch.rollouts[b].tokens)].tolist()]
        for b in rows
    }


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
