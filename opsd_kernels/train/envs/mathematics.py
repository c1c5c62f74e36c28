"""`verifier=math`: expressions are compared by Math-Verify, numbers exactly, as `numeric` does.

Math-Verify reads LaTeX with a grammar and compares with sympy; nothing is executed. A comparison that takes
longer than SECONDS counts as wrong. The limit is a SIGALRM, which Python delivers to the main thread alone:
in another thread there is none.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from opsd_kernels.train.config import ConfigError
from opsd_kernels.train.envs.numbers import last_box, last_number
from opsd_kernels.train.types import Verdict

# Ordinary answers take .1 s; a tower of powers takes whatever it is given.
SECONDS = 2


def require() -> None:
    """Raise ConfigError if Math-Verify is not installed."""
    try:
        import math_verify  # noqa: F401 - optional
    except ImportError as error:
        raise ConfigError(
            "verifier: expected exact, numeric or package.module:function, as Math-Verify is not installed "
            "(pip install 'opsd_kernels[math]'), got 'math'"
        ) from error


def same_mathematics(completion: str, row: Mapping[str, Any]) -> Verdict:
    """Compare the last box of the answer, or its last formula, with the row's answer as mathematics."""
    answer = f"\\boxed{{{row['answer']}}}"
    # Of the row the whole answer must be a number: x^2 + 1 ends with one.
    given, truth = last_number(completion), last_number(answer)
    if given is not None and truth is not None:
        return Verdict(1.0) if given == truth else Verdict(0.0, "The final number is wrong.")
    box = last_box(completion)
    found = _parsed(completion if box is None else f"\\boxed{{{box}}}")
    if not found:
        return Verdict(0.0, "The answer holds no formula.")
    from math_verify import verify

    right = verify(_parsed(answer), found, timeout_seconds=_limit())
    return Verdict(1.0) if right else Verdict(0.0, "The final answer is wrong.")


def is_mathematics(answer: str) -> bool:
    """True for an answer that can be compared."""
    box = f"\\boxed{{{answer}}}"
    return last_number(box) is not None or bool(_parsed(box))


def _parsed(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    # Formulas alone: Math-Verify reads plain text with Python's `eval`.
    wanted = [LatexExtractionConfig(boxed_match_priority=0)]
    return parse(text, wanted, fallback_mode="no_fallback", parsing_timeout=_limit())


def _limit() -> int | None:
    return SECONDS if threading.current_thread() is threading.main_thread() else None
