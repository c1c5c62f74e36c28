"""`chain`: neutral long answers. `+3141` is answered by the running sums modulo 10, `3489`.

Every position is as hard as every other: the control for effects of position. Running differences, `-3141`, are the untrained skill.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import numpy as np

from opsd_kernels.train import seeds
from opsd_kernels.train.envs.base import DemoTask, Env, WarmExample, held_out_fifth
from opsd_kernels.train.types import Context, Prompt, Verdict

SIZE = 10_000  # instances; problem id = skill * SIZE + instance
TRAINED, DIFFERENCES = range(2)
DIGITS_KEY, SPLIT_KEY = 620, 621


def running(digits: tuple[int, ...], sign: int, step: int = 0) -> str:
    """Sums modulo 10 of the signed digits so far, each step adding `step` more."""
    total, out = 0, ""
    for digit in digits:
        total = (total + sign * digit + step) % 10
        out += str(total)
    return out


class ChainAttempt(Env):
    def __init__(self, task: Chain, problem: int):
        super().__init__()
        self.task, self.problem = task, problem

    def prompt(self) -> Prompt:
        return self.task.prompt(self.problem)

    def _judge(self, completion: str) -> Verdict:
        answer, truth = "".join(completion.split()), self.task.solution(self.problem)
        return (
            Verdict(1.0)
            if answer == truth
            else Verdict(0.0, self.task.comment(self.task.feedback, answer, truth))
        )


class Chain(DemoTask):
    """Running sums: 80 % of the instances to train on, 20 % held out, differences untrained."""

    vocabulary = (*"0123456789+-", "wrong", "at", "right", "long", "solve")
    signs, length = "+-", 12  # of the trained skill and of the untrained one; digits
    told = ("answer", "where", "wrong")  # kinds of feedback that say something

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
        """What a failure is told. `where` names the first wrong position and what belongs there; the answer is never quoted."""
        if kind == "where":
            place = next((i for i, right in enumerate(truth) if answer[i : i + 1] != right), None)
            return "wrong long" if place is None else f"wrong at {place + 1:02d} right {truth[place]}"
        return {"answer": truth, "wrong": "wrong", "none": None}[kind]

    def bare_example(self, rng: np.random.Generator, skill_share: float) -> WarmExample:
        problem = self.problem(rng, TRAINED if rng.random() < skill_share else DIFFERENCES)
        return WarmExample(self.prompt(problem), None, self.solution(problem))

    def privileged_example(self, rng: np.random.Generator) -> WarmExample:
        """A random answer that the context holds whole: the model learns to believe it. The others are told where an attempt went wrong."""
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
        """A random answer, in the context as feedback or as a sibling's, beside which there may be other feedback."""
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
        """An instance of the training split."""
        return skill * SIZE + self.train[rng.integers(len(self.train))] % SIZE


@lru_cache(maxsize=SIZE * 2)
def _digits(instance: int, length: int) -> tuple[int, ...]:
    return tuple(int(value * 10) for value in seeds.uniforms(DIGITS_KEY, length, instance, np.arange(length)))
