// fp32 functions from the special-function units. Logits are held in base 2, so that log2(e) costs nothing: it
// is a part of the factor that multiplies them anyway.
#pragma once

#include "cluster.cuh"

namespace opsd::cuda {

constexpr float INF = __builtin_inff();
constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;
constexpr float LN_2F = static_cast<float>(LN_2);

// 2^x - 1, from power = 2^x. power - 1 has an error of two units of power's last place: below |x| = 1/4 that is
// more than 1e-6 of the result, and a polynomial (minimax, 1.4e-8) takes its place.
OPSD_DEVICE float exp2m1(float x, float power) {
  float c = fmaf(x, 0.0013333556707948446f, 0.00963016226887703f);
  c = fmaf(c, x, 0.05550416558980942f);
  c = fmaf(c, x, 0.24022631347179413f);
  c = fmaf(c, x, 0.6931471824645996f);
  return fabsf(x) < 0.25f ? c * x : power - 1;
}

// a / b within a unit in the last place: a division is a subroutine of a hundred instructions.
OPSD_DEVICE float quotient(float a, float b) {
  const float inverse = reciprocal_approx(b), near = a * inverse, rest = fmaf(-near, b, a);
  return rest == rest ? fmaf(rest, inverse, near) : near;  // a may be infinite
}
// To 1e-14.
OPSD_DEVICE double quotient(double a, double b) {
  const double inverse = reciprocal_approx(static_cast<float>(b)), near = a * inverse, nearer = fma(fma(-near, b, a), inverse, near);
  return fma(fma(-nearer, b, a), inverse, nearer);
}

}  // namespace opsd::cuda

namespace opsd {

OPSD_DEVICE float reciprocal(float x) { return cuda::reciprocal_approx(x); }

// For -1 < x <= 0. The unit's logarithm is good to an absolute 2^-22: a polynomial (minimax, 1.4e-8) near 0.
OPSD_DEVICE float log1p(float x) {
  float c = fmaf(x, 0.262869268655777f, -0.24270178377628326f);
  c = fmaf(c, x, 0.33366885781288147f);
  c = fmaf(c, x, -0.4999946653842926f);
  c = fmaf(c, x, 1.0f);
  return x > -0.125f ? c * x : cuda::LN_2F * cuda::log2_approx(1 + x);
}

}  // namespace opsd

#include "../divergence.h"  // after the functions that it takes of a float
