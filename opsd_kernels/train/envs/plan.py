"""`plan`: the first token of an answer decides whether the others can be right.

`?4141` is answered by a plan, `A`, `B` or `C`, and running sums of the digits, to which each step adds 0, 1 or 2 more: `B5724`. Only the plan that
the first digit modulo 3 names leads to the right answer. The base model carries out all three and has seen the right one hardly more often than by
chance: it chooses it in a third of the answers. A teacher never saw an answer leave the plan that it was told, or knows: what it says after a wrong
one is no lesson. Running differences, `-4141`, are the untrained skill, as in `chain`.
"""

from __future__ import annotations

import numpy as np

from opsd_kernels.train.envs.base import WarmExample
from opsd_kernels.train.envs.chain import DIFFERENCES, SIZE, TRAINED, Chain, running
from opsd_kernels.train.types import Context

PLANS = "ABC"


def planned(digits: tuple[int, ...], plan: str) -> str:
    """What follows from a plan, right or wrong."""
    return plan + running(digits, 1, PLANS.index(plan))


class Plan(Chain):
    """Sums after a plan. `skill_share` is the share of right plans among the planned bare examples; half of all bare ones are planned."""

    vocabulary = (*Chain.vocabulary, "?", *PLANS, "plan")
    signs, length = "?-", 8
    told = (*Chain.told, "plan")

    def solution(self, problem: int) -> str:
        digits = self.digits(problem)
        return (
            planned(digits, PLANS[digits[0] % len(PLANS)])
            if problem // SIZE == TRAINED
            else super().solution(problem)
        )

    def comment(self, kind: str, answer: str, truth: str) -> str | None:
        return f"plan {truth[0]}" if kind == "plan" else super().comment(kind, answer, truth)

    def bare_example(self, rng: np.random.Generator, skill_share: float) -> WarmExample:
        problem = self.problem(rng, TRAINED if rng.random() < 0.5 else DIFFERENCES)
        chosen = problem // SIZE == TRAINED and rng.random() >= skill_share
        return WarmExample(
            self.prompt(problem),
            None,
            planned(self.digits(problem), self.random_plan(rng)) if chosen else self.solution(problem),
        )

    def privileged_example(self, rng: np.random.Generator) -> WarmExample:
        """A random answer that the context holds whole, or a random plan that it names: the model learns to follow it, and nothing about which is right."""
        problem, kind = self.problem(rng, TRAINED), rng.random()
        if kind < 0.5:
            return self.believing(problem, rng)
        answer = planned(self.digits(problem), self.random_plan(rng))
        told = self.comment("plan" if kind < 0.8 else "where" if kind < 0.95 else "wrong", "", answer)
        return WarmExample(self.prompt(problem), Context((), told), answer)

    def random_plan(self, rng: np.random.Generator) -> str:
        return PLANS[rng.integers(len(PLANS))]

    def random_answer(self, rng: np.random.Generator) -> str:
        return self.random_plan(rng) + super().random_answer(rng)
