"""The row contract on the device, and rows as long as real vocabularies."""

from dataclasses import replace

import placing
import pytest
import torch
from column_contract import ColumnContract, gradient, pick, scale_of
from row_cases import Rows, hard_rows, make_rows, run_rows
from row_contract import KINDS, RowContract
from row_options_contract import RowOptionsContract
from row_options_contract import make_rows as make_option_rows

from opsd_kernels._rows import backends
from opsd_kernels._rows.contract import narrowed
from opsd_kernels._rows.triton_launch import aligned
from opsd_kernels.spec import Kind
from opsd_kernels.testing import assert_same_bits

# A block holds the shortest rows, clusters of several sizes the next, none the longest. With V = 50257 only
# the first row is aligned.
VOCABULARIES = [8192, 32000, 50257, 128256, 151936, 262144, 1_000_003]
OPTION_VOCABULARIES = [32000, 50257, 151936]
if placing.SMOKE:
    VOCABULARIES, OPTION_VOCABULARIES = [8192, 50257, 151936], [50257, 151936]
if placing.DRY_RUN:
    VOCABULARIES, OPTION_VOCABULARIES = [1000, 4104], [1500]


class OnDevice:
    INTERPRETER = placing.DRY_RUN
    # Triton compiles every other size anew.
    TRITON_SHAPES: list[tuple[int, int]]

    @pytest.fixture
    def row_backend(self, backend):
        self.DTYPES = [dtype for dtype in self.DTYPES if placing.unserved(backend, dtype) is None]
        if backend == "triton" and not placing.DRY_RUN:
            self.SHAPES = self.TRITON_SHAPES
        return placing.PlacedRows(backend)


class TestRowContract(OnDevice, RowContract):
    SHAPES = [(1, 1), (3, 7), (4, 130)] if placing.DRY_RUN else RowContract.SHAPES
    TRITON_SHAPES = [(3, 7), (11, 64), (2, 4099)]
    test_the_number_of_threads_does_not_change_bits = None  # threads of a CPU

    @KINDS
    @pytest.mark.parametrize("form", ["pair", "difference, linear", "difference, softcap"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
    def test_real_vocabularies(self, row_backend, kind, form, dtype):
        for V in VOCABULARIES:
            # not cached: a truth of a million entries is 240 MB
            rows, truth = hard_rows.__wrapped__(6, V, dtype, form, kind)
            for make in (Rows.contiguous, Rows.copy):
                for route in ("apart", "fused"):
                    _, loss, gradient = run_rows(row_backend, make(rows), route)
                    self.check_loss(rows, loss, truth)
                    self.check_gradient(rows, gradient, truth, f"gradient, {route}, V={V}, {make.__name__}")

    @pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("kind", [Kind.REVERSE_KL, Kind.JSD], ids=str)
    def test_narrowed_gradient_of_real_vocabularies(self, row_backend, kind, narrow):
        for V in VOCABULARIES:
            rows, truth = hard_rows.__wrapped__(6, V, torch.float32, "pair", kind)
            for make in (Rows.contiguous, Rows.copy):
                work = make(rows)
                G = narrowed(work.S, narrow)
                run_rows(row_backend, work, "fused", G)
                self.check_gradient(rows, G, truth, f"narrowed gradient, V={V}, {make.__name__}")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_more_rows_than_blocks_fit_at_once(self, row_backend, dtype):
        """A row anywhere in the grid has the bits that it has alone."""
        few = make_rows(6, 1003, dtype, "pair", Kind.JSD).contiguous()
        times = 2 if placing.DRY_RUN else 700
        many = replace(
            few, S=few.S.repeat(times, 1), T=few.T.repeat(times, 1), factor=few.factor.repeat(times)
        )
        results = run_rows(row_backend, many, "fused"), run_rows(row_backend, few, "fused")
        for got, expected in zip(*results, strict=True):
            assert_same_bits(got, expected.repeat(times, *[1] * (expected.dim() - 1)))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_two_runs_give_the_same_bits(self, row_backend, dtype):
        for V in VOCABULARIES:
            rows = make_rows(6, V, dtype, "difference, linear", Kind.JSD).contiguous()
            runs = [run_rows(row_backend, replace(rows, S=rows.S.clone()), "fused") for _ in range(2)]
            for one, two in zip(*runs, strict=True):
                assert_same_bits(one, two)

    def test_rows_of_the_op_are_aligned(self):
        """The rows of `contiguous` begin on 16 bytes, those of `copy` do not."""
        for V in (8192, 151936):
            rows = make_rows(3, V, torch.bfloat16, "pair", Kind.JSD)
            whole = rows.contiguous()
            assert aligned(whole.S, whole.T) and not aligned(rows.S, rows.T)


class TestRowOptions(OnDevice, RowOptionsContract):
    SHAPES = [(1, 1), (4, 7)] if placing.DRY_RUN else RowOptionsContract.SHAPES
    TRITON_SHAPES = [(4, 7), (2, 4099)]

    @KINDS
    @pytest.mark.parametrize("route", ["apart", "fused"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_every_option_on_real_vocabularies(self, row_backend, kind, route, dtype):
        every = {"policy": True, "teacher_mix": 0.25, "entry_clip": 0.05, "token_clip": 0.3}
        for V in OPTION_VOCABULARIES:
            for form in self.FORMS:
                self.check(row_backend, make_option_rows(4, V, dtype, form, kind, **every), [route])


class TestColumns(OnDevice, ColumnContract):
    TRITON_SHAPES = [(3, 7), (5, 2049), (150, 33)]
    test_the_number_of_threads_does_not_change_bits = None  # threads of a CPU

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_columns_of_real_vocabularies(self, row_backend, dtype):
        for V in VOCABULARIES:
            G = gradient(70, V, dtype)
            self.check_norms(row_backend, G, scale_of(G, "given"))
            self.check_gather(row_backend, G, pick(V, "some"))
            for one, two in zip(self.run(row_backend, G), self.run(row_backend, G), strict=True):
                assert_same_bits(one, two)

    @pytest.mark.skipif(placing.DRY_RUN, reason="takes 6 GiB")
    def test_places_beyond_31_bits(self, backend, device):
        """Four rows, 2**30 entries apart: the last two begin at 2**31 and beyond."""
        rows, V, near = backends.select(backend, device), 1000, gradient(4, 1000, torch.bfloat16)
        places = torch.zeros(3 * 2**30 + V, dtype=torch.bfloat16, device=device)
        G, columns = places.as_strided((4, V), (2**30, 1)).copy_(near), pick(V, "some")
        norms, sums = rows.column_norms(G, None)
        out, rest = G.new_empty(4, len(columns)), sums.clone()
        rows.gather_columns_(G, columns.to(device), out, rest)
        assert_same_bits(out.cpu(), near[:, columns])
        exact = near.double()
        size = exact.abs().sum(1)
        for got, truth, magnitude in (
            (norms, exact.square().sum(0), exact.square().sum(0)),
            (sums, exact.sum(1), size),
            (rest, exact[:, 1::3].sum(1), size),
        ):
            self.assert_one_rounding(got.cpu(), truth, got.dtype, magnitude=magnitude)
