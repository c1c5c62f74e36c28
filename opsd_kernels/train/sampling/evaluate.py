"""Measure accuracy on held-out problems, with and without the teacher's context."""

from __future__ import annotations

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
