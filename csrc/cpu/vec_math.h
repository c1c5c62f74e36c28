// exp, expm1, log1p and tanh of a vector of floats, each within about one unit in the last place, by minimax
// polynomials. -inf and NaN propagate as in IEEE; a domain is noted where it is limited.
#pragma once

#include "../divergence.h"
#include "vec.h"

namespace opsd::OPSD_CAPABILITY {

using opsd::abs;
using opsd::exp_pair;
using opsd::log1p;
using opsd::max;
using opsd::select;
OPSD_INLINE double exp(double x) { return ::exp(x); }
OPSD_INLINE double scaled_tanh(double x, double c, double) { return ::tanh(x * c); }

// x = n * ln 2 + r with |r| <= ln(2)/2, for |x| < 2^21.
struct Reduced {
  Vec n, r;
};

OPSD_INLINE Reduced reduce(Vec x) {
  const Vec magic(12582912.0);  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const Vec n = fma(x, Vec(1.44269504088896341), magic) - magic;
#if defined(__AVX2__) || defined(__FP_FAST_FMAF)
  return {n, fma(n, Vec(-0.693147180559945309), x)};  // off by 3e-9 |x|, for ln 2 is not a float
#else
  // n times a number of 9 bits is exact
  return {n, fma(n, Vec(2.12194440054690583e-4), fma(n, Vec(-0.693359375), x))};
#endif
}

// (exp(r) - 1) / r for |r| <= 0.347, relative error 1e-8 before rounding.
OPSD_INLINE Vec exp_slope(Vec r) {
  Vec y = fma(Vec(1.3946578487395867e-3), r, Vec(8.366659443075866e-3));
  y = fma(y, r, Vec(4.1666280307701184e-2));
  y = fma(y, r, Vec(0.1666654242975561));
  y = fma(y, r, Vec(0.5000000062352782));
  return fma(y, r, Vec(1.0));
}

// Below this exp is 0 in floats; max() hands a NaN in its second operand through.
constexpr double EXP_FLOOR = -110.0;

// x <= 88. Results below the smallest normal number may be 0.
OPSD_INLINE Vec exp(Vec x) {
  const Reduced a = reduce(max(Vec(EXP_FLOOR), x));
  return scale_by_power(fma(exp_slope(a.r), a.r, Vec(1.0)), a.n);
}

OPSD_INLINE ExpPair<Vec> exp_pair(const Reduced& a) {
  const Vec power = scale_by_power(Vec(1.0), a.n), h = a.r * exp_slope(a.r);
  return {fma(power, h, power), fma(power, h, power - Vec(1.0))};
}

// x <= 88
OPSD_INLINE ExpPair<Vec> exp_pair(Vec x) { return exp_pair(reduce(max(Vec(EXP_FLOOR), x))); }

// The same for |x| <= 80 alone; beyond, anything.
OPSD_INLINE ExpPair<Vec> bounded_exp_pair(Vec x) { return exp_pair(reduce(x)); }
OPSD_INLINE ExpPair<double> bounded_exp_pair(double x) { return exp_pair(x); }

OPSD_INLINE Vec expm1(Vec x) { return exp_pair(x).expm1; }

// x in (-1, 1e30); near -1 as exact as 1 + x.
OPSD_INLINE Vec log1p(Vec x) {
  const Ints offset = bits(Vec(1.0) + x) + (0x3f800000 - 0x3f3504f3);  // exponents count from sqrt(1/2)
  const Vec k = to_float((offset >> 23) - 127);
  const Vec power = from_bits(0x7f000000 - (offset & 0x7f800000));  // 2^-k
  // (1 + x) / 2^k - 1 from x, with all its digits
  const Vec f = fma(power, x, power - Vec(1.0));
  Vec y = fma(Vec(-0.07819587741658397), f, Vec(0.13005231238963932));
  y = fma(y, f, Vec(-0.13210368119947474));
  y = fma(y, f, Vec(0.14163482264515603));
  y = fma(y, f, Vec(-0.1661098087970387));
  y = fma(y, f, Vec(0.2000301159574703));
  y = fma(y, f, Vec(-0.25001528238368703));
  y = fma(y, f, Vec(0.33333308378342236));
  y = fma(y, f, Vec(-0.499999890988681));
  const Vec mantissa = fma(f * f, y, f);
  return fma(k, Vec(0.693359375), fma(k, Vec(-2.12194440054690583e-4), mantissa));
}

// tanh((c + c_rest) * x) = (1 - u) / (1 + u) with u = exp(-2c|x|). A softcap of 30 magnifies every last
// digit, so the product is never rounded, and large arguments take 1 - 2u / (1 + u).
OPSD_INLINE Vec scaled_tanh(Vec x, Vec c, Vec c_rest) {
  const Vec y = select(c < Vec(0.0), Vec(2.0), Vec(-2.0)) * abs(x);
  // rest: NaN where x is infinite
  const Vec product = y * c, rest = fma(y, c_rest, exact_fma(y, c, -product));
  Reduced a = reduce(max(Vec(EXP_FLOOR), product));
  a.r = a.r + select(rest == rest, rest, Vec(0.0));
  const ExpPair<Vec> u = exp_pair(a);
  const Mask large = product < Vec(-1.0);
  const Vec part = select(large, u.exp + u.exp, -u.expm1) / (Vec(1.0) + u.exp);
  const Vec magnitude = select(large, Vec(1.0) - part, part);
  return select(x * c < Vec(0.0), -magnitude, magnitude);
}

}  // namespace opsd::OPSD_CAPABILITY
