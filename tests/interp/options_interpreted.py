"""The tests of the row contract's options (tests/unit/test_rows_options.py) over the Triton kernels. Collected in a subprocess of test_interpreter.py alone."""

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "unit"))
import test_rows_options
from test_rows_options import *  # noqa: F403
from test_rows_options import CLIPS, DTYPES, FORMS

from opsd_kernels.spec import Kind

test_rows_options.assert_one_rounding = functools.partial(
    test_rows_options.assert_one_rounding, interpreter=True
)
test_rows_options.SHAPES = [(1, 1), (4, 7), (1, 2500)]  # 2500: two tiles

# The whole matrix takes the interpreter a quarter of an hour. Every kind and route meets every option, in types and forms that take turns.
IN_TURN = ("test_clips", "test_teacher_mix", "test_policy")
ONE_KIND = ("test_policy_into_a_narrowed_view", "test_a_teacher_of_one_row_for_all")


def turn_of(test: str, params: dict) -> int:
    options = [*CLIPS, *CLIPS.values(), {}]
    return (
        int(params["kind"]) + IN_TURN.index(test) + (options.index(params["clip"]) if "clip" in params else 0)
    )


@pytest.fixture(autouse=True)
def covering_part(request, monkeypatch):
    test, params = (
        request.node.originalname,
        request.node.callspec.params if hasattr(request.node, "callspec") else {},
    )
    wanted = test not in ONE_KIND or params["kind"] == Kind.JSD
    if test in IN_TURN:
        turn = turn_of(test, params)
        wanted = params["dtype"] == DTYPES[turn % len(DTYPES)]
        form = list(FORMS)[(turn + (params["route"] == "fused")) % len(FORMS)]
        monkeypatch.setattr(test_rows_options, "FORMS", {form: FORMS[form]})
    if not wanted:
        pytest.skip("not in the part of the matrix that the interpreter runs")


@pytest.fixture
def backend() -> str:
    return "triton"
