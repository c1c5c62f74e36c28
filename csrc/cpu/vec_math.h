// exp, expm1, log1p and tanh of a vector of floats, each within about one unit in the last place, by polynomials that were fitted
// to the least maximal error on their interval. -inf and NaN go through as IEEE; domains are noted where they are not everything.
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
OPSD_INLINE double tanh(double x) { return ::tanh(x); }

// x = n * ln 2 + r with |r| <= ln(2)/2, for |x| < 2^21. The high part of ln 2 has 9 bits: n times it is exact without fma, too.
struct Reduced {
  Vec n, r;
};

OPSD_INLINE Reduced reduce(Vec x) {
  const Vec magic(12582912.0);  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const Vec n = fma(x, Vec(1.44269504088896341), magic) - magic;
  const Vec r = fma(n, Vec(-0.693359375), x);
  return {n, fma(n, Vec(2.12194440054690583e-4), r)};
}

// (exp(r) - 1 - r) for |r| <= 0.347, relative error 3e-8.
OPSD_INLINE Vec exp_rest(Vec r) {
  Vec y = fma(Vec(1.3946578487395867e-3), r, Vec(8.366659443075866e-3));
  y = fma(y, r, Vec(4.1666280307701184e-2));
  y = fma(y, r, Vec(0.1666654242975561));
  y = fma(y, r, Vec(0.5000000062352782));
  return r * r * y;
}

// Below this exp is 0 in floats; max() hands a NaN in its second operand through.
constexpr double EXP_FLOOR = -110.0;

// x <= 88. Results below the smallest normal number may be 0.
OPSD_INLINE Vec exp(Vec x) {
  const Reduced a = reduce(max(Vec(EXP_FLOOR), x));
  return scale_by_power(Vec(1.0) + (a.r + exp_rest(a.r)), a.n);
}

// x <= 88
OPSD_INLINE ExpPair<Vec> exp_pair(Vec x) {
  const Reduced a = reduce(max(Vec(EXP_FLOOR), x));
  const Vec power = scale_by_power(Vec(1.0), a.n), h = a.r + exp_rest(a.r);
  return {fma(power, h, power), fma(power, h, power - Vec(1.0))};
}

OPSD_INLINE Vec expm1(Vec x) { return exp_pair(x).expm1; }

// expm1(d) - d, to its own relative accuracy near 0; for |d| <= 87, elsewhere anything.
OPSD_INLINE Vec exp_second_order(Vec d) {
  const Reduced a = reduce(d);
  const Vec power = scale_by_power(Vec(1.0), a.n);
  const Vec first_order = fma(power, a.r, power - Vec(1.0));  // d itself where n = 0
  return fma(power, exp_rest(a.r), first_order - d);
}

// x in (-1, 1e30); near -1 as exact as 1 + x.
OPSD_INLINE Vec log1p(Vec x) {
  const Ints offset = bits(Vec(1.0) + x) + (0x3f800000 - 0x3f3504f3);  // exponents count from sqrt(1/2)
  const Vec k = to_float((offset >> 23) - 127);
  const Vec power = from_bits(0x7f000000 - (offset & 0x7f800000));  // 2^-k
  const Vec f = fma(power, x, power - Vec(1.0));                    // (1 + x) / 2^k - 1 from x, with all its digits
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

// (1 - u) / (1 + u) with u = exp(-2|x|); from 1/2 on as 1 - 2u / (1 + u), where a softcap of 30 would magnify the quotient's last digit.
OPSD_INLINE Vec tanh(Vec x) {
  const ExpPair<Vec> u = exp_pair(Vec(-2.0) * abs(x));
  const Mask large = abs(x) > Vec(0.5);
  const Vec part = select(large, u.exp + u.exp, -u.expm1) / (Vec(1.0) + u.exp);
  const Vec magnitude = select(large, Vec(1.0) - part, part);
  return select(x < Vec(0.0), -magnitude, magnitude);
}

OPSD_INLINE double exp_second_order(double d) {
  // Cancellation in expm1(d) - d costs d * 1e-16 / (d^2 / 2): below 0.01 the series is better.
  if (d > -0.01 && d < 0.01) return d * d * (0.5 + d * (1.0 / 6 + d * (1.0 / 24 + d * (1.0 / 120 + d * (1.0 / 720 + d / 5040)))));
  return ::expm1(d) - d;
}

}  // namespace opsd::OPSD_CAPABILITY
