"""What a model can do: with and without the teacher's context, on problems it never trained on."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.contexts import build_contexts
from opsd_kernels.train.envs.base import Task
from opsd_kernels.train.sampling.rollout import Request, Sampler, requests
from opsd_kernels.train.teacher import Teacher

EVALUATION_KEY = (
    3  # the same random numbers at every evaluation of a run, so that differences are the model's
)


def accuracy(
    sampler: Sampler, model: PreTrainedModel, task: Task, problems: Sequence[int], samples: int, seed: int
) -> float | None:
    """Share of right answers at the rollout temperature, over `samples` answers that go round the problems; None without a problem."""
    asked = (
        []
        if not problems
        else [
            Request(task.env(problems[i % len(problems)], 0).prompt(), i % len(problems), i // len(problems))
            for i in range(samples)
        ]
    )
    if not asked:
        return None
    rollouts = sampler.sample(model, task, asked, seed, EVALUATION_KEY, 0)
    return sum(rollout.verdict.success for rollout in rollouts) / len(rollouts)


def self_teacher_accuracy(
    sampler: Sampler,
    student: PreTrainedModel,
    teacher: Teacher,
    task: Task,
    config: TrainConfig,
    samples: int,
) -> float:
    """Share of right answers when the teacher answers again with each rollout's context, built as in training.

    A rollout without a context counts as it is: there the teacher has nothing to add. Simplification: a trust-region teacher answers as its reference does.
    """
    # Whole groups, since a demonstration comes from a sibling.
    groups = max(1, samples // config.group_size)
    problems = [task.held_out[i % len(task.held_out)] for i in range(groups)]
    prompts = [task.env(problem, 0).prompt() for problem in problems]
    attempts = sampler.sample(
        student, task, requests(prompts, config.group_size), config.seed, EVALUATION_KEY, 1
    )
    contexts = build_contexts(attempts, config, config.seed, EVALUATION_KEY)
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
