"""The extension's bf16 x bf16 -> fp32 GEMM.

Every layout and edge, exact products, the same bits on any number of threads.
"""

import pytest
import torch

from opsd_kernels._core import cpu_gemm
from opsd_kernels._rows import extension
from opsd_kernels.testing import assert_no_worse, assert_same_bits

LAYOUTS = {"rows": (False, False), "columns of b": (False, True), "columns of a": (True, False)}
SHAPES = [(1, 1, 1), (1, 64, 2), (64, 1, 31), (3, 130, 33), (65, 257, 1025), (200, 17, 2049), (130, 700, 64)]


@pytest.fixture(autouse=True)
def usable():
    reason = extension.gemm_unavailable()
    if reason is not None:
        pytest.skip(reason)


def matrix(rows: int, columns: int, transposed: bool, seed: int) -> torch.Tensor:
    """A view into a wider matrix, NaN all around it."""
    shape = (columns, rows) if transposed else (rows, columns)
    wide = torch.full((shape[0] + 2, shape[1] + 5), torch.nan, dtype=torch.bfloat16)
    inner = wide[1:-1, 3:-2]
    inner.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return inner.t() if transposed else inner


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, accumulate: bool) -> torch.Tensor:
    torch.ops.opsd_kernels.gemm_bf16_(a, b, out, accumulate)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("M, N, K", SHAPES)
def test_products_are_those_of_fp32(M, N, K, layout):
    a, b = matrix(M, K, LAYOUTS[layout][0], 0), matrix(K, N, LAYOUTS[layout][1], 1)
    truth, peer = a.double() @ b.double(), a.float() @ b.float()
    out = torch.full((M, N + 3), torch.nan)[:, :N]
    assert_no_worse(multiply(a, b, out, False), peer, truth)
    start = torch.randn(M, N, generator=torch.Generator().manual_seed(2))
    assert_no_worse(multiply(a, b, start.clone(), True), start + peer, start + truth)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_change_no_bit(layout, threads=(1, 2, 7)):
    a, b = matrix(200, 500, LAYOUTS[layout][0], 0), matrix(500, 333, LAYOUTS[layout][1], 1)
    before, results = torch.get_num_threads(), []
    for count in threads:
        torch.set_num_threads(count)
        results.append(multiply(a, b, torch.empty(200, 333), False))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(results[0], other)


def test_it_is_what_the_projections_use():
    assert cpu_gemm.cpu_gemm_name(torch.bfloat16) == "oneDNN's micro-kernel"


def test_errors_name_the_argument():
    a, b, out = torch.ones(4, 3).bfloat16(), torch.ones(3, 5).bfloat16(), torch.empty(4, 5)
    for args, message in (
        ((a.float(), b, out), "a: expected BFloat16, got Float"),
        ((a, b[:2], out), "b: expected 3 rows, got 2"),
        ((a, b, out[:, :4]), r"out: expected shape \(4, 5\), got shape \(4, 4\)"),
        (
            (a.t().contiguous().t(), b.t().contiguous().t(), out),
            "b: expected contiguous columns beside a transposed a",
        ),
        ((torch.ones(8, 6).bfloat16()[::2, ::2], b, out), "a: expected one stride of 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            multiply(*args, False)
