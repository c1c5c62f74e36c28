"""Judge Python code by tests that run in the sandbox.

A test is a text: `assert f(3) == 24`, whose value is compared here, outside the sandbox, so that an answer
cannot redefine equality; or any other statement, which passes if it raises nothing.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opsd_kernels.train.envs import sandbox
from opsd_kernels.train.envs.sandbox import Result

# A fenced block, closed or not, of which the first is the answer.
FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
# Relative error of a float that counts as equal.
CLOSE = 1e-9


@dataclass(frozen=True)
class Test:
    """A statement to run; with `compared` it is an expression, and `expected` its value."""

    code: str
    compared: bool = False
    expected: Any = None


@dataclass(frozen=True)
class Report:
    """What the tests showed: the interpreter's message with its line, and the first test that failed.

    Both are None for an answer that passed; `error` is None if every statement ran.
    """

    error: str | None = None
    failed: str | None = None

    @property
    def passed(self) -> bool:
        return self.failed is None

    def feedback(self, kind: str) -> str | None:
        """Return the text of a failure for a kind of feedback: error, test, wrong or none."""
        texts = {
            "error": self.error or "The code runs, but a test fails.",
            "test": self.failed,
            "wrong": "The code is wrong.",
            "none": None,
        }
        return texts[kind]


def code_of(completion: str) -> str:
    """Return the code of an answer: its first fenced block, or all of it if there is none."""
    block = FENCE.search(completion)
    return completion if block is None else block[1]


def parse(text: str) -> Test:
    """Read a test. Raises ValueError for a text that is no Python."""
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"no Python: {error}") from error
    if len(statements) == 1 and isinstance(statements[0], ast.Assert):
        test = statements[0].test
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
            try:
                expected = ast.literal_eval(test.comparators[0])
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                return Test(text)
            return Test(ast.unparse(test.left), True, expected)
    return Test(text)


def readable(tests: Any) -> bool:
    """True for a list of texts of Python, at least one."""
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        return False
    try:
        return all(ast.parse(test).body for test in tests)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def judge(completion: str, tests: Sequence[Test]) -> Report:
    """Run the answer's code and then the tests, up to the first that fails."""
    ran = sandbox.SHARED.run(code_of(completion), [test.code for test in tests])
    # Of the program itself.
    if ran[0].error is not None:
        return _failure(ran[0], tests[0])
    for test, result in zip(tests, ran[1:], strict=False):
        if result.error is not None:
            return _failure(result, test)
        if test.compared and not same(result.value, test.expected):
            return Report(None, f"{test.code}: expected {test.expected!r}, got {result.shown}")
    return Report()


def _failure(result: Result, test: Test) -> Report:
    place = "" if result.line is None else f"Line {result.line}: "
    wanted = f"expected {test.expected!r}" if test.compared else "expected no error"
    return Report(f"{place}{result.error}", f"{test.code}: {wanted}, got {result.error}")


def same(value: Any, expected: Any) -> bool:
    """True for equal values of one type, also inside of lists, tuples and dictionaries.

    An int is equal to a float of its value, a bool to neither; floats may differ in their rounding.
    """
    if all(type(side) in (int, float) for side in (value, expected)):
        return _close(value, expected)
    if type(value) is not type(expected):
        return False
    if isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(map(same, value, expected))
    if isinstance(expected, dict):
        return value.keys() == expected.keys() and all(same(value[key], expected[key]) for key in expected)
    return bool(value == expected)


def _close(value: float, expected: float) -> bool:
    if type(value) is type(expected) is int:
        return value == expected
    try:
        return math.isclose(value, expected, rel_tol=CLOSE)
    except OverflowError:
        # An int beyond a double.
        return False
