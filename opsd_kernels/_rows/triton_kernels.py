"""Triton row kernels, one program per row. Contract: contract.py. Formulas: triton_math.py.

A program walks its row in tiles of BLOCK_V entries and adds up the entries of each group (`pack`): the
threads meet at the end of a sweep, once for each sum. Whole tiles are read without masks. Rows of a near
teacher, which are the rule, have loops of their own in fp32, without guards. Loops are `while` loops: under
the interpreter of Triton 3.5 and 3.6, `range` with a run-time bound fails with numpy >= 2.3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .contract import Column
from .triton_math import (
    FORWARD_KL,
    LOG2_E,
    MIXED_KL,
    REVERSE_KL,
    bend_slope,
    clipped,
    entry,
    exp,
    near_entry,
    near_terms,
)
from .triton_statistics import LIMIT, row_stats
from .triton_tiles import bent, fold, inside, lanes, relative, side_of_row

COLUMNS, CLIPPED = tl.constexpr(len(Column)), tl.constexpr(int(Column.CLIPPED))


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
    x, y, o = relative(row, v, y_s, y_t, m, m_t, MODE, False)
    q = exp(x - logsum)
    delta = o - gap
    near = spread <= LIMIT
    p = tl.where(near, q, 1.0) * exp(tl.where(near, delta, y - logsum_t))
    return q, p, delta


@triton.jit
def _near_distributions(row, v, y_s, y_t, stats, MODE: tl.constexpr, WHOLE: tl.constexpr):
    """Return q and delta in fp32."""
    m, logsum, m_t, _, gap, _ = stats
    x, _, o = relative(row, v, y_s, y_t, m, m_t, MODE, WHOLE)
    return tl.exp2(tl.fma(x, LOG2_E, -logsum * LOG2_E)), o - gap


@triton.jit
def _dot_tile(
    row, v0, sums, stats, beta, clip, cumulants, NEAR: tl.constexpr, WHOLE: tl.constexpr,
    KIND: tl.constexpr, CLIP: tl.constexpr, MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr,
    BLOCK_V: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Add a tile to each group's sum f, sum u, and count of the entries under the clip."""
    f_sum, u_sum, count = sums
    v, V = v0 + tl.arange(0, BLOCK_V), row[4]
    y_s, y_t = bent(row, v, MODE, CAP_S, CAP_T, WHOLE)
    if NEAR:
        q, delta = _near_distributions(row, v, y_s, y_t, stats, MODE, WHOLE)
        f, u = near_entry(delta, beta, cumulants, KIND)
        f, u = q * f, q * u
    else:
        q, p, delta = _distributions(row, v, y_s, y_t, stats, MODE)
        f, u = entry(q, p, delta, beta, KIND)
    f, u, over = clipped(q, f, u, beta, clip, KIND, CLIP)
    f_sum += fold(inside(v, V, f, 0.0, WHOLE), BLOCK_V, PACK)
    u_sum += fold(inside(v, V, u, 0.0, WHOLE), BLOCK_V, PACK)
    if CLIP:
        count += fold(tl.where(over & (v < V), 1.0, 0.0).to(beta.dtype), BLOCK_V, PACK)
    return f_sum, u_sum, count


@triton.jit
def _far_dot(
    row, stats, beta, clip,
    KIND: tl.constexpr, CLIP: tl.constexpr, MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr,
    BLOCK_V: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Return each group's sums (`_dot_tile`) of any row: guarded, and with precise logarithms."""
    f_sum = lanes(0.0, BLOCK_V, PACK, beta.dtype)
    u_sum, count = f_sum, f_sum
    v0 = 0
    while v0 < row[4]:
        f_sum, u_sum, count = _dot_tile(
            row, v0, (f_sum, u_sum, count), stats, beta, clip, None, False, False,
            KIND, CLIP, MODE, CAP_S, CAP_T, BLOCK_V, PACK,
        )  # fmt: skip
        v0 += BLOCK_V
    return f_sum, u_sum, count


@triton.jit
def _row_dot(
    row, stats, beta, clip,
    KIND: tl.constexpr, CLIP: tl.constexpr, MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr,
    BLOCK_V: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Return sum f, sum u, and the share of the entries under the clip."""
    V = row[4]
    LEAN: tl.constexpr = beta.dtype == tl.float32
    f_sum = lanes(0.0, BLOCK_V, PACK, beta.dtype)
    u_sum, count = f_sum, f_sum
    cumulants = near_terms(beta)
    v0 = 0
    if LEAN and stats[5] <= LIMIT:
        while v0 + BLOCK_V <= V:
            f_sum, u_sum, count = _dot_tile(
                row, v0, (f_sum, u_sum, count), stats, beta, clip, cumulants, True, True,
                KIND, CLIP, MODE, CAP_S, CAP_T, BLOCK_V, PACK,
            )  # fmt: skip
            v0 += BLOCK_V
        if v0 < V:
            f_sum, u_sum, count = _dot_tile(
                row, v0, (f_sum, u_sum, count), stats, beta, clip, cumulants, True, False,
                KIND, CLIP, MODE, CAP_S, CAP_T, BLOCK_V, PACK,
            )  # fmt: skip
    else:
        f_sum, u_sum, count = _far_dot(row, stats, beta, clip, KIND, CLIP, MODE, CAP_S, CAP_T, BLOCK_V, PACK)
    share = tl.sum(count, 0) / V if CLIP else tl.full((), 0.0, beta.dtype)
    return tl.sum(f_sum, 0), tl.sum(u_sum, 0), share


@triton.jit
def _grad_tile(
    row, v0, stats, a, factor, policy, label, beta, clip, cumulants, G,
    NEAR: tl.constexpr, WHOLE: tl.constexpr,
    KIND: tl.constexpr, CLIP: tl.constexpr, HAS_POLICY: tl.constexpr, MODE: tl.constexpr, CAP_S: tl.constexpr,
    CAP_T: tl.constexpr, NARROWED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write a tile of the gradient."""
    v, V, student = v0 + tl.arange(0, BLOCK_V), row[4], row[5]
    y_s, y_t = bent(row, v, MODE, CAP_S, CAP_T, WHOLE)
    if NARROWED:
        # the first tile's gradient overlaps logits that another thread loads
        tl.debug_barrier()
    slope = bend_slope(y_s, student[0], CAP_S)
    outer = student[1] * factor
    if NEAR:
        q, delta = _near_distributions(row, v, y_s, y_t, stats, MODE, WHOLE)
        f, u = near_entry(delta, beta, cumulants, KIND)
        if CLIP:
            _, u, _ = clipped(q, q * f, q * u, beta, clip, KIND, CLIP)
            g = tl.fma(u, outer, q * (-outer * a)) * slope
        else:
            g = q * tl.fma(u, outer, -outer * a) * slope
    else:
        q, p, delta = _distributions(row, v, y_s, y_t, stats, MODE)
        f, u = entry(q, p, delta, beta, KIND)
        _, u, _ = clipped(q, f, u, beta, clip, KIND, CLIP)
        g = (u - q * a) * slope * outer
        g = tl.where(factor == 0, 0.0, g)  # an ignored row may hold inf
    if HAS_POLICY:
        pull = (q - tl.where(v == label, 1.0, 0.0)) * slope * (student[1] * policy)
        g = tl.where(policy == 0, g, g + pull)
    if WHOLE:
        tl.store(G + v, g.to(G.dtype.element_ty))
    else:
        tl.store(G + v, g.to(G.dtype.element_ty), mask=v < V)


@triton.jit
def _far_grad(
    row, stats, a, factor, policy, label, beta, clip, G,
    KIND: tl.constexpr, CLIP: tl.constexpr, HAS_POLICY: tl.constexpr, MODE: tl.constexpr, CAP_S: tl.constexpr,
    CAP_T: tl.constexpr, NARROWED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write the gradient of any row, zeros where the factor is 0."""
    v0 = 0
    while v0 < row[4]:
        _grad_tile(
            row, v0, stats, a, factor, policy, label, beta, clip, None, G, False, False,
            KIND, CLIP, HAS_POLICY, MODE, CAP_S, CAP_T, NARROWED, BLOCK_V,
        )  # fmt: skip
        v0 += BLOCK_V


@triton.jit
def _row_grad(
    row, stats, a, factor, policy, label, beta, clip, G,
    KIND: tl.constexpr, CLIP: tl.constexpr, HAS_POLICY: tl.constexpr, MODE: tl.constexpr, CAP_S: tl.constexpr,
    CAP_T: tl.constexpr,
    NARROWED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    V = row[4]
    LEAN: tl.constexpr = beta.dtype == tl.float32
    cumulants = near_terms(beta)
    v0 = 0
    if LEAN and ((stats[5] <= LIMIT) & (factor != 0)):
        while v0 + BLOCK_V <= V:
            _grad_tile(
                row, v0, stats, a, factor, policy, label, beta, clip, cumulants, G, True, True,
                KIND, CLIP, HAS_POLICY, MODE, CAP_S, CAP_T, NARROWED, BLOCK_V,
            )  # fmt: skip
            v0 += BLOCK_V
        if v0 < V:
            _grad_tile(
                row, v0, stats, a, factor, policy, label, beta, clip, cumulants, G, True, False,
                KIND, CLIP, HAS_POLICY, MODE, CAP_S, CAP_T, NARROWED, BLOCK_V,
            )  # fmt: skip
    else:
        _far_grad(
            row, stats, a, factor, policy, label, beta, clip, G,
            KIND, CLIP, HAS_POLICY, MODE, CAP_S, CAP_T, NARROWED, BLOCK_V,
        )  # fmt: skip


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
        side_of_row(inner_s, outer_s, 0.0, TemperatureS, ACC),
        side_of_row(inner_t, outer_t, mix, TemperatureT, ACC),
    )  # fmt: skip
    _store_stats(Stats, row_stats(row, KIND, METRICS, MODE, CAP_S, CAP_T, BLOCK_V, PACK))
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
        side_of_row(inner_s, outer_s, 0.0, TemperatureS, ACC),
        side_of_row(inner_t, outer_t, mix, TemperatureT, ACC),
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
        side_of_row(inner_s, outer_s, 0.0, TemperatureS, ACC),
        side_of_row(inner_t, outer_t, mix, TemperatureT, ACC),
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
        side_of_row(inner_s, outer_s, 0.0, TemperatureS, ACC),
        side_of_row(inner_t, outer_t, mix, TemperatureT, ACC),
    )  # fmt: skip
    beta, clip, token_clip = tl.full((), beta, ACC), tl.full((), clip, ACC), tl.full((), token_clip, ACC)
    columns = row_stats(row, KIND, METRICS, MODE, CAP_S, CAP_T, BLOCK_V, PACK)
    _store_stats(Stats, columns)
    stats = (columns[0], columns[1], columns[2], columns[3], columns[4], columns[5])
    share = tl.full((), 0.0, ACC)
    if KIND == REVERSE_KL and not CLIP:
        loss, a = columns[6], columns[6]
    elif KIND == FORWARD_KL and not CLIP:
        loss, a = columns[7], tl.full((), -1.0, ACC)
    elif KIND == MIXED_KL and not CLIP:
        a = (1.0 - beta) * columns[6]
        loss = tl.fma(beta, columns[7], a)
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
