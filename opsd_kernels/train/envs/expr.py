"""`expr`: find an expression that fits two input-output pairs.

The answer to `3:17 5:27` is `5*x+2` or an equal function. The verifier evaluates the answer on inputs that
were not shown. Lines with slopes from 2 to 9 are trained; `30-x` is the untrained skill.
"""

from __future__ import annotations

import numpy as np

from opsd_kernels.train.envs.arithmetic import ExpressionError, parse
from opsd_kernels.train.envs.base import DemoTask, Env, WarmExample, held_out_fifth
from opsd_kernels.train.types import Context, Prompt, Verdict

KINDS = ("case", "answer", "wrong", "none")
# Problem id = form * SIZE + (((slope - 2) * 10 + offset) * 10 + first input) * 3 + step - 1.
LINE, DESCENT = range(2)
SIZE = 8 * 10 * 10 * 3
# Checked in this order, without the inputs that were shown.
INPUTS = range(13)
SPLIT_KEY = 811
# Shares of the privileged warm examples; the feedback of the others is "wrong".
CASE_SHARE, ANSWER_SHARE, PEER_SHARE = 0.45, 0.25, 0.2


def parts(problem: int) -> tuple[int, int, int, int, int]:
    """Decode a problem id into (form, slope, offset, first input, second input)."""
    form, rest = divmod(problem, SIZE)
    rest, step = divmod(rest, 3)
    rest, first = divmod(rest, 10)
    slope, offset = divmod(rest, 10)
    return form, slope + 2, offset, first, first + step + 1


def solution(problem: int) -> str:
    form, slope, offset, _, _ = parts(problem)
    return f"{slope}*x+{offset}" if form == LINE else f"{10 * slope + offset}-x"


def shown(problem: int) -> tuple[int, int]:
    return parts(problem)[3:]


class ExprAttempt(Env):
    """One attempt at one problem; `kind` names the feedback on a failure."""

    def __init__(self, problem: int, kind: str):
        super().__init__()
        self.problem, self.kind = problem, kind

    def prompt(self) -> Prompt:
        truth = parse(solution(self.problem))
        return Prompt(self.problem, " ".join(f"{x}:{truth(x)}" for x in shown(self.problem)))

    def _judge(self, completion: str) -> Verdict:
        complaint = first_failure(completion, self.problem)
        if complaint is None:
            return Verdict(1.0)
        texts = {"case": complaint, "answer": solution(self.problem), "wrong": "wrong", "none": None}
        return Verdict(0.0, texts[self.kind])


def first_failure(completion: str, problem: int) -> str | None:
    """Return the evaluator's error or the first hidden input with a wrong output; None if there is none."""
    try:
        function = parse(completion)
    except ExpressionError as error:
        return str(error)
    truth = parse(solution(problem))
    failing = next((x for x in INPUTS if x not in shown(problem) and function(x) != truth(x)), None)
    if failing is None:
        return None
    return f"x={failing} expected {truth(failing)} got {str(function(failing))[:12]}"


class Expr(DemoTask):
    """The task: 80 % of the lines to train on, 20 % held out; descents are untrained."""

    words = "expected got unexpected sign end too long wrong solve".split()
    vocabulary = (*"0123456789x+-*():=", *words)

    def __init__(self, feedback: str, peers: bool = False):
        super().__init__(feedback, peers)
        self.train, self.held_out = held_out_fifth(range(SIZE), SPLIT_KEY)
        self.untrained = [DESCENT * SIZE + problem for problem in self.held_out]
        self.rehearsal = [DESCENT * SIZE + problem for problem in self.train]

    def env(self, problem: int, key: int) -> Env:
        return ExprAttempt(problem, self.feedback)

    def solution(self, problem: int) -> str:
        return solution(problem)

    def bare_example(self, rng: np.random.Generator, skill_share: float) -> WarmExample:
        problem = self._problem(rng, LINE if rng.random() < skill_share else DESCENT)
        return WarmExample(ExprAttempt(problem, "none").prompt(), None, solution(problem))

    def privileged_example(self, rng: np.random.Generator) -> WarmExample:
        problem = self._problem(rng, LINE if rng.random() < 0.75 else DESCENT)
        answer, wrong = solution(problem), solution(self._problem(rng, problem // SIZE))
        kind = rng.random()
        if kind < CASE_SHARE:
            complaint = first_failure(wrong, problem)
            return WarmExample(
                ExprAttempt(problem, "none").prompt(), Context((), complaint or "wrong"), answer
            )
        # The outputs are random, so that only the context has the answer: the model learns to follow it.
        first, second = shown(problem)
        prompt = Prompt(problem, f"{first}:{rng.integers(100)} {second}:{rng.integers(100)}")
        if kind < CASE_SHARE + ANSWER_SHARE:
            return WarmExample(prompt, Context((), answer), answer)
        if kind < CASE_SHARE + ANSWER_SHARE + PEER_SHARE:
            return WarmExample(prompt, self.siblings(answer, wrong, rng), answer)
        return WarmExample(ExprAttempt(problem, "none").prompt(), Context((answer,), "wrong"), answer)

    def _problem(self, rng: np.random.Generator, form: int) -> int:
        return form * SIZE + self.train[int(rng.integers(len(self.train)))]
