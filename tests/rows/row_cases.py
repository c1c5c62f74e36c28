"""Chunks of logit rows that are hard for a sweep, and their float64 truth. Used by row_contract.py."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opsd_kernels._rows.contract import RowBackend
from opsd_kernels.spec import Divergence, Kind, LogitTransform, RowSpec
from opsd_kernels.testing import FP32_ARITHMETIC
from opsd_kernels.testing.reference import reference_divergence, reference_logits

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PLAIN, SCALED, CAPPED = LogitTransform(), LogitTransform(1.3, None, 0.7), LogitTransform(1.3, 30.0, 0.7)
# name: student's transform, teacher's transform, True if the teacher buffer holds a difference
FORMS = {
    "pair": (PLAIN, PLAIN, False),
    "pair, transformed": (CAPPED, SCALED, False),
    "difference, linear": (SCALED, SCALED, True),
    "difference, softcap": (CAPPED, CAPPED, True),
    "difference, two temperatures": (PLAIN, SCALED, True),
}
# The same with a temperature for each row: of one side, of each side its own, one for both.
OF_ROWS = {
    "pair, temperatures of the teacher": ("pair", None, 0.4),
    "pair, temperatures": ("pair, transformed", 0.5, 0.4),
    "difference, one temperature": ("difference, linear", 0.5, 0.5),
    "difference, softcap, temperatures": ("difference, softcap", 0.5, 0.4),
}


@dataclass
class Rows:
    """The arguments of one chunk's sweeps: logits, factors, spec, biases, policy term."""

    S: Tensor
    T: Tensor
    factor: Tensor
    spec: RowSpec
    bias_s: Tensor | None = None
    bias_t: Tensor | None = None
    policy: Tensor | None = None
    labels: Tensor | None = None

    @property
    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        return self.bias_s, self.bias_t

    def copy(self) -> Rows:
        """Copy S and T into views, each with an odd storage offset and a row stride of its own."""
        return replace(self, S=strided(self.S, 8, 5), T=strided(self.T, 24, 16))

    def contiguous(self) -> Rows:
        """Lay the rows out one after the other from a storage's start, as in the op's own buffers."""
        return replace(self, S=self.S.contiguous(), T=self.T.contiguous())

    def take(self, rows: slice) -> Rows:
        S, T, factor = self.S[rows], self.T[rows], self.factor[rows]
        return replace(self, S=S, T=T, factor=factor, spec=self.spec.at(rows))

    @property
    def live(self) -> Tensor:
        """Shape (n,) bool: True where the factor is not zero."""
        return self.factor != 0


@dataclass
class Truth:
    loss: Tensor
    gradient: Tensor
    rounding: (
        Tensor  # (n,) cost of rounding the transformed logits to fp32 alone, in units of FP32_ARITHMETIC
    )
    spread: Tensor  # (n,) max |o|, relative to the student's first maximum
    student: Tensor
    teacher: Tensor

    def size(self, loss: Tensor) -> Tensor:
        """Shape (n,): the largest number that the sums of a row pass through, for a divergence of `loss`."""
        return torch.where(loss.isfinite(), loss, 0.0).clamp(min=1) + self.rounding


def strided(x: Tensor, gap: int, offset: int) -> Tensor:
    """Copy x to a view with `gap` unused columns after each row and `offset` unused entries before the first.

    The unused entries are NaN.
    """
    n, V = x.shape
    storage = x.new_full((offset + n * (V + gap),), math.nan)
    return storage.as_strided((n, V), (V + gap, 1), offset).copy_(x)


def teacher_gap(S: Tensor, gen: torch.Generator) -> Tensor:
    """T - S. Rows in turn: wide, wide and off the student's peak, near by 1e-1, 1e-2 and 1e-4, equal."""
    n, V = S.shape
    gap = torch.randn(n, V, generator=gen, dtype=torch.float64)
    steps = torch.tensor([9.0, 0.5, 1e-1, 1e-2, 1e-4, 0.0], dtype=torch.float64).repeat(n // 6 + 1)[:n]
    gap *= steps[:, None]
    gap[torch.arange(1, n, 6), S[1::6].argmax(-1)] -= 20
    return gap


def temperatures(n: int, least: float, dtype: torch.dtype) -> Tensor:
    """Shape (n, 1): rising from `least` by quarters, exact in fp32, in the dtype of the statistics."""
    return (least + 0.25 * torch.arange(n, dtype=torch.float64) % 2)[:, None].to(
        torch.promote_types(dtype, torch.float32)
    )


def of_rows(rows: Rows, least_s: float | None, least_t: float | None) -> Rows:
    """Give each row of a side a temperature of its own; one tensor for both sides if they start alike."""
    n, dtype = rows.S.shape[0], rows.S.dtype
    spec = rows.spec
    if least_s is not None:
        spec = replace(spec, student=replace(spec.student, temperature=temperatures(n, least_s, dtype)))
    if least_t is not None:
        own = spec.student.temperature if least_t == least_s else temperatures(n, least_t, dtype)
        spec = replace(spec, teacher=replace(spec.teacher, temperature=own))
    return replace(rows, spec=spec)


def make_rows(
    n: int,
    V: int,
    dtype: torch.dtype,
    form: str = "pair",
    kind: Kind = Kind.JSD,
    bias: bool = True,
    seed: int = 0,
) -> Rows:
    """Draw flat and peaked rows, |z| up to 40. With n > 2 row 2 has factor 0 and holds inf and NaN."""
    if form in OF_ROWS:
        base, least_s, least_t = OF_ROWS[form]
        return of_rows(make_rows(n, V, dtype, base, kind, bias, seed), least_s, least_t)
    gen = torch.Generator().manual_seed(seed)
    student, teacher, difference = FORMS[form]
    widths = torch.tensor([1.0, 10.0, 4.0], dtype=torch.float64).repeat(n // 3 + 1)[:n, None]
    S = torch.randn(n, V, generator=gen, dtype=torch.float64) * widths
    S[::2, V // 3] += 12
    S = S.clamp(-40, 40).to(dtype)
    gap = teacher_gap(S.double(), gen)
    T = (gap if difference else S.double() + gap).to(dtype)
    factor = torch.linspace(0.5, -3.0, n, dtype=torch.float64)
    if n > 2:
        factor[2], S[2], T[2, ::2], T[2, 1::2] = 0, math.inf, math.nan, -math.inf
    wide = torch.promote_types(dtype, torch.float32)
    bias_s = torch.randn(V, generator=gen, dtype=torch.float64).to(wide) if bias else None
    bias_t = bias_s if difference or not bias else torch.randn(V, generator=gen, dtype=torch.float64).to(wide)
    spec = RowSpec(Divergence(kind, 0.3), student, teacher, difference)
    return Rows(strided(S, 8, 5), strided(T, 24, 16), factor.to(wide), spec, bias_s, bias_t)


def off_kinks(rows: Rows) -> Rows:
    """Move entries of nearly equal probability apart: at TVD's kink, p = q, any subgradient is right."""
    signs = torch.tensor([0.25, -0.25]).repeat(rows.S.shape[1])[: rows.S.shape[1]].to(rows.T.dtype)
    for _ in range(8):
        truth = truth_of(rows)
        # 2e-5: a few roundings of logits of 40
        near = (truth.teacher.log_softmax(-1) - truth.student.log_softmax(-1)).abs() < 2e-5
        near &= rows.live[:, None]
        if not near.any():
            break
        rows.T.add_(signs * near)
    return rows


def truth_of(rows: Rows) -> Truth:
    """Compute textbook and autograd in float64, with the gradient 0 where the factor is 0."""
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


@functools.cache
def hard_rows(n: int, V: int, dtype: torch.dtype, form: str, kind: Kind) -> tuple[Rows, Truth]:
    """Return make_rows with its truth, cached. Callers copy the rows before a sweep writes to them."""
    rows = make_rows(n, V, dtype, form, kind)
    rows = off_kinks(rows) if kind == Kind.TVD and V > 1 else rows
    return rows, truth_of(rows)


def run_rows(
    backend: RowBackend, rows: Rows, route: str, G: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (stats, loss, gradient) by three sweeps or one. Without G the gradient overwrites S."""
    G = rows.S if G is None else G
    policy = (rows.policy, rows.labels)
    if route == "fused":
        stats, loss, _ = backend.row_fused_(
            rows.S, rows.T, rows.factor, rows.spec, *rows.biases, True, G, *policy
        )
        return stats, loss, G
    stats = backend.row_stats(rows.S, rows.T, rows.spec, *rows.biases, True)
    loss, A = backend.row_dot(rows.S, rows.T, stats, rows.spec, *rows.biases)
    backend.row_grad_(rows.S, rows.T, stats, A, rows.factor, rows.spec, *rows.biases, G, *policy)
    return stats, loss, G
