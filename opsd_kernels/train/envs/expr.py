"""`expr`: find an expression that fits two input-output pairs. `3:17 5:27` is answered `5*x+2`, or anything else that is the same function.

The verifier evaluates the answer on inputs that were not shown. Lines with slopes from 2 to 9 are trained; `30-x` is the untrained skill.
"""

from __future__ import annotations

import numpy as np

from opsd_kernels.train.envs.arithmetic import ExpressionError, parse
from opsd_kernels.train.envs.base import DemoTask, Env, WarmExample, held_out_fifth
from opsd_kernels.train.types import Context, Prompt, Verdict

KINDS = ("case", "answer", "wrong", "none")
LINE, DESCENT = (
    0,
    1,
)  # problem id = form * SIZE + (((slope - 2) * 10 + offset) * 10 + first input) * 3 + step - 1
SIZE = 8 * 10 * 10 * 3
INPUTS = range(13)  # checked in this order, those that were shown excepted
SPLIT_KEY = 811
CASE_SHARE, ANSWER_SHARE, PEER_SHARE = (
    0.45,
    0.25,
    0.2,
)  # of the privileged warm examples; the rest is told "wrong"


def parts(problem: int) -> tuple[int, int, int, int, int]:
    """(form, slope, offset, first input, second input)."""
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
    """One attempt at one problem; `kind` names the feedback a failure gets."""

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
    """The evaluator's error, or the first hidden input at which the answer differs from the truth. None where it is right."""
    try:
        function = parse(completion)
    except ExpressionError as error:
        return str(error)
    truth = parse(solution(problem))
    failing = next((x for x in INPUTS if x not in shown(problem) and function(x) != truth(x)), None)
    return (
        None
        if failing is None
        else f"x={failing} expected {truth(failing)} got {str(function(failing))[:12]}"
    )


class Expr(DemoTask):
    """80 % of the lines to train on, 20 % held out, descents untrained."""

    vocabulary = (
        *"0123456789x+-*():=",
        "expected",
        "got",
        "unexpected",
        "sign",
        "end",
        "too",
        "long",
        "wrong",
        "solve",
    )

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
        # The outputs are random here, so that only the context tells: the model learns to believe it.
        first, second = shown(problem)
        prompt = Prompt(problem, f"{first}:{rng.integers(100)} {second}:{rng.integers(100)}")
        if kind < CASE_SHARE + ANSWER_SHARE:
            return WarmExample(prompt, Context((), answer), answer)
        if kind < CASE_SHARE + ANSWER_SHARE + PEER_SHARE:
            return WarmExample(prompt, self.siblings(answer, wrong, rng), answer)
        return WarmExample(ExprAttempt(problem, "none").prompt(), Context((answer,), "wrong"), answer)

    def _problem(self, rng: np.random.Generator, form: int) -> int:
        return form * SIZE + self.train[rng.integers(len(self.train))]
