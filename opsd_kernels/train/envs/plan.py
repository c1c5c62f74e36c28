"""`plan`: the first token of an answer decides whether the rest can be correct.

The answer to `?4141` is a plan, `A`, `B` or `C`, and the running sums of the digits, to which each step adds
0, 1 or 2: `B5724`. The first digit modulo 3 names the correct plan. The base model carries out all three and
has seen the correct one hardly more often than by chance: it chooses it in a third of the answers. No answer
in the teacher's training leaves the plan of its context, so its distribution after a wrong plan teaches
nothing. Running differences, `-4141`, are the untrained skill, as in `chain`.
"""

from __future__ import annotations

import numpy as np

from opsd_kernels.train.envs.base import WarmExample
from opsd_kernels.train.envs.chain import DIFFERENCES, SIZE, TRAINED, Chain, running
from opsd_kernels.train.types import Context

PLANS = "ABC"


def planned(digits: tuple[int, ...], plan: str) -> str:
    """Return the answer by a plan, correct or not."""
    return plan + running(digits, 1, PLANS.index(plan))


class Plan(Chain):
    """Sums after a plan.

    Half of the bare examples are planned; `skill_share` is the share of correct plans among those.
    """

    vocabulary = (*Chain.vocabulary, "?", *PLANS, "plan")
    signs, length = "?-", 8
    told = (*Chain.told, "plan")

    def solution(self, problem: int) -> str:
        digits = self.digits(problem)
        if problem // SIZE != TRAINED:
            return super().solution(problem)
        return planned(digits, PLANS[digits[0] % len(PLANS)])

    def comment(self, kind: str, answer: str, truth: str) -> str | None:
        return f"plan {truth[0]}" if kind == "plan" else super().comment(kind, answer, truth)

    def bare_example(self, rng: np.random.Generator, skill_share: float) -> WarmExample:
        problem = self.problem(rng, TRAINED if rng.random() < 0.5 else DIFFERENCES)
        chosen = problem // SIZE == TRAINED and rng.random() >= skill_share
        answer = planned(self.digits(problem), self.random_plan(rng)) if chosen else self.solution(problem)
        return WarmExample(self.prompt(problem), None, answer)

    def privileged_example(self, rng: np.random.Generator) -> WarmExample:
        """Draw a random answer that the context holds in full, or a random plan that it names.

        The model learns to follow the context, and nothing about which plan is correct.
        """
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
