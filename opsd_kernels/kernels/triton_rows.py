"""Triton row sweeps: one program per row. What a sweep must honour: contract.py. The formulas: triton_math.py.

A program walks its row in tiles of BLOCK_V entries and keeps each sum as a tile of partial sums, so that a tile costs one reduction over the threads, its
maximum. Loops are `while` loops: under the interpreter of Triton 3.5 and 3.6, `range` with a run-time bound fails with numpy >= 2.3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec import LogitTransform, RowSpec
from .contract import GAP_BOUNDS, SPREAD_LIMIT, Column, plain_kl, stats_dtype
from .triton_math import FORWARD_KL, REVERSE_KL, entry, exp_pair, guarded, log1p, transform, transform_slope

LIMIT = tl.constexpr(SPREAD_LIMIT)
GAP_LOW, GAP_HIGH = tl.constexpr(GAP_BOUNDS[0]), tl.constexpr(GAP_BOUNDS[1])
COLUMNS = tl.constexpr(len(Column))
# Below every logit but -inf: a maximum that starts here never makes -inf - -inf.
LOWEST = tl.constexpr(-3.0e38)

# MODE: what T holds.
PLAIN, DIFFERENCE, LINEAR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _row(S, T, BiasS, BiasT, stride_s, stride_t, V, inner_s, outer_s, inner_t, outer_t, ACC: tl.constexpr):
    """What the loops need to know of this program's row, scalars in the type of the arithmetic."""
    n = tl.program_id(0).to(tl.int64)  # n * V passes 2**31 at 16k rows x 152k columns
    student = (tl.full((), inner_s, ACC), tl.full((), outer_s, ACC))
    teacher = (tl.full((), inner_t, ACC), tl.full((), outer_t, ACC))
    return S + n * stride_s, T + n * stride_t, BiasS, BiasT, V, student, teacher


@triton.jit
def _raw(Z, Bias, v, V, ACC: tl.constexpr):
    z = tl.load(Z + v, mask=v < V, other=0.0).to(ACC)
    if Bias is not None:
        z += tl.load(Bias + v, mask=v < V, other=0.0)
    return z


@triton.jit
def _logits(row, v, MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr):
    """Logits s and t of a tile, their difference d, and the student's raw logits with bias. Past the end of the row: -inf, -inf, 0."""
    S, T, BiasS, BiasT, V, student, teacher = row
    ACC: tl.constexpr = student[0].dtype
    z = _raw(S, BiasS, v, V, ACC)
    s = tl.where(v < V, transform(z, student[0], student[1], CAP_S), -float("inf"))
    if MODE == LINEAR:
        d = tl.load(T + v, mask=v < V, other=0.0).to(ACC) * student[0]
        t = s + d
    else:
        other = _raw(T, BiasT, v, V, ACC)
        if MODE == DIFFERENCE:
            other += tl.load(S + v, mask=v < V, other=0.0).to(ACC)
        t = tl.where(v < V, transform(other, teacher[0], teacher[1], CAP_T), -float("inf"))
        d = tl.where(v < V, t - s, 0.0)
    return s, t, d, z


@triton.jit
def _first(x, top, v, V):
    return tl.min(tl.where(x == top, v, V), 0)


@triton.jit
def _student_sums(
    row, REVERSE: tl.constexpr, FORWARD: tl.constexpr, METRICS: tl.constexpr,
    MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One sweep relative to the student's maximum m, with e = exp(s - m) and g = e * exp(d), rescaled whenever m rises:

    m, (sum e, sum e * d, sum e * expm1(d), sum g, sum g * d, max |d|), and with METRICS (sum e * (s - m), sum g * (s - m), arg max s, max t, arg max t).
    """
    V = row[4]
    ACC: tl.constexpr = row[5][0].dtype
    m, m_t = tl.full((), LOWEST, ACC), tl.full((), LOWEST, ACC)
    at_s, at_t = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    e_sum = tl.zeros([BLOCK_V], ACC)
    ed, em, g_sum, gd, es, gs, spread = e_sum, e_sum, e_sum, e_sum, e_sum, e_sum, e_sum
    v0 = 0
    while v0 < V:
        v = v0 + tl.arange(0, BLOCK_V)
        s, t, d, _ = _logits(row, v, MODE, CAP_S, CAP_T)
        top = tl.max(s, 0)
        if top > m:
            shrink = tl.exp(m - top)
            if METRICS:
                es = (es + (m - top) * e_sum) * shrink
                gs = (gs + (m - top) * g_sum) * shrink
                at_s = _first(s, top, v, V)
            e_sum, ed, em, g_sum, gd = e_sum * shrink, ed * shrink, em * shrink, g_sum * shrink, gd * shrink
            m = top
        e = tl.exp(s - m)
        exp_d, expm1_d = exp_pair(d)
        g = e * exp_d
        e_sum += e
        em += e * expm1_d
        g_sum += g
        if REVERSE:
            ed += e * d
        if FORWARD:
            gd += g * d
        spread = tl.maximum(spread, tl.abs(d), propagate_nan=tl.PropagateNan.ALL)
        if METRICS:
            es += guarded(e, e * (s - m))
            gs += guarded(g, g * (s - m))
            top = tl.max(t, 0)
            if top > m_t:
                at_t = _first(t, top, v, V)
                m_t = top
        v0 += BLOCK_V
    widest = tl.max(tl.where(spread == spread, spread, float("inf")), 0)
    sums = (tl.sum(e_sum, 0), tl.sum(ed, 0), tl.sum(em, 0), tl.sum(g_sum, 0), tl.sum(gd, 0), widest)
    return m, sums, (tl.sum(es, 0), tl.sum(gs, 0), at_s, m_t, at_t)


@triton.jit
def _both_sums(row, m, METRICS: tl.constexpr, MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK_V: tl.constexpr):
    """The sums of a row whose teacher is far: relative to both maxima, every term guarded by its probability.

    With e = exp(s - m), r = exp(t - m_t): m_t, sum e * d, sum r, sum r * d, sum r * (t - m_t).
    """
    V = row[4]
    ACC: tl.constexpr = row[5][0].dtype
    tops = tl.full([BLOCK_V], LOWEST, ACC)
    v0 = 0
    while v0 < V:
        _, t, _, _ = _logits(row, v0 + tl.arange(0, BLOCK_V), MODE, CAP_S, CAP_T)
        tops = tl.maximum(tops, t)
        v0 += BLOCK_V
    m_t = tl.max(tops, 0)
    ed = tl.zeros([BLOCK_V], ACC)
    r_sum, rd, rt = ed, ed, ed
    v0 = 0
    while v0 < V:
        s, t, d, _ = _logits(row, v0 + tl.arange(0, BLOCK_V), MODE, CAP_S, CAP_T)
        e, r = tl.exp(s - m), tl.exp(t - m_t)
        ed += guarded(e, e * d)
        r_sum += r
        rd += guarded(r, r * d)
        if METRICS:
            rt += guarded(r, r * (t - m_t))
        v0 += BLOCK_V
    return m_t, tl.sum(ed, 0), tl.sum(r_sum, 0), tl.sum(rd, 0), tl.sum(rt, 0)


@triton.jit
def _row_stats(row, KIND: tl.constexpr, METRICS: tl.constexpr, MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK_V: tl.constexpr):
    """The columns of the statistics, in order."""
    REVERSE: tl.constexpr = METRICS or KIND == REVERSE_KL
    FORWARD: tl.constexpr = METRICS or KIND == FORWARD_KL
    m, sums, more = _student_sums(row, REVERSE, FORWARD, METRICS, MODE, CAP_S, CAP_T, BLOCK_V)
    e_sum, ed, em, g_sum, gd, spread = sums
    es, gs, at_s, top_t, at_t = more
    logsum = tl.log(e_sum)
    x = em / e_sum
    m_t = m
    logsum_t = tl.log(g_sum)
    gap = tl.where((x > GAP_LOW) & (x < GAP_HIGH), log1p(x), tl.log(g_sum / e_sum))
    mean_t = (gs + gd) / g_sum  # of t - m_t under the teacher
    forward = gd / g_sum - gap
    if (spread <= LIMIT) == 0:
        m_t, ed, r_sum, rd, rt = _both_sums(row, m, METRICS, MODE, CAP_S, CAP_T, BLOCK_V)
        logsum_t = tl.log(r_sum)
        gap = (m_t - m) + (logsum_t - logsum)
        mean_t = rt / r_sum
        forward = rd / r_sum - gap
    zero = m * 0.0
    reverse = gap - ed / e_sum if REVERSE else zero
    if not FORWARD:
        forward = zero
    h_s, h_t, top_q, top_p = zero, zero, zero, zero
    if METRICS:
        h_s, h_t = logsum - es / e_sum, logsum_t - mean_t
        top_q, top_p = tl.exp(-logsum), tl.exp(top_t - m_t - logsum_t)
    return m, logsum, m_t, logsum_t, gap, spread, reverse, forward, h_s, h_t, top_q, top_p, at_s, at_t


@triton.jit
def _store_stats(Stats, stats):
    Stats += tl.program_id(0).to(tl.int64) * COLUMNS
    for c in tl.static_range(COLUMNS):
        tl.store(Stats + c, stats[c])


@triton.jit
def _load_stats(Stats):
    """The columns that a distribution needs."""
    Stats += tl.program_id(0).to(tl.int64) * COLUMNS
    return tl.load(Stats), tl.load(Stats + 1), tl.load(Stats + 2), tl.load(Stats + 3), tl.load(Stats + 4), tl.load(Stats + 5)


@triton.jit
def _distributions(s, t, d, stats):
    """q, p and delta. Near rows take p = q * exp(delta), so that p - q keeps delta's digits."""
    m, logsum, m_t, logsum_t, gap, spread = stats
    q = tl.exp(s - m - logsum)
    delta = d - gap
    near = spread <= LIMIT
    p = tl.where(near, q, 1.0) * tl.exp(tl.where(near, delta, t - m_t - logsum_t))
    return q, p, delta


@triton.jit
def _row_dot(row, stats, beta, KIND: tl.constexpr, MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK_V: tl.constexpr):
    V = row[4]
    f_sum = tl.zeros([BLOCK_V], beta.dtype)
    u_sum = f_sum
    v0 = 0
    while v0 < V:
        v = v0 + tl.arange(0, BLOCK_V)
        s, t, d, _ = _logits(row, v, MODE, CAP_S, CAP_T)
        q, p, delta = _distributions(s, t, d, stats)
        f, u = entry(q, p, delta, beta, KIND)
        f_sum += tl.where(v < V, f, 0.0)
        u_sum += tl.where(v < V, u, 0.0)
        v0 += BLOCK_V
    return tl.sum(f_sum, 0), tl.sum(u_sum, 0)


@triton.jit
def _row_grad(
    row, stats, a, factor, beta, G,
    KIND: tl.constexpr, MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, NARROWED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    V, student = row[4], row[5]
    v0 = 0
    while v0 < V:
        v = v0 + tl.arange(0, BLOCK_V)
        s, t, d, z = _logits(row, v, MODE, CAP_S, CAP_T)
        if NARROWED:
            tl.debug_barrier()  # the first tile's gradient lies over logits that another thread loads
        q, p, delta = _distributions(s, t, d, stats)
        _, u = entry(q, p, delta, beta, KIND)
        g = (u - q * a) * (transform_slope(z, student[0], student[1], CAP_S) * factor)
        g = tl.where(factor == 0, 0.0, g)  # an ignored row may hold inf
        tl.store(G + v, g.to(G.dtype.element_ty), mask=v < V)
        v0 += BLOCK_V


@triton.jit
def _row_stats_kernel(
    S, T, BiasS, BiasT, Stats, stride_s, stride_t, V,
    inner_s: tl.float64, outer_s: tl.float64, inner_t: tl.float64, outer_t: tl.float64,
    KIND: tl.constexpr, METRICS: tl.constexpr, MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = _row(S, T, BiasS, BiasT, stride_s, stride_t, V, inner_s, outer_s, inner_t, outer_t, Stats.dtype.element_ty)
    _store_stats(Stats, _row_stats(row, KIND, METRICS, MODE, CAP_S, CAP_T, BLOCK_V))


@triton.jit
def _row_dot_kernel(
    S, T, BiasS, BiasT, Stats, Loss, A, stride_s, stride_t, V,
    inner_s: tl.float64, outer_s: tl.float64, inner_t: tl.float64, outer_t: tl.float64, beta: tl.float64,
    KIND: tl.constexpr, MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    ACC: tl.constexpr = Stats.dtype.element_ty
    row = _row(S, T, BiasS, BiasT, stride_s, stride_t, V, inner_s, outer_s, inner_t, outer_t, ACC)
    loss, a = _row_dot(row, _load_stats(Stats), tl.full((), beta, ACC), KIND, MODE, CAP_S, CAP_T, BLOCK_V)
    tl.store(Loss + n, loss)
    tl.store(A + n, a)


@triton.jit
def _row_grad_kernel(
    S, T, BiasS, BiasT, Stats, A, Factor, G, stride_s, stride_t, stride_g, V,
    inner_s: tl.float64, outer_s: tl.float64, inner_t: tl.float64, outer_t: tl.float64, beta: tl.float64,
    KIND: tl.constexpr, MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, NARROWED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    ACC: tl.constexpr = Stats.dtype.element_ty
    row = _row(S, T, BiasS, BiasT, stride_s, stride_t, V, inner_s, outer_s, inner_t, outer_t, ACC)
    a, factor, beta = tl.load(A + n), tl.load(Factor + n), tl.full((), beta, ACC)
    _row_grad(row, _load_stats(Stats), a, factor, beta, G + n * stride_g, KIND, MODE, CAP_S, CAP_T, NARROWED, BLOCK_V)


@triton.jit
def _row_fused_kernel(
    S, T, BiasS, BiasT, Stats, Loss, A, Factor, G, stride_s, stride_t, stride_g, V,
    inner_s: tl.float64, outer_s: tl.float64, inner_t: tl.float64, outer_t: tl.float64, beta: tl.float64,
    KIND: tl.constexpr, METRICS: tl.constexpr, MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, NARROWED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    ACC: tl.constexpr = Stats.dtype.element_ty
    row = _row(S, T, BiasS, BiasT, stride_s, stride_t, V, inner_s, outer_s, inner_t, outer_t, ACC)
    factor, beta = tl.load(Factor + n), tl.full((), beta, ACC)
    columns = _row_stats(row, KIND, METRICS, MODE, CAP_S, CAP_T, BLOCK_V)
    stats = (columns[0], columns[1], columns[2], columns[3], columns[4], columns[5])
    if KIND == REVERSE_KL:
        loss, a = columns[6], columns[6]
    elif KIND == FORWARD_KL:
        loss, a = columns[7], tl.full((), -1.0, ACC)
    else:
        loss, a = _row_dot(row, stats, beta, KIND, MODE, CAP_S, CAP_T, BLOCK_V)
    _store_stats(Stats, columns)
    tl.store(Loss + n, loss)
    tl.store(A + n, a)
    _row_grad(row, stats, a, factor, beta, G + n * stride_g, KIND, MODE, CAP_S, CAP_T, NARROWED, BLOCK_V)


KERNELS = {"stats": _row_stats_kernel, "dot": _row_dot_kernel, "grad": _row_grad_kernel, "fused": _row_fused_kernel}


def config(V: int, dtype: torch.dtype) -> tuple[int, int]:
    """(BLOCK_V, num_warps) for rows of V logits of `dtype`: eight entries per thread (float64: four), so that the tiles of partial sums stay in registers."""
    if dtype == torch.float64:
        return (512, 4)
    if V <= 1024:
        return (1024, 4)
    return (2048, 8) if V <= 1 << 15 else (4096, 16)


def interpreted() -> bool:
    """Whether these kernels were made for Triton's interpreter: TRITON_INTERPRET=1 when this module was imported."""
    return not isinstance(_row_stats_kernel, triton.runtime.JITFunction)


def usable(device_type: str) -> str | None:
    """None if the kernels can serve tensors of `device_type`, else the reason."""
    if interpreted():
        return None if device_type == "cpu" else f"TRITON_INTERPRET is set, and the interpreter serves cpu, not {device_type}"
    if device_type != "cuda":
        return f"Triton compiles for cuda, not for {device_type} (TRITON_INTERPRET=1 interprets on cpu, slowly)"
    return None if torch.cuda.is_available() else "no CUDA device is visible"


def _scalars(transform: LogitTransform) -> tuple[float, float]:
    """(inner, outer) of triton_math.transform."""
    if transform.softcap is None:
        return transform.factor, 1.0
    return transform.scale / transform.softcap, transform.softcap / transform.temperature


def _mode(spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None) -> int:
    if spec.linear_difference(bias_s is bias_t):
        return LINEAR.value
    return DIFFERENCE.value if spec.difference else PLAIN.value


def _launch(name: str, S: Tensor, T: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None, **arguments: object) -> None:
    inner_s, outer_s = _scalars(spec.student)
    inner_t, outer_t = _scalars(spec.teacher)
    BLOCK_V, num_warps = config(S.shape[1], S.dtype)
    options = {} if interpreted() else {"num_warps": num_warps, "enable_fp_fusion": True}  # the fusion's default changes in Triton 3.10
    with torch.cuda.device_of(S):
        KERNELS[name][(S.shape[0],)](
            S=S, T=T, BiasS=bias_s, BiasT=bias_t, stride_s=S.stride(0), stride_t=T.stride(0), V=S.shape[1],
            inner_s=inner_s, outer_s=outer_s, inner_t=inner_t, outer_t=outer_t,
            KIND=int(spec.divergence.kind), MODE=_mode(spec, bias_s, bias_t),
            CAP_S=spec.student.softcap is not None, CAP_T=spec.teacher.softcap is not None, BLOCK_V=BLOCK_V, **arguments, **options,
        )  # fmt: skip


def _is_narrowed(S: Tensor, G: Tensor) -> bool:
    return G.dtype != S.dtype and G.data_ptr() == S.data_ptr()


def row_stats(S: Tensor, T: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None, metrics: bool) -> Tensor:
    stats = S.new_empty((S.shape[0], len(Column)), dtype=stats_dtype(S.dtype))
    _launch("stats", S, T, spec, bias_s, bias_t, Stats=stats, METRICS=metrics)
    return stats


def row_dot(S: Tensor, T: Tensor, stats: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None) -> tuple[Tensor, Tensor]:
    if spec.divergence.one_sweep:
        return plain_kl(stats, spec)
    loss, A = stats.new_empty(S.shape[0]), stats.new_empty(S.shape[0])
    _launch("dot", S, T, spec, bias_s, bias_t, Stats=stats, Loss=loss, A=A, beta=spec.divergence.beta)
    return loss, A


def row_grad_(
    S: Tensor, T: Tensor, stats: Tensor, A: Tensor, factor: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None, G: Tensor
) -> None:
    _launch(
        "grad", S, T, spec, bias_s, bias_t, Stats=stats, A=A, Factor=factor, G=G, stride_g=G.stride(0), beta=spec.divergence.beta, NARROWED=_is_narrowed(S, G)
    )


def row_fused_(
    S: Tensor, T: Tensor, factor: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None, metrics: bool, G: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    stats = S.new_empty((S.shape[0], len(Column)), dtype=stats_dtype(S.dtype))
    loss, A = stats.new_empty(S.shape[0]), stats.new_empty(S.shape[0])
    _launch(
        "fused", S, T, spec, bias_s, bias_t, Stats=stats, Loss=loss, A=A, Factor=factor, G=G, stride_g=G.stride(0), beta=spec.divergence.beta,
        METRICS=metrics, NARROWED=_is_narrowed(S, G),
    )  # fmt: skip
    return stats, loss, A
