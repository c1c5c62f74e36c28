"""The row contract (_rows/contract.py), for every backend, against float64 of the same rounded inputs."""

import functools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from opsd_kernels._rows import backends
from opsd_kernels._rows.contract import SPREAD_LIMIT, Column, RowBackend, narrowed, stats_dtype
from opsd_kernels.spec import Divergence, Kind, LogitTransform, RowSpec
from opsd_kernels.testing import FP32_ARITHMETIC, assert_one_rounding, assert_same_bits
from opsd_kernels.testing.reference import reference_divergence, reference_logits, reference_statistics

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PLAIN, SCALED, CAPPED = LogitTransform(), LogitTransform(1.3, None, 0.7), LogitTransform(1.3, 30.0, 0.7)
# name: student's transform, teacher's, whether the teacher buffer holds a difference
FORMS = {
    "pair": (PLAIN, PLAIN, False),
    "pair, transformed": (CAPPED, SCALED, False),
    "difference, linear": (SCALED, SCALED, True),
    "difference, softcap": (CAPPED, CAPPED, True),
    "difference, two temperatures": (PLAIN, SCALED, True),
}
SHAPES = [
    (1, 1),
    (3, 7),
    (11, 64),
    (11, 1003),
    (2, 4099),
]  # (n, V): one entry, ragged, whole vectors, more than one block of any backend


@dataclass
class Rows:
    """A chunk as the loop hands it to a backend. S and T are views: odd offset, and a row stride of its own each."""

    S: Tensor
    T: Tensor
    factor: Tensor
    spec: RowSpec
    bias_s: Tensor | None = None
    bias_t: Tensor | None = None

    @property
    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        return self.bias_s, self.bias_t

    def copy(self) -> "Rows":
        return replace(self, S=strided(self.S, 8, 5), T=strided(self.T, 24, 16))

    def take(self, rows: slice) -> "Rows":
        return replace(self, S=self.S[rows], T=self.T[rows], factor=self.factor[rows])


@dataclass
class Truth:
    loss: Tensor
    gradient: Tensor
    rounding: Tensor  # (n,) what rounding the transformed logits to fp32 alone may cost, in units of FP32_ARITHMETIC
    spread: Tensor  # (n,) max |o|, relative to the student's first maximum
    student: Tensor
    teacher: Tensor


def strided(x: Tensor, gap: int, offset: int) -> Tensor:
    """A copy of x with `gap` unused columns behind each row and `offset` unused entries in front, filled with NaN."""
    n, V = x.shape
    storage = x.new_full((offset + n * (V + gap),), math.nan)
    return storage.as_strided((n, V), (V + gap, 1), offset).copy_(x)


def teacher_gap(S: Tensor, gen: torch.Generator) -> Tensor:
    """T - S by row, in turn: another wide teacher, one that left the student's peak, near by 1e-1, 1e-2 and 1e-4, the same."""
    n, V = S.shape
    gap = torch.randn(n, V, generator=gen, dtype=torch.float64)
    steps = torch.tensor([9.0, 0.5, 1e-1, 1e-2, 1e-4, 0.0], dtype=torch.float64).repeat(n // 6 + 1)[:n]
    gap *= steps[:, None]
    gap[torch.arange(1, n, 6), S[1::6].argmax(-1)] -= 20
    return gap


def make_rows(
    n: int,
    V: int,
    dtype: torch.dtype,
    form: str = "pair",
    kind: Kind = Kind.JSD,
    bias: bool = True,
    seed: int = 0,
) -> Rows:
    """Logits to |z| = 40, flat and peaked rows; zero among the factors where n allows it, and that row full of inf and NaN."""
    gen = torch.Generator().manual_seed(seed)
    student, teacher, difference = FORMS[form]
    S = (
        torch.randn(n, V, generator=gen, dtype=torch.float64)
        * torch.tensor([1.0, 10.0, 4.0], dtype=torch.float64).repeat(n // 3 + 1)[:n, None]
    )
    S[::2, V // 3] += 12
    S = S.clamp(-40, 40).to(dtype)
    gap = teacher_gap(S.double(), gen)
    T = (gap if difference else S.double() + gap).to(dtype)
    factor = torch.linspace(0.5, -3.0, n, dtype=torch.float64)
    if n > 2:
        factor[2], S[2], T[2, ::2], T[2, 1::2] = 0, math.inf, math.nan, -math.inf
    wide = stats_dtype(dtype)
    bias_s = torch.randn(V, generator=gen, dtype=torch.float64).to(wide) if bias else None
    bias_t = bias_s if difference or not bias else torch.randn(V, generator=gen, dtype=torch.float64).to(wide)
    return Rows(
        strided(S, 8, 5),
        strided(T, 24, 16),
        factor.to(wide),
        RowSpec(Divergence(kind, 0.3), student, teacher, difference),
        bias_s,
        bias_t,
    )


def off_kinks(rows: Rows) -> Rows:
    """TVD has a kink where p = q, and its gradient there is anyone's: move entries of nearly equal probability apart."""
    signs = torch.tensor([0.25, -0.25]).repeat(rows.S.shape[1])[: rows.S.shape[1]].to(rows.T.dtype)
    for _ in range(8):
        truth = truth_of(rows)
        near = (
            truth.teacher.log_softmax(-1) - truth.student.log_softmax(-1)
        ).abs() < 2e-5  # a few roundings of logits of 40
        near &= (rows.factor != 0)[:, None]
        if not near.any():
            break
        rows.T.add_(signs * near)
    return rows


def truth_of(rows: Rows) -> Truth:
    """Textbook and autograd in float64, with the gradient 0 where the factor is."""
    spec = rows.spec
    S, T = rows.S.double().clone(), rows.T.double()
    bias_s, bias_t = (None if b is None else b.double() for b in rows.biases)
    with torch.no_grad():
        t = reference_logits(S + T if spec.difference else T, spec.teacher, bias_t)
    S.requires_grad_()
    s = reference_logits(S, spec.student, bias_s)
    loss = reference_divergence(s, t, spec.divergence)
    (gradient,) = torch.autograd.grad((loss * rows.factor.double()).sum(), S)
    factor = rows.factor.double()[:, None]
    gradient = torch.where(factor == 0, 0.0, gradient)
    loss, s = loss.detach(), s.detach()
    rounding = torch.zeros_like(loss)
    if LogitTransform() not in (spec.student, spec.teacher):
        largest = sum(torch.where(x.isfinite(), x.abs(), 0.0).amax(-1) for x in (s, t))
        rounding = largest * torch.finfo(torch.float32).eps / 2 / FP32_ARITHMETIC
    d = torch.where(s == t, 0.0, t - s)
    c = d.gather(-1, s.argmax(-1, keepdim=True))
    return Truth(loss, gradient, rounding, (d - c).abs().amax(-1), s, t)


def size(truth: Truth, loss: Tensor) -> Tensor:
    """(n,) the largest number that the sums of a row pass through."""
    return torch.where(loss.isfinite(), loss, 0.0).clamp(min=1) + truth.rounding


@functools.cache
def hard_rows(n: int, V: int, dtype: torch.dtype, form: str, kind: Kind) -> tuple[Rows, Truth]:
    """make_rows with its truth, shared by the backends: callers copy the rows."""
    rows = make_rows(n, V, dtype, form, kind)
    rows = off_kinks(rows) if kind == Kind.TVD and V > 1 else rows
    return rows, truth_of(rows)


def run_rows(
    backend: RowBackend, rows: Rows, route: str, G: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(stats, loss, gradient), by the three sweeps apart or fused. Without G the gradient overwrites S."""
    G = rows.S if G is None else G
    if route == "fused":
        stats, loss, _ = backend.row_fused_(rows.S, rows.T, rows.factor, rows.spec, *rows.biases, True, G)
        return stats, loss, G
    stats = backend.row_stats(rows.S, rows.T, rows.spec, *rows.biases, True)
    loss, A = backend.row_dot(rows.S, rows.T, stats, rows.spec, *rows.biases)
    backend.row_grad_(rows.S, rows.T, stats, A, rows.factor, rows.spec, *rows.biases, G)
    return stats, loss, G


@pytest.fixture
def rows_of(backend) -> RowBackend:
    return backends.select(backend, torch.device("cpu"))


def live(rows: Rows) -> Tensor:
    return rows.factor != 0


def gap_of(stats: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """L - c in float64, for the c that the backend chose: the difference of two columns, rounded to their type."""
    return (
        t.logsumexp(-1)
        - s.logsumexp(-1)
        - (stats[:, Column.TEACHER_MAX] - stats[:, Column.STUDENT_MAX]).double()
    )


def check_gradient(rows: Rows, gradient: Tensor, truth: Truth, name: str = "gradient") -> None:
    scale = rows.factor.double().abs() * max(1, abs(rows.spec.student.factor))
    assert_one_rounding(
        gradient,
        truth.gradient,
        gradient.dtype,
        magnitude=(scale * size(truth, truth.loss))[:, None],
        name=name,
    )


def check_loss(rows: Rows, loss: Tensor, truth: Truth) -> None:
    """In the linear difference form the loss is exact relative to the spread, not only to 1."""
    keep = live(rows)
    magnitude = size(truth, truth.loss)
    if rows.spec.linear_difference(rows.bias_s is rows.bias_t) and loss.dtype == torch.float32:
        magnitude = torch.maximum(
            truth.loss, truth.spread.clamp(min=1e-6)
        ) + truth.rounding * truth.spread.clamp(max=1)
    assert_one_rounding(loss[keep], truth.loss[keep], loss.dtype, magnitude=magnitude[keep], name="loss")


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradient(rows_of, kind, form, dtype):
    for n, V in SHAPES:
        rows, truth = hard_rows(n, V, dtype, form, kind)
        for route in ("apart", "fused"):
            _, loss, gradient = run_rows(rows_of, rows.copy(), route)
            assert loss.dtype == stats_dtype(dtype)
            check_loss(rows, loss, truth)
            check_gradient(rows, gradient, truth, f"gradient, {route}, V={V}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(rows_of, form, dtype):
    for n, V in SHAPES:
        rows = make_rows(n, V, dtype, form, Kind.TVD)
        truth, keep = truth_of(rows), live(rows)
        s, t = truth.student[keep], truth.teacher[keep]
        stats = rows_of.row_stats(rows.S, rows.T, rows.spec, *rows.biases, True)
        assert stats.shape == (n, len(Column)) and stats.dtype == stats_dtype(dtype)
        got = stats[keep]
        expected = reference_statistics(s, t)
        assert_one_rounding(got[:, Column.STUDENT_MAX], s.amax(-1), stats.dtype, name="student's maximum")
        whole, largest = size(truth, truth.loss), t.abs().amax(-1).clamp(min=1)
        assert_one_rounding(
            got[:, Column.STUDENT_LOGSUM],
            s.logsumexp(-1) - s.amax(-1),
            stats.dtype,
            magnitude=whole[keep],
            name="student's log-sum",
        )
        sums = got[:, Column.TEACHER_MAX].double() + got[:, Column.TEACHER_LOGSUM].double()
        assert_one_rounding(
            sums, t.logsumexp(-1), stats.dtype, magnitude=largest, name="teacher's normaliser"
        )
        assert_one_rounding(got[:, Column.GAP], gap_of(got, s, t), stats.dtype, magnitude=largest, name="gap")
        far = got[:, Column.SPREAD] > SPREAD_LIMIT
        assert_one_rounding(
            got[far, Column.TEACHER_MAX],
            t[far].amax(-1),
            stats.dtype,
            magnitude=largest[far],
            name="teacher's maximum",
        )
        for column, name in ((Column.REVERSE_KL, "reverse_kl"), (Column.FORWARD_KL, "forward_kl")):
            kl = reference_divergence(truth.student, truth.teacher, Divergence.parse(name))
            assert_one_rounding(
                got[:, column], kl[keep], stats.dtype, magnitude=size(truth, kl)[keep], name=name
            )
        for side in ("student", "teacher"):
            entropy, top = (Column[f"{side}_{what}".upper()] for what in ("entropy", "max_prob"))
            magnitude = expected[f"{side}_entropy"].clamp(min=1)
            assert_one_rounding(
                got[:, entropy],
                expected[f"{side}_entropy"],
                stats.dtype,
                magnitude=magnitude,
                name=f"{side}'s entropy",
            )
            assert_one_rounding(
                got[:, top], expected[f"{side}_max_prob"], stats.dtype, name=f"{side}'s top probability"
            )
        assert_same_bits(got[:, Column.STUDENT_ARGMAX].long(), s.argmax(-1))


def test_argmax_is_the_lowest_index_of_the_maximum(rows_of):
    for V in (2, 77, 1003):
        S = torch.zeros(2, V)
        S[0, [V // 2, V - 1]] = 3.0
        rows = Rows(S, S.clone(), torch.ones(2), RowSpec(Divergence(Kind.TVD)))
        stats = rows_of.row_stats(rows.S, rows.T, rows.spec, None, None, True)
        assert stats[:, Column.STUDENT_ARGMAX].tolist() == [V // 2, 0]
        assert stats[:, Column.TEACHER_ARGMAX].tolist() == [V // 2, 0]


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name.lower())
def test_without_metrics_the_losses_are_the_same(rows_of, kind):
    rows, truth = hard_rows(11, 1003, torch.float32, "difference, linear", kind)
    stats = rows_of.row_stats(rows.S, rows.T, rows.spec, *rows.biases, False)
    loss, _ = rows_of.row_dot(rows.S, rows.T, stats, rows.spec, *rows.biases)
    keep = live(rows)
    check_loss(rows, loss, truth)
    assert (stats[keep][:, Column.STUDENT_ENTROPY :] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_near_teacher_keeps_its_digits(rows_of, dtype):
    """Rows of spread 1e-3 and 1e-5 in the linear difference form: KL 1e-7 and 1e-11, where subtracting two log-sums leaves noise."""
    gen = torch.Generator().manual_seed(3)
    S = (4 * torch.randn(4, 1003, generator=gen)).to(dtype)
    T = (torch.tensor([1e-3, 1e-5, 1e-3, 1e-5])[:, None] * torch.randn(4, 1003, generator=gen)).to(dtype)
    for kind in (Kind.FORWARD_KL, Kind.REVERSE_KL, Kind.TVD):
        rows = Rows(
            S.clone(), T, torch.ones(4).to(stats_dtype(dtype)), RowSpec(Divergence(kind), difference=True)
        )
        truth = truth_of(rows)
        digits = truth.spread if dtype != torch.float64 else 1.0  # the truth is float64 itself
        stats = rows_of.row_stats(rows.S, rows.T, rows.spec, None, None, False)
        assert_one_rounding(
            stats[:, Column.GAP],
            gap_of(stats, truth.student, truth.teacher),
            stats.dtype,
            magnitude=digits,
            name="gap",
        )
        loss, _ = rows_of.row_dot(rows.S, rows.T, stats, rows.spec, None, None)
        assert_one_rounding(loss, truth.loss, stats.dtype, magnitude=digits, name=kind.name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name.lower())
def test_a_shifted_teacher_costs_no_digits(rows_of, kind, dtype):
    """Peaked rows at KL 1e-5, all teacher logits 32 higher: the bound stays relative to the spread of 0.02."""
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
    _, loss, _ = run_rows(rows_of, rows, "fused")
    digits = truth.spread if dtype == torch.float32 else 1.0
    assert_one_rounding(loss, truth.loss, loss.dtype, magnitude=digits, name="loss")


# ---------------------------------------------------------------- where the gradient goes


@pytest.mark.parametrize(
    "dtype, narrow", [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)], ids=str
)
@pytest.mark.parametrize("route", ["apart", "fused"])
@pytest.mark.parametrize("form", ["pair", "difference, softcap"])
def test_narrowed_gradient(rows_of, dtype, narrow, route, form):
    for n, V in SHAPES:
        rows, truth = hard_rows(n, V, dtype, form, Kind.JSD)
        work = rows.copy()
        G = narrowed(work.S, narrow)
        run_rows(rows_of, work, route, G)
        check_gradient(rows, G, truth, f"narrowed gradient, V={V}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ["apart", "fused"])
def test_a_buffer_of_its_own_gets_the_same_bits(rows_of, dtype, route):
    rows = make_rows(11, 1003, dtype, "pair, transformed", Kind.SKEW_REVERSE_KL)
    over_S, beside = rows.copy(), rows.copy()
    _, _, expected = run_rows(rows_of, over_S, route)
    G = strided(torch.zeros_like(rows.S), 3, 1)
    run_rows(rows_of, beside, route, G)
    assert_same_bits(G, expected)
    assert_same_bits(beside.S, rows.S)


@pytest.mark.parametrize("narrow", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("route", ["apart", "fused"])
def test_nothing_else_is_written(rows_of, route, narrow):
    """The gaps between rows, the entries in front of the first, and all of T."""
    work = make_rows(5, 77, torch.float32, "pair", Kind.JSD).copy()
    storage = work.S.as_strided((work.S.untyped_storage().nbytes() // 4,), (1,), 0)
    storage[storage.isnan()] = 7.5
    before_S, before_T = storage.clone(), work.T.clone()
    run_rows(rows_of, work, route, None if narrow is None else narrowed(work.S, narrow))
    inside = torch.zeros_like(storage, dtype=torch.bool).as_strided(
        work.S.shape, work.S.stride(), work.S.storage_offset()
    )
    outside = ~torch.zeros_like(storage, dtype=torch.bool)
    outside.as_strided(inside.shape, inside.stride(), inside.storage_offset()).fill_(False)
    assert_same_bits(storage[outside], before_S[outside])
    assert_same_bits(work.T, before_T)


# ---------------------------------------------------------------- zero factors, masked entries, rows without a distribution


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf], ids=str)
def test_zero_factor_gives_exact_zeros(rows_of, kind, dtype, rubbish):
    for form in ("pair", "difference, linear"):
        rows = make_rows(6, 130, dtype, form, kind)
        rows.S[4], rows.T[5] = rubbish, rubbish
        rows.factor[4:] = 0
        for route in ("apart", "fused"):
            _, _, G = run_rows(rows_of, rows.copy(), route)
            assert_same_bits(G[4:], torch.zeros_like(G[4:]))
            assert G[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("side", ["both", "teacher", "student"])
@pytest.mark.parametrize("form", ["pair", "difference, linear", "difference, two temperatures"])
def test_minus_infinity_in_a_bias(rows_of, kind, side, form):
    """The masked entry counts nothing where that is finite; KL(q, p) with q > 0 = p is +inf. Entry 33 is not a peak, but has probability."""
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
    infinite = (kind, side) in ((Kind.REVERSE_KL, "teacher"), (Kind.FORWARD_KL, "student"))
    assert (truth.loss == math.inf).all() if infinite else truth.loss.isfinite().all()
    for route in ("apart", "fused"):
        _, loss, G = run_rows(rows_of, rows.copy(), route)
        check_loss(rows, loss, truth)
        if (kind, side) != (Kind.REVERSE_KL, "teacher"):  # there the gradient itself is inf - inf
            check_gradient(rows, G, truth)


@pytest.mark.parametrize("side", ["S", "T"])
def test_a_row_without_a_distribution_is_nan(rows_of, side):
    for kind in Kind:
        rows = make_rows(2, 67, torch.float32, "pair", kind, bias=False)
        getattr(rows, side)[1] = -math.inf
        _, loss, _ = run_rows(rows_of, rows, "fused")
        assert loss[0].isfinite() and loss[1].isnan(), kind


# ---------------------------------------------------------------- bits


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_alone_has_the_bits_it_has_in_a_batch(rows_of, kind, dtype):
    rows = make_rows(13, 1003, dtype, "difference, linear", kind)
    for route in ("apart", "fused"):
        batch = run_rows(rows_of, rows.copy(), route)
        for row in (0, 1, 2, 7, 12):
            alone = run_rows(rows_of, rows.copy().take(slice(row, row + 1)), route)
            for got, expected in zip(alone, batch, strict=True):
                assert_same_bits(got[0], expected[row])


def test_the_number_of_threads_does_not_change_bits(rows_of):
    rows = make_rows(13, 4099, torch.float32, "pair", Kind.JSD)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run_rows(rows_of, rows.copy(), "fused"))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two)
