"""Results do not depend on torch's default dtype, nor on autocast around the first call of a process."""

import pytest
import torch

from opsd_kernels import linear_divergence
from opsd_kernels._rows import extension
from opsd_kernels.testing import assert_same_bits, evaluate, hard_case

TRIED = (extension.gemm_unavailable, extension.gemm_fp32_unavailable)


@pytest.fixture
def default_dtype():
    """Return a function that sets the default dtype, in a process that has tried no GEMM yet."""

    def choose(dtype):
        torch.set_default_dtype(dtype)
        for tried in TRIED:
            tried.cache_clear()

    yield choose
    choose(torch.float32)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_default_dtype_changes_nothing(default_dtype, dtype, default):
    case = hard_case(40, 300, 24, dtype, shared_head=True)
    expected = evaluate(linear_divergence, case)
    default_dtype(default)
    found = evaluate(linear_divergence, case)
    assert_same_bits(found, expected)


def test_gemms_are_tried_outside_autocast(default_dtype):
    before = [tried() for tried in TRIED]
    default_dtype(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert [tried() for tried in TRIED] == before
