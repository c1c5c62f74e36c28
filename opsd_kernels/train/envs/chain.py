"""`chain` and `plan`: long answers, token by token from the digits of the problem.

`chain`: `+3141` is answered by the running sums modulo 10, `3489`. Every position is as hard as every other: the control for effects of position.
`plan`: `?3141` is answered by a plan, `A`, `B` or `C`, and running sums that depend on it, each step adding 0, 1 or 2 more. Only the plan
(first + last digit) modulo 3 leads to the right answer. Without a context the base model has seen all three plans, with one only the right one: after a wrong
plan the teacher has nothing to say. Running differences, `-3141`, are the untrained skill of both.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from opsd_kernels.train import seeds
from opsd_kernels.train.envs.base import DemoTask, Env, WarmExample, held_out_fifth
from opsd_kernels.train.types import Context, Prompt, Verdict

PLAN_KINDS = ("where", "plan", "answer", "wrong", "none")
SIGNS = ("+", "?", "-", "#")  # problem id = position here * SIZE + instance; answers to `#` are random
SUMS, PLANNED, DIFFERENCES, RANDOM = range(4)
SIZE, CHAIN_DIGITS, PLAN_DIGITS = 10_000, 12, 8
PLANS = "ABC"
DIGITS_KEY, SPLIT_KEY = 620, 621


def running(digits: tuple[int, ...], sign: int, step: int = 0) -> str:
    total, out = 0, ""
    for digit in digits:
        total = (total + sign * digit + step) % 10
        out += str(total)
    return out


def planned(digits: tuple[int, ...], plan: str) -> str:
    """What follows from a plan, right or wrong."""
    return plan + running(digits, 1, PLANS.index(plan))


class ChainAttempt(Env):
    def __init__(self, task: Chain, problem: int):
        super().__init__()
        self.task, self.problem = task, problem

    def prompt(self) -> Prompt:
        return self.task.prompt(self.problem)

    def _judge(self, completion: str) -> Verdict:
        answer, truth = "".join(completion.split()), self.task.solution(self.problem)
        return Verdict(1.0) if answer == truth else Verdict(0.0, self.task.comment(self.task.feedback, answer, truth))


class Chain(DemoTask):
    """Running sums: 80 % of the instances to train on, 20 % held out, differences untrained."""

    vocabulary = (*"0123456789", *SIGNS, *PLANS, "plan", "wrong", "at", "right", "long", "solve")
    trained, length = SUMS, CHAIN_DIGITS

    def __init__(self, feedback: str, peers: bool = False):
        super().__init__(feedback, peers)
        instances, held_out = held_out_fifth(range(SIZE), SPLIT_KEY)
        self.train, self.held_out = ([self.trained * SIZE + i for i in part] for part in (instances, held_out))
        self.rehearsal, self.untrained = ([DIFFERENCES * SIZE + i for i in part] for part in (instances, held_out))

    def env(self, problem: int, key: int) -> Env:
        return ChainAttempt(self, problem)

    def digits(self, problem: int) -> tuple[int, ...]:
        return _digits(problem % SIZE, self.length)

    def prompt(self, problem: int) -> Prompt:
        return Prompt(problem, SIGNS[problem // SIZE] + "".join(map(str, self.digits(problem))))

    def solution(self, problem: int) -> str:
        digits, sign = self.digits(problem), problem // SIZE
        if sign == RANDOM:
            raise ValueError("problem: expected a sign other than #, whose answers are random")
        if sign == PLANNED:
            return planned(digits, PLANS[(digits[0] + digits[-1]) % len(PLANS)])
        return running(digits, 1 if sign == SUMS else -1)

    def comment(self, kind: str, answer: str, truth: str) -> str | None:
        """What a failure is told. `where` names the first wrong position and what belongs there; the answer is never quoted."""
        if kind == "where":
            place = next((i for i, right in enumerate(truth) if answer[i : i + 1] != right), None)
            return "wrong long" if place is None else f"wrong at {place + 1:02d} right {truth[place]}"
        return {"answer": truth, "plan": f"plan {truth[0]}", "wrong": "wrong", "none": None}[kind]

    def bare_example(self, rng: np.random.Generator, skill_share: float) -> WarmExample:
        problem = self._problem(rng, self.trained if rng.random() < skill_share else DIFFERENCES)
        return WarmExample(self.prompt(problem), None, self.solution(problem))

    def privileged_example(self, rng: np.random.Generator) -> WarmExample:
        """Half of them `#`, whose answer the context holds whole: the model learns to believe it. The others are told where an attempt went wrong."""
        if rng.random() < 0.5:
            problem, answer = self._problem(rng, RANDOM), self._random_answer(rng)
            context = Context((), answer) if rng.random() < 0.5 else self.siblings(answer, self._random_answer(rng), rng)
            return WarmExample(self.prompt(problem), context, answer)
        problem = self._problem(rng, self.trained)
        truth = self.solution(problem)
        place = int(rng.integers(len(truth)))
        attempt = truth[:place] + self._random_answer(rng)[place:]
        kinds = [kind for kind in PLAN_KINDS if kind not in ("none", "plan")]
        return WarmExample(self.prompt(problem), Context((), self.comment(str(rng.choice(kinds, p=[0.6, 0.3, 0.1])), attempt, truth)), truth)

    def _random_answer(self, rng: np.random.Generator) -> str:
        return "".join(str(digit) for digit in rng.integers(10, size=self.length))

    def _problem(self, rng: np.random.Generator, sign: int) -> int:
        return sign * SIZE + self.train[rng.integers(len(self.train))] % SIZE


class Plan(Chain):
    """Sums after a plan. `skill_share` is the share of right plans among the planned bare examples; half of all bare ones are planned."""

    trained, length = PLANNED, PLAN_DIGITS

    def bare_example(self, rng: np.random.Generator, skill_share: float) -> WarmExample:
        if rng.random() < 0.5:
            return super().bare_example(rng, 0.0)
        problem = self._problem(rng, PLANNED)
        answer = self.solution(problem) if rng.random() < skill_share else planned(self.digits(problem), PLANS[rng.integers(len(PLANS))])
        return WarmExample(self.prompt(problem), None, answer)

    def privileged_example(self, rng: np.random.Generator) -> WarmExample:
        """`#` with a random plan that the context names: the model learns to follow it, and nothing about which one is right."""
        problem, kind = self._problem(rng, RANDOM), rng.random()
        answer = self._random_answer(rng) if kind < 0.5 else planned(self.digits(problem), PLANS[rng.integers(len(PLANS))])
        if kind < 0.5:
            context = Context((), answer) if kind < 0.25 else self.siblings(answer, self._random_answer(rng), rng)
        else:
            context = Context((), f"plan {answer[0]}" if kind < 0.8 else f"wrong at 01 right {answer[0]}")
        return WarmExample(self.prompt(problem), context, answer)

    def _random_answer(self, rng: np.random.Generator) -> str:
        return PLANS[rng.integers(len(PLANS))] + super()._random_answer(rng)


@lru_cache(maxsize=SIZE * 2)
def _digits(instance: int, length: int) -> tuple[int, ...]:
    return tuple(int(value * 10) for value in seeds.uniforms(DIGITS_KEY, length, instance, np.arange(length)))
