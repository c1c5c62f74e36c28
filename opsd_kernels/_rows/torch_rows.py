"""Row sweeps in plain torch, for any device and dtype. Contract: contract.py. Formulas: torch_math.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import RowSpec
from .contract import GAP_BOUNDS, SPREAD_LIMIT, Column, clip_tokens, offset, plain_kl
from .torch_math import clipped_u, entry, transform, transform_slope
from .torch_topk import row_topk_ as row_topk_

# Rows are swept in blocks of about this many entries, so that the dozen temporaries stay small beside the
# chunk's buffers.
BLOCK_ENTRIES = 1 << 17
SUM_ROWS = 16  # of a gradient, cast at a time for its column sums


class Logits(NamedTuple):
    """Transformed logits, in the dtype of the statistics."""

    s: Tensor
    t: Tensor
    d: Tensor
    # True if d is exact, from the difference buffer
    linear: bool

    def offset(self, max_s: Tensor, max_t: Tensor) -> Tensor:
        return offset(self.s, self.t, self.d, max_s, max_t, self.linear)

    def teacher_above(self, max_s: Tensor, max_t: Tensor) -> Tensor:
        """Return t - max_t, without the rounding of t = s + d where d is exact."""
        return (self.s - max_s) + self.offset(max_s, max_t) if self.linear else self.t - max_t


def _blocks(S: Tensor) -> list[slice]:
    rows = max(1, BLOCK_ENTRIES // S.shape[1])
    return [slice(start, start + rows) for start in range(0, S.shape[0], rows)]


def logits(S: Tensor, T: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None) -> Logits:
    """Transform raw logits (n, V), or some of their columns with the same columns of the biases.

    One bias object on both sides means that it cancels in the difference.
    """
    wide = torch.promote_types(S.dtype, torch.float32)
    z, other = S.to(wide), T.to(wide)
    s = transform(z, spec.student, bias_s)
    if spec.linear_difference(bias_s is bias_t):
        d = (1 - spec.teacher_mix) * spec.student.factor * other
        return Logits(s, s + d, d, linear=True)
    t = transform(z + other if spec.difference else other, spec.teacher, bias_t)
    if spec.teacher_mix:
        t = (1 - spec.teacher_mix) * t + spec.teacher_mix * s
    return Logits(s, t, t - s, linear=False)


def _expected(probability: Tensor, value: Tensor) -> Tensor:
    """Sum probability * value over the vocabulary. An entry of probability 0 adds 0, whatever its value."""
    return torch.where(probability > 0, probability * value, torch.zeros_like(value)).sum(-1)


def distributions(logits: Logits, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, p and delta of entries. Near rows take p = q * exp(delta): p - q keeps delta's digits."""
    column = {c: stats[:, c, None] for c in Column}
    references = column[Column.STUDENT_MAX], column[Column.TEACHER_MAX]
    q = torch.exp(student_logprobs(logits.s, stats))
    delta = logits.offset(*references) - column[Column.GAP]
    far_p = torch.exp(logits.teacher_above(*references) - column[Column.TEACHER_LOGSUM])
    # delta is NaN where neither side has the entry
    near_p = torch.where(logits.t == -torch.inf, 0.0, q * torch.exp(delta))
    return q, torch.where(column[Column.SPREAD] <= SPREAD_LIMIT, near_p, far_p), delta


def student_logprobs(s: Tensor, stats: Tensor) -> Tensor:
    """Return log q of transformed student logits (n, K), in nats."""
    return s - stats[:, Column.STUDENT_MAX, None] - stats[:, Column.STUDENT_LOGSUM, None]


def label_logprobs(label: Logits, stats: Tensor) -> Tensor:
    """Return (n, 2): log q and log p of the label, in nats."""
    column = stats[:, :, None]
    references = column[:, Column.STUDENT_MAX], column[:, Column.TEACHER_MAX]
    student = student_logprobs(label.s, stats)
    return torch.cat([student, label.teacher_above(*references) - column[:, Column.TEACHER_LOGSUM]], dim=1)


def _normalisers(logits: Logits) -> tuple[Tensor, ...]:
    """Return the columns up to SPREAD, (n, 1) each."""
    s, t, *_ = logits
    peak = s.argmax(-1, keepdim=True)
    max_s, at_peak = s.gather(-1, peak), t.gather(-1, peak)
    o = logits.offset(max_s, at_peak)
    spread = torch.nan_to_num(o.abs().amax(-1, keepdim=True), nan=torch.inf, posinf=torch.inf)
    near = spread <= SPREAD_LIMIT
    max_t = torch.where(near, at_peak, t.amax(-1, keepdim=True))
    e = torch.exp(s - max_s)
    Z = e.sum(-1, keepdim=True)
    logsum_s = torch.log(Z)
    logsum_t = torch.log(torch.exp(logits.teacher_above(max_s, max_t)).sum(-1, keepdim=True))
    # Numerator and Z from one e: a q with sum 1 + eps would put eps into L, and L into the KL at first order.
    x = (e * torch.expm1(o)).sum(-1, keepdim=True) / Z
    close = near & (x > GAP_BOUNDS[0]) & (x < GAP_BOUNDS[1])
    return max_s, logsum_s, max_t, logsum_t, torch.where(close, torch.log1p(x), logsum_t - logsum_s), spread


def missing(stats: Tensor) -> Tensor:
    """Shape (n,): NaN where a side has no distribution, which the guards would hide; else 0."""
    return 0 * stats[:, Column.GAP]


def _block_stats(logits: Logits, metrics: bool) -> Tensor:
    s, t, *_ = logits
    stats = s.new_zeros(s.shape[0], len(Column))
    max_s, logsum_s, max_t, *_ = columns = _normalisers(logits)
    stats[:, : len(columns)] = torch.cat(columns, dim=-1)
    q, p, delta = distributions(logits, stats)
    stats[:, Column.REVERSE_KL] = _expected(q, -delta) + missing(stats)
    stats[:, Column.FORWARD_KL] = _expected(p, delta) + missing(stats)
    if metrics:
        # A near row's reference may lie 20 below the teacher's own maximum.
        above = logits.teacher_above(max_s, max_t)
        above = above - above.amax(-1, keepdim=True)
        teacher_sum = torch.exp(above).sum(-1)
        stats[:, Column.STUDENT_ENTROPY] = logsum_s[:, 0] - _expected(q, s - max_s)
        stats[:, Column.TEACHER_ENTROPY] = torch.log(teacher_sum) - _expected(p, above)
        stats[:, Column.STUDENT_MAX_PROB] = torch.exp(-logsum_s[:, 0])
        stats[:, Column.TEACHER_MAX_PROB] = 1 / teacher_sum
        stats[:, Column.STUDENT_ARGMAX] = s.argmax(-1).to(s.dtype)
        stats[:, Column.TEACHER_ARGMAX] = t.argmax(-1).to(s.dtype)
    return stats


def column_norms(G: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(G.dtype, torch.float32)
    norms, sums = G.new_zeros(G.shape[1], dtype=wide), G.new_empty(G.shape[0], dtype=wide)
    for start in range(0, G.shape[0], SUM_ROWS):
        part = slice(start, start + SUM_ROWS)
        rows = G[part].to(wide)
        sums[part] = rows.sum(1)
        scaled = rows if scale is None else rows * scale[part, None]
        norms += scaled.square().sum(0)
    return norms, sums


def weighted_sum(G: Tensor, scale: Tensor) -> Tensor:
    """Return scale @ G, (V,), in the dtype of `scale`."""
    step = SUM_ROWS if G.dtype.itemsize == 2 else G.shape[0]
    total = scale[:step] @ G[:step].to(scale.dtype)
    for start in range(step, G.shape[0], step):
        part = slice(start, start + step)
        total = total + scale[part] @ G[part].to(scale.dtype)
    return total


def gather_columns_(G: Tensor, columns: Tensor, out: Tensor, sums: Tensor) -> None:
    torch.index_select(G, 1, columns, out=out)
    sums -= out.sum(1, dtype=sums.dtype)


def row_stats(
    S: Tensor, T: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None, metrics: bool
) -> Tensor:
    return torch.cat(
        [_block_stats(logits(S[b], T[b], spec.at(b), bias_s, bias_t), metrics) for b in _blocks(S)]
    )


def terms(q: Tensor, p: Tensor, delta: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (f, u, clipped) of every entry, under the entry clip."""
    f, u = entry(spec.divergence, q, p, delta)
    clipped = f > spec.entry_clip
    return (
        torch.where(clipped, spec.entry_clip, f),
        torch.where(clipped, clipped_u(spec.divergence, q), u),
        clipped,
    )


def row_dot(
    S: Tensor, T: Tensor, stats: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None
) -> tuple[Tensor, Tensor]:
    if spec.one_sweep:
        return plain_kl(stats, spec)
    loss, A = torch.empty_like(stats[:, 0]), torch.empty_like(stats[:, 0])
    for b in _blocks(S):
        f, u, clipped = terms(*distributions(logits(S[b], T[b], spec.at(b), bias_s, bias_t), stats[b]), spec)
        loss[b], A[b] = f.sum(-1) + missing(stats[b]), u.sum(-1) + missing(stats[b])
        stats[b, Column.CLIPPED] = clipped.to(stats.dtype).mean(-1)
    return clip_tokens(loss, stats, spec), A


def row_grad_(
    S: Tensor,
    T: Tensor,
    stats: Tensor,
    A: Tensor,
    factor: Tensor,
    spec: RowSpec,
    bias_s: Tensor | None,
    bias_t: Tensor | None,
    G: Tensor,
    policy_slope: Tensor | None = None,
    labels: Tensor | None = None,
) -> None:
    factor = torch.where(stats[:, Column.CLIPPED] == 1, 0.0, factor)
    for b in _blocks(S):
        of_rows = spec.at(b)
        q, p, delta = distributions(logits(S[b], T[b], of_rows, bias_s, bias_t), stats[b])
        _, u, _ = terms(q, p, delta, spec)
        grad = torch.where(factor[b, None] == 0, 0.0, (u - q * A[b, None]) * factor[b, None])
        if policy_slope is not None and labels is not None:
            onehot = (torch.arange(S.shape[1], device=S.device) == labels[b, None]).to(q.dtype)
            pull = policy_slope[b, None]
            grad += torch.where(pull == 0, 0.0, pull * (q - onehot))
        slope = transform_slope(S[b].to(q.dtype), of_rows.student, bias_s)
        G[b].copy_(torch.where(grad == 0, 0.0, grad * slope))


def row_fused_(
    S: Tensor,
    T: Tensor,
    factor: Tensor,
    spec: RowSpec,
    bias_s: Tensor | None,
    bias_t: Tensor | None,
    metrics: bool,
    G: Tensor,
    policy_slope: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    stats = row_stats(S, T, spec, bias_s, bias_t, metrics)
    loss, A = row_dot(S, T, stats, spec, bias_s, bias_t)
    row_grad_(S, T, stats, A, factor, spec, bias_s, bias_t, G, policy_slope, labels)
    return stats, loss, A
