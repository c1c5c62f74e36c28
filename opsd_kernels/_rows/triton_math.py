"""The Triton home of the formulas: entry, logit transform, and the functions that Triton lacks.

The others are torch_math.py and csrc/divergence.h. The code uses only functions of both the compiler and the
interpreter, but for `log2`. In fp32 an exponential is the hardware's `ex2.approx.ftz`, one instruction and
good to 2 ulp of exp(x), where `tl.exp` takes three more for subnormal results. Its difference from 1 has no
digits near 0, hence `exp_pair` and `gap_pair`. In float64 exp and log are those of the device library.
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
MIXED_KL = tl.constexpr(int(Kind.MIXED_KL))

LOG2_E = tl.constexpr(1.4426950408889634)
# ln 2 in two parts. The first has zeros in its low bits: its product with a whole number below 2**15 is exact
# in fp32.
LN2_HIGH = tl.constexpr(0.693145751953125)
LN2_LOW = tl.constexpr(1.4286068203094172e-06)
# 1.5 * 2**23: adding it to an fp32 leaves the nearest whole number in the low bits
ROUND_TO_INT = tl.constexpr(12582912.0)
LN2 = tl.constexpr(0.6931471805599453)
# Up to this |x| a polynomial keeps the digits of expm1(x), and of the logarithm of a mixture, that the
# difference of an exponential from 1 loses. Beyond, the hardware's 2.4e-7 is 1e-6 of them at most.
SMALL_GAP = tl.constexpr(0.25)


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
def exp(x):
    if x.dtype == tl.float64:
        e = tl.exp(x)
    else:
        e = tl.exp2(x * LOG2_E)
    return e


@triton.jit
def gap_pair(x):
    """Return exp(x) and expm1(x) in 9 instructions instead of the 17 of `exp_pair`. NaN stays NaN.

    Both are good to 4 ulp of exp(x). Up to SMALL_GAP expm1 has a relative 2e-7, from a polynomial of the
    smallest largest error.
    """
    if x.dtype == tl.float64:
        e, m = _exp_pair_fp64(tl.where(x < -100.0, -100.0, x))
    else:
        e = tl.exp2(x * LOG2_E)
        c = tl.fma(x, 0.00834885, 0.04175356)
        c = tl.fma(c, x, 0.16666642)
        c = tl.fma(c, x, 0.49999932)
        m = tl.where(tl.abs(x) < SMALL_GAP, x * tl.fma(c, x, 1.0), e - 1.0)
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
    elif KIND == MIXED_KL:
        of_q = (1.0 - beta) * guarded(q, -q * delta)
        f = beta * guarded(p, p * delta) + of_q
        u = beta * (q - p) + of_q
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
def _log2_interpreted(x):
    return tl.log2(x)


@triton.jit
def _log2_approx(x):
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


# The hardware's logarithm, good to 2.4e-7: `tl.log2` is a function of 25 instructions. The interpreter has no
# assembly.
log2 = _log2_approx if isinstance(exp, triton.runtime.JITFunction) else _log2_interpreted


@triton.jit
def _log_mixture(d, mixture, cumulants):
    """Return log(1 - beta + beta * exp(d)), from 1 - beta + beta * exp(d) where |d| is not small."""
    k1, k2, k3, k4, k5 = cumulants
    c = tl.fma(d, k5, k4)
    c = tl.fma(c, d, k3)
    c = tl.fma(c, d, k2)
    small = d * tl.fma(c, d, k1)
    return tl.where(tl.abs(d) < SMALL_GAP, small, LN2 * log2(mixture))


@triton.jit
def near_terms(beta):
    """Return what `near_entry` needs of a row: the series of log(1 - beta + beta * exp(d)) in d.

    Its coefficients are the cumulants of a Bernoulli variable over factorials.
    """
    v = beta * (1.0 - beta)
    skew = 1.0 - 2.0 * beta
    k4, k5 = v * (1.0 - 6.0 * v) / 24.0, v * skew * (1.0 - 12.0 * v) / 120.0
    return beta, v / 2.0, v * skew / 6.0, k4, k5


@triton.jit
def near_entry(d, beta, cumulants, KIND: tl.constexpr):
    """Return f / q and u / q of `entry` in fp32, for a finite d = log p - log q of a near row.

    No term is infinite there, so nothing is guarded.
    """
    if KIND == REVERSE_KL:
        f = -d
        u = f
    elif KIND == FORWARD_KL:
        e = tl.exp2(d * LOG2_E)
        f = e * d
        u = -e
    elif KIND == MIXED_KL:
        _, m = gap_pair(d)
        of_q = (beta - 1.0) * d
        f = tl.fma(beta * d, m + 1.0, of_q)
        u = tl.fma(-beta, m, of_q)
    elif KIND == TVD:
        _, m = gap_pair(d)
        f = 0.5 * tl.abs(m)
        u = tl.where(d > 0, -0.5, tl.where(d < 0, 0.5, 0.0))
    else:
        d2 = d * LOG2_E
        e = tl.exp2(d2)
        if KIND == JSD:
            # relative to the larger probability: log(m / q) of a large d, less d, has lost log(m / p)
            share = tl.where(d > 0, 1.0 - beta, beta)
            above, below = tl.maximum(d, 0.0), tl.minimum(d, 0.0)
            mixture = tl.fma(share, tl.exp2(-tl.abs(d2)), 1.0 - share)
            log_m_q = _log_mixture(d, mixture, cumulants)
            small = tl.abs(d) < SMALL_GAP
            log_m_p = tl.where(small, log_m_q - d, log_m_q - below)
            log_m_q = tl.where(small, log_m_q, log_m_q + above)
            u = (beta - 1.0) * log_m_q
            f = tl.fma(-beta * e, log_m_p, u)
        elif KIND == SKEW_REVERSE_KL:
            mixture = tl.fma(beta, e, 1.0 - beta)
            f = -_log_mixture(d, mixture, cumulants)
            u = tl.fma(beta, e / mixture, f)
        else:
            mixture = tl.fma(1.0 - beta, tl.exp2(-d2), beta)
            log_m_q = _log_mixture(d, mixture, cumulants)
            log_m_p = tl.where(tl.abs(d) < SMALL_GAP, log_m_q - d, log_m_q)
            f = -e * log_m_p
            u = (beta - 1.0) / mixture
    return f, u


@triton.jit
def clipped(q, f, u, beta, clip, KIND: tl.constexpr, CLIP: tl.constexpr):
    """Return (f, u) under the entry clip, and where the clip holds.

    A clipped term has the derivative 0. Where u leaves out a multiple of q, which cancels where nothing is
    clipped, the 0 is minus that multiple: Divergence.omitted.
    """
    over = f > clip
    if CLIP:
        f = tl.where(over, clip, f)
        if KIND == REVERSE_KL:
            u = tl.where(over, -q, u)
        elif KIND == MIXED_KL:
            u = tl.where(over, (2.0 * beta - 1.0) * q, u)
        else:
            u = tl.where(over, 0.0, u)
    return f, u, over
