"""`chain`: long answers without structure. The answer to `+3141` is its running sums modulo 10, `3489`.

All positions are equally hard: the control for effects of position. Running differences, `-3141`, are the
untrained skill.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import numpy as np

from opsd_kernels.train import seeds
from opsd_kernels.train.envs.base import DemoTask, Env, WarmExample, held_out_fifth
from opsd_kernels.train.types import Context, Prompt, Verdict

# Instances. Problem id = skill * SIZE + instance.
SIZE = 10_000
TRAINED, DIFFERENCES = range(2)
DIGITS_KEY, SPLIT_KEY = 620, 621


def running(digits: tuple[int, ...], sign: int, step: int = 0) -> str:
    """Return the running sums modulo 10 of the signed digits, each step adding `step` more."""
    total, out = 0, ""
    for digit in digits:
        total = (total + sign * digit + step) % 10
        out += str(total)
    return out


class ChainAttempt(Env):
    """One attempt at one problem of a chain task."""

    def __init__(self, task: Chain, problem: int):
        super().__init__()
        self.task, self.problem = task, problem

    def prompt(self) -> Prompt:
        return self.task.prompt(self.problem)

    def _judge(self, completion: str) -> Verdict:
        answer, truth = "".join(completion.split()), self.task.solution(self.problem)
        if answer == truth:
            return Verdict(1.0)
        return Verdict(0.0, self.task.comment(self.task.feedback, answer, truth))


class Chain(DemoTask):
    """Running sums: 80 % of the instances to train on, 20 % held out, differences untrained."""

    vocabulary = (*"0123456789+-", "wrong", "at", "right", "long", "solve")
    # Signs of the trained and of the untrained skill, and the number of digits.
    signs, length = "+-", 12
    # Kinds of feedback with a text.
    told: tuple[str, ...] = ("answer", "where", "wrong")

    def __init__(self, feedback: str, peers: bool = False):
        super().__init__(feedback, peers)
        instances, held_out = held_out_fifth(range(SIZE), SPLIT_KEY)
        self.train, self.held_out = ([TRAINED * SIZE + i for i in part] for part in (instances, held_out))
        self.rehearsal, self.untrained = (
            [DIFFERENCES * SIZE + i for i in part] for part in (instances, held_out)
        )

    def env(self, problem: int, key: int) -> Env:
        return ChainAttempt(self, problem)

    def digits(self, problem: int) -> tuple[int, ...]:
        return _digits(problem % SIZE, self.length)

    def prompt(self, problem: int) -> Prompt:
        return Prompt(problem, self.signs[problem // SIZE] + "".join(map(str, self.digits(problem))))

    def solution(self, problem: int) -> str:
        return running(self.digits(problem), 1 if problem // SIZE == TRAINED else -1)

    def comment(self, kind: str, answer: str, truth: str) -> str | None:
        """Return the feedback on a failure, which never quotes the answer.

        `where` names the first wrong position and the digit that belongs there.
        """
        if kind == "where":
            place = next((i for i, right in enumerate(truth) if answer[i : i + 1] != right), None)
            return "wrong long" if place is None else f"wrong at {place + 1:02d} right {truth[place]}"
        return {"answer": truth, "wrong": "wrong", "none": None}[kind]

    def bare_example(self, rng: np.random.Generator, skill_share: float) -> WarmExample:
        problem = self.problem(rng, TRAINED if rng.random() < skill_share else DIFFERENCES)
        return WarmExample(self.prompt(problem), None, self.solution(problem))

    def privileged_example(self, rng: np.random.Generator) -> WarmExample:
        """Draw a random answer that the context holds in full, so that the model learns to follow it.

        The context of the other examples is the first error of an attempt.
        """
        problem = self.problem(rng, TRAINED)
        if rng.random() < 0.7:
            return self.believing(problem, rng)
        truth = self.solution(problem)
        place = int(rng.integers(len(truth)))
        attempt = truth[:place] + self.random_answer(rng)[place:]
        return WarmExample(
            self.prompt(problem),
            Context((), self.comment("where" if rng.random() < 0.8 else "wrong", attempt, truth)),
            truth,
        )

    def believing(self, problem: int, rng: np.random.Generator) -> WarmExample:
        """Draw a random answer and show it in the context, as feedback or as a sibling's."""
        answer, attempt, form = self.random_answer(rng), self.random_answer(rng), rng.random()
        if form < 0.4:
            return WarmExample(self.prompt(problem), Context((), answer), answer)
        told = None if form < 0.7 else self.comment(str(rng.choice(self.told)), attempt, answer)
        return WarmExample(
            self.prompt(problem),
            dataclasses.replace(self.siblings(answer, attempt, rng), feedback=told),
            answer,
        )

    def random_answer(self, rng: np.random.Generator) -> str:
        return "".join(str(digit) for digit in rng.integers(10, size=self.length))

    def problem(self, rng: np.random.Generator, skill: int) -> int:
        """Draw an instance of the training split."""
        return skill * SIZE + self.train[int(rng.integers(len(self.train)))] % SIZE


@lru_cache(maxsize=SIZE * 2)
def _digits(instance: int, length: int) -> tuple[int, ...]:
    return tuple(int(value * 10) for value in seeds.uniforms(DIGITS_KEY, length, instance, np.arange(length)))
