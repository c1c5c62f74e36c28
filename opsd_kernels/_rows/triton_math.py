"""The Triton home of the formulas: entry, logit transform, and the functions that Triton lacks.

The others are torch_math.py and csrc/divergence.h. The code uses only functions of both the compiler and the
interpreter. Triton's own fp32 exp is the hardware's `ex2.approx`, good to 2 ulp of exp(x): its difference
from 1 has no digits near 0, hence `exp_pair`. In float64 exp and log are those of the device library.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..spec import Kind

REVERSE_KL = tl.constexpr(int(Kind.REVERSE_KL))
FORWARD_KL = tl.constexpr(int(Kind.FORWARD_KL))
JSD = tl.constexpr(int(Kind.JSD))
SKEW_REVERSE_KL = tl.constexpr(int(Kind.SKEW_REVERSE_KL))
SKEW_FORWARD_KL = tl.constexpr(int(Kind.SKEW_FORWARD_KL))
TVD = tl.constexpr(int(Kind.TVD))

LOG2_E = tl.constexpr(1.4426950408889634)
# ln 2 in two parts. The first has zeros in its low bits: its product with a whole number below 2**15 is exact
# in fp32.
LN2_HIGH = tl.constexpr(0.693145751953125)
LN2_LOW = tl.constexpr(1.4286068203094172e-06)
# 1.5 * 2**23: adding it to an fp32 leaves the nearest whole number in the low bits
ROUND_TO_INT = tl.constexpr(12582912.0)


@triton.jit
def _exp_pair_fp32(x):
    whole = tl.fma(x, LOG2_E, ROUND_TO_INT) - ROUND_TO_INT
    # |r| <= ln(2) / 2: Taylor to r**7 leaves 2e-8 of r
    r = tl.fma(whole, -LN2_LOW, tl.fma(whole, -LN2_HIGH, x))
    c = tl.fma(r, 1.0 / 5040, 1.0 / 720)
    c = tl.fma(c, r, 1.0 / 120)
    c = tl.fma(c, r, 1.0 / 24)
    c = tl.fma(c, r, 1.0 / 6)
    c = tl.fma(c, r, 0.5)
    m = tl.fma(c * r, r, r)
    power = tl.exp2(whole)
    return tl.fma(power, m, power), tl.fma(power, m, power - 1.0)


@triton.jit
def _exp_pair_fp64(x):
    e = tl.exp(x)
    kahan = (e - 1.0) * x / tl.where(e == 1.0, 1.0, tl.log(e))
    return e, tl.where(e == 1.0, x, tl.where(tl.abs(x) < 0.5, kahan, e - 1.0))


@triton.jit
def exp_pair(x):
    """Return exp(x) and expm1(x) to a relative 1e-7 (fp64: 1e-15), for x <= 80. NaN stays NaN."""
    x = tl.where(x < -100.0, -100.0, x)
    if x.dtype == tl.float64:
        e, m = _exp_pair_fp64(x)
    else:
        e, m = _exp_pair_fp32(x)
    return e, m


@triton.jit
def expm1(x):
    _, m = exp_pair(x)
    return m


@triton.jit
def log1p(y):
    """Return log(1 + y) for y > -1: the logarithm of the rounded sum plus the rounding error."""
    w = 1.0 + y
    return tl.log(w) + (y - (w - 1.0)) / w


@triton.jit
def tanh(x):
    m = expm1(-2.0 * tl.abs(x))
    t = m / (2.0 + m)
    return tl.where(x < 0, t, -t)


@triton.jit
def bend(z, inner, CAPPED: tl.constexpr):
    """Map a raw logit plus bias to y, where the logit is y * outer: the transform without its last factor.

    Under a softcap y = tanh(z * inner).
    """
    if CAPPED:
        z = tanh(z * inner)
    return z


@triton.jit
def bend_slope(y, inner, CAPPED: tl.constexpr):
    """Return dy / dz, from y."""
    if CAPPED:
        slope = inner * (1.0 - y) * (1.0 + y)
    else:
        slope = 1.0
    return slope


@triton.jit
def guarded(probability, term):
    return tl.where(probability == 0, 0.0, term)


@triton.jit
def entry(q, p, delta, beta, KIND: tl.constexpr):
    """Return (f, u) of torch_math.py for entries with delta = log p - log q."""
    if KIND == REVERSE_KL:
        f = guarded(q, -q * delta)
        u = f
    elif KIND == FORWARD_KL:
        f = guarded(p, p * delta)
        u = -p
    else:
        a = expm1(-tl.abs(delta))
        below = delta <= 0
        if KIND == JSD or KIND == SKEW_REVERSE_KL or KIND == SKEW_FORWARD_KL:
            share = tl.where(below, beta, 1.0 - beta) * a
            log = log1p(share)
            log_m_q = tl.where(below, log, log + delta)
            log_m_p = tl.where(below, log - delta, log)
            p_over_m = tl.where(below, 1.0 + a, 1.0) / (1.0 + share)
            if KIND == JSD:
                u = guarded(q, (beta - 1.0) * q * log_m_q)
                f = u - beta * guarded(p, p * log_m_p)
            elif KIND == SKEW_REVERSE_KL:
                f = guarded(q, -q * log_m_q)
                u = guarded(q, q * (beta * p_over_m - log_m_q))
            else:
                f = guarded(p, -p * log_m_p)
                u = guarded(q, (beta - 1.0) * q * p_over_m)
        else:
            tl.static_assert(KIND == TVD)
            sign = tl.where(delta > 0, 1.0, tl.where(delta < 0, -1.0, delta))
            f = tl.where((p == 0) & (q == 0), 0.0, -0.5 * a * tl.where(below, q, p))
            u = guarded(q, -0.5 * q * sign)
    return f, u


@triton.jit
def clipped_entry(q, p, delta, beta, clip, KIND: tl.constexpr, CLIP: tl.constexpr):
    """Return (f, u) under the entry clip, and where the clip holds.

    There u is 0, less the constant times q that reverse KL's u = f leaves out.
    """
    f, u = entry(q, p, delta, beta, KIND)
    over = f > clip
    if CLIP:
        f = tl.where(over, clip, f)
        u = tl.where(over, -q if KIND == REVERSE_KL else 0.0, u)
    return f, u, over
