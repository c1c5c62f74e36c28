"""`secret_op`: an operator whose rule the base model half knows.

`a * b` means a + 2b. Numbers are written least significant digit first, operands with two digits, answers with three: `21*43` is 12 * 34 = 80,
answered `080`. The base model learns `+` well, `*` up to a chosen accuracy, and four operators whose answers are random in every example, so that
reading the context is the only way to answer those: that skill is what makes the model its own teacher.
"""

from __future__ import annotations

import numpy as np

from opsd_kernels.train import seeds
from opsd_kernels.train.envs.base import DemoTask, Env, WarmExample, held_out_fifth
from opsd_kernels.train.types import Context, Prompt, Verdict

KINDS = (
    "answer",
    "first",
    "first_two",
    "last",
    "marks",
    "wrong",
    "corrupted",
    "other",
    "none",
)  # of feedback
OPERATORS = ("*", "+", "#", "%", "&", "@")  # problem id = position here * PAIRS + 100 * a + b
STAR, PLUS = 0, 1
PAIRS, DIGITS = 10_000, 3
SPLIT_KEY = 5077
WARM_FEEDBACK = {
    "answer": 2.0,
    "first": 1.0,
    "first_two": 1.0,
    "last": 1.0,
    "marks": 2.0,
    "wrong": 0.5,
}  # shares in the warm start
WARM_SHARES = np.array(list(WARM_FEEDBACK.values())) / sum(WARM_FEEDBACK.values())
BARE_PLUS_SHARE, PRIVILEGED_PLUS_SHARE = 0.85, 0.25


def written(number: int, digits: int) -> str:
    return f"{number:0{digits}d}"[::-1]


class SecretOpAttempt(Env):
    """One attempt at one problem; `kind` names the feedback a failure gets."""

    def __init__(self, problem: int, kind: str, key: int):
        super().__init__()
        self.problem, self.kind, self.key = problem, kind, key

    def prompt(self) -> Prompt:
        operator, pair = divmod(self.problem, PAIRS)
        a, b = divmod(pair, 100)
        return Prompt(self.problem, f"{written(a, 2)}{OPERATORS[operator]}{written(b, 2)}")

    def _judge(self, completion: str) -> Verdict:
        answer = "".join(completion.split())
        truth = solution(self.problem)
        if answer == truth:
            return Verdict(1.0)
        return Verdict(0.0, feedback_text(self.kind, self.problem, truth, answer, self.key))


def solution(problem: int) -> str:
    """The right answer as written. Raises ValueError for the operators that have none."""
    operator, pair = divmod(problem, PAIRS)
    a, b = divmod(pair, 100)
    if operator not in (STAR, PLUS):
        raise ValueError(
            f"problem: expected one of the operators * and +, got {OPERATORS[operator]}, whose answers are random"
        )
    return written(a + 2 * b if operator == STAR else a + b, DIGITS)


def feedback_text(kind: str, problem: int, truth: str, answer: str, key: int) -> str | None:
    """The environment's comment on a failed attempt. An answer that is not three digits is never quoted."""
    if kind == "none":
        return None
    if kind == "corrupted":
        place = seeds.pick(DIGITS, key, 0)
        digit = (int(truth[place]) + 1 + seeds.pick(9, key, 1)) % 10
        return truth[:place] + str(digit) + truth[place + 1 :]
    if kind == "other":
        return _other_answer(problem, truth, key)
    if kind == "marks":
        if len(answer) != DIGITS or not (answer.isascii() and answer.isdigit()):
            return "wrong"
        return (
            answer
            + " "
            + " ".join(
                "right" if mine == right else "wrong" for mine, right in zip(answer, truth, strict=True)
            )
        )
    texts = {
        "answer": truth,
        "first": truth[0] + "??",
        "first_two": truth[:2] + "?",
        "last": "??" + truth[2],
        "wrong": "wrong",
    }
    return texts[kind]


def _other_answer(problem: int, truth: str, key: int) -> str:
    operator = problem // PAIRS
    draws = (solution(operator * PAIRS + seeds.pick(PAIRS, key, draw)) for draw in range(100))
    return next(answer for answer in draws if answer != truth)


class SecretOp(DemoTask):
    """The family: 80 % of the `*` pairs to train on, 20 % held out, `+` untrained."""

    vocabulary = tuple("0123456789") + OPERATORS + ("?", "right", "wrong", "solve")

    def __init__(self, feedback: str, peers: bool = False):
        super().__init__(feedback, peers)
        self.train, self.held_out = held_out_fifth(range(PAIRS), SPLIT_KEY)
        self.untrained = [PLUS * PAIRS + pair for pair in self.held_out]
        self.rehearsal = [PLUS * PAIRS + pair for pair in self.train]

    def env(self, problem: int, key: int) -> Env:
        return SecretOpAttempt(problem, self.feedback, key)

    def solution(self, problem: int) -> str:
        return solution(problem)

    def bare_example(self, rng: np.random.Generator, skill_share: float) -> WarmExample:
        """`*` with its rule in `skill_share` of the examples, mostly `+` in the others."""
        if rng.random() < skill_share:
            problem = self.train[rng.integers(len(self.train))]
        else:
            problem = self._problem(
                rng, PLUS if rng.random() < BARE_PLUS_SHARE else int(rng.integers(PLUS + 1, len(OPERATORS)))
            )
        return self._example(rng, problem, random_answer=problem // PAIRS > PLUS, form=None)

    def privileged_example(self, rng: np.random.Generator) -> WarmExample:
        """`*` comes only with a random answer that the context holds whole: the model learns to believe the context, and nothing about the rule."""
        kind = str(rng.choice(list(WARM_FEEDBACK), p=WARM_SHARES))
        solved, silent = rng.random() < 0.4, rng.random() < 0.4
        form = (solved, None if solved and silent else kind)
        if rng.random() < PRIVILEGED_PLUS_SHARE:
            return self._example(rng, self._problem(rng, PLUS), random_answer=False, form=form)
        # Without `*` among these the teacher follows its own half-knowledge against a full answer: 38 % right instead of 98 %.
        whole = solved or kind == "answer"
        operator = (
            int(rng.integers(PLUS, len(OPERATORS))) if whole else int(rng.integers(PLUS + 1, len(OPERATORS)))
        )
        return self._example(
            rng, self._problem(rng, STAR if operator == PLUS else operator), random_answer=True, form=form
        )

    def _problem(self, rng: np.random.Generator, operator: int) -> int:
        """A pair of the training split."""
        return operator * PAIRS + self.train[rng.integers(len(self.train))]

    def _example(
        self,
        rng: np.random.Generator,
        problem: int,
        random_answer: bool,
        form: tuple[bool, str | None] | None,
    ) -> WarmExample:
        answer = written(int(rng.integers(1000)), DIGITS) if random_answer else solution(problem)
        prompt = SecretOpAttempt(problem, "none", 0).prompt()
        if form is None:
            return WarmExample(prompt, None, answer)
        solved, kind = form
        keep = rng.random(DIGITS) < 0.5
        attempt = "".join(
            digit if kept else str(rng.integers(10)) for digit, kept in zip(answer, keep, strict=True)
        )
        if solved and kind is None:
            return WarmExample(prompt, self.siblings(answer, attempt, rng), answer)
        return WarmExample(
            prompt,
            Context((answer,) if solved else (), feedback_text(kind, problem, answer, attempt, 0)),
            answer,
        )
