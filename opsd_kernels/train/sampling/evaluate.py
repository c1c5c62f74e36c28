"""Measure accuracy on held-out problems, with and without the teacher's context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from transformers import PreTrainedModel

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.contexts import build_contexts
from opsd_kernels.train.envs.base import Task
from opsd_kernels.train.sampling.rollout import Request, requests
from opsd_kernels.train.teacher import Teacher
from opsd_kernels.train.types import Context, Rollout

# The same random numbers at every evaluation of a run, so that differences are the model's.
EVALUATION_KEY = 3


class Sampling(Protocol):
    """The part of a Sampler that evaluation needs."""

    def sample(
        self, model: PreTrainedModel, task: Task, requests: Sequence[Request], *key: int
    ) -> list[Rollout]: ...

    def fitting(
        self, rollouts: Sequence[Rollout], contexts: Sequence[Context | None], again: bool = False
    ) -> list[Context | None]: ...


def accuracy(
    sampler: Sampling, model: PreTrainedModel, task: Task, problems: Sequence[int], samples: int, seed: int
) -> float | None:
    """Return the share of correct answers at the rollout temperature, or None without problems or samples.

    The `samples` answers go round the problems.
    """
    count = len(problems)
    if not count or not samples:
        return None
    asked = [
        Request(task.env(problems[i % count], 0).prompt(), i % count, i // count) for i in range(samples)
    ]
    rollouts = sampler.sample(model, task, asked, seed, EVALUATION_KEY, 0)
    return sum(rollout.verdict.success for rollout in rollouts) / len(rollouts)


def gain_interval(before: float, after: float, samples: int) -> tuple[float, float]:
    """Return the 95 % interval of after - before, two accuracies over `samples` answers each.

    Newcombe's (1998, method 10), for independent answers: those to the same problems agree more, so that the
    interval is too wide rather than too narrow.
    """
    (low_1, high_1), (low_0, high_0) = (_wilson(share, samples) for share in (after, before))
    gain = after - before
    return (
        gain - math.hypot(after - low_1, high_0 - before),
        gain + math.hypot(high_1 - after, before - low_0),
    )


def _wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's score interval of a share of `count` answers."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return middle - half, middle + half


def self_teacher_accuracy(
    sampler: Sampling,
    student: PreTrainedModel,
    teacher: Teacher,
    task: Task,
    config: TrainConfig,
    samples: int,
) -> float:
    """Return the share of correct answers when the teacher answers again with each rollout's context.

    Contexts are built as in training. A rollout without a context, or with one too long for the models,
    counts with its own verdict.
    Simplification: a trust-region teacher answers as its reference does.
    """
    # Whole groups, since a demonstration comes from a sibling.
    groups = max(1, samples // config.group_size)
    problems = [task.held_out[i % len(task.held_out)] for i in range(groups)]
    prompts = [task.env(problem, 0).prompt() for problem in problems]
    attempts = sampler.sample(
        student, task, requests(prompts, config.group_size), config.seed, EVALUATION_KEY, 1
    )
    contexts = sampler.fitting(
        attempts, build_contexts(attempts, config, config.seed, EVALUATION_KEY), again=True
    )
    asked = [
        Request(a.prompt, a.group, a.sample, context)
        for a, context in zip(attempts, contexts, strict=True)
        if context is not None
    ]
    with teacher.using() as model:
        answers = sampler.sample(model, task, asked, config.seed, EVALUATION_KEY, 2)
    right = sum(rollout.verdict.success for rollout in answers)
    alone = sum(a.verdict.success for a, context in zip(attempts, contexts, strict=True) if context is None)
    return (right + alone) / len(attempts)
