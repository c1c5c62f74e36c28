"""The statistics of a row in the Triton kernels, in one sweep; rows of a far teacher take two more."""

from __future__ import annotations

import triton
import triton.language as tl

from .contract import GAP_BOUNDS, SPREAD_LIMIT
from .triton_launch import LINEAR
from .triton_math import FORWARD_KL, MIXED_KL, REVERSE_KL, exp, exp_pair, gap_pair, guarded, log1p
from .triton_tiles import LOWEST, bent, first, fold, fold_max, lanes, logits, relative, unfold

LIMIT = tl.constexpr(SPREAD_LIMIT)
GAP_LOW, GAP_HIGH = tl.constexpr(GAP_BOUNDS[0]), tl.constexpr(GAP_BOUNDS[1])


@triton.jit
def _first_maximum(
    row, v0, MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """Return a tile's largest student logit m, the teacher's there, its index, and the rounding error of m.

    LOWEST, LOWEST, 0 and LOWEST where the whole tile is -inf.
    """
    v = v0 + tl.arange(0, BLOCK_V)
    y_s, y_t = bent(row, v, MODE, CAP_S, CAP_T, False)
    s, t = logits(row, v, y_s, y_t, MODE, False)
    top = tl.max(s, 0)
    at = first(s, top, v, row[4])
    t_there = tl.sum(tl.where(v == at, t, 0.0), 0)
    error = tl.fma(tl.sum(tl.where(v == at, y_s, 0.0), 0), row[5][1], -top)
    some = top > LOWEST
    m, m_t = tl.where(some, top, LOWEST), tl.where(some, t_there, LOWEST)
    return m, m_t, tl.where(some, at, 0), tl.where(some, error, LOWEST)


@triton.jit
def _near_tile(
    row, v0, m_0, m_t, sums, REVERSE: tl.constexpr, FORWARD: tl.constexpr, METRICS: tl.constexpr,
    MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK_V: tl.constexpr, PACK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Add a tile to each group's sums (`_near_sums`), and raise the group's own maximum."""
    m, at, e_sum, eo, em, g_sum, go, high, low, es, gt, top_y, top_t, at_t = sums
    v = v0 + tl.arange(0, BLOCK_V)
    y_s, y_t = bent(row, v, MODE, CAP_S, CAP_T, WHOLE)
    s, t = logits(row, v, y_s, y_t, MODE, WHOLE)
    top = tl.maximum(m, fold_max(s, BLOCK_V, PACK))
    at = tl.where(top > m, v0, at)
    fall = m - top
    shrink = exp(fall)
    if METRICS:
        es = tl.fma(fall, e_sum, es) * shrink
        gt = gt * shrink
    e_sum, em, g_sum = e_sum * shrink, em * shrink, g_sum * shrink
    _, _, o = relative(row, v, y_s, y_t, m_0, m_t, MODE, WHOLE)
    # x alone, the same in every mode: LINEAR is the shortest
    x, _, _ = relative(row, v, y_s, y_t, unfold(top, BLOCK_V, PACK), m_t, LINEAR, WHOLE)
    e = exp(x)
    exp_o, expm1_o = gap_pair(o)
    g = e * exp_o
    if METRICS:
        y = tl.maximum(x + o, LOWEST)  # a product with probability 0 is 0
        top_there = tl.maximum(top_y + fall, fold_max(y, BLOCK_V, PACK))
        gt = tl.fma(top_y + fall - top_there, g_sum, gt)
        top_y = top_there
        gt += fold(g * (y - unfold(top_y, BLOCK_V, PACK)), BLOCK_V, PACK)
        es += fold(e * tl.maximum(x, LOWEST), BLOCK_V, PACK)
        top_there = tl.maximum(top_t, fold_max(t, BLOCK_V, PACK))
        at_t = tl.where(top_there > top_t, v0, at_t)
        top_t = top_there
    e_sum += fold(e, BLOCK_V, PACK)
    em += fold(e * expm1_o, BLOCK_V, PACK)
    g_sum += fold(g, BLOCK_V, PACK)
    if REVERSE:
        eo = eo * shrink + fold(e * o, BLOCK_V, PACK)
    if FORWARD:
        go = go * shrink + fold(g * o, BLOCK_V, PACK)
    # max of -o: a `tl.min` over neighbours in several threads crashes the compiler of Triton 3.9 for sm_90
    # and up
    high = tl.maximum(high, fold_max(o, BLOCK_V, PACK))
    low = tl.maximum(low, fold_max(-o, BLOCK_V, PACK))
    return top, at, e_sum, eo, em, g_sum, go, high, low, es, gt, top_y, top_t, at_t


@triton.jit
def _near_sums(
    row, REVERSE: tl.constexpr, FORWARD: tl.constexpr, METRICS: tl.constexpr,
    MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK_V: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Sweep once, relative to the student's first maximum m and the teacher's logit m_t there.

    With e = exp(s - m) and g = e * exp(o), returns
    m, m_t, (sum e, sum e * o, sum e * expm1(o), sum g, sum g * o, max |o|), and with METRICS
    (sum e * (s - m), sum g * (t - max t), s - m and t - m_t at their maxima, arg max s, arg max t).

    During the sweep each group of entries has e relative to its own maximum so far, so that threads need not
    meet, and o relative to references in the first tile that has a student logit above -inf.
    """
    V = row[4]
    ACC: tl.constexpr = row[5][0].dtype
    m_0, m_t0, _, _ = _first_maximum(row, 0, MODE, CAP_S, CAP_T, BLOCK_V)
    v0 = BLOCK_V
    while (m_0 == LOWEST) & (v0 < V):
        m_0, m_t0, _, _ = _first_maximum(row, v0, MODE, CAP_S, CAP_T, BLOCK_V)
        v0 += BLOCK_V
    zero, lowest = lanes(0.0, BLOCK_V, PACK, ACC), lanes(LOWEST, BLOCK_V, PACK, ACC)
    m, top_y, top_t = lowest, lowest, lowest
    at, at_t = lanes(0, BLOCK_V, PACK, tl.int32), lanes(0, BLOCK_V, PACK, tl.int32)
    e_sum, eo, em, g_sum, go, es, gt = zero, zero, zero, zero, zero, zero, zero
    high = lanes(-float("inf"), BLOCK_V, PACK, ACC)
    low = high
    v0 = 0
    while v0 + BLOCK_V <= V:
        m, at, e_sum, eo, em, g_sum, go, high, low, es, gt, top_y, top_t, at_t = _near_tile(
            row, v0, m_0, m_t0, (m, at, e_sum, eo, em, g_sum, go, high, low, es, gt, top_y, top_t, at_t),
            REVERSE, FORWARD, METRICS, MODE, CAP_S, CAP_T, BLOCK_V, PACK, True,
        )  # fmt: skip
        v0 += BLOCK_V
    if v0 < V:
        m, at, e_sum, eo, em, g_sum, go, high, low, es, gt, top_y, top_t, at_t = _near_tile(
            row, v0, m_0, m_t0, (m, at, e_sum, eo, em, g_sum, go, high, low, es, gt, top_y, top_t, at_t),
            REVERSE, FORWARD, METRICS, MODE, CAP_S, CAP_T, BLOCK_V, PACK, False,
        )  # fmt: skip
    tile = tl.min(tl.where(m == tl.max(m, 0), at, V), 0)
    top, m_t, at_s, peak_s = _first_maximum(row, tile, MODE, CAP_S, CAP_T, BLOCK_V)
    fall = m - top
    shrink, shift = exp(fall), (m_t0 - m_0) - (m_t - top)
    exp_shift, expm1_shift = exp_pair(shift)
    if METRICS:
        v = tl.min(tl.where(top_t == tl.max(top_t, 0), at_t, V), 0) + tl.arange(0, BLOCK_V)
        y_s, y_t = bent(row, v, MODE, CAP_S, CAP_T, False)
        _, t = logits(row, v, y_s, y_t, MODE, False)
        _, y, _ = relative(row, v, y_s, y_t, top, m_t, MODE, False)
        at_t, peak_t = first(t, tl.max(t, 0), v, V), tl.max(y, 0)
        es = tl.fma(fall, e_sum, es)
        gt = exp_shift * tl.fma(top_y + fall + shift - peak_t, g_sum, gt)
    else:
        at_t, peak_t = at_s, peak_s
    e_all, em_all = tl.sum(shrink * e_sum, 0), tl.sum(shrink * em, 0)
    g_all = exp_shift * tl.sum(shrink * g_sum, 0)
    eo_all = tl.fma(shift, e_all, tl.sum(shrink * eo, 0))
    go_all = tl.fma(shift, g_all, exp_shift * tl.sum(shrink * go, 0))
    em_all = tl.fma(exp_shift, em_all, expm1_shift * e_all)
    spread = tl.maximum(tl.max(high, 0) + shift, tl.max(low, 0) - shift)
    # a maximum skips NaN, the sum keeps it
    spread = tl.where(em_all == em_all, spread, float("inf"))
    more = tl.sum(shrink * es, 0), tl.sum(shrink * gt, 0), peak_s, peak_t, at_s, at_t
    return top, m_t, (e_all, eo_all, em_all, g_all, go_all, spread), more


@triton.jit
def _far_sums(
    row,
    m,
    METRICS: tl.constexpr,
    MODE: tl.constexpr,
    CAP_S: tl.constexpr,
    CAP_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PACK: tl.constexpr,
):
    """Sum a row of a far teacher: relative to each side's own maximum, every term guarded by its probability.

    With e = exp(s - m) and r = exp(t - m_t), returns m_t, sum e * o, sum r, sum r * o, sum r * (t - m_t), and
    max (t - m_t), the rounding error of m_t.
    """
    V = row[4]
    ACC: tl.constexpr = row[5][0].dtype
    tops = tl.full([BLOCK_V], LOWEST, ACC)
    v0 = 0
    while v0 < V:
        v = v0 + tl.arange(0, BLOCK_V)
        y_s, y_t = bent(row, v, MODE, CAP_S, CAP_T, False)
        _, t = logits(row, v, y_s, y_t, MODE, False)
        tops = tl.maximum(tops, t)
        v0 += BLOCK_V
    m_t = tl.max(tops, 0)
    eo = lanes(0.0, BLOCK_V, PACK, ACC)
    r_sum, ro, rt = eo, eo, eo
    tops = tl.full([BLOCK_V], LOWEST, ACC)
    v0 = 0
    while v0 < V:
        v = v0 + tl.arange(0, BLOCK_V)
        y_s, y_t = bent(row, v, MODE, CAP_S, CAP_T, False)
        x, y, o = relative(row, v, y_s, y_t, m, m_t, MODE, False)
        e, r = exp(x), exp(y)
        eo += fold(guarded(e, e * o), BLOCK_V, PACK)
        r_sum += fold(r, BLOCK_V, PACK)
        ro += fold(guarded(r, r * o), BLOCK_V, PACK)
        if METRICS:
            rt += fold(guarded(r, r * y), BLOCK_V, PACK)
            tops = tl.maximum(tops, y)
        v0 += BLOCK_V
    return m_t, tl.sum(eo, 0), tl.sum(r_sum, 0), tl.sum(ro, 0), tl.sum(rt, 0), tl.max(tops, 0)


@triton.jit
def row_stats(
    row, KIND: tl.constexpr, METRICS: tl.constexpr,
    MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK_V: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Return the columns of the statistics up to CLIPPED, in order."""
    REVERSE: tl.constexpr = METRICS or KIND == REVERSE_KL or KIND == MIXED_KL
    FORWARD: tl.constexpr = METRICS or KIND == FORWARD_KL or KIND == MIXED_KL
    m, m_t, sums, more = _near_sums(row, REVERSE, FORWARD, METRICS, MODE, CAP_S, CAP_T, BLOCK_V, PACK)
    e_sum, eo, em, g_sum, go, spread = sums
    es, gt, peak_s, peak_t, at_s, at_t = more
    logsum = tl.log(e_sum)
    x = em / e_sum
    gap = tl.where((x > GAP_LOW) & (x < GAP_HIGH), log1p(x), tl.log(g_sum / e_sum))
    logsum_t = tl.log(g_sum)
    forward = go / g_sum - gap
    exp_peak, _ = exp_pair(-peak_t)
    # relative to max t, which may lie 20 above m_t
    h_t, top_p = tl.log(g_sum * exp_peak) - gt / g_sum, 1.0 / (g_sum * exp_peak)
    if spread > LIMIT:
        m_t, eo, r_sum, ro, rt, peak_t = _far_sums(row, m, METRICS, MODE, CAP_S, CAP_T, BLOCK_V, PACK)
        logsum_t = tl.log(r_sum)
        gap = logsum_t - logsum
        forward = ro / r_sum - gap
        h_t, top_p = logsum_t - rt / r_sum, exp(peak_t) / r_sum
    zero = tl.full((), 0.0, m.dtype)
    reverse = gap - eo / e_sum if REVERSE else zero
    if not FORWARD:
        forward = zero
    h_s, top_q = logsum - es / e_sum, exp(peak_s) / e_sum
    if not METRICS:
        h_s, h_t, top_q, top_p, at_s, at_t = zero, zero, zero, zero, zero, zero
    return m, logsum, m_t, logsum_t, gap, spread, reverse, forward, h_s, h_t, top_q, top_p, at_s, at_t
