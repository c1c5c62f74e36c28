"""Row sweeps in plain torch: any device, any dtype, the oracle of the other backends. What a sweep must honour: contract.py. The formulas: divergences.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import entry, transform, transform_slope
from ..spec import RowSpec
from .contract import GAP_BOUNDS, SPREAD_LIMIT, Column, offset, plain_kl, stats_dtype

# Rows are walked in blocks of about this many entries, so that the dozen temporaries of a sweep stay small beside the chunk's own buffers.
BLOCK_ENTRIES = 1 << 17


class _Logits(NamedTuple):
    """Transformed logits of a block of rows, in the dtype of the statistics."""

    s: Tensor
    t: Tensor
    d: Tensor
    linear: bool  # d is exact, from the difference buffer

    def offset(self, max_s: Tensor, max_t: Tensor) -> Tensor:
        return offset(self.s, self.t, self.d, max_s, max_t, self.linear)

    def teacher_above(self, max_s: Tensor, max_t: Tensor) -> Tensor:
        """t - max_t, without the rounding of t = s + d where d is exact."""
        return (self.s - max_s) + self.offset(max_s, max_t) if self.linear else self.t - max_t


def _blocks(S: Tensor) -> list[slice]:
    rows = max(1, BLOCK_ENTRIES // S.shape[1])
    return [slice(start, start + rows) for start in range(0, S.shape[0], rows)]


def _logits(S: Tensor, T: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None) -> _Logits:
    wide = stats_dtype(S.dtype)
    z, other = S.to(wide), T.to(wide)
    s = transform(z, spec.student, bias_s)
    if spec.linear_difference(bias_s is bias_t):
        d = spec.student.factor * other
        return _Logits(s, s + d, d, linear=True)
    t = transform(z + other if spec.difference else other, spec.teacher, bias_t)
    return _Logits(s, t, t - s, linear=False)


def _expected(probability: Tensor, value: Tensor) -> Tensor:
    """sum p * value over the vocabulary, where an entry of probability 0 counts nothing whatever its value."""
    return torch.where(probability > 0, probability * value, torch.zeros_like(value)).sum(-1)


def _distributions(logits: _Logits, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, p and delta of a block. Near rows take p = q * exp(delta), so that p - q keeps delta's digits."""
    column = {c: stats[:, c, None] for c in Column}
    references = column[Column.STUDENT_MAX], column[Column.TEACHER_MAX]
    q = torch.exp(logits.s - references[0] - column[Column.STUDENT_LOGSUM])
    delta = logits.offset(*references) - column[Column.GAP]
    far_p = torch.exp(logits.teacher_above(*references) - column[Column.TEACHER_LOGSUM])
    return q, torch.where(column[Column.SPREAD] <= SPREAD_LIMIT, q * torch.exp(delta), far_p), delta


def _normalisers(logits: _Logits) -> tuple[Tensor, ...]:
    """The columns up to SPREAD, (n, 1) each."""
    s, t, *_ = logits
    peak = s.argmax(-1, keepdim=True)
    max_s, at_peak = s.gather(-1, peak), t.gather(-1, peak)
    o = logits.offset(max_s, at_peak)
    spread = torch.nan_to_num(o.abs().amax(-1, keepdim=True), nan=torch.inf, posinf=torch.inf)
    near = spread <= SPREAD_LIMIT
    max_t = torch.where(near, at_peak, t.amax(-1, keepdim=True))
    e = torch.exp(s - max_s)
    Z = e.sum(-1, keepdim=True)
    logsum_s, logsum_t = torch.log(Z), torch.log(torch.exp(logits.teacher_above(max_s, max_t)).sum(-1, keepdim=True))
    x = (e * torch.expm1(o)).sum(-1, keepdim=True) / Z  # of one e: a q whose sum is 1 + eps would put eps into L, and L into the KL at first order
    close = near & (x > GAP_BOUNDS[0]) & (x < GAP_BOUNDS[1])
    return max_s, logsum_s, max_t, logsum_t, torch.where(close, torch.log1p(x), logsum_t - logsum_s), spread


def _missing(stats: Tensor) -> Tensor:
    """NaN where a side has no distribution, which the guards by probability would hide; else 0."""
    return 0 * stats[:, Column.GAP]


def _block_stats(logits: _Logits, metrics: bool) -> Tensor:
    s, t, *_ = logits
    stats = s.new_zeros(s.shape[0], len(Column))
    max_s, logsum_s, max_t, *_ = columns = _normalisers(logits)
    stats[:, : len(columns)] = torch.cat(columns, dim=-1)
    q, p, delta = _distributions(logits, stats)
    stats[:, Column.REVERSE_KL] = _expected(q, -delta) + _missing(stats)
    stats[:, Column.FORWARD_KL] = _expected(p, delta) + _missing(stats)
    if metrics:
        above = logits.teacher_above(max_s, max_t)
        above = above - above.amax(-1, keepdim=True)  # a near row's reference may lie 20 below the teacher's own maximum
        teacher_sum = torch.exp(above).sum(-1)
        stats[:, Column.STUDENT_ENTROPY] = logsum_s[:, 0] - _expected(q, s - max_s)
        stats[:, Column.TEACHER_ENTROPY] = torch.log(teacher_sum) - _expected(p, above)
        stats[:, Column.STUDENT_MAX_PROB] = torch.exp(-logsum_s[:, 0])
        stats[:, Column.TEACHER_MAX_PROB] = 1 / teacher_sum
        stats[:, Column.STUDENT_ARGMAX] = s.argmax(-1).to(s.dtype)
        stats[:, Column.TEACHER_ARGMAX] = t.argmax(-1).to(s.dtype)
    return stats


def row_stats(S: Tensor, T: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None, metrics: bool) -> Tensor:
    return torch.cat([_block_stats(_logits(S[b], T[b], spec, bias_s, bias_t), metrics) for b in _blocks(S)])


def row_dot(S: Tensor, T: Tensor, stats: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None) -> tuple[Tensor, Tensor]:
    if spec.divergence.one_sweep:
        return plain_kl(stats, spec)
    loss, A = torch.empty_like(stats[:, 0]), torch.empty_like(stats[:, 0])
    for b in _blocks(S):
        f, u = entry(spec.divergence, *_distributions(_logits(S[b], T[b], spec, bias_s, bias_t), stats[b]))
        loss[b], A[b] = f.sum(-1) + _missing(stats[b]), u.sum(-1) + _missing(stats[b])
    return loss, A


def row_grad_(S: Tensor, T: Tensor, stats: Tensor, A: Tensor, factor: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None, G: Tensor) -> None:
    for b in _blocks(S):
        q, p, delta = _distributions(_logits(S[b], T[b], spec, bias_s, bias_t), stats[b])
        _, u = entry(spec.divergence, q, p, delta)
        grad = (u - q * A[b, None]) * transform_slope(S[b].to(q.dtype), spec.student, bias_s) * factor[b, None]
        G[b].copy_(torch.where(factor[b, None] == 0, torch.zeros_like(grad), grad))


def row_fused_(
    S: Tensor, T: Tensor, factor: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None, metrics: bool, G: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    stats = row_stats(S, T, spec, bias_s, bias_t, metrics)
    loss, A = row_dot(S, T, stats, spec, bias_s, bias_t)
    row_grad_(S, T, stats, A, factor, spec, bias_s, bias_t, G)
    return stats, loss, A
