"""Test the extension's fp32 GEMM, which takes the place of torch.mm on AMD's processors.

Every layout and edge, nothing written beside the result, the same bits on any number of threads.
"""

import pytest
import torch
from gemm_cases import LAYOUTS, SHAPES, assert_products, assert_tailed, assert_threads_change_no_bit, matrix

from opsd_kernels._core import loop
from opsd_kernels._rows import extension
from opsd_kernels.testing import assert_no_worse, relative_error

FP32 = torch.float32


@pytest.fixture(autouse=True)
def usable():
    reason = extension.gemm_fp32_unavailable()
    if reason is not None:
        pytest.skip(reason)


def multiply(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool = False,
    tail: torch.Tensor | None = None,
) -> torch.Tensor:
    torch.ops.opsd_kernels.gemm_fp32_(a, b, out, accumulate, tail)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("M, N, K", SHAPES)
def test_products_are_no_worse_than_those_of_torch(M, N, K, layout):
    assert_products(multiply, FP32, layout, M, N, K)


def test_the_error_of_long_sums_is_that_of_short_ones():
    """Sums are cut into chains of 256 products. In chains of 1024 it is twice as large."""
    errors = {}
    for K in (256, 1024, 4096):
        a, b = matrix(64, K, False, 0, FP32), matrix(K, 512, False, 1, FP32)
        errors[K] = relative_error(multiply(a, b, torch.empty(64, 512)), a.double() @ b.double())
    assert max(errors[1024], errors[4096]) < 1.5 * errors[256]


def test_further_rows_of_b_in_a_matrix_of_their_own():
    assert_tailed(multiply, FP32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("N", [1, 15, 16, 17])
def test_thin_results(layout, N):
    """Columns of one register: the products of an adapter."""
    for M, K in ((1, 5), (7, 2100), (8, 64), (131, 33)):
        assert_products(multiply, FP32, layout, M, N, K)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_change_no_bit(layout):
    a, b = matrix(200, 1100, LAYOUTS[layout][0], 0, FP32), matrix(1100, 333, LAYOUTS[layout][1], 1, FP32)
    assert_threads_change_no_bit(lambda: multiply(a, b, torch.empty(200, 333)))


def test_infinities_stay_in_their_rows_and_columns():
    a, b = torch.ones(70, 65), torch.ones(65, 130)
    a[3, 5], b[7, 9] = torch.inf, torch.nan
    out = multiply(a, b, torch.empty(70, 130))
    assert out[3].isposinf().sum() == 129 and out[:, 9].isnan().all()
    assert (out.isfinite().sum() == 69 * 129).item()


def test_it_is_what_the_loop_uses(monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("torch's product was called")

    h, W, G = (matrix(*shape, False, seed, FP32) for seed, shape in enumerate(((40, 50), (77, 50), (40, 77))))
    expected = [h @ W.t(), G @ W, 2 * (G.t() @ h)]
    truth = [x.double() for x in (h, W, G)]
    exact = [truth[0] @ truth[1].t(), truth[2] @ truth[1], 2 * (truth[2].t() @ truth[0])]
    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, refused)
    monkeypatch.setattr(torch.Tensor, "addmm_", refused)
    S, dh, dW = torch.empty(40, 77), torch.empty(40, 50), torch.empty(77, 50)
    loop.project(h, W, S)
    loop.project(G, W.t(), dh)
    loop.accumulate_weight_grad(G, h, dW, first=True)
    loop.accumulate_weight_grad(G, h, dW, first=False)
    for ours, peer, product in zip((S, dh, dW), expected, exact, strict=True):
        assert_no_worse(ours, peer, product)


def test_errors_name_the_argument():
    a, b, out = torch.ones(4, 3), torch.ones(3, 5), torch.empty(4, 5)
    for args, message in (
        ((a.double(), b, out), "a: expected Float, got Double"),
        ((a, b.bfloat16(), out), "b: expected Float, got BFloat16"),
        ((a, b, out.half()), "out: expected Float, got Half"),
        ((a, torch.ones(2, 5), out), "b: expected 3 rows, got 2"),
        ((a, b, torch.empty(4, 6)), r"out: expected shape \(4, 5\), got shape \(4, 6\)"),
        ((a.t().contiguous().t(), b.t().contiguous().t(), out), "b: expected contiguous columns beside"),
        ((torch.ones(8, 6)[::2, ::2], b, out), "a: expected one stride of 1"),
        ((torch.ones(3).expand(4, 3), b, out), "a: expected a stride of at least 3, got 0"),
        ((a, torch.ones(7).as_strided((3, 5), (1, 1)), out), "b: expected a stride of at least 5, got 1"),
        ((a, b, out, False, torch.ones(2, 5)), "b: expected fewer than 3 rows above a tail, got 3"),
        ((a, b[:2], out, False, torch.ones(0, 5)), "tail: expected at least one row, got 0"),
        ((a, b[:2], out, False, torch.ones(1, 4)), "tail: expected 5 columns, as in b, got 4"),
        ((a, b[:2], out, False, torch.ones(1, 5).double()), "tail: expected Float, got Double"),
        (
            (a.t().contiguous().t(), b[:2], out, False, torch.ones(1, 5)),
            "tail: expected none beside a transposed a",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            multiply(*args)
