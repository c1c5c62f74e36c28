"""The row contract's clips, teacher mix and policy term as a test class: see row_contract.py."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from row_cases import Rows, of_rows, run_rows
from row_contract import EACH_DTYPE, KINDS, ROUTES, RowChecks
from torch import Tensor

from opsd_kernels._rows.contract import Column, RowBackend, narrowed
from opsd_kernels.spec import Divergence, Kind, LogitTransform, RowSpec
from opsd_kernels.testing import assert_same_bits
from opsd_kernels.testing.reference import reference_logits

PLAIN, CAPPED = LogitTransform(), LogitTransform(1.3, 20.0, 0.7)
FORMS = {
    "pair": (PLAIN, CAPPED, False),
    "difference, linear": (PLAIN, PLAIN, True),
    "difference, softcap": (CAPPED, CAPPED, True),
    "pair, temperatures": (PLAIN, CAPPED, False),
}
CLIPS = {
    "entry": {"entry_clip": 0.02},
    "token": {"token_clip": 0.3},
    "both": {"entry_clip": 0.05, "token_clip": 0.3},
}


def make_rows(
    n: int, V: int, dtype: torch.dtype, form: str, kind: Kind, policy: bool = False, **options: float
) -> Rows:
    """Draw peaked and flat rows with far and near teachers; some factors and policy slopes are 0."""
    gen = torch.Generator().manual_seed(n + V)
    student, teacher, difference = FORMS[form]
    S = 4 * torch.randn(n, V, generator=gen, dtype=torch.float64)
    S[::2, V // 3] += 8
    steps = torch.tensor([3.0, 0.3, 30.0, 1e-2])[torch.arange(n) % 4, None]
    gap = torch.randn(n, V, generator=gen, dtype=torch.float64) * steps
    factor = torch.linspace(2.0, -1.5, n, dtype=torch.float64)
    pull = torch.linspace(-1.0, 3.0, n, dtype=torch.float64)
    if n > 3:
        factor[1], pull[2] = 0, 0
        factor[3], pull[3] = 0, 0
    wide = torch.promote_types(dtype, torch.float32)
    labels = torch.randint(V, (n,), generator=gen)
    labels[::5] = -1
    rows = Rows(
        S.to(dtype),
        (gap if difference else S + gap).to(dtype),
        factor.to(wide),
        RowSpec(Divergence(kind, 0.3), student, teacher, difference, **options),
        policy=pull.to(wide) if policy else None,
        labels=labels if policy else None,
    )
    return of_rows(rows, 0.5, 0.75) if form.endswith("temperatures") else rows


def terms(log_q: Tensor, log_p: Tensor, kind: Kind, beta: float) -> Tensor:
    """f of every entry from the textbook formula, for finite logits."""
    q, p = log_q.exp(), log_p.exp()
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return {
        Kind.REVERSE_KL: q * (log_q - log_p),
        Kind.FORWARD_KL: p * (log_p - log_q),
        Kind.JSD: beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m),
        Kind.SKEW_REVERSE_KL: q * (log_q - log_m),
        Kind.SKEW_FORWARD_KL: p * (log_p - log_m),
        Kind.TVD: (p - q).abs() / 2,
        Kind.MIXED_KL: (beta * p - (1 - beta) * q) * (log_p - log_q),
    }[kind]


@dataclass
class Truth:
    loss: Tensor
    clipped: Tensor
    gradient: Tensor


def truth_of(rows: Rows) -> Truth:
    """Compute textbook and autograd in float64."""
    spec, T = rows.spec, rows.T.double()
    S = rows.S.double().clone().requires_grad_()
    s = reference_logits(S, spec.student, None)
    t = reference_logits(S.detach() + T if spec.difference else T, spec.teacher, None)
    mixed = (1 - spec.teacher_mix) * t + spec.teacher_mix * s.detach()
    log_q = s.log_softmax(-1)
    f = terms(log_q, mixed.log_softmax(-1), spec.divergence.kind, spec.divergence.beta)
    D = f.clamp(max=spec.entry_clip).sum(-1)
    above = D.detach() > spec.token_clip
    clipped = torch.where(above, 1.0, (f.detach() > spec.entry_clip).double().mean(-1))
    loss = torch.where(above, spec.token_clip, D)
    objective = (loss * rows.factor.double()).sum()
    if rows.policy is not None:
        at_label = torch.where(rows.labels >= 0, s.gather(-1, rows.labels.clamp(min=0)[:, None])[:, 0], 0.0)
        objective = objective + (rows.policy.double() * (s.logsumexp(-1) - at_label)).sum()
    return Truth(loss.detach(), clipped, torch.autograd.grad(objective, S)[0])


class RowOptionsContract(RowChecks):
    """The sweeps with clips, teacher mix and policy term, against autograd in float64."""

    FORMS = FORMS
    SHAPES = [(1, 1), (4, 7), (9, 64), (9, 1003), (2, 4099)]

    def check(
        self, backend: RowBackend, rows: Rows, routes: Sequence[str], narrow: torch.dtype | None = None
    ) -> None:
        truth = truth_of(rows)
        # 40: through a transform, logits of that size are rounded to fp32
        largest = truth.loss.abs().clamp(min=1) * (40 if rows.spec.student.softcap else 1)
        scale = rows.factor.double().abs() + (0 if rows.policy is None else rows.policy.double().abs())
        magnitude = (2 * scale * largest)[:, None]
        for route in routes:
            work = replace(rows, S=rows.S.clone())
            G = work.S if narrow is None else narrowed(work.S, narrow)
            stats, loss, _ = run_rows(backend, work, route, G)
            self.assert_one_rounding(loss, truth.loss, loss.dtype, magnitude=largest, name=f"loss, {route}")
            clipped = stats[:, Column.CLIPPED]
            self.assert_one_rounding(clipped, truth.clipped, stats.dtype, name=f"clipped share, {route}")
            self.assert_one_rounding(
                G, truth.gradient, G.dtype, magnitude=magnitude, name=f"gradient, {route}"
            )

    @KINDS
    @pytest.mark.parametrize("clip", CLIPS)
    @EACH_DTYPE
    def test_clips(self, row_backend, kind, clip, dtype):
        for form in self.FORMS:
            for n, V in self.SHAPES:
                self.check(row_backend, make_rows(n, V, dtype, form, kind, **CLIPS[clip]), self.EACH_ROUTE)

    @KINDS
    @EACH_DTYPE
    def test_teacher_mix(self, row_backend, kind, dtype):
        for form in self.FORMS:
            for n, V in self.SHAPES:
                self.check(row_backend, make_rows(n, V, dtype, form, kind, teacher_mix=0.25), self.EACH_ROUTE)

    @KINDS
    @EACH_DTYPE
    @pytest.mark.parametrize("clip", [{}, CLIPS["both"]], ids=["whole", "clipped"])
    def test_policy(self, row_backend, kind, dtype, clip):
        for form in self.FORMS:
            for n, V in self.SHAPES:
                self.check(
                    row_backend, make_rows(n, V, dtype, form, kind, policy=True, **clip), self.EACH_ROUTE
                )

    @KINDS
    def test_policy_into_a_narrowed_view(self, row_backend, kind):
        for n, V in self.SHAPES:
            self.check(
                row_backend,
                make_rows(n, V, torch.float32, "pair", kind, policy=True, teacher_mix=0.5, entry_clip=0.05),
                self.EACH_ROUTE,
                torch.bfloat16,
            )

    @ROUTES
    def test_a_label_that_has_nearly_all_probability(self, row_backend, route):
        """q - 1 at the label is rounded once.

        q rounded to bf16 before the subtraction would leave an error of 2**-9 of the policy slope.
        """
        rows = make_rows(4, 257, torch.bfloat16, "pair", Kind.FORWARD_KL, policy=True)
        rows.S[:, 100] = 16.0
        rows = replace(rows, labels=torch.full((4,), 100), factor=torch.zeros(4))
        truth, work = truth_of(rows), replace(rows, S=rows.S.clone())
        run_rows(row_backend, work, route)
        self.assert_one_rounding(
            work.S,
            truth.gradient,
            work.S.dtype,
            magnitude=rows.policy.double().abs()[:, None],
            name="gradient",
        )

    @ROUTES
    def test_a_policy_alone_ignores_an_infinite_divergence(self, row_backend, route):
        rows = make_rows(4, 65, torch.float32, "pair", Kind.REVERSE_KL, policy=True)
        plain = replace(rows, factor=torch.zeros(4), S=rows.S.clone(), T=rows.S.clone())
        excluded = replace(rows, factor=torch.zeros(4), S=rows.S.clone(), T=rows.S.clone())
        excluded.T[:, 7] = -math.inf
        for work in (plain, excluded):
            run_rows(row_backend, work, route)
        assert_same_bits(excluded.S, plain.S)

    @ROUTES
    @pytest.mark.parametrize("kind", [Kind.REVERSE_KL, Kind.JSD], ids=str)
    def test_an_infinite_term_is_clipped(self, row_backend, route, kind):
        """A term of +inf, of a teacher at -inf, counts as the clip. The other entries give the gradient."""
        rows = make_rows(4, 65, torch.float64, "pair", kind, entry_clip=0.1)
        rows.T[:, 7] = -math.inf
        far = replace(rows, T=rows.T.clone())
        # probability 0 in float64, and still finite for the textbook formula
        far.T[:, 7] = -700.0
        truth, work = truth_of(far), replace(rows, S=rows.S.clone())
        _, loss, _ = run_rows(row_backend, work, route)
        self.assert_one_rounding(loss, truth.loss, loss.dtype)
        self.assert_one_rounding(work.S, truth.gradient, work.S.dtype)

    @KINDS
    def test_a_teacher_of_one_row_for_all(self, row_backend, kind):
        """Row stride 0, the uniform teacher of entropies, gives the bits of a repeated row."""
        for dtype in self.DTYPES:
            rows = make_rows(self.ROWS, 1003, dtype, "pair", kind, policy=True)
            one = torch.zeros(1, 1003, dtype=dtype)
            results = []
            for T in (one.expand(self.ROWS, 1003), one.repeat(self.ROWS, 1)):
                work = replace(rows, S=rows.S.clone(), T=T)
                results.append(run_rows(row_backend, work, "fused"))
            for got, expected in zip(*results, strict=True):
                assert_same_bits(got, expected)

    @KINDS
    @ROUTES
    def test_without_options_nothing_changes(self, row_backend, route, kind):
        """Policy slopes of zero, a mix of 0 and clips of inf give the bits of the call without them."""
        rows, n = make_rows(self.ROWS, 1003, torch.bfloat16, "difference, linear", kind), self.ROWS
        zeros = replace(rows, policy=torch.zeros(n), labels=torch.zeros(n, dtype=torch.int64))
        results = []
        for given in (rows, zeros):
            work = replace(given, S=given.S.clone())
            results.append(run_rows(row_backend, work, route))
        for got, expected in zip(*results, strict=True):
            assert_same_bits(got, expected)
