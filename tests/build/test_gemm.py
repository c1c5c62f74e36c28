"""The extension's bf16 x bf16 GEMM, with an fp32 result or with a bf16 one less a constant of each row.

Every layout and edge, exact products, the same bits on any number of threads.
"""

import pytest
import torch
from gemm_cases import LAYOUTS, SHAPES, assert_products, assert_tailed, assert_threads_change_no_bit, matrix

from opsd_kernels._core import cpu_gemm
from opsd_kernels._rows import extension
from opsd_kernels.testing import assert_no_worse, assert_one_rounding, assert_same_bits

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def usable():
    reason = extension.gemm_unavailable()
    if reason is not None:
        pytest.skip(reason)


def multiply(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool,
    shift: torch.Tensor | None = None,
    tail: torch.Tensor | None = None,
) -> torch.Tensor:
    torch.ops.opsd_kernels.gemm_bf16_(a, b, out, accumulate, shift, tail)
    return out


def test_further_rows_of_b_in_a_matrix_of_their_own():
    assert_tailed(multiply, BF16)


@pytest.mark.parametrize("K, more", [(64, 16), (1024, 33), (3000, 5)])
def test_a_bf16_result_of_both_is_that_of_one_matrix(K, more):
    a, b, tail = (
        matrix(70, K + more, False, 0, BF16),
        matrix(K, 333, True, 1, BF16),
        matrix(more, 333, True, 2, BF16),
    )
    shift = torch.randn(70)
    whole = torch.cat([b.t(), tail.t()], 1).t()
    found, one = (
        multiply(a, right, torch.empty(70, 333, dtype=BF16), False, shift, rest)
        for right, rest in ((b, tail), (whole, None))
    )
    assert_same_bits(found, one)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("M, N, K", SHAPES)
def test_products_are_those_of_fp32(M, N, K, layout):
    assert_products(multiply, BF16, layout, M, N, K)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_change_no_bit(layout):
    a, b = matrix(200, 500, LAYOUTS[layout][0], 0, BF16), matrix(500, 333, LAYOUTS[layout][1], 1, BF16)
    assert_threads_change_no_bit(lambda: multiply(a, b, torch.empty(200, 333), False))


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns of b"])
@pytest.mark.parametrize("M, N, K", [*SHAPES, (300, 1100, 2051), (64, 64, 1024), (1, 517, 3001)])
def test_a_bf16_result_is_rounded_once_after_the_shift(M, N, K, transposed):
    """Large products, near the constant subtracted from them, keep their digits."""
    a, b = matrix(M, K, False, 0, BF16), matrix(K, N, transposed, 1, BF16)
    exact = a.double() @ b.double()
    shift = exact[:, N // 2].float() - torch.rand(M, generator=torch.Generator().manual_seed(2))
    whole = torch.full((M + 1, N + 3), torch.nan, dtype=torch.bfloat16)
    out = multiply(a, b, whole[1:, 1 : N + 1], False, shift)
    # The fp32 sums of K products round as those of torch.mm do.
    sums = (a.float() @ b.float() - exact).abs().max().item() + 2e-7 * exact.abs().max().item()
    assert_one_rounding(out, exact - shift.double()[:, None], torch.bfloat16, magnitude=1 + sums / 1e-6)
    around = whole.clone()
    around[1:, 1 : N + 1] = torch.nan
    assert around.isnan().all(), "nothing beside the view is written"
    assert_same_bits(
        multiply(a, b, torch.empty_like(out), False, torch.zeros(M)),
        multiply(a, b, torch.empty_like(out), False),
    )


def test_threads_change_no_bit_of_a_shifted_result():
    a, b, shift = matrix(200, 501, False, 0, BF16), matrix(501, 1333, True, 1, BF16), torch.randn(200)

    def run(rows: slice = slice(None)) -> torch.Tensor:
        out = torch.empty(len(a[rows]), 1333, dtype=BF16)
        return multiply(a[rows], b, out, False, shift[rows])

    whole = assert_threads_change_no_bit(run)
    assert_same_bits(run(slice(77, 78)), whole[77:78])


def test_it_is_what_the_projections_use():
    assert cpu_gemm.cpu_gemm_name(torch.bfloat16) == "oneDNN's micro-kernel"


def test_errors_name_the_argument():
    a, b, out = torch.ones(4, 3).bfloat16(), torch.ones(3, 5).bfloat16(), torch.empty(4, 5)
    narrow, shift = out.bfloat16(), torch.zeros(4)
    for args, message in (
        ((a, b, narrow, True), "accumulate: expected false with a bf16 out, got true"),
        ((a.t().contiguous().t(), b, narrow, False), "a: expected contiguous columns with a bf16 out"),
        ((a, b, out, False, shift), "shift: expected none with an fp32 out, got one"),
        ((a, b, narrow, False, shift.double()), "shift: expected Float, got Double"),
        ((a, b, narrow, False, shift[:3]), "shift: expected contiguous, one per row of a, got 3"),
        ((a, b, narrow, False, torch.zeros(8)[::2]), "shift: expected contiguous, one per row of a"),
        ((a, b, out.half(), False), "out: expected Float, got Half"),
        ((a, b[:1], out, False, None, b[:2]), "b: expected an even number of rows above a tail, got 1"),
        ((torch.cat([a, a], 1), b[:2], out, False, None, b), "tail: expected an even number of rows where"),
    ):
        with pytest.raises(RuntimeError, match=message):
            multiply(*args)
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


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 3, 67, 2), (33, 129, 1024, 7)], ids=str)
def test_dots_at_a_few_columns(shape):
    C, V, H, K = shape
    gen = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n + 1, H + 3, generator=gen).bfloat16()[1:, 1 : H + 1] for n in (C, V))
    columns = torch.randint(V, (C, K), generator=gen)
    out = torch.full((C, K), torch.nan)
    torch.ops.opsd_kernels.dots_bf16_(a, b, columns, out)
    plain = (a.float()[:, None] * b.float()[columns]).sum(-1)
    assert_no_worse(out, plain, (a.double()[:, None] * b.double()[columns]).sum(-1))
    with pytest.raises(RuntimeError, match=rf"columns: expected entries in \[0, {V}\)"):
        torch.ops.opsd_kernels.dots_bf16_(a, b, columns + V, out)
    with pytest.raises(RuntimeError, match="out: expected"):
        torch.ops.opsd_kernels.dots_bf16_(a, b, columns, out[:, :0])
