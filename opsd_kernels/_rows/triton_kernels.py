"""Triton row kernels, one program per row. Contract: contract.py. Formulas: triton_math.py.

A program walks its row in tiles of BLOCK_V entries and first adds up the entries of each thread (`pack`): the
threads meet once per tile, for its maximum, and once per sum at the end. Loops are `while` loops: under the
interpreter of Triton 3.5 and 3.6, `range` with a run-time bound fails with numpy >= 2.3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .contract import GAP_BOUNDS, SPREAD_LIMIT, Column
from .triton_launch import DIFFERENCE, DIFFERENCE_MIXED, LINEAR, PLAIN_MIXED
from .triton_math import FORWARD_KL, REVERSE_KL, bend, bend_slope, clipped_entry, exp_pair, guarded, log1p

LIMIT = tl.constexpr(SPREAD_LIMIT)
GAP_LOW, GAP_HIGH = tl.constexpr(GAP_BOUNDS[0]), tl.constexpr(GAP_BOUNDS[1])
COLUMNS, CLIPPED = tl.constexpr(len(Column)), tl.constexpr(int(Column.CLIPPED))
# Below every logit but -inf: a maximum that starts here never makes -inf - -inf.
LOWEST = tl.constexpr(-1.0e38)


@triton.jit
def _side(inner, outer, mix, Temperature, ACC: tl.constexpr):
    """Return a side's transform of this row, in the arithmetic's type.

    `mix` is the other side's weight in its logits.
    """
    outer = tl.full((), outer, ACC)
    if Temperature is not None:
        outer = outer / tl.load(Temperature + tl.program_id(0).to(tl.int64))
    return tl.full((), inner, ACC), outer, tl.full((), mix, ACC)


@triton.jit
def _raw(Z, Bias, v, V, ACC: tl.constexpr):
    z = tl.load(Z + v, mask=v < V, other=0.0).to(ACC)
    if Bias is not None:
        z += tl.load(Bias + v, mask=v < V, other=0.0)
    return z


@triton.jit
def _bent(row, v, MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr):
    """Load a tile of both sides, each without its last factor (`bend`).

    In LINEAR mode the raw difference takes the teacher's place.
    """
    S, T, BiasS, BiasT, V, student, teacher = row
    ACC: tl.constexpr = student[0].dtype
    y_s = bend(_raw(S, BiasS, v, V, ACC), student[0], CAP_S)
    if MODE == LINEAR:
        y_t = tl.load(T + v, mask=v < V, other=0.0).to(ACC)
    else:
        z = _raw(T, BiasT, v, V, ACC)
        if MODE == DIFFERENCE or MODE == DIFFERENCE_MIXED:
            z += tl.load(S + v, mask=v < V, other=0.0).to(ACC)
        y_t = bend(z, teacher[0], CAP_T)
    return y_s, y_t


@triton.jit
def _logits(row, v, y_s, y_t, MODE: tl.constexpr):
    """Return the logits s and t of a tile; -inf past the end of the row."""
    s = y_s * row[5][1]
    if MODE == LINEAR:
        t = s + y_t * row[6][1]
    else:
        t = y_t * row[6][1]
        if MODE == PLAIN_MIXED or MODE == DIFFERENCE_MIXED:
            t = tl.fma(s, row[6][2], t)
    return tl.where(v < row[4], s, -float("inf")), tl.where(v < row[4], t, -float("inf"))


@triton.jit
def _relative(row, v, y_s, y_t, m, m_t, MODE: tl.constexpr):
    """Return s - m, t - m_t and the offset o of contract.py, in one step from y.

    Rounding s = 1.3 * z at |z| = 40 first would cost 2e-6 of every probability.
    """
    V, student, teacher = row[4], row[5], row[6]
    x = tl.where(v < V, tl.fma(y_s, student[1], -m), -float("inf"))
    if MODE == LINEAR:
        o = tl.where(v < V, tl.fma(y_t, teacher[1], m - m_t), 0.0)
        y = x + o
    else:
        if MODE == PLAIN_MIXED or MODE == DIFFERENCE_MIXED:
            y = tl.fma(x, teacher[2], tl.fma(y_t, teacher[1], tl.fma(m, teacher[2], -m_t)))
        else:
            y = tl.fma(y_t, teacher[1], -m_t)
        y = tl.where(v < V, y, -float("inf"))
        # both -inf: a masked entry, which does not make the row far
        o = tl.where(x == y, 0.0, y - x)
    return x, y, o


@triton.jit
def _lanes(value, BLOCK_V: tl.constexpr, PACK: tl.constexpr, ACC: tl.constexpr):
    """Return accumulators, one for each group of entries that `_fold` adds up."""
    SIZE: tl.constexpr = BLOCK_V // PACK if PACK > 0 else BLOCK_V // -PACK
    return tl.full([SIZE], value, ACC)


@triton.jit
def _fold(x, BLOCK_V: tl.constexpr, PACK: tl.constexpr):
    """Sum the entries that one thread holds: PACK neighbours, or -PACK entries far apart.

    Whole tiles as accumulators spilled (8 sums x 8 entries).
    """
    if PACK > 0:
        folded = tl.sum(tl.reshape(x, [BLOCK_V // PACK, PACK]), 1)
    else:
        folded = tl.sum(tl.reshape(x, [-PACK, BLOCK_V // -PACK]), 0)
    return folded


@triton.jit
def _fold_max(x, BLOCK_V: tl.constexpr, PACK: tl.constexpr):
    if PACK > 0:
        folded = tl.max(tl.reshape(x, [BLOCK_V // PACK, PACK]), 1)
    else:
        folded = tl.max(tl.reshape(x, [-PACK, BLOCK_V // -PACK]), 0)
    return folded


@triton.jit
def _first(x, top, v, V):
    return tl.min(tl.where(x == top, v, V), 0)


@triton.jit
def _near_sums(
    row, REVERSE: tl.constexpr, FORWARD: tl.constexpr, METRICS: tl.constexpr,
    MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK_V: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Sweep once, relative to the student's first maximum m and the teacher's logit m_t there.

    With e = exp(s - m) and g = e * exp(o), rescaled when m rises, returns
    m, m_t, (sum e, sum e * o, sum e * expm1(o), sum g, sum g * o, max |o|), and with METRICS
    (sum e * (s - m), sum g * (t - max t), s - m and t - m_t at their maxima, arg max s, arg max t).
    """
    V = row[4]
    ACC: tl.constexpr = row[5][0].dtype
    m = tl.full((), LOWEST, ACC)
    m_t, top_t, peak_s, peak_t = m, m, m, m
    at_s, at_t = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    e_sum = _lanes(0.0, BLOCK_V, PACK, ACC)
    eo, em, g_sum, go, es, gt = e_sum, e_sum, e_sum, e_sum, e_sum, e_sum
    high = _lanes(-float("inf"), BLOCK_V, PACK, ACC)
    # max of -o: a `tl.min` over neighbours in several threads crashes the compiler of Triton 3.9 for sm_90
    # and up
    low = high
    v0 = 0
    while v0 < V:
        v = v0 + tl.arange(0, BLOCK_V)
        y_s, y_t = _bent(row, v, MODE, CAP_S, CAP_T)
        s, t = _logits(row, v, y_s, y_t, MODE)
        top = tl.max(s, 0)
        if top > m:
            at_s = _first(s, top, v, V)
            t_there = tl.sum(tl.where(v == at_s, t, 0.0), 0)
            shrink, shift = tl.exp(m - top), (m_t - m) - (t_there - top)
            exp_shift, expm1_shift = exp_pair(shift)
            grow = shrink * exp_shift
            em = shrink * (exp_shift * em + expm1_shift * e_sum)
            eo = shrink * (eo + shift * e_sum)
            go = grow * (go + shift * g_sum)
            es = shrink * (es + (m - top) * e_sum)
            e_sum, g_sum, gt = shrink * e_sum, grow * g_sum, grow * gt
            high, low = high + shift, low - shift
            # the rounding error of s at its maximum
            peak_s = tl.fma(tl.sum(tl.where(v == at_s, y_s, 0.0), 0), row[5][1], -top)
            peak_t += m_t - t_there
            m, m_t = top, t_there
        x, y, o = _relative(row, v, y_s, y_t, m, m_t, MODE)
        if METRICS:
            top = tl.max(t, 0)
            if top > top_t:
                at_t = _first(t, top, v, V)
                y_there = tl.max(y, 0)
                gt += (peak_t - y_there) * g_sum
                top_t, peak_t = top, y_there
        e = tl.exp(x)
        exp_o, expm1_o = exp_pair(o)
        g = e * exp_o
        e_sum += _fold(e, BLOCK_V, PACK)
        em += _fold(e * expm1_o, BLOCK_V, PACK)
        g_sum += _fold(g, BLOCK_V, PACK)
        if REVERSE:
            eo += _fold(e * o, BLOCK_V, PACK)
        if FORWARD:
            go += _fold(g * o, BLOCK_V, PACK)
        if METRICS:
            es += _fold(guarded(e, e * x), BLOCK_V, PACK)
            gt += _fold(guarded(g, g * (y - peak_t)), BLOCK_V, PACK)
        high, low = (
            tl.maximum(high, _fold_max(o, BLOCK_V, PACK)),
            tl.maximum(low, _fold_max(-o, BLOCK_V, PACK)),
        )
        v0 += BLOCK_V
    em_sum = tl.sum(em, 0)
    spread = tl.maximum(tl.max(high, 0), tl.max(low, 0))
    # a maximum skips NaN, the sum keeps it
    spread = tl.where(em_sum == em_sum, spread, float("inf"))
    sums = (tl.sum(e_sum, 0), tl.sum(eo, 0), em_sum, tl.sum(g_sum, 0), tl.sum(go, 0), spread)
    return m, m_t, sums, (tl.sum(es, 0), tl.sum(gt, 0), peak_s, peak_t, at_s, at_t)


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
        y_s, y_t = _bent(row, v, MODE, CAP_S, CAP_T)
        _, t = _logits(row, v, y_s, y_t, MODE)
        tops = tl.maximum(tops, t)
        v0 += BLOCK_V
    m_t = tl.max(tops, 0)
    eo = _lanes(0.0, BLOCK_V, PACK, ACC)
    r_sum, ro, rt = eo, eo, eo
    tops = tl.full([BLOCK_V], LOWEST, ACC)
    v0 = 0
    while v0 < V:
        v = v0 + tl.arange(0, BLOCK_V)
        y_s, y_t = _bent(row, v, MODE, CAP_S, CAP_T)
        x, y, o = _relative(row, v, y_s, y_t, m, m_t, MODE)
        e, r = tl.exp(x), tl.exp(y)
        eo += _fold(guarded(e, e * o), BLOCK_V, PACK)
        r_sum += _fold(r, BLOCK_V, PACK)
        ro += _fold(guarded(r, r * o), BLOCK_V, PACK)
        if METRICS:
            rt += _fold(guarded(r, r * y), BLOCK_V, PACK)
            tops = tl.maximum(tops, y)
        v0 += BLOCK_V
    return m_t, tl.sum(eo, 0), tl.sum(r_sum, 0), tl.sum(ro, 0), tl.sum(rt, 0), tl.max(tops, 0)


@triton.jit
def _row_stats(
    row, KIND: tl.constexpr, METRICS: tl.constexpr,
    MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK_V: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Return the columns of the statistics up to CLIPPED, in order."""
    REVERSE: tl.constexpr = METRICS or KIND == REVERSE_KL
    FORWARD: tl.constexpr = METRICS or KIND == FORWARD_KL
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
        h_t, top_p = logsum_t - rt / r_sum, tl.exp(peak_t) / r_sum
    zero = tl.full((), 0.0, m.dtype)
    reverse = gap - eo / e_sum if REVERSE else zero
    if not FORWARD:
        forward = zero
    h_s, top_q = logsum - es / e_sum, tl.exp(peak_s) / e_sum
    if not METRICS:
        h_s, h_t, top_q, top_p, at_s, at_t = zero, zero, zero, zero, zero, zero
    return m, logsum, m_t, logsum_t, gap, spread, reverse, forward, h_s, h_t, top_q, top_p, at_s, at_t


@triton.jit
def _store_stats(Stats, stats):
    Stats += tl.program_id(0).to(tl.int64) * COLUMNS
    for c in tl.static_range(CLIPPED):
        tl.store(Stats + c, stats[c])


@triton.jit
def _load_policy(Policy, Labels, HAS_POLICY: tl.constexpr, ACC: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    policy, label = tl.full((), 0.0, ACC), tl.full((), -1, tl.int32)
    if HAS_POLICY:
        policy, label = tl.load(Policy + n), tl.load(Labels + n).to(tl.int32)
    return policy, label


@triton.jit
def _load_stats(Stats):
    """Load the columns up to SPREAD."""
    Stats += tl.program_id(0).to(tl.int64) * COLUMNS
    return (
        tl.load(Stats), tl.load(Stats + 1), tl.load(Stats + 2),
        tl.load(Stats + 3), tl.load(Stats + 4), tl.load(Stats + 5),
    )  # fmt: skip


@triton.jit
def _distributions(row, v, y_s, y_t, stats, MODE: tl.constexpr):
    """Return q, p and delta. Near rows take p = q * exp(delta), so that p - q keeps delta's digits."""
    m, logsum, m_t, logsum_t, gap, spread = stats
    x, y, o = _relative(row, v, y_s, y_t, m, m_t, MODE)
    q = tl.exp(x - logsum)
    delta = o - gap
    near = spread <= LIMIT
    p = tl.where(near, q, 1.0) * tl.exp(tl.where(near, delta, y - logsum_t))
    return q, p, delta


@triton.jit
def _row_dot(
    row, stats, beta, clip,
    KIND: tl.constexpr, CLIP: tl.constexpr, MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr,
    BLOCK_V: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Return sum f, sum u, and the share of the entries under the clip."""
    V = row[4]
    f_sum = _lanes(0.0, BLOCK_V, PACK, beta.dtype)
    u_sum, count = f_sum, f_sum
    v0 = 0
    while v0 < V:
        v = v0 + tl.arange(0, BLOCK_V)
        y_s, y_t = _bent(row, v, MODE, CAP_S, CAP_T)
        q, p, delta = _distributions(row, v, y_s, y_t, stats, MODE)
        f, u, over = clipped_entry(q, p, delta, beta, clip, KIND, CLIP)
        f_sum += _fold(tl.where(v < V, f, 0.0), BLOCK_V, PACK)
        u_sum += _fold(tl.where(v < V, u, 0.0), BLOCK_V, PACK)
        if CLIP:
            count += _fold(tl.where(over & (v < V), 1.0, 0.0).to(beta.dtype), BLOCK_V, PACK)
        v0 += BLOCK_V
    share = tl.sum(count, 0) / V if CLIP else tl.full((), 0.0, beta.dtype)
    return tl.sum(f_sum, 0), tl.sum(u_sum, 0), share


@triton.jit
def _row_grad(
    row, stats, a, factor, policy, label, beta, clip, G,
    KIND: tl.constexpr, CLIP: tl.constexpr, HAS_POLICY: tl.constexpr, MODE: tl.constexpr, CAP_S: tl.constexpr,
    CAP_T: tl.constexpr,
    NARROWED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    V, student = row[4], row[5]
    v0 = 0
    while v0 < V:
        v = v0 + tl.arange(0, BLOCK_V)
        y_s, y_t = _bent(row, v, MODE, CAP_S, CAP_T)
        if NARROWED:
            # the first tile's gradient overlaps logits that another thread loads
            tl.debug_barrier()
        q, p, delta = _distributions(row, v, y_s, y_t, stats, MODE)
        _, u, _ = clipped_entry(q, p, delta, beta, clip, KIND, CLIP)
        slope = bend_slope(y_s, student[0], CAP_S)
        g = (u - q * a) * slope * (student[1] * factor)
        g = tl.where(factor == 0, 0.0, g)  # an ignored row may hold inf
        if HAS_POLICY:
            pull = (q - tl.where(v == label, 1.0, 0.0)) * slope * (student[1] * policy)
            g = tl.where(policy == 0, g, g + pull)
        tl.store(G + v, g.to(G.dtype.element_ty), mask=v < V)
        v0 += BLOCK_V


@triton.jit
def _row_stats_kernel(
    S, T, BiasS, BiasT, TemperatureS, TemperatureT, Stats, stride_s, stride_t, V,
    inner_s: tl.float64, outer_s: tl.float64, inner_t: tl.float64, outer_t: tl.float64, mix: tl.float64,
    KIND: tl.constexpr, METRICS: tl.constexpr, MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr,
    BLOCK_V: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    # n * V passes 2**31 at 16k rows x 152k columns
    n = tl.program_id(0).to(tl.int64)
    ACC: tl.constexpr = Stats.dtype.element_ty
    row = (
        S + n * stride_s, T + n * stride_t, BiasS, BiasT, V,
        _side(inner_s, outer_s, 0.0, TemperatureS, ACC), _side(inner_t, outer_t, mix, TemperatureT, ACC),
    )  # fmt: skip
    _store_stats(Stats, _row_stats(row, KIND, METRICS, MODE, CAP_S, CAP_T, BLOCK_V, PACK))
    tl.store(Stats + n * COLUMNS + CLIPPED, 0.0)


@triton.jit
def _row_dot_kernel(
    S, T, BiasS, BiasT, TemperatureS, TemperatureT, Stats, Loss, A, stride_s, stride_t, V,
    inner_s: tl.float64, outer_s: tl.float64, inner_t: tl.float64, outer_t: tl.float64, mix: tl.float64,
    beta: tl.float64, clip: tl.float64,
    KIND: tl.constexpr, CLIP: tl.constexpr, MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr,
    BLOCK_V: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    ACC: tl.constexpr = Stats.dtype.element_ty
    row = (
        S + n * stride_s, T + n * stride_t, BiasS, BiasT, V,
        _side(inner_s, outer_s, 0.0, TemperatureS, ACC), _side(inner_t, outer_t, mix, TemperatureT, ACC),
    )  # fmt: skip
    beta, clip = tl.full((), beta, ACC), tl.full((), clip, ACC)
    loss, a, share = _row_dot(
        row, _load_stats(Stats), beta, clip, KIND, CLIP, MODE, CAP_S, CAP_T, BLOCK_V, PACK
    )
    tl.store(Loss + n, loss)
    tl.store(A + n, a)
    if CLIP:
        tl.store(Stats + n * COLUMNS + CLIPPED, share)


@triton.jit
def _row_grad_kernel(
    S, T, BiasS, BiasT, TemperatureS, TemperatureT, Stats, A, Factor, Policy, Labels, G,
    stride_s, stride_t, stride_g, V,
    inner_s: tl.float64, outer_s: tl.float64, inner_t: tl.float64, outer_t: tl.float64, mix: tl.float64,
    beta: tl.float64, clip: tl.float64,
    KIND: tl.constexpr, CLIP: tl.constexpr, HAS_POLICY: tl.constexpr, MODE: tl.constexpr, CAP_S: tl.constexpr,
    CAP_T: tl.constexpr,
    NARROWED: tl.constexpr, BLOCK_V: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    ACC: tl.constexpr = Stats.dtype.element_ty
    row = (
        S + n * stride_s, T + n * stride_t, BiasS, BiasT, V,
        _side(inner_s, outer_s, 0.0, TemperatureS, ACC), _side(inner_t, outer_t, mix, TemperatureT, ACC),
    )  # fmt: skip
    beta, clip, a = tl.full((), beta, ACC), tl.full((), clip, ACC), tl.load(A + n)
    factor = tl.where(tl.load(Stats + n * COLUMNS + CLIPPED) == 1, 0.0, tl.load(Factor + n))
    policy, label = _load_policy(Policy, Labels, HAS_POLICY, ACC)
    _row_grad(
        row, _load_stats(Stats), a, factor, policy, label, beta, clip, G + n * stride_g,
        KIND, CLIP, HAS_POLICY, MODE, CAP_S, CAP_T, NARROWED, BLOCK_V,
    )  # fmt: skip


@triton.jit
def _row_fused_kernel(
    S, T, BiasS, BiasT, TemperatureS, TemperatureT, Stats, Loss, A, Factor, Policy, Labels, G,
    stride_s, stride_t, stride_g, V,
    inner_s: tl.float64, outer_s: tl.float64, inner_t: tl.float64, outer_t: tl.float64, mix: tl.float64,
    beta: tl.float64, clip: tl.float64, token_clip: tl.float64,
    KIND: tl.constexpr, METRICS: tl.constexpr, CLIP: tl.constexpr, HAS_POLICY: tl.constexpr,
    MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr,
    NARROWED: tl.constexpr, BLOCK_V: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    ACC: tl.constexpr = Stats.dtype.element_ty
    row = (
        S + n * stride_s, T + n * stride_t, BiasS, BiasT, V,
        _side(inner_s, outer_s, 0.0, TemperatureS, ACC), _side(inner_t, outer_t, mix, TemperatureT, ACC),
    )  # fmt: skip
    beta, clip, token_clip = tl.full((), beta, ACC), tl.full((), clip, ACC), tl.full((), token_clip, ACC)
    columns = _row_stats(row, KIND, METRICS, MODE, CAP_S, CAP_T, BLOCK_V, PACK)
    _store_stats(Stats, columns)
    stats = (columns[0], columns[1], columns[2], columns[3], columns[4], columns[5])
    share = tl.full((), 0.0, ACC)
    if KIND == REVERSE_KL and not CLIP:
        loss, a = columns[6], columns[6]
    elif KIND == FORWARD_KL and not CLIP:
        loss, a = columns[7], tl.full((), -1.0, ACC)
    else:
        loss, a, share = _row_dot(row, stats, beta, clip, KIND, CLIP, MODE, CAP_S, CAP_T, BLOCK_V, PACK)
    above = loss > token_clip
    tl.store(Loss + n, tl.where(above, token_clip, loss))
    tl.store(A + n, a)
    share = tl.where(above, 1.0, share)
    tl.store(Stats + n * COLUMNS + CLIPPED, share)
    factor = tl.where(share == 1, 0.0, tl.load(Factor + n))
    policy, label = _load_policy(Policy, Labels, HAS_POLICY, ACC)
    _row_grad(
        row, stats, a, factor, policy, label, beta, clip, G + n * stride_g,
        KIND, CLIP, HAS_POLICY, MODE, CAP_S, CAP_T, NARROWED, BLOCK_V,
    )  # fmt: skip


KERNELS = {
    "stats": _row_stats_kernel,
    "dot": _row_dot_kernel,
    "grad": _row_grad_kernel,
    "fused": _row_fused_kernel,
}
