"""`python`: write a small function, judged by hidden tests in the sandbox. For real models.

The prompt says what f(x) returns and shows two tests. Single-digit sums in words are the untrained skill.
"""

from __future__ import annotations

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
        return Verdict(0.0, self.problem.solution if self.kind == "answer" else report.feedback(self.kind))


def question(problem: Problem) -> str:
    shown = "\n".join(problem.tests[:SHOWN])
    return f"Write a Python function f(x) that returns {problem.returns}. Reply with the code only.\n{shown}"


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
        numbers = range(len(problems()))
        self.train = [number for number in numbers if not problems()[number].held_out]
        self.held_out = [number for number in numbers if problems()[number].held_out]
        self.rehearsal, self.untrained = held_out_fifth(range(SUMS, SUMS + 100), SPLIT_KEY)

    def env(self, problem: int, key: int) -> Env:
        return SumAttempt(problem) if problem >= SUMS else PythonAttempt(problem, self.feedback)
