"""The row contract on the emulated CUDA kernels. Collected in the subprocesses of test_emulated.py alone."""

import dataclasses
import os

import pytest
import torch
from covering_part import CoveringPart
from row_cases import hard_rows, run_rows
from row_contract import RowContract
from row_options_contract import RowOptionsContract, make_rows

from opsd_kernels._rows import backends, extension
from opsd_kernels.spec import Kind
from opsd_kernels.testing import assert_same_bits

extension.load()
torch.ops.load_library(os.environ["OPSD_EMULATED_LIBRARY"])

IN_FLOAT64 = ("test_an_infinite_term_is_clipped", "test_a_teacher_of_one_row_for_all")


class OnEmulator(CoveringPart):
    ROWS = 6

    @pytest.fixture
    def row_backend(self):
        return backends.CompiledRows(torch.ops.opsd_emulated)

    def served(self, test: str, params: dict) -> bool:
        """The CUDA kernels have no float64."""
        return params.get("dtype") != torch.float64 and test not in IN_FLOAT64


class TestRowContract(OnEmulator, RowContract):
    SHAPES = [(1, 1), (3, 7), (6, 1003), (1, 2065)]
    HARD = (6, 1003)

    @pytest.mark.parametrize("kind", [Kind.REVERSE_KL, Kind.JSD, Kind.MIXED_KL])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_aligned_rows(self, row_backend, dtype, kind):
        """Rows that begin on 16 bytes are read in vectors; the other tests' views never begin there."""
        rows, truth = hard_rows(6, 2080, dtype, "pair", kind)
        aligned = rows.contiguous()
        assert aligned.S.data_ptr() % 16 == aligned.T.data_ptr() % 16 == 0
        for route in ("apart", "fused"):
            work = dataclasses.replace(aligned, S=aligned.S.clone())
            _, loss, gradient = run_rows(row_backend, work, route)
            self.check_loss(rows, loss, truth)
            self.check_gradient(rows, gradient, truth)

    @pytest.mark.parametrize(
        "V, itemsize, architecture, expected",
        [
            (151936, 2, 90, "fused 8 of 256 with 18992 entries each in 74 KiB"),
            (32000, 2, 90, "fused 2 of 256 with 16000 entries each in 63 KiB"),
            (151936, 4, 90, "fused 8 of 256 with 18992 entries each in 149 KiB"),
            (256000, 4, 90, None),
            (151936, 2, 80, None),
        ],
    )
    def test_launches_are_as_documented(self, V, itemsize, architecture, expected):
        text = torch.ops.opsd_emulated.cuda_launch(V, itemsize, architecture)
        assert text.startswith("each sweep one block of 256 threads per row")
        assert (expected in text) if expected else ("fused" not in text)


class TestRowOptions(OnEmulator, RowOptionsContract):
    SHAPES = [(1, 1), (4, 7), (5, 1003), (1, 2065)]

    @pytest.mark.parametrize("kind", [Kind.FORWARD_KL, Kind.JSD])
    def test_a_teacher_of_one_row_for_all_in_fp32(self, row_backend, kind):
        """Row stride 0 gives the bits of a repeated row."""
        rows = make_rows(5, 1003, torch.float32, "pair", kind)
        one = dataclasses.replace(rows, T=rows.T[:1].expand(5, -1))
        many = dataclasses.replace(rows, T=one.T.contiguous(), S=rows.S.clone())
        results = [
            row_backend.row_fused_(x.S, x.T, x.factor, x.spec, None, None, True, x.S) for x in (one, many)
        ]
        for got, expected in zip(*results, strict=True):
            assert_same_bits(got, expected)
        assert_same_bits(one.S, many.S)
