"""The row contract (opsd_kernels/_rows/contract.py) as test classes for every backend to subclass.

class TestRowContract(RowContract):
    @pytest.fixture
    def row_backend(self): return the_backend

Every result is compared with float64 of the same rounded inputs. A subclass may set `SHAPES`, `DTYPES`,
`FORMS` and `EACH_ROUTE`, in its fixtures too (each test has an instance of its own), and set a test to None
to leave it out. covering_part.py has a base class that runs a part of the matrix.
"""

import math
from dataclasses import replace

import pytest
import torch
from row_cases import (
    DTYPES,
    FORMS,
    OF_ROWS,
    Rows,
    Truth,
    hard_rows,
    make_rows,
    off_kinks,
    run_rows,
    strided,
    truth_of,
)
from torch import Tensor

from opsd_kernels._rows import backends
from opsd_kernels._rows.contract import SPREAD_LIMIT, Column, RowBackend, narrowed
from opsd_kernels.spec import Divergence, Kind, LogitTransform, RowSpec
from opsd_kernels.testing import assert_one_rounding, assert_same_bits
from opsd_kernels.testing.reference import reference_divergence, reference_statistics

KINDS = pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name.lower())
ROUTES = pytest.mark.parametrize("route", ["apart", "fused"])
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def gap_of(stats: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """L - c in float64, for the backend's own c: the difference of two columns, rounded to their type."""
    c = (stats[:, Column.TEACHER_MAX] - stats[:, Column.STUDENT_MAX]).double()
    return t.logsumexp(-1) - s.logsumexp(-1) - c


class RowChecks:
    """The backend under test and the gates on its results."""

    INTERPRETER = False  # True where bf16 results are truncated, as by Triton's interpreter
    DTYPES = DTYPES  # those of tests that loop over all
    EACH_ROUTE = ("apart", "fused")
    ROWS = 11  # of tests with one shape that compare two calls; six hold every teacher

    @pytest.fixture
    def row_backend(self, backend: str) -> RowBackend:
        return backends.select(backend, torch.device("cpu"))

    def assert_one_rounding(
        self, actual: Tensor, truth: Tensor, dtype: torch.dtype, **options: object
    ) -> None:
        assert_one_rounding(actual, truth, dtype, self.INTERPRETER, **options)

    def check_gradient(self, rows: Rows, gradient: Tensor, truth: Truth, name: str = "gradient") -> None:
        slope = torch.as_tensor(rows.spec.student.factor, dtype=torch.float64).abs().clamp(min=1)
        scale = rows.factor.double().abs() * slope.reshape(-1)
        magnitude = (scale * truth.size(truth.loss))[:, None]
        self.assert_one_rounding(gradient, truth.gradient, gradient.dtype, magnitude=magnitude, name=name)

    def check_loss(self, rows: Rows, loss: Tensor, truth: Truth) -> None:
        """In the linear difference form the loss is exact relative to the spread, not only to 1."""
        keep, magnitude = rows.live, truth.size(truth.loss)
        if rows.spec.linear_difference(rows.bias_s is rows.bias_t) and loss.dtype == torch.float32:
            magnitude = torch.maximum(truth.loss, truth.spread.clamp(min=1e-6))
            magnitude = magnitude + truth.rounding * truth.spread.clamp(max=1)
        self.assert_one_rounding(
            loss[keep], truth.loss[keep], loss.dtype, magnitude=magnitude[keep], name="loss"
        )


class RowContract(RowChecks):
    """The sweeps without clips, mix and policy term."""

    # (n, V): one entry, ragged, whole vectors, more than one block of any backend
    SHAPES = [(1, 1), (3, 7), (11, 64), (11, 1003), (2, 4099)]

    def check_loss_and_gradient(self, row_backend, kind, form, dtype):
        for n, V in self.SHAPES:
            rows, truth = hard_rows(n, V, dtype, form, kind)
            for route in self.EACH_ROUTE:
                _, loss, gradient = run_rows(row_backend, rows.copy(), route)
                assert loss.dtype == torch.promote_types(dtype, torch.float32)
                self.check_loss(rows, loss, truth)
                self.check_gradient(rows, gradient, truth, f"gradient, {route}, V={V}")

    @KINDS
    @pytest.mark.parametrize("form", FORMS)
    @EACH_DTYPE
    def test_loss_and_gradient(self, row_backend, kind, form, dtype):
        self.check_loss_and_gradient(row_backend, kind, form, dtype)

    @KINDS
    @pytest.mark.parametrize("form", OF_ROWS)
    @EACH_DTYPE
    def test_a_temperature_for_each_row(self, row_backend, kind, form, dtype):
        self.check_loss_and_gradient(row_backend, kind, form, dtype)

    @pytest.mark.parametrize("form", FORMS)
    @EACH_DTYPE
    def test_statistics(self, row_backend, form, dtype):
        for n, V in self.SHAPES:
            rows = make_rows(n, V, dtype, form, Kind.TVD)
            truth, keep = truth_of(rows), rows.live
            s, t = truth.student[keep], truth.teacher[keep]
            stats = row_backend.row_stats(rows.S, rows.T, rows.spec, *rows.biases, True)
            assert stats.shape == (n, len(Column)) and stats.dtype == torch.promote_types(
                dtype, torch.float32
            )
            got = stats[keep]
            expected = reference_statistics(s, t)
            self.assert_one_rounding(
                got[:, Column.STUDENT_MAX], s.amax(-1), stats.dtype, name="student's maximum"
            )
            whole, largest = truth.size(truth.loss), t.abs().amax(-1).clamp(min=1)
            self.assert_one_rounding(
                got[:, Column.STUDENT_LOGSUM],
                s.logsumexp(-1) - s.amax(-1),
                stats.dtype,
                magnitude=whole[keep],
                name="student's log-sum",
            )
            sums = got[:, Column.TEACHER_MAX].double() + got[:, Column.TEACHER_LOGSUM].double()
            self.assert_one_rounding(
                sums, t.logsumexp(-1), stats.dtype, magnitude=largest, name="teacher's normaliser"
            )
            self.assert_one_rounding(
                got[:, Column.GAP], gap_of(got, s, t), stats.dtype, magnitude=largest, name="gap"
            )
            far = got[:, Column.SPREAD] > SPREAD_LIMIT
            self.assert_one_rounding(
                got[far, Column.TEACHER_MAX],
                t[far].amax(-1),
                stats.dtype,
                magnitude=largest[far],
                name="teacher's maximum",
            )
            for column, name in ((Column.REVERSE_KL, "reverse_kl"), (Column.FORWARD_KL, "forward_kl")):
                kl = reference_divergence(truth.student, truth.teacher, Divergence.parse(name))
                self.assert_one_rounding(
                    got[:, column], kl[keep], stats.dtype, magnitude=truth.size(kl)[keep], name=name
                )
            for side in ("student", "teacher"):
                entropy, top = (Column[f"{side}_{what}".upper()] for what in ("entropy", "max_prob"))
                magnitude = expected[f"{side}_entropy"].clamp(min=1)
                self.assert_one_rounding(
                    got[:, entropy],
                    expected[f"{side}_entropy"],
                    stats.dtype,
                    magnitude=magnitude,
                    name=f"{side}'s entropy",
                )
                self.assert_one_rounding(
                    got[:, top], expected[f"{side}_max_prob"], stats.dtype, name=f"{side}'s top probability"
                )
            assert_same_bits(got[:, Column.STUDENT_ARGMAX].long(), s.argmax(-1))

    def test_argmax_is_the_lowest_index_of_the_maximum(self, row_backend):
        for V in (2, 77, 1003):
            S = torch.zeros(2, V)
            S[0, [V // 2, V - 1]] = 3.0
            rows = Rows(S, S.clone(), torch.ones(2), RowSpec(Divergence(Kind.TVD)))
            stats = row_backend.row_stats(rows.S, rows.T, rows.spec, None, None, True)
            assert stats[:, Column.STUDENT_ARGMAX].tolist() == [V // 2, 0]
            assert stats[:, Column.TEACHER_ARGMAX].tolist() == [V // 2, 0]

    @KINDS
    def test_without_metrics_the_losses_are_the_same(self, row_backend, kind):
        rows, truth = hard_rows(self.ROWS, 1003, torch.float32, "difference, linear", kind)
        stats = row_backend.row_stats(rows.S, rows.T, rows.spec, *rows.biases, False)
        loss, _ = row_backend.row_dot(rows.S, rows.T, stats, rows.spec, *rows.biases)
        keep = rows.live
        self.check_loss(rows, loss, truth)
        assert (stats[keep][:, Column.STUDENT_ENTROPY :] == 0).all()

    @EACH_DTYPE
    def test_a_near_teacher_keeps_its_digits(self, row_backend, dtype):
        """Rows of spread 1e-3 and 1e-5 in the linear difference form keep their digits.

        KL is 1e-7 and 1e-11 there, and subtracting two log-sums would leave noise.
        """
        gen = torch.Generator().manual_seed(3)
        S = (4 * torch.randn(4, 1003, generator=gen)).to(dtype)
        T = (torch.tensor([1e-3, 1e-5, 1e-3, 1e-5])[:, None] * torch.randn(4, 1003, generator=gen)).to(dtype)
        for kind in (Kind.FORWARD_KL, Kind.REVERSE_KL, Kind.TVD, Kind.MIXED_KL):
            rows = Rows(
                S.clone(),
                T,
                torch.ones(4).to(torch.promote_types(dtype, torch.float32)),
                RowSpec(Divergence(kind), difference=True),
            )
            truth = truth_of(rows)
            digits = truth.spread if dtype != torch.float64 else 1.0  # the truth is float64 itself
            stats = row_backend.row_stats(rows.S, rows.T, rows.spec, None, None, False)
            self.assert_one_rounding(
                stats[:, Column.GAP],
                gap_of(stats, truth.student, truth.teacher),
                stats.dtype,
                magnitude=digits,
                name="gap",
            )
            loss, _ = row_backend.row_dot(rows.S, rows.T, stats, rows.spec, None, None)
            self.assert_one_rounding(loss, truth.loss, stats.dtype, magnitude=digits, name=kind.name)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @KINDS
    def test_a_shifted_teacher_costs_no_digits(self, row_backend, kind, dtype):
        """Peaked rows at KL 1e-5 stay exact relative to the spread of 0.02 under a shift of 32."""
        gen = torch.Generator().manual_seed(5)
        S = torch.randn(6, 257, generator=gen, dtype=torch.float64)
        S[:, 100] += torch.tensor([0.0, 2, 5, 9, 12, 16])
        S = (S * 64).round() / 64  # so that S + gap + 32 is exact in fp32
        T = (
            S
            + 32
            + (torch.randn(6, 257, generator=gen, dtype=torch.float64).clamp(-2, 2) * 1e-2 * 2**14).round()
            / 2**14
        )
        rows = Rows(S.to(dtype), T.to(dtype), torch.ones(6, dtype=dtype), RowSpec(Divergence(kind)))
        assert_same_bits(rows.T.double(), T)
        truth = truth_of(off_kinks(rows) if kind == Kind.TVD else rows)
        _, loss, _ = run_rows(row_backend, rows, "fused")
        digits = truth.spread if dtype == torch.float32 else 1.0
        self.assert_one_rounding(loss, truth.loss, loss.dtype, magnitude=digits, name="loss")

    # ---------------------------------------------------------------- where the gradient goes

    @pytest.mark.parametrize(
        "dtype, narrow", [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)], ids=str
    )
    @ROUTES
    @pytest.mark.parametrize("form", ["pair", "difference, softcap"])
    def test_narrowed_gradient(self, row_backend, dtype, narrow, route, form):
        for n, V in self.SHAPES:
            rows, truth = hard_rows(n, V, dtype, form, Kind.JSD)
            work = rows.copy()
            G = narrowed(work.S, narrow)
            run_rows(row_backend, work, route, G)
            self.check_gradient(rows, G, truth, f"narrowed gradient, V={V}")

    @EACH_DTYPE
    @ROUTES
    def test_a_buffer_of_its_own_gets_the_same_bits(self, row_backend, dtype, route):
        rows = make_rows(self.ROWS, 1003, dtype, "pair, transformed", Kind.SKEW_REVERSE_KL)
        over_S, beside = rows.copy(), rows.copy()
        _, _, expected = run_rows(row_backend, over_S, route)
        G = strided(torch.zeros_like(rows.S), 3, 1)
        run_rows(row_backend, beside, route, G)
        assert_same_bits(G, expected)
        assert_same_bits(beside.S, rows.S)

    @pytest.mark.parametrize("narrow", [None, torch.bfloat16], ids=str)
    @ROUTES
    def test_nothing_else_is_written(self, row_backend, route, narrow):
        """The gaps between rows, the entries before the first row and all of T keep their bits."""
        work = make_rows(5, 77, torch.float32, "pair", Kind.JSD).copy()
        storage = work.S.as_strided((work.S.untyped_storage().nbytes() // 4,), (1,), 0)
        storage[storage.isnan()] = 7.5
        before_S, before_T = storage.clone(), work.T.clone()
        run_rows(row_backend, work, route, None if narrow is None else narrowed(work.S, narrow))
        inside = torch.zeros_like(storage, dtype=torch.bool).as_strided(
            work.S.shape, work.S.stride(), work.S.storage_offset()
        )
        outside = ~torch.zeros_like(storage, dtype=torch.bool)
        outside.as_strided(inside.shape, inside.stride(), inside.storage_offset()).fill_(False)
        assert_same_bits(storage[outside], before_S[outside])
        assert_same_bits(work.T, before_T)

    # ---------------------------------------------------------------- zero factors and -inf

    @KINDS
    @EACH_DTYPE
    @pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf], ids=str)
    def test_zero_factor_gives_exact_zeros(self, row_backend, kind, dtype, rubbish):
        for form in ("pair", "difference, linear"):
            rows = make_rows(6, 130, dtype, form, kind)
            rows.S[4], rows.T[5] = rubbish, rubbish
            rows.factor[4:] = 0
            for route in self.EACH_ROUTE:
                _, _, G = run_rows(row_backend, rows.copy(), route)
                assert_same_bits(G[4:], torch.zeros_like(G[4:]))
                assert G[[0, 1, 3]].isfinite().all()

    @KINDS
    @pytest.mark.parametrize("side", ["both", "teacher", "student"])
    @pytest.mark.parametrize("form", ["pair", "difference, linear", "difference, two temperatures"])
    def test_minus_infinity_in_a_bias(self, row_backend, kind, side, form):
        """A masked entry adds nothing where the divergence is finite; KL(q, p) with q > 0 = p is +inf.

        Entry 33 is no peak, but has probability.
        """
        rows = make_rows(5, 67, torch.float32, form, kind)
        rows.factor[2], rows.S[2], rows.T[2] = 1.0, 0.5, torch.linspace(-1, 1, 67)
        rows.S[:, 33], rows.T[:, 33] = 1.0, 0.5
        masked = rows.bias_s.clone()
        masked[[33, 66]] = -math.inf
        other = rows.bias_t if rows.bias_t is not rows.bias_s else rows.bias_s.clone()
        if side == "both":
            other[[33, 66]] = -math.inf
        shared = side == "both" and rows.spec.difference
        rows = replace(
            rows,
            bias_s=masked if side != "teacher" else rows.bias_s,
            bias_t=masked if shared or side == "teacher" else other,
        )
        rows = off_kinks(rows) if kind == Kind.TVD else rows
        truth = truth_of(rows)
        endless = {"teacher": (Kind.REVERSE_KL, Kind.MIXED_KL), "student": (Kind.FORWARD_KL, Kind.MIXED_KL)}
        infinite = kind in endless.get(side, ())
        assert (truth.loss == math.inf).all() if infinite else truth.loss.isfinite().all()
        for route in self.EACH_ROUTE:
            _, loss, G = run_rows(row_backend, rows.copy(), route)
            self.check_loss(rows, loss, truth)
            if not infinite:
                self.check_gradient(rows, G, truth)
            elif side == "student":  # else the gradient itself is inf - inf
                of_q = replace(rows, spec=replace(rows.spec, divergence=Divergence(Kind.REVERSE_KL)))
                self.check_gradient(rows, G, replace(truth, loss=truth_of(of_q).loss))

    @pytest.mark.parametrize("side", ["S", "T"])
    def test_a_row_without_a_distribution_is_nan(self, row_backend, side):
        for kind in Kind:
            rows = make_rows(2, 67, torch.float32, "pair", kind, bias=False)
            getattr(rows, side)[1] = -math.inf
            _, loss, _ = run_rows(row_backend, rows, "fused")
            assert loss[0].isfinite() and loss[1].isnan(), kind

    @EACH_DTYPE
    @ROUTES
    def test_a_softcap_leaves_columns_beyond_the_vocabulary_out(self, row_backend, dtype, route):
        """A cap makes every number finite, also those of the lanes beyond V in the last tile of a row."""
        capped = LogitTransform(1.0, 1.0, 1.0)
        for V in (1, 7, 1003, 2500):
            rows = make_rows(3, V, dtype, bias=False)
            for logits in (rows.S, rows.T):
                logits.zero_()
            bias = torch.full((V,), -50.0, dtype=torch.promote_types(dtype, torch.float32))
            spec = replace(rows.spec, student=capped, teacher=capped)
            work = replace(rows, spec=spec, bias_s=bias, bias_t=bias.clone()).copy()
            stats, loss, _ = run_rows(row_backend, work, route)
            entropy = torch.full((3,), math.log(V), dtype=torch.float64)
            names = "STUDENT_LOGSUM", "TEACHER_LOGSUM", "STUDENT_ENTROPY", "TEACHER_ENTROPY"
            for name in names:
                self.assert_one_rounding(stats[:, Column[name]], entropy, stats.dtype, name=name)
            assert (loss.abs() <= 1e-6).all(), V

    # ---------------------------------------------------------------- bits

    @KINDS
    @EACH_DTYPE
    def test_a_row_alone_has_the_bits_it_has_in_a_batch(self, row_backend, kind, dtype):
        rows = make_rows(13, 1003, dtype, "difference, linear", kind)
        for route in self.EACH_ROUTE:
            batch = run_rows(row_backend, rows.copy(), route)
            for row in (0, 1, 2, 7, 12):
                alone = run_rows(row_backend, rows.copy().take(slice(row, row + 1)), route)
                for got, expected in zip(alone, batch, strict=True):
                    assert_same_bits(got[0], expected[row])

    def test_the_number_of_threads_does_not_change_bits(self, row_backend):
        rows = make_rows(13, 4099, torch.float32, "pair", Kind.JSD)
        results, threads = [], torch.get_num_threads()
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append(run_rows(row_backend, rows.copy(), "fused"))
        finally:
            torch.set_num_threads(threads)
        for one, two in zip(*results, strict=True):
            assert_same_bits(one, two)
