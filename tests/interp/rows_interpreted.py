"""The row contract on Triton's interpreter. Collected in the subprocesses of test_interpreter.py alone."""

import math
from dataclasses import replace

import pytest
import torch
from column_contract import ColumnContract
from row_cases import DTYPES, hard_rows, make_rows, run_rows, truth_of
from row_contract import RowContract
from row_options_contract import CLIPS, RowOptionsContract

from opsd_kernels._rows import backends
from opsd_kernels._rows.contract import Column
from opsd_kernels._rows.triton_launch import aligned
from opsd_kernels.spec import Divergence, Kind
from opsd_kernels.testing import assert_same_bits

# The whole matrix takes the interpreter ten minutes. In fp32 every kind meets every form; the other types
# meet every kind in one form.
ONE_FORM = {torch.float64: "difference, softcap", torch.bfloat16: "difference, linear", torch.float16: "pair"}
ONE_DTYPE = {
    "test_a_row_alone_has_the_bits_it_has_in_a_batch": torch.bfloat16,
    "test_zero_factor_gives_exact_zeros": torch.float32,
    "test_a_buffer_of_its_own_gets_the_same_bits": torch.float32,
}
# The interpreter has one thread.
LEFT_OUT = ("test_the_number_of_threads_does_not_change_bits",)


def wanted(test: str, params: dict) -> bool:
    dtype = params.get("dtype")
    if test in LEFT_OUT or dtype != ONE_DTYPE.get(test, dtype):
        return False
    if test == "test_loss_and_gradient":
        return params["form"] == ONE_FORM.get(dtype, params["form"])
    if test == "test_a_temperature_for_each_row":
        return dtype == torch.float32 and params["kind"] in (Kind.FORWARD_KL, Kind.JSD)
    if test == "test_minus_infinity_in_a_bias":
        return params["form"] == "pair" or params["kind"] in (Kind.FORWARD_KL, Kind.JSD)
    if test == "test_a_row_alone_has_the_bits_it_has_in_a_batch":
        return params["kind"] in (Kind.FORWARD_KL, Kind.JSD)
    return True


# The whole matrix of the options takes a quarter of an hour. Every kind and route meets every option; types
# and forms take turns.
IN_TURN = ("test_clips", "test_teacher_mix", "test_policy")
ONE_KIND = ("test_policy_into_a_narrowed_view", "test_a_teacher_of_one_row_for_all")


def turn_of(test: str, params: dict) -> int:
    clips = [*CLIPS, *CLIPS.values(), {}]
    clip = clips.index(params["clip"]) if "clip" in params else 0
    return int(params["kind"]) + IN_TURN.index(test) + clip


def name_and_params(request: pytest.FixtureRequest) -> tuple[str, dict]:
    return request.node.originalname, getattr(getattr(request.node, "callspec", None), "params", {})


class OnInterpreter:
    INTERPRETER = True

    @pytest.fixture
    def row_backend(self):
        return backends.select("triton", torch.device("cpu"))


class TestRowContract(OnInterpreter, RowContract):
    SHAPES = [(1, 1), (3, 7), (6, 1003), (1, 2500)]  # 2500: two tiles

    @pytest.fixture(autouse=True)
    def covering_part(self, request):
        if not wanted(*name_and_params(request)):
            pytest.skip("not in the part of the matrix that the interpreter runs")

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
    def test_a_maximum_in_a_late_tile(self, row_backend, dtype, form):
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
        for kind in (Kind.REVERSE_KL, Kind.FORWARD_KL, Kind.SKEW_FORWARD_KL, Kind.MIXED_KL):
            chosen = replace(
                rows, S=rows.S.clone(), spec=replace(rows.spec, divergence=Divergence(kind, 0.3))
            )
            truth = truth_of(chosen)
            truth.gradient.nan_to_num_(nan=0.0)  # autograd's, where both sides are -inf
            stats, loss, gradient = run_rows(row_backend, chosen, "fused")
            assert_same_bits(stats[:, Column.STUDENT_ARGMAX].long(), truth.student.argmax(-1))
            self.check_loss(chosen, loss, truth)
            self.check_gradient(chosen, gradient, truth)


class TestRowOptions(OnInterpreter, RowOptionsContract):
    SHAPES = [(1, 1), (4, 7), (1, 2500)]

    @pytest.fixture(autouse=True)
    def covering_part(self, request):
        test, params = name_and_params(request)
        covered = test not in ONE_KIND or params["kind"] == Kind.JSD
        if test in IN_TURN:
            turn = turn_of(test, params)
            covered = params["dtype"] == DTYPES[turn % len(DTYPES)]
            forms = list(RowOptionsContract.FORMS)
            self.FORMS = [forms[(turn + (params["route"] == "fused")) % len(forms)]]
        if not covered:
            pytest.skip("not in the part of the matrix that the interpreter runs")


class TestColumns(OnInterpreter, ColumnContract):
    test_the_number_of_threads_does_not_change_bits = None  # the interpreter has one thread
