"""The row contract's tests (tests/unit/test_rows.py) over the Triton kernels. Collected in the subprocesses of test_interpreter.py alone."""

import dataclasses
import functools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "unit"))
import test_rows
from test_rows import *  # noqa: F403

from opsd_kernels._rows.triton_launch import aligned as begins_on_16_bytes
from opsd_kernels.spec import Kind

test_rows.assert_one_rounding = functools.partial(test_rows.assert_one_rounding, interpreter=True)
test_rows.SHAPES = [(1, 1), (3, 7), (6, 1003), (1, 2500)]  # 2500: two tiles

# The whole matrix takes the interpreter ten minutes. In fp32 every kind meets every form; the other types meet every kind in one form.
ONE_FORM = {torch.float64: "difference, softcap", torch.bfloat16: "difference, linear", torch.float16: "pair"}
ONE_DTYPE = {
    "test_a_row_alone_has_the_bits_it_has_in_a_batch": torch.bfloat16,
    "test_zero_factor_gives_exact_zeros": torch.float32,
    "test_a_buffer_of_its_own_gets_the_same_bits": torch.float32,
}
LEFT_OUT = ("test_the_number_of_threads_does_not_change_bits",)  # the interpreter has one


def wanted(test: str, params: dict) -> bool:
    dtype = params.get("dtype")
    if test in LEFT_OUT or dtype != ONE_DTYPE.get(test, dtype):
        return False
    if test == "test_loss_and_gradient":
        return params["form"] == ONE_FORM.get(dtype, params["form"])
    if test == "test_minus_infinity_in_a_bias":
        return params["form"] == "pair" or params["kind"] in (Kind.FORWARD_KL, Kind.JSD)
    if test == "test_a_row_alone_has_the_bits_it_has_in_a_batch":
        return params["kind"] in (Kind.FORWARD_KL, Kind.JSD)
    return True


@pytest.fixture(autouse=True)
def covering_part(request):
    callspec = getattr(request.node, "callspec", None)
    if not wanted(request.node.originalname, callspec.params if callspec else {}):
        pytest.skip("not in the part of the matrix that the interpreter runs")


@pytest.fixture
def backend() -> str:
    return "triton"


@pytest.mark.parametrize("kind", [Kind.REVERSE_KL, Kind.JSD])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_aligned_rows(rows_of, dtype, kind):
    """A tile is added up in another order where rows begin on 16 bytes; the other tests' views never do."""
    rows, truth = test_rows.hard_rows(6, 2080, dtype, "pair", kind)
    aligned = dataclasses.replace(rows, S=rows.S.contiguous(), T=rows.T.contiguous())
    assert begins_on_16_bytes(aligned.S, aligned.T) and not begins_on_16_bytes(rows.S, rows.T)
    _, loss, gradient = test_rows.run_rows(rows_of, aligned, "fused")
    test_rows.check_loss(rows, loss, truth)
    test_rows.check_gradient(rows, gradient, truth)
