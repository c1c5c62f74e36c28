"""`mastermind`: find a hidden code of three symbols out of six, given three marked guesses.

`a b c 1 0 d e a 0 2 f f b 0 1` shows the guesses with their numbers of exact and of misplaced symbols; the
answer is the code. There are 216 codes, so every success probability is exact: a sum over `CODES`, or over
`consistent(problem)`. Codes are held out, not guesses. Marking a guess is the untrained skill.
"""

from __future__ import annotations

import functools
from collections import Counter
from itertools import product

import numpy as np

from opsd_kernels.train import seeds
from opsd_kernels.train.envs.base import DemoTask, Env, WarmExample, held_out_fifth
from opsd_kernels.train.types import Context, Prompt, Verdict

KINDS = ("counts", "answer", "wrong", "none")
SYMBOLS, LENGTH, GUESSES = "abcdef", 3, 3
CODES = tuple("".join(code) for code in product(SYMBOLS, repeat=LENGTH))
# Problem id = code * HISTORIES + history; from MARKING on, MARKING + guess * len(CODES) + code.
HISTORIES = 64
MARKING = len(CODES) * HISTORIES
SPLIT_KEY, HISTORY_KEY = 409, 410
COUNTS_SHARE, ANSWER_SHARE, PEER_SHARE = 0.7, 0.1, 0.1
# Largest number of marked guesses in a context of the warm start.
TOLD = 4


def marks(guess: str, code: str) -> tuple[int, int]:
    """Count the symbols in their place, and the symbols in another place."""
    exact = sum(mine == right for mine, right in zip(guess, code, strict=True))
    return exact, sum((Counter(guess) & Counter(code)).values()) - exact


def line(guess: str, code: str) -> str:
    exact, misplaced = marks(guess, code)
    return f"{' '.join(guess)} {exact} {misplaced}"


@functools.cache
def marks_table() -> np.ndarray:
    """Shape (guesses, codes): the marks of every guess for every code, as 4 * exact + misplaced."""
    pairs = [[marks(guess, code) for code in CODES] for guess in CODES]
    return np.array([[4 * exact + misplaced for exact, misplaced in row] for row in pairs], dtype=np.int8)


def history(problem: int) -> list[str]:
    """Return the guesses shown: random codes other than the hidden one."""
    code = problem // HISTORIES
    drawn = [seeds.pick(len(CODES) - 1, HISTORY_KEY, problem, turn) for turn in range(GUESSES)]
    return [CODES[guess + (guess >= code)] for guess in drawn]


def consistent(problem: int) -> list[str]:
    """Return the codes consistent with the guesses.

    A solver without a context is right once in their number.
    """
    guesses, truth = [CODES.index(guess) for guess in history(problem)], problem // HISTORIES
    table = marks_table()[guesses]
    return [CODES[code] for code in np.flatnonzero((table == table[:, truth, None]).all(0))]


def solution(problem: int) -> str:
    if problem >= MARKING:
        guess, code = divmod(problem - MARKING, len(CODES))
        return "{} {}".format(*marks(CODES[guess], CODES[code]))
    return " ".join(CODES[problem // HISTORIES])


def asked(problem: int) -> Prompt:
    if problem >= MARKING:
        guess, code = divmod(problem - MARKING, len(CODES))
        return Prompt(problem, f"{' '.join(CODES[guess])} = {' '.join(CODES[code])}")
    return Prompt(problem, " ".join(line(guess, CODES[problem // HISTORIES]) for guess in history(problem)))


def feedback_text(kind: str, problem: int, completion: str) -> str | None:
    """Return the feedback on a failure.

    It quotes a completion only if that is a code of three of the six symbols.
    """
    guess = "".join(completion.split())
    if kind == "counts" and problem < MARKING and guess in CODES:
        return line(guess, CODES[problem // HISTORIES])
    return {"counts": "wrong", "answer": solution(problem), "wrong": "wrong", "none": None}[kind]


class MastermindAttempt(Env):
    """One attempt at one problem; `kind` names the feedback on a failure."""

    def __init__(self, problem: int, kind: str):
        super().__init__()
        self.problem, self.kind = problem, kind

    def prompt(self) -> Prompt:
        return asked(self.problem)

    def _judge(self, completion: str) -> Verdict:
        if completion.split() == solution(self.problem).split():
            return Verdict(1.0)
        return Verdict(0.0, feedback_text(self.kind, self.problem, completion))


class Mastermind(DemoTask):
    """The task: 80 % of the codes to train on, 20 % held out; marking two codes is untrained."""

    vocabulary = (*SYMBOLS, *"0123=", "wrong", "solve")

    def __init__(self, feedback: str, peers: bool = False):
        super().__init__(feedback, peers)
        codes, held_out = held_out_fifth(range(len(CODES)), SPLIT_KEY)
        self.train = [code * HISTORIES + h for code in codes for h in range(HISTORIES)]
        # Codes vary first, so that a prefix of the list holds all of them.
        self.held_out = [code * HISTORIES + h for h in range(HISTORIES) for code in held_out]
        pairs, kept = held_out_fifth(range(len(CODES) ** 2), SPLIT_KEY)
        self.untrained, self.rehearsal = [MARKING + pair for pair in kept], [MARKING + pair for pair in pairs]

    def env(self, problem: int, key: int) -> Env:
        return MastermindAttempt(problem, self.feedback)

    def solution(self, problem: int) -> str:
        return solution(problem)

    def bare_example(self, rng: np.random.Generator, skill_share: float) -> WarmExample:
        problems = self.train if rng.random() < skill_share else self.rehearsal
        problem = problems[int(rng.integers(len(problems)))]
        return WarmExample(asked(problem), None, solution(problem))

    def privileged_example(self, rng: np.random.Generator) -> WarmExample:
        problem = self.train[int(rng.integers(len(self.train)))]
        answer, kind = solution(problem), rng.random()
        if kind < COUNTS_SHARE:
            return WarmExample(asked(problem), Context((), self.counted(problem, rng)), answer)
        # Marks of other codes: only the context has the answer, and the model learns to follow it.
        others = [CODES[rng.integers(len(CODES))] for _ in range(2 * GUESSES)]
        marked = map(line, others[:GUESSES], others[GUESSES:])
        prompt = Prompt(problem, " ".join(marked))
        if kind < COUNTS_SHARE + ANSWER_SHARE:
            return WarmExample(prompt, Context((), answer), answer)
        if kind < COUNTS_SHARE + ANSWER_SHARE + PEER_SHARE:
            return WarmExample(
                prompt, self.siblings(answer, " ".join(CODES[rng.integers(len(CODES))]), rng), answer
            )
        return WarmExample(asked(problem), Context((answer,), "wrong"), answer)

    def counted(self, problem: int, rng: np.random.Generator) -> str:
        """Return one to `TOLD` wrong guesses with their marks.

        Half of them are consistent with the problem, as those of a model are.
        """
        code = problem // HISTORIES
        left = [guess for guess in consistent(problem) if guess != CODES[code]]
        others = CODES[:code] + CODES[code + 1 :]
        pools = [left if left and rng.random() < 0.5 else others for _ in range(1 + rng.integers(TOLD))]
        return " ".join(line(pool[rng.integers(len(pool))], CODES[code]) for pool in pools)
