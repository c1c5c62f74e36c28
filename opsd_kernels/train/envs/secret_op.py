"""`secret_op`: an operator whose rule the base model knows in part.

`a * b` means a + 2b. Numbers are written least significant digit first, operands with two digits, answers
with three: `21*43` is 12 * 34 = 80, with the answer `080`. The base model learns `+` well, `*` up to a chosen
accuracy, and four operators whose answers are random in every example. Those can only be read from the
context, and this skill makes the model its own teacher.
"""

from __future__ import annotations

import numpy as np

from opsd_kernels.train import seeds
from opsd_kernels.train.envs.base import DemoTask, Env, WarmExample, held_out_fifth
from opsd_kernels.train.types import Context, Prompt, Verdict

KINDS = tuple("answer first first_two last marks wrong corrupted other none".split())
# Problem id = position of the operator * PAIRS + 100 * a + b.
OPERATORS = ("*", "+", "#", "%", "&", "@")
STAR, PLUS = 0, 1
PAIRS, DIGITS = 10_000, 3
SPLIT_KEY = 5077
# Shares of the kinds of feedback in the warm start.
WARM_FEEDBACK = {"answer": 2.0, "first": 1.0, "first_two": 1.0, "last": 1.0, "marks": 2.0, "wrong": 0.5}
WARM_SHARES = np.array(list(WARM_FEEDBACK.values())) / sum(WARM_FEEDBACK.values())
BARE_PLUS_SHARE, PRIVILEGED_PLUS_SHARE = 0.85, 0.25


def written(number: int, digits: int) -> str:
    return f"{number:0{digits}d}"[::-1]


class SecretOpAttempt(Env):
    """One attempt at one problem; `kind` names the feedback on a failure."""

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
    """Return the correct answer as written. Raises ValueError for the operators without one."""
    operator, pair = divmod(problem, PAIRS)
    a, b = divmod(pair, 100)
    if operator not in (STAR, PLUS):
        raise ValueError(
            f"problem: expected one of the operators * and +, got {OPERATORS[operator]}, "
            "whose answers are random"
        )
    return written(a + 2 * b if operator == STAR else a + b, DIGITS)


def feedback_text(kind: str, problem: int, truth: str, answer: str, key: int) -> str | None:
    """Return the feedback on a failure. An answer other than three digits is never quoted."""
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
        marks = ("right" if mine == right else "wrong" for mine, right in zip(answer, truth, strict=True))
        return " ".join([answer, *marks])
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
    """The task: 80 % of the `*` pairs to train on, 20 % held out; `+` is untrained."""

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
        """Draw `*` with its rule in `skill_share` of the examples, mostly `+` in the others."""
        if rng.random() < skill_share:
            problem = self.train[int(rng.integers(len(self.train)))]
        else:
            plus = rng.random() < BARE_PLUS_SHARE
            problem = self._problem(rng, PLUS if plus else int(rng.integers(PLUS + 1, len(OPERATORS))))
        return self._example(rng, problem, random_answer=problem // PAIRS > PLUS, form=None)

    def privileged_example(self, rng: np.random.Generator) -> WarmExample:
        """Draw an example with a context; `*` only with a random answer that the context holds in full.

        The model learns to follow the context, and nothing about the rule.
        """
        kind = str(rng.choice(list(WARM_FEEDBACK), p=WARM_SHARES))
        solved, silent = rng.random() < 0.4, rng.random() < 0.4
        form = (solved, None if solved and silent else kind)
        if rng.random() < PRIVILEGED_PLUS_SHARE:
            return self._example(rng, self._problem(rng, PLUS), random_answer=False, form=form)
        # Without `*` here the teacher prefers its partial knowledge to a full answer: 38 % correct, not 98 %.
        whole = solved or kind == "answer"
        operator = int(rng.integers(PLUS if whole else PLUS + 1, len(OPERATORS)))
        problem = self._problem(rng, STAR if operator == PLUS else operator)
        return self._example(rng, problem, random_answer=True, form=form)

    def _problem(self, rng: np.random.Generator, operator: int) -> int:
        """Draw a pair of the training split."""
        return operator * PAIRS + self.train[int(rng.integers(len(self.train)))]

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
        # Without feedback there is always a sibling.
        if kind is None:
            return WarmExample(prompt, self.siblings(answer, attempt, rng), answer)
        feedback = feedback_text(kind, problem, answer, attempt, 0)
        return WarmExample(prompt, Context((answer,) if solved else (), feedback), answer)
