"""The contract of a row backend: three sweeps over a chunk of logit rows, and their fusion.

Notation, per row: student logits s, teacher logits t (after the transform), q = softmax(s), p = softmax(t), d
= t - s, and delta = log p - log q = d - L with L = lse(t) - lse(s). A constant shift of the teacher may be
far larger than its difference from the student, so both sides are taken relative to a pair of reference
logits: delta = o - (L - c) with c = TEACHER_MAX - STUDENT_MAX. The offset is o = d - c where the difference
buffer holds d itself, else o = (t - TEACHER_MAX) - (s - STUDENT_MAX). In near rows TEACHER_MAX is the
teacher's logit at the student's first maximum, where a peaked row has all its weight; in other rows each side
has its own maximum.

A backend is a module or object with

    row_stats(S, T, spec, bias_s, bias_t, metrics)                                      -> stats
    row_dot(S, T, stats, spec, bias_s, bias_t)                                          -> (loss, A)
    row_grad_(S, T, stats, A, factor, spec, bias_s, bias_t, G, policy_slope, labels)    -> None
    row_fused_(S, T, factor, spec, bias_s, bias_t, metrics, G, policy_slope, labels)    -> (stats, loss, A)

S, T          (n, V) raw student logits, and raw teacher logits or, with `spec.difference`, raw teacher minus
              raw student logits. Same dtype: float64, float32, bfloat16 or float16. Unit column stride; any
              row stride >= V, and for T also 0, one row for all; any storage offset. n, V >= 1. S and T never
              overlap. With `spec.teacher_mix` a, t stands for (1 - a) * t + a * s everywhere below.
spec          RowSpec of scalars. A side's temperature may be a tensor (n, 1), one for each row, of the dtype
              of the statistics; one object for both sides keeps a linear difference linear.
bias_s/_t     (V,) contiguous, of the dtype of the statistics, or None. -inf in a bias masks that entry:
              probability zero (not under a softcap, which maps it to -c).
stats         (n, len(Column)) in torch.promote_types(S.dtype, float32): float64 for float64 logits, else
              float32. Columns up to SPREAD and the
              divergence's own value (REVERSE_KL, FORWARD_KL, for mixed KL both) are always right; the others
              only with `metrics`, else 0.
loss, A       (n,) of the dtype of stats: the divergence in nats, and the row scalar A of mathematics.md. For
              the KLs without an entry clip `row_dot` reads both from stats (`plain_kl`) and no logits.
clips         spec.entry_clip: a term f > clip counts as the clip and its u as 0; for reverse and mixed
              KL, whose u lacks c * q, as -c * q (`Divergence.omitted`). spec.token_clip: a sum above it
              counts as the clip. With either, `row_dot` and `row_fused_` write stats[CLIPPED]: the share of
              the row's V terms under the entry clip, and 1 where the token clip holds. At 1 the divergence
              has no gradient.
factor        (n,) of the dtype of stats: multiplies the row's gradient.
policy_slope  (n,) of the dtype of stats, or None for zeros: adds policy_slope * (q - onehot(label)), the
              gradient of -policy_slope * log q(label).
labels        (n,) int64 with `policy_slope`; -1 means no label: policy_slope * q alone is added.
G             (n, V) output: factor * (u - q * A) + policy_slope * (q - onehot(label)), through 1/temperature,
              the softcap's slope and the scale. Either S itself, or a buffer that shares nothing with S and
              T, or the *narrowed view* of S: S's memory seen as the 16-bit type, each row starting where S's
              row starts (`narrowed`). A sweep therefore reads entry v of S and T before it writes entry v of
              G, and in a narrowed view it writes no byte that is still to be read.

Promises, each checked by tests/rows/row_contract.py against float64:

* One rounding. Arithmetic in fp32 (fp64 for fp64 buffers); the result differs from exact arithmetic on the
  same rounded inputs by one rounding of the output type plus 2e-6. Row maximum and log-sum stay apart:
  s - (max + logsum) costs a factor of ten. delta comes from o, not from log p - log q.
* Zero factor: the divergence adds exactly 0 to that row of G, whatever the row holds, inf and NaN included;
  with a policy_slope of 0 the row is exactly 0.
* -inf: an entry with t = -inf has p = 0, with s = -inf has q = 0. A term whose probability is 0 is 0. KL
  terms with q > 0 = p are +inf. No NaN where the divergence is finite. A row whose student (or teacher)
  entries are all -inf has no distribution: NaN.
* Deterministic, and independent of the other rows: a row alone gives the same bits as in a batch, for any
  number of threads. No atomics.
* int64 addresses.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from ..spec import Kind, LogitTransform, RowSpec

# Near rows have |o| up to this. They may be summed relative to the student's maximum alone: exp(-87 + 2 * 24)
# * 152k entries stays under 1e-11.
SPREAD_LIMIT = 24.0
# With x = sum q * expm1(o), L - c = log1p(x) inside these bounds, which keeps its digits however close the
# teacher is. Outside it is log(sum q * exp(o)), with an exp of full relative accuracy (1 + expm1 has less):
# near x = -1, a student's peak where the teacher has no mass, log1p(x) has no digits left.
GAP_BOUNDS = (-0.5, 1.0)


class Column(IntEnum):
    """Columns of the statistics. Entropies and divergences are in nats."""

    STUDENT_MAX = 0
    # log sum exp(s - max)
    STUDENT_LOGSUM = 1
    # t at the student's first maximum in near rows, max t in others; c is this minus STUDENT_MAX, rounded
    TEACHER_MAX = 2
    # log sum exp(t - TEACHER_MAX)
    TEACHER_LOGSUM = 3
    # L - c = TEACHER_LOGSUM - STUDENT_LOGSUM, but to its own relative accuracy
    GAP = 4
    # max |o| with the near references; +inf where it is inf or NaN
    SPREAD = 5
    REVERSE_KL = 6
    FORWARD_KL = 7
    STUDENT_ENTROPY = 8
    TEACHER_ENTROPY = 9
    STUDENT_MAX_PROB = 10
    TEACHER_MAX_PROB = 11
    # lowest index of the maximum, as a float (exact below 2**24)
    STUDENT_ARGMAX = 12
    TEACHER_ARGMAX = 13
    # 0 until row_dot has run
    CLIPPED = 14


class RowBackend(Protocol):
    """The sweeps of a backend, as described above."""

    def row_stats(
        self, S: Tensor, T: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None, metrics: bool
    ) -> Tensor: ...

    def row_dot(
        self, S: Tensor, T: Tensor, stats: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...

    def row_grad_(
        self,
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
    ) -> None: ...

    def row_fused_(
        self,
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
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def row_topk_(
        self,
        S: Tensor,
        of_side: LogitTransform,
        bias: Tensor | None,
        ids: Tensor,
        values: Tensor,
        tail: Tensor,
    ) -> None:
        """Write the k largest logits of each row of S, (n, V) float32 or float64, in falling order.

        `ids` (n, k) int64 and `values` (n, k), contiguous: columns and transformed logits, the lower column
        first among equal logits; NaN counts as -inf. `tail` (n,): log of the sum of exp(x - values[:, 0])
        over the other entries x, -inf for none, NaN if one is NaN. 1 <= k <= V.
        """
        ...

    def column_norms(self, G: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the (V,) sums over the rows of (scale * G)^2, and the (n,) row sums of G.

        G is (n, V), `scale` (n,) or None for ones. Both results have the dtype of the statistics.
        """
        ...

    def gather_columns_(self, G: Tensor, columns: Tensor, out: Tensor, sums: Tensor) -> None:
        """Write G[:, columns] to `out`, (n, K), and subtract its row sums from `sums`, (n,)."""
        ...


def narrowed(S: Tensor, dtype: torch.dtype) -> Tensor:
    """View the front of each row of S, (n, V) with row stride r, as `dtype`.

    The view is (n, V) with row stride r * S.itemsize / dtype.itemsize.
    """
    ratio = S.element_size() // dtype.itemsize
    flat = S.as_strided((S.stride(0) * (S.shape[0] - 1) + S.shape[1],), (1,)).view(dtype)
    return flat.as_strided((S.shape[0], S.shape[1]), (S.stride(0) * ratio, 1))


def offset(s: Tensor, t: Tensor, d: Tensor, max_s: Tensor, max_t: Tensor, linear: bool) -> Tensor:
    """Return the offset o. With `linear` d is exact, from the difference buffer."""
    return d - (max_t - max_s) if linear else (t - max_t) - (s - max_s)


def plain_kl(stats: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor]:
    """Return (loss, A) of a KL, or of the sum of both, whose value is in the columns of the statistics."""
    kind, beta = spec.divergence.kind, spec.divergence.beta
    if kind == Kind.REVERSE_KL:
        loss = A = stats[:, Column.REVERSE_KL].clone()
    elif kind == Kind.FORWARD_KL:
        loss, A = stats[:, Column.FORWARD_KL].clone(), torch.full_like(stats[:, 0], -1.0)
    else:
        A = (1 - beta) * stats[:, Column.REVERSE_KL]
        loss = beta * stats[:, Column.FORWARD_KL] + A
    return clip_tokens(loss, stats, spec), A


def clip_tokens(loss: Tensor, stats: Tensor, spec: RowSpec) -> Tensor:
    """Return the loss under the token clip, and set stats[CLIPPED] where the clip holds."""
    if spec.token_clip == math.inf:
        return loss
    above = loss > spec.token_clip
    stats[:, Column.CLIPPED] = torch.where(above, 1.0, stats[:, Column.CLIPPED])
    return torch.where(above, spec.token_clip, loss)
