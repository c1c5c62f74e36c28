"""The row contract's columns of a gradient, their norms and the kept ones, as a test class.

See row_contract.py.
"""

import math

import pytest
import torch
from row_cases import strided
from row_contract import EACH_DTYPE, RowChecks
from torch import Tensor

from opsd_kernels._rows.contract import RowBackend, narrowed
from opsd_kernels.testing import assert_same_bits

SCALES = ("none", "given", "zeros")
PICKS = ("none", "one", "some", "all")
LAYOUTS = ("contiguous", "strided", "narrowed")


def gradient(n: int, V: int, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """Shape (n, V): rows that sum to nearly zero, of sizes from 1 to 2**-12; row 2 is zero."""
    gen = torch.Generator().manual_seed(n + V)
    G = torch.randn(n, V, generator=gen, dtype=torch.float64)
    G -= G.mean(1, keepdim=True)
    G *= 2.0 ** -(torch.arange(n) % 5 * 3)[:, None]
    G[2:3] = 0
    G = G.to(dtype)
    if layout == "strided":
        return strided(G, 8, 5)
    if layout == "narrowed":
        return narrowed(strided(torch.zeros(n, V), 3, 1), dtype).copy_(G)
    return G


def scale_of(G: Tensor, name: str) -> Tensor | None:
    """Shape (n,), of the dtype of the statistics, or None. Every third of "zeros" is one."""
    wide = torch.promote_types(G.dtype, torch.float32)
    rows = torch.arange(len(G))
    given = (torch.linspace(0.5, -3.0, len(G), dtype=torch.float64)).to(wide)
    return {"none": None, "given": given, "zeros": torch.where(rows % 3 == 0, 0, given)}[name]


def pick(V: int, name: str) -> Tensor:
    """Shape (K,) int64, ascending."""
    columns = torch.arange(V)
    return {"none": columns[:0], "one": columns[-1:], "some": columns[columns % 3 != 1], "all": columns}[name]


def layouts(dtype: torch.dtype) -> tuple[str, ...]:
    return LAYOUTS if dtype.itemsize == 2 else LAYOUTS[:2]


class ColumnContract(RowChecks):
    """column_norms and gather_columns_."""

    # (n, V): one entry, ragged, more columns than a block of any backend, more rows than one program sums
    SHAPES = [(1, 1), (3, 7), (5, 2049), (150, 33)]

    def check_norms(self, row_backend: RowBackend, G: Tensor, scale: Tensor | None) -> None:
        wide, exact = torch.promote_types(G.dtype, torch.float32), G.double()
        before = G.clone()
        norms, sums = row_backend.column_norms(G, scale)
        assert norms.dtype == sums.dtype == wide
        assert_same_bits(G, before)
        scaled = exact if scale is None else exact * scale.double()[:, None]
        truth = scaled.square().sum(0)
        # relative to the norm itself: nothing cancels
        self.assert_one_rounding(norms, truth, wide, magnitude=truth, name=f"norms of {tuple(G.shape)}")
        self.assert_one_rounding(sums, exact.sum(1), wide, magnitude=exact.abs().sum(1), name="row sums")

    @EACH_DTYPE
    @pytest.mark.parametrize("scale", SCALES)
    def test_norms(self, row_backend, dtype, scale):
        for n, V in self.SHAPES:
            for layout in layouts(dtype):
                G = gradient(n, V, dtype, layout)
                self.check_norms(row_backend, G, scale_of(G, scale))

    def check_gather(self, row_backend: RowBackend, G: Tensor, columns: Tensor) -> None:
        """`out` is part of a wider buffer, as in the op. Nothing is written beside it."""
        n, K = len(G), len(columns)
        wide, exact = torch.promote_types(G.dtype, torch.float32), G.double()
        buffer = torch.full((n, K + 3), math.nan, dtype=G.dtype)
        out, sums = buffer[:, :K], exact.sum(1).to(wide)
        expected = sums.double() - exact[:, columns].sum(1)
        row_backend.gather_columns_(G, columns, out, sums)
        assert_same_bits(out, G[:, columns])
        assert buffer[:, K:].isnan().all()
        magnitude = exact.abs().sum(1) + expected.abs()
        self.assert_one_rounding(sums, expected, wide, magnitude=magnitude, name="sums of the others")

    @EACH_DTYPE
    @pytest.mark.parametrize("picked", PICKS)
    def test_gather(self, row_backend, dtype, picked):
        for n, V in self.SHAPES:
            for layout in layouts(dtype):
                self.check_gather(row_backend, gradient(n, V, dtype, layout), pick(V, picked))

    def run(self, row_backend: RowBackend, G: Tensor) -> tuple[Tensor, ...]:
        norms, sums = row_backend.column_norms(G, scale_of(G, "given"))
        columns = pick(G.shape[1], "some")
        out, rest = G.new_empty(len(G), len(columns)), sums.clone()
        row_backend.gather_columns_(G, columns, out, rest)
        return norms, sums, out, rest

    @EACH_DTYPE
    def test_two_calls_give_the_same_bits(self, row_backend, dtype):
        for n, V in self.SHAPES:
            G = gradient(n, V, dtype, "strided")
            for one, two in zip(self.run(row_backend, G), self.run(row_backend, G), strict=True):
                assert_same_bits(one, two)

    @EACH_DTYPE
    def test_the_number_of_threads_does_not_change_bits(self, row_backend, dtype):
        threads = torch.get_num_threads()
        for n, V in self.SHAPES:
            G, results = gradient(n, V, dtype, "strided"), []
            try:
                for count in (1, 2):
                    torch.set_num_threads(count)
                    results.append(self.run(row_backend, G))
            finally:
                torch.set_num_threads(threads)
            for one, two in zip(*results, strict=True):
                assert_same_bits(one, two)
