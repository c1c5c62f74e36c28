"""Verify answers to the user's own prompts: exactly, as numbers, as formulas, by tests or a function.

`python` alone executes the answer, in the sandbox.
"""

from __future__ import annotations

import functools
import importlib
import math
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from opsd_kernels.train.config import ConfigError
from opsd_kernels.train.config.presets import RUN_FEEDBACK
from opsd_kernels.train.envs import mathematics, python_tests, sandbox
from opsd_kernels.train.envs.numbers import last_number
from opsd_kernels.train.types import Verdict

Row = Mapping[str, Any]
Verifier = Callable[[str, Row], Verdict]

# Characters of a user's feedback that enter a context.
MAX_FEEDBACK = 4000


def resolve(name: str, feedback: str = "text") -> Verifier:
    """Return the verifier `exact`, `numeric`, `math`, `python`, or `package.module:function`.

    `feedback` is the kind that `python` gives. Raises ConfigError for anything else, for `math` without
    Math-Verify, and for `python` without its sandbox. A function takes the answer and the row of the data
    file, and returns a Verdict, a bool, a reward in [0, 1], or a pair of a reward and a feedback text.
    """
    if name == "math":
        mathematics.require()
    if name == "python":
        sandbox.require("verifier")
        return functools.partial(tested, kind=feedback if feedback in RUN_FEEDBACK else "test")
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(
            f"verifier: expected exact, numeric, math, python or package.module:function, got {name!r}"
        )
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"verifier: expected a function that can be imported, got {name!r}: {error}"
        ) from error
    if not callable(function):
        raise ConfigError(
            f"verifier: expected a function, got {name!r}, which is of type {type(function).__name__}"
        )
    return lambda completion, row: as_verdict(function(completion, row), name)


def as_verdict(result: Any, name: str) -> Verdict:
    """Convert the result of a user's function. Raises TypeError or ValueError naming the function."""
    if isinstance(result, Verdict):
        reward, feedback = result.reward, result.feedback
    else:
        reward, feedback = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(reward, (bool, int, float)) or not (feedback is None or isinstance(feedback, str)):
        raise TypeError(f"{name}: expected a Verdict, a bool, a number or (number, text), got {result!r}")
    if not (math.isfinite(reward) and 0 <= reward <= 1):
        raise ValueError(f"{name}: expected a reward in [0, 1], got {reward!r}")
    if feedback is None or reward >= 1:
        return Verdict(float(reward))
    # No tokenizer accepts a lone surrogate, which the output of a program may hold.
    return Verdict(float(reward), feedback[:MAX_FEEDBACK].encode("utf-8", "replace").decode())


def exact(completion: str, row: Row) -> Verdict:
    """Compare the whole answer with the row's, up to white space and Unicode form."""
    if _plain(completion) == _plain(str(row["answer"])):
        return Verdict(1.0)
    return Verdict(0.0, "The answer is not the expected one.")


def numeric(completion: str, row: Row) -> Verdict:
    """Compare the last number of the answer, or the one in its last `\\boxed{}`, with the row's, exactly.

    `numbers.py` says what is a number. Raises ValueError if the row's answer is none.
    """
    given, truth = last_number(completion), last_number(str(row["answer"]))
    if truth is None:
        raise ValueError(f"answer: expected a number in the row, got {row['answer']!r}")
    if given is None:
        return Verdict(0.0, "The answer holds no number.")
    return Verdict(1.0) if given == truth else Verdict(0.0, "The final number is wrong.")


def tested(completion: str, row: Row, kind: str) -> Verdict:
    """Run the answer's code and the row's `tests` in the sandbox; `kind` of python_tests is the feedback."""
    report = python_tests.judge(completion, [python_tests.parse(test) for test in row["tests"]])
    return Verdict(1.0) if report.passed else Verdict(0.0, report.feedback(kind))


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


BUILT_IN: dict[str, Verifier] = {"exact": exact, "numeric": numeric, "math": mathematics.same_mathematics}
# Of a built-in verifier: whether it can use a row's answer, and what it needs.
READABLE: dict[str, tuple[Callable[[str], bool], str]] = {
    "numeric": (lambda answer: last_number(answer) is not None, "a number"),
    "math": (mathematics.is_mathematics, "a formula or a number"),
}
