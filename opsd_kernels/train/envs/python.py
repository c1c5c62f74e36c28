"""`python`: write a small function, judged by hidden tests in the sandbox. For real models.

The prompt says what f(x) returns and shows two tests. Single-digit sums in words are the untrained skill.
"""

from __future__ import annotations

from opsd_kernels.train import seeds
from opsd_kernels.train.contexts import ContextTemplate
from opsd_kernels.train.envs import python_tests, sandbox
from opsd_kernels.train.envs.base import Env, Task, held_out_fifth
from opsd_kernels.train.envs.numbers import last_number
from opsd_kernels.train.envs.python_problems import SHOWN, Problem, problems
from opsd_kernels.train.types import Prompt, Verdict

# Problem id of the sum a + b: SUMS + 10 * a + b.
SUMS = 1_000_000
SPLIT_KEY = 4021


class PythonAttempt(Env):
    """One attempt at one problem; `kind` names the feedback on a failure."""

    def __init__(self, number: int, kind: str):
        super().__init__()
        self.number, self.problem, self.kind = number, problems()[number], kind

    def prompt(self) -> Prompt:
        return Prompt(self.number, question(self.problem))

    def _judge(self, completion: str) -> Verdict:
        report = python_tests.judge(completion, [python_tests.parse(test) for test in self.problem.tests])
        if report.passed:
            return Verdict(1.0)
        if self.kind == "answer":
            return Verdict(0.0, f"The code is wrong. A correct solution:\n{self.problem.solution}")
        return Verdict(0.0, report.feedback(self.kind))


def question(problem: Problem) -> str:
    """Return the user's turn.

    With the tests as `assert` lines SmolLM2 goes on writing tests: .07 of its answers are right, not .15.
    """
    shown = " and ".join(test.removeprefix("assert ") for test in problem.tests[:SHOWN])
    return (
        f"Write a Python function f(x) that returns {problem.returns}. For example, {shown}. "
        "Reply with the code only."
    )


class SumAttempt(Env):
    """One attempt at a sum of two digits in words, the untrained skill."""

    def __init__(self, number: int):
        super().__init__()
        self.number, (self.a, self.b) = number, divmod(number - SUMS, 10)

    def prompt(self) -> Prompt:
        return Prompt(self.number, f"What is {self.a} plus {self.b}? Reply with the number only.")

    def _judge(self, completion: str) -> Verdict:
        return Verdict(float(last_number(completion) == self.a + self.b))


class Python(Task):
    """The task. Held out are whole templates, and a fifth of the constants of the others.

    Raises ConfigError if the sandbox is missing.
    """

    template = ContextTemplate()

    def __init__(self, feedback: str):
        sandbox.require()
        self.feedback = feedback
        # Mixed, so that an evaluation of a few answers asks for all topics.
        numbers = seeds.shuffled(range(len(problems())), SPLIT_KEY)
        self.train = [number for number in numbers if not problems()[number].held_out]
        self.held_out = [number for number in numbers if problems()[number].held_out]
        self.rehearsal, self.untrained = held_out_fifth(range(SUMS, SUMS + 100), SPLIT_KEY)

    def env(self, problem: int, key: int) -> Env:
        return SumAttempt(problem) if problem >= SUMS else PythonAttempt(problem, self.feedback)
