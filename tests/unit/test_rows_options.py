"""The row contract's clips, teacher mix and policy term (_rows/contract.py), for every backend, against autograd in float64."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from opsd_kernels._rows import backends
from opsd_kernels._rows.contract import Column, RowBackend, narrowed, stats_dtype
from opsd_kernels.spec import Divergence, Kind, LogitTransform, RowSpec
from opsd_kernels.testing import assert_one_rounding, assert_same_bits
from opsd_kernels.testing.reference import reference_logits

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PLAIN, CAPPED = LogitTransform(), LogitTransform(1.3, 20.0, 0.7)
FORMS = {
    "pair": (PLAIN, CAPPED, False),
    "difference, linear": (PLAIN, PLAIN, True),
    "difference, softcap": (CAPPED, CAPPED, True),
}
CLIPS = {
    "entry": {"entry_clip": 0.02},
    "token": {"token_clip": 0.3},
    "both": {"entry_clip": 0.05, "token_clip": 0.3},
}
SHAPES = [(1, 1), (4, 7), (9, 64), (9, 1003), (2, 4099)]
KINDS = pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name.lower())
ROUTES = pytest.mark.parametrize("route", ["apart", "fused"])


@dataclass
class Rows:
    S: Tensor
    T: Tensor
    factor: Tensor
    spec: RowSpec
    policy: Tensor | None = None
    labels: Tensor | None = None

    def double(self) -> "Rows":
        return replace(
            self,
            **{name: getattr(self, name).double() for name in ("S", "T", "factor")},
            policy=None if self.policy is None else self.policy.double(),
        )


def make_rows(
    n: int, V: int, dtype: torch.dtype, form: str, kind: Kind, policy: bool = False, **options: float
) -> Rows:
    """Peaked and flat rows with teachers far and near; a factor of 0 and a policy of 0 among the others."""
    gen = torch.Generator().manual_seed(n + V)
    student, teacher, difference = FORMS[form]
    S = 4 * torch.randn(n, V, generator=gen, dtype=torch.float64)
    S[::2, V // 3] += 8
    gap = (
        torch.randn(n, V, generator=gen, dtype=torch.float64)
        * torch.tensor([3.0, 0.3, 30.0, 1e-2])[torch.arange(n) % 4, None]
    )
    factor = torch.linspace(2.0, -1.5, n, dtype=torch.float64)
    pull = torch.linspace(-1.0, 3.0, n, dtype=torch.float64)
    if n > 3:
        factor[1], pull[2] = 0, 0
        factor[3], pull[3] = 0, 0
    wide = stats_dtype(dtype)
    labels = torch.randint(V, (n,), generator=gen)
    labels[::5] = -1
    return Rows(
        S.to(dtype),
        (gap if difference else S + gap).to(dtype),
        factor.to(wide),
        RowSpec(Divergence(kind, 0.3), student, teacher, difference, **options),
        pull.to(wide) if policy else None,
        labels if policy else None,
    )


def terms(log_q: Tensor, log_p: Tensor, kind: Kind, beta: float) -> Tensor:
    """f of every entry, by the textbook, for finite logits."""
    q, p = log_q.exp(), log_p.exp()
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return {
        Kind.REVERSE_KL: q * (log_q - log_p),
        Kind.FORWARD_KL: p * (log_p - log_q),
        Kind.JSD: beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m),
        Kind.SKEW_REVERSE_KL: q * (log_q - log_m),
        Kind.SKEW_FORWARD_KL: p * (log_p - log_m),
        Kind.TVD: (p - q).abs() / 2,
    }[kind]


@dataclass
class Truth:
    loss: Tensor
    clipped: Tensor
    gradient: Tensor


def truth_of(rows: Rows) -> Truth:
    spec, exact = rows.spec, rows.double()
    S = exact.S.clone().requires_grad_()
    s = reference_logits(S, spec.student, None)
    t = reference_logits(exact.S + exact.T if spec.difference else exact.T, spec.teacher, None)
    mixed = (1 - spec.teacher_mix) * t + spec.teacher_mix * s.detach()
    log_q = s.log_softmax(-1)
    f = terms(log_q, mixed.log_softmax(-1), spec.divergence.kind, spec.divergence.beta)
    D = f.clamp(max=spec.entry_clip).sum(-1)
    above = D.detach() > spec.token_clip
    clipped = torch.where(above, 1.0, (f.detach() > spec.entry_clip).double().mean(-1))
    loss = torch.where(above, spec.token_clip, D)
    objective = (loss * exact.factor).sum()
    if rows.policy is not None:
        at_label = torch.where(rows.labels >= 0, s.gather(-1, rows.labels.clamp(min=0)[:, None])[:, 0], 0.0)
        objective = objective + (exact.policy * (s.logsumexp(-1) - at_label)).sum()
    return Truth(loss.detach(), clipped, torch.autograd.grad(objective, S)[0])


def run_rows(backend: RowBackend, rows: Rows, route: str, G: Tensor) -> tuple[Tensor, Tensor]:
    """(stats, loss); the gradient is in G."""
    if route == "fused":
        return backend.row_fused_(
            rows.S, rows.T, rows.factor, rows.spec, None, None, True, G, rows.policy, rows.labels
        )[:2]
    stats = backend.row_stats(rows.S, rows.T, rows.spec, None, None, True)
    loss, A = backend.row_dot(rows.S, rows.T, stats, rows.spec, None, None)
    backend.row_grad_(
        rows.S, rows.T, stats, A, rows.factor, rows.spec, None, None, G, rows.policy, rows.labels
    )
    return stats, loss


def check(backend: RowBackend, rows: Rows, route: str, narrow: torch.dtype | None = None) -> None:
    truth, work = truth_of(rows), replace(rows, S=rows.S.clone())
    G = work.S if narrow is None else narrowed(work.S, narrow)
    stats, loss = run_rows(backend, work, route, G)
    largest = truth.loss.abs().clamp(min=1) * (
        40 if rows.spec.student.softcap else 1
    )  # through the transform logits of 40 are rounded to fp32
    assert_one_rounding(loss, truth.loss, loss.dtype, magnitude=largest, name="loss")
    assert_one_rounding(stats[:, Column.CLIPPED], truth.clipped, stats.dtype, name="clipped share")
    scale = rows.factor.double().abs() + (0 if rows.policy is None else rows.policy.double().abs())
    assert_one_rounding(G, truth.gradient, G.dtype, magnitude=(2 * scale * largest)[:, None], name="gradient")


@pytest.fixture
def rows_of(backend) -> RowBackend:
    return backends.select(backend, torch.device("cpu"))


@KINDS
@ROUTES
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clips(rows_of, kind, route, clip, dtype):
    for form in FORMS:
        for n, V in SHAPES:
            check(rows_of, make_rows(n, V, dtype, form, kind, **CLIPS[clip]), route)


@KINDS
@ROUTES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_teacher_mix(rows_of, kind, route, dtype):
    for form in FORMS:
        for n, V in SHAPES:
            check(rows_of, make_rows(n, V, dtype, form, kind, teacher_mix=0.25), route)


@KINDS
@ROUTES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", [{}, CLIPS["both"]], ids=["whole", "clipped"])
def test_policy(rows_of, kind, route, dtype, clip):
    for form in FORMS:
        for n, V in SHAPES:
            check(rows_of, make_rows(n, V, dtype, form, kind, policy=True, **clip), route)


@KINDS
@ROUTES
def test_policy_into_a_narrowed_view(rows_of, kind, route):
    for n, V in SHAPES:
        check(
            rows_of,
            make_rows(n, V, torch.float32, "pair", kind, policy=True, teacher_mix=0.5, entry_clip=0.05),
            route,
            torch.bfloat16,
        )


@ROUTES
def test_a_label_that_has_nearly_all_probability(rows_of, route):
    """q - 1 at the label, rounded once: q rounded to bf16 before the subtraction would leave an error of 2**-9 of the policy."""
    rows = make_rows(4, 257, torch.bfloat16, "pair", Kind.FORWARD_KL, policy=True)
    rows.S[:, 100] = 16.0
    rows = replace(rows, labels=torch.full((4,), 100), factor=torch.zeros(4))
    truth, work = truth_of(rows), replace(rows, S=rows.S.clone())
    run_rows(rows_of, work, route, work.S)
    assert_one_rounding(
        work.S, truth.gradient, work.S.dtype, magnitude=rows.policy.double().abs()[:, None], name="gradient"
    )


@ROUTES
def test_a_policy_alone_ignores_an_infinite_divergence(rows_of, route):
    rows = make_rows(4, 65, torch.float32, "pair", Kind.REVERSE_KL, policy=True)
    plain = replace(rows, factor=torch.zeros(4), S=rows.S.clone(), T=rows.S.clone())
    excluded = replace(rows, factor=torch.zeros(4), S=rows.S.clone(), T=rows.S.clone())
    excluded.T[:, 7] = -math.inf
    for work in (plain, excluded):
        run_rows(rows_of, work, route, work.S)
    assert_same_bits(excluded.S, plain.S)


@ROUTES
@pytest.mark.parametrize("kind", [Kind.REVERSE_KL, Kind.JSD], ids=str)
def test_an_infinite_term_is_clipped(rows_of, route, kind):
    """A teacher that excludes an entry: the term is +inf, so the clip; the gradient is finite and that of the other entries."""
    rows = make_rows(4, 65, torch.float64, "pair", kind, entry_clip=0.1)
    rows.T[:, 7] = -math.inf
    far = replace(rows, T=rows.T.clone())
    far.T[:, 7] = -700.0  # in float64 as good as -inf, and the textbook can still say it
    truth, work = truth_of(far), replace(rows, S=rows.S.clone())
    _, loss = run_rows(rows_of, work, route, work.S)
    assert_one_rounding(loss, truth.loss, loss.dtype)
    assert_one_rounding(work.S, truth.gradient, work.S.dtype)


@KINDS
def test_a_teacher_of_one_row_for_all(rows_of, kind):
    """Row stride 0, as in entropies: a uniform teacher."""
    for dtype in DTYPES:
        rows = make_rows(9, 1003, dtype, "pair", kind, policy=True)
        one = torch.zeros(1, 1003, dtype=dtype)
        results = []
        for T in (one.expand(9, 1003), one.repeat(9, 1)):
            work = replace(rows, S=rows.S.clone(), T=T)
            results.append((*run_rows(rows_of, work, "fused", work.S), work.S))
        for got, expected in zip(*results, strict=True):
            assert_same_bits(got, expected)


@ROUTES
def test_without_options_nothing_changes(rows_of, route):
    """A policy of zeros, a mix of 0 and clips of inf give the bits of the call without them."""
    for kind in Kind:
        rows = make_rows(9, 1003, torch.bfloat16, "difference, linear", kind)
        zeros = replace(rows, policy=torch.zeros(9), labels=torch.zeros(9, dtype=torch.int64))
        results = []
        for given in (rows, zeros):
            work = replace(given, S=given.S.clone())
            results.append((*run_rows(rows_of, work, route, work.S), work.S))
        for got, expected in zip(*results, strict=True):
            assert_same_bits(got, expected)
