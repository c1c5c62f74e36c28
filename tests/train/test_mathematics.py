"""The verifier of formulas, and a run without the library behind it."""

import sys
import threading

import pytest

from opsd_kernels.train.config import ConfigError
from opsd_kernels.train.envs import mathematics, verifiers
from opsd_kernels.train.types import Verdict


def test_the_library_is_named_if_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match="verifier: expected .*pip install .*math.* got 'math'"):
        verifiers.resolve("math")


@pytest.fixture
def judge():
    pytest.importorskip("math_verify", reason="math-verify, which compares formulas, is not installed")
    return verifiers.resolve("math")


@pytest.mark.parametrize(
    "completion, answer, right",
    [
        (r"so \boxed{\sqrt{2}}", r"\sqrt{2}", True),
        (r"\boxed{\frac{2}{\sqrt 2}}", r"\sqrt{2}", True),
        (r"the answer is $1+x^2$", "x^2+1", True),
        (r"\boxed{3\pi}", r"\pi \cdot 3", True),
        (r"\boxed{(1, 2)}", "(1,2)", True),
        (r"\boxed{[1,2]}", "[1,2)", False),
        (r"\boxed{\{2,1\}}", r"\{1,2\}", True),
        (r"\boxed{\sqrt{64}}", "8", True),
        (r"\boxed{\frac{3}{4}}", "0.75", True),
        ("It is 5.", "5", True),
        # numbers are exact
        ("0.1", "0.10000000000000001", False),
        (r"\boxed{1 234}", "235", False),
        # a part, a list, nothing
        ("1", "x^2+1", False),
        (r"\boxed{\sqrt{2}, \sqrt{3}}", r"\sqrt{3}", False),
        (r"\boxed{\sqrt{3}} or \boxed{\sqrt{2}}", r"\sqrt{3}", False),
        (r"\boxed{\sqrt{3}", r"\sqrt{3}", False),
        ("none", "5", False),
    ],
)
def test_formulas_are_compared_as_mathematics(judge, completion, answer, right):
    assert judge(completion, {"answer": answer}).success is right


@pytest.mark.parametrize("answer, readable", [("x^2", True), ("7", True), ("", False), ("\\frac{", False)])
def test_an_answer_that_is_no_formula_is_found(judge, answer, readable):
    assert mathematics.is_mathematics(answer) is readable


def test_a_comparison_without_end_is_wrong(judge, monkeypatch):
    monkeypatch.setattr(mathematics, "SECONDS", 1)
    assert judge(r"\boxed{9^{9^{9^9}}}", {"answer": r"\sqrt{2}"}) == Verdict(
        0.0, "The final answer is wrong."
    )


def test_it_serves_in_another_thread(judge):
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(judge(r"\boxed{2x}", {"answer": "x+x"})))
    thread.start(), thread.join()
    assert verdicts == [Verdict(1.0)]
