"""The row contract on Triton's interpreter. Collected in the subprocesses of test_interpreter.py alone."""

import math
from dataclasses import replace

import pytest
import torch
from column_contract import ColumnContract
from covering_part import CoveringPart
from row_cases import hard_rows, make_rows, run_rows, truth_of
from row_contract import RowContract
from row_options_contract import RowOptionsContract

from opsd_kernels._rows import backends
from opsd_kernels._rows.contract import Column
from opsd_kernels._rows.triton_launch import aligned
from opsd_kernels.spec import Divergence, Kind
from opsd_kernels.testing import assert_same_bits


class OnInterpreter(CoveringPart):
    """The whole matrix would take the interpreter half an hour."""

    INTERPRETER = True
    ROWS = 6

    @pytest.fixture
    def row_backend(self):
        return backends.select("triton", torch.device("cpu"))


class TestRowContract(OnInterpreter, RowContract):
    SHAPES = [(1, 1), (3, 7), (6, 1003), (1, 2500)]  # 2500: two tiles
    HARD = (6, 1003)
    test_the_number_of_threads_does_not_change_bits = None  # the interpreter has one thread

    def served(self, test: str, params: dict) -> bool:
        """One dtype where a test is about the factors of a row, or about its bits."""
        if test == "test_a_row_alone_has_the_bits_it_has_in_a_batch":
            return params["kind"] in (Kind.FORWARD_KL, Kind.JSD) and params["dtype"] == torch.bfloat16
        if test == "test_a_buffer_of_its_own_gets_the_same_bits":
            return params["dtype"] == torch.float32
        return True

    @pytest.mark.parametrize("kind", [Kind.REVERSE_KL, Kind.JSD])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_aligned_rows(self, row_backend, dtype, kind):
        """Rows that begin on 16 bytes sum a tile in another order; the other tests' views never do."""
        rows, truth = hard_rows(6, 2080, dtype, "pair", kind)
        whole = rows.contiguous()
        assert aligned(whole.S, whole.T) and not aligned(rows.S, rows.T)
        _, loss, gradient = run_rows(row_backend, whole, "fused")
        self.check_loss(rows, loss, truth)
        self.check_gradient(rows, gradient, truth)

    @pytest.mark.parametrize("form", ["pair", "difference, linear"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        "kind", [Kind.REVERSE_KL, Kind.FORWARD_KL, Kind.SKEW_FORWARD_KL, Kind.MIXED_KL], ids=str
    )
    def test_a_maximum_in_a_late_tile(self, row_backend, dtype, form, kind):
        """Sums move from a group's own maximum, and from the first tile's references, to those of the row.

        Peaks lie 3 and 35 above a first tile whose logits are within 1, a masked first tile far below.
        """
        rows = make_rows(4, 4500, dtype, form, Kind.REVERSE_KL, bias=False)
        rows.factor[2], rows.S[2], rows.T[2] = 1.0, rows.S[0], rows.T[0]  # was an ignored row
        rows.S.clamp_(-1, 1)
        rows.T.clamp_(-1, 1)
        for row, lead in enumerate((3.0, 35.0, 35.0)):
            rows.S[row, 4400 - row] = 1 + lead
            rows.T[row, 4400 - row] = 0.5 if rows.spec.difference else 0.5 + lead
        rows = rows.contiguous()
        if not rows.spec.difference:
            rows.S[3, :2100] = rows.T[3, :2100] = -math.inf
        rows = replace(rows, spec=replace(rows.spec, divergence=Divergence(kind, 0.3)))
        truth = truth_of(rows)
        truth.gradient.nan_to_num_(nan=0.0)  # autograd's, where both sides are -inf
        stats, loss, gradient = run_rows(row_backend, replace(rows, S=rows.S.clone()), "fused")
        assert_same_bits(stats[:, Column.STUDENT_ARGMAX].long(), truth.student.argmax(-1))
        self.check_loss(rows, loss, truth)
        self.check_gradient(rows, gradient, truth)


class TestRowOptions(OnInterpreter, RowOptionsContract):
    SHAPES = [(1, 1), (4, 7), (1, 2500)]
    DTYPES = [torch.float32, torch.bfloat16]

    def served(self, test: str, params: dict) -> bool:
        if test in ("test_policy_into_a_narrowed_view", "test_a_teacher_of_one_row_for_all"):
            return params["kind"] == Kind.JSD
        if test == "test_without_options_nothing_changes":  # one sweep, two, and a kink
            return params["kind"] in (Kind.FORWARD_KL, Kind.JSD, Kind.TVD)
        return True


class TestColumns(OnInterpreter, ColumnContract):
    test_the_number_of_threads_does_not_change_bits = None  # the interpreter has one thread
