"""A tile of a row in the Triton kernels: loaded, transformed, relative to references, summed per thread."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_launch import DIFFERENCE, DIFFERENCE_MIXED, LINEAR, PLAIN_MIXED
from .triton_math import bend

# Below every logit but -inf: a maximum that starts here never makes -inf - -inf.
LOWEST = tl.constexpr(-1.0e38)


@triton.jit
def side_of_row(inner, outer, mix, Temperature, ACC: tl.constexpr):
    """Return a side's transform of this row, in the arithmetic's type.

    `mix` is the other side's weight in its logits.
    """
    outer = tl.full((), outer, ACC)
    if Temperature is not None:
        outer = outer / tl.load(Temperature + tl.program_id(0).to(tl.int64))
    return tl.full((), inner, ACC), outer, tl.full((), mix, ACC)


@triton.jit
def _load(Z, v, V, WHOLE: tl.constexpr):
    """Load entries of a tile; 0 past the end of the row, which a WHOLE tile does not reach."""
    if WHOLE:
        z = tl.load(Z + v)
    else:
        z = tl.load(Z + v, mask=v < V, other=0.0)
    return z


@triton.jit
def _raw(Z, Bias, v, V, ACC: tl.constexpr, WHOLE: tl.constexpr):
    z = _load(Z, v, V, WHOLE).to(ACC)
    if Bias is not None:
        z += _load(Bias, v, V, WHOLE)
    return z


@triton.jit
def bent(row, v, MODE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, WHOLE: tl.constexpr):
    """Load a tile of both sides, each without its last factor (`bend`).

    In LINEAR mode the raw difference takes the teacher's place.
    """
    S, T, BiasS, BiasT, V, student, teacher = row
    ACC: tl.constexpr = student[0].dtype
    y_s = bend(_raw(S, BiasS, v, V, ACC, WHOLE), student[0], CAP_S)
    if MODE == LINEAR:
        y_t = _load(T, v, V, WHOLE).to(ACC)
    else:
        z = _raw(T, BiasT, v, V, ACC, WHOLE)
        if MODE == DIFFERENCE or MODE == DIFFERENCE_MIXED:
            z += _load(S, v, V, WHOLE).to(ACC)
        y_t = bend(z, teacher[0], CAP_T)
    return y_s, y_t


@triton.jit
def inside(v, V, value, other, WHOLE: tl.constexpr):
    """Return `value`, and past the end of the row `other`."""
    if not WHOLE:
        value = tl.where(v < V, value, other)
    return value


@triton.jit
def logits(row, v, y_s, y_t, MODE: tl.constexpr, WHOLE: tl.constexpr):
    """Return the logits s and t of a tile; -inf past the end of the row."""
    s = y_s * row[5][1]
    if MODE == LINEAR:
        t = s + y_t * row[6][1]
    else:
        t = y_t * row[6][1]
        if MODE == PLAIN_MIXED or MODE == DIFFERENCE_MIXED:
            t = tl.fma(s, row[6][2], t)
    return inside(v, row[4], s, -float("inf"), WHOLE), inside(v, row[4], t, -float("inf"), WHOLE)


@triton.jit
def relative(row, v, y_s, y_t, m, m_t, MODE: tl.constexpr, WHOLE: tl.constexpr):
    """Return s - m, t - m_t and the offset o of contract.py, in one step from y.

    Rounding s = 1.3 * z at |z| = 40 first would cost 2e-6 of every probability.
    """
    V, student, teacher = row[4], row[5], row[6]
    x = inside(v, V, tl.fma(y_s, student[1], -m), -float("inf"), WHOLE)
    if MODE == LINEAR:
        o = inside(v, V, tl.fma(y_t, teacher[1], m - m_t), 0.0, WHOLE)
        y = x + o
    else:
        if MODE == PLAIN_MIXED or MODE == DIFFERENCE_MIXED:
            y = tl.fma(x, teacher[2], tl.fma(y_t, teacher[1], tl.fma(m, teacher[2], -m_t)))
        else:
            y = tl.fma(y_t, teacher[1], -m_t)
        y = inside(v, V, y, -float("inf"), WHOLE)
        # both -inf: a masked entry, which does not make the row far
        o = tl.where(x == y, 0.0, y - x)
    return x, y, o


@triton.jit
def lanes(value, BLOCK_V: tl.constexpr, PACK: tl.constexpr, ACC: tl.constexpr):
    """Return accumulators, one for each group of entries that `fold` adds up."""
    SIZE: tl.constexpr = BLOCK_V // PACK if PACK > 0 else BLOCK_V // -PACK
    return tl.full([SIZE], value, ACC)


@triton.jit
def fold(x, BLOCK_V: tl.constexpr, PACK: tl.constexpr):
    """Sum the entries that one thread holds: PACK neighbours, or -PACK entries far apart.

    Whole tiles as accumulators spilled (8 sums x 8 entries).
    """
    if PACK > 0:
        folded = tl.sum(tl.reshape(x, [BLOCK_V // PACK, PACK]), 1)
    else:
        folded = tl.sum(tl.reshape(x, [-PACK, BLOCK_V // -PACK]), 0)
    return folded


@triton.jit
def fold_max(x, BLOCK_V: tl.constexpr, PACK: tl.constexpr):
    if PACK > 0:
        folded = tl.max(tl.reshape(x, [BLOCK_V // PACK, PACK]), 1)
    else:
        folded = tl.max(tl.reshape(x, [-PACK, BLOCK_V // -PACK]), 0)
    return folded


@triton.jit
def unfold(lane, BLOCK_V: tl.constexpr, PACK: tl.constexpr):
    """Give each entry of a tile the value of its group."""
    if PACK > 0:
        entries = tl.broadcast_to(lane[:, None], [BLOCK_V // PACK, PACK])
    else:
        entries = tl.broadcast_to(lane[None, :], [-PACK, BLOCK_V // -PACK])
    return tl.reshape(entries, [BLOCK_V])


@triton.jit
def first(x, top, v, V):
    return tl.min(tl.where(x == top, v, V), 0)
