"""What both GEMMs of the C++ extension must do: every layout and edge, the same bits on any threads."""

from collections.abc import Callable

import torch

from opsd_kernels.testing import assert_no_worse, assert_same_bits

LAYOUTS = {"rows": (False, False), "columns of b": (False, True), "columns of a": (True, False)}
SHAPES = [(1, 1, 1), (1, 64, 2), (64, 1, 31), (3, 130, 33), (65, 257, 1025), (200, 17, 2049), (130, 700, 64)]
# multiply(a, b, out, accumulate) -> out
Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor]


def inside(
    rows: int, columns: int, transposed: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a view into a wider matrix of NaN, and the matrix."""
    shape = (columns, rows) if transposed else (rows, columns)
    wide = torch.full((shape[0] + 2, shape[1] + 5), torch.nan, dtype=dtype)
    inner = wide[1:-1, 3:-2]
    return (inner.t() if transposed else inner), wide


def matrix(rows: int, columns: int, transposed: bool, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Return random numbers in a view into a wider matrix, NaN all around it."""
    view, _ = inside(rows, columns, transposed, dtype)
    return view.copy_(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))


def assert_products(multiply: Multiply, dtype: torch.dtype, layout: str, M: int, N: int, K: int) -> None:
    """Assert that products are no worse than those of fp32 `mm`, and that nothing beside them is written."""
    a, b = matrix(M, K, LAYOUTS[layout][0], 0, dtype), matrix(K, N, LAYOUTS[layout][1], 1, dtype)
    truth, peer = a.double() @ b.double(), a.float() @ b.float()
    out, around = inside(M, N, False, torch.float32)
    assert_no_worse(multiply(a, b, out, False), peer, truth)
    out.fill_(torch.nan)
    assert around.isnan().all(), "nothing beside the view is written"
    start = torch.randn(M, N, generator=torch.Generator().manual_seed(2))
    assert_no_worse(multiply(a, b, start.clone(), True), start + peer, start + truth)


# M, N, rows of b (even for bf16), rows of the tail: within one step, across two, a step of the tail alone
TAILED = [(1, 1, 2, 1), (70, 130, 64, 16), (9, 67, 1024, 32), (33, 65, 1150, 3), (5, 200, 2048, 130)]


def assert_tailed(multiply: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    """Assert that a @ [b ; tail] is that of one matrix b, whatever the layouts of b and tail."""
    for M, N, K, more in TAILED:
        for of_b, of_tail in ((True, True), (False, False), (True, False), (False, True)):
            a = matrix(M, K + more, False, 0, dtype)
            b, tail = matrix(K, N, of_b, 1, dtype), matrix(more, N, of_tail, 2, dtype)
            whole = torch.cat([b, tail])
            if more % 2 == 0:  # the last columns of a meet the tail's first rows again
                a = torch.cat([a, matrix(M, more // 2 + 1, False, 3, dtype)], 1)
                whole = torch.cat([whole, tail[: more // 2 + 1]])
            truth, peer = a.double() @ whole.double(), a.float() @ whole.float()
            out, around = inside(M, N, False, torch.float32)
            assert_no_worse(multiply(a, b, out, False, tail=tail), peer, truth)
            # Zeros: the same sums as without a tail, and without the last of a's columns
            alone = multiply(a[:, :K], b, torch.empty(M, N), False)
            none = multiply(a, b, torch.empty(M, N), False, tail=torch.zeros_like(tail))
            assert_no_worse(none, alone, alone)
            out.fill_(torch.nan)
            assert around.isnan().all(), "nothing beside the view is written"


def assert_threads_change_no_bit(run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Assert that `run` has the same bits on 1, 2 and 7 threads, and return them."""
    before, results = torch.get_num_threads(), []
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        results.append(run())
    torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(results[0], other)
    return results[0]
