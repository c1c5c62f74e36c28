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
