// (f, u) of one vocabulary entry for every divergence: the C++ home of the formulas, host and device,
// torch-free. opsd_kernels/_rows/torch_math.py defines them and says why they are written in delta = log p -
// log q.
//
// X is a number: double, a SIMD vector of floats with select, abs, max, reciprocal, exp_pair and log1p, or on a
// GPU float, whose functions are in cuda/math.cuh. All of f and u are homogeneous of degree one in (q, p) at
// fixed delta, so a caller may fold a row's factor into both. GUARDED: a term is 0 where its probability is 0,
// whatever delta is. Rows of finite delta need no guard.
#pragma once

#include <cmath>

#include "row_args.h"

#if defined(__CUDACC__)
#define OPSD_FORMULA __device__ __forceinline__
#else
#define OPSD_FORMULA inline __attribute__((always_inline))
#endif

namespace opsd {

template <class X>
struct Terms {
  X f, u;
};

// exp(x) and expm1(x), each to its own relative accuracy.
template <class X>
struct ExpPair {
  X exp, expm1;
};

OPSD_FORMULA float select(bool condition, float yes, float no) { return condition ? yes : no; }
OPSD_FORMULA double select(bool condition, double yes, double no) { return condition ? yes : no; }
OPSD_FORMULA float max(float a, float b) { return ::fmaxf(a, b); }
OPSD_FORMULA double max(double a, double b) { return a > b ? a : b; }
OPSD_FORMULA float abs(float x) { return x < 0 ? -x : x; }
OPSD_FORMULA double abs(double x) { return x < 0 ? -x : x; }
OPSD_FORMULA ExpPair<double> exp_pair(double x) { return {::exp(x), ::expm1(x)}; }
OPSD_FORMULA double reciprocal(double x) { return 1 / x; }
OPSD_FORMULA double log1p(double x) { return ::log1p(x); }

template <bool GUARDED, class X>
OPSD_FORMULA X guard(X probability, X term) {
  if constexpr (GUARDED) return select(probability > X(0), term, X(0));
  return term;
}

// delta with exp(-|delta|) and a = expm1(-|delta|).
template <class X>
struct Ratio {
  X delta, decay, a;
};

template <class X>
OPSD_FORMULA Ratio<X> ratio(X delta) {
  const ExpPair<X> pair = exp_pair(-abs(delta));
  return {delta, pair.exp, pair.expm1};
}

// The same from a known expm1(delta), a normal number: exp(-|delta|) is 1 + expm1(delta), or its reciprocal.
template <class X>
OPSD_FORMULA Ratio<X> ratio(X delta, X expm1_delta) {
  const auto below = delta <= X(0);
  const X whole = X(1) + expm1_delta, inverse = reciprocal(whole);
  return {delta, select(below, whole, inverse), select(below, expm1_delta, -expm1_delta * inverse)};
}

template <class X>
struct Mixture {
  X log_m_q, log_m_p, p_over_m;
};

template <class X>
OPSD_FORMULA Mixture<X> mixture(const Ratio<X>& r, X beta) {
  const auto below = r.delta <= X(0);
  const X part = select(below, beta, X(1) - beta) * r.a;  // m/q - 1 where below, m/p - 1 elsewhere
  const X log = log1p(part);
  const X inverse = reciprocal(X(1) + part);
  return {select(below, log, log + r.delta), select(below, log - r.delta, log), select(below, r.decay * inverse, inverse)};
}

template <bool GUARDED, class X>
OPSD_FORMULA Terms<X> reverse_kl(X q, X delta) {
  const X f = guard<GUARDED>(q, -(q * delta));
  return {f, f};
}

template <bool GUARDED, class X>
OPSD_FORMULA Terms<X> forward_kl(X p, X delta) {
  return {guard<GUARDED>(p, p * delta), -p};
}

// u - q * A of forward KL, A = -1, where delta is finite: q - p without the cancellation.
template <class X>
OPSD_FORMULA X forward_kl_grad(X q, X expm1_delta) {
  return -(q * expm1_delta);
}

template <bool GUARDED, class X>
OPSD_FORMULA Terms<X> jsd(X q, X p, const Ratio<X>& r, X beta) {
  const Mixture<X> m = mixture(r, beta);
  const X u = guard<GUARDED>(q, (beta - X(1)) * q * m.log_m_q);
  return {u - beta * guard<GUARDED>(p, p * m.log_m_p), u};
}

template <bool GUARDED, class X>
OPSD_FORMULA Terms<X> skew_reverse_kl(X q, const Ratio<X>& r, X beta) {
  const Mixture<X> m = mixture(r, beta);
  return {guard<GUARDED>(q, -(q * m.log_m_q)), guard<GUARDED>(q, q * (beta * m.p_over_m - m.log_m_q))};
}

template <bool GUARDED, class X>
OPSD_FORMULA Terms<X> skew_forward_kl(X q, X p, const Ratio<X>& r, X beta) {
  const Mixture<X> m = mixture(r, beta);
  return {guard<GUARDED>(p, -(p * m.log_m_p)), guard<GUARDED>(q, (beta - X(1)) * q * m.p_over_m)};
}

template <bool GUARDED, class X>
OPSD_FORMULA Terms<X> tvd(X q, X p, const Ratio<X>& r) {
  const X larger = max(p, q);
  const X half = X(0.5) * q;
  const X sign_term = select(r.delta > X(0), -half, select(r.delta < X(0), half, X(0)));
  return {guard<GUARDED>(larger, X(-0.5) * r.a * larger), guard<GUARDED>(q, sign_term)};
}

template <bool GUARDED, class X>
OPSD_FORMULA Terms<X> mixed_kl(X q, X p, X delta, X beta) {
  const X of_q = (X(1) - beta) * guard<GUARDED>(q, -(q * delta));
  return {beta * guard<GUARDED>(p, p * delta) + of_q, beta * (q - p) + of_q};
}

// u / q of mixed KL where delta is finite, q - p without the cancellation.
template <class X>
OPSD_FORMULA X mixed_kl_ratio(X delta, X expm1_delta, X beta) {
  return -(beta * expm1_delta) - (X(1) - beta) * delta;
}

template <Kind KIND, bool GUARDED, class X>
OPSD_FORMULA Terms<X> entry(X q, X p, const Ratio<X>& r, X beta) {
  if constexpr (KIND == Kind::REVERSE_KL) return reverse_kl<GUARDED>(q, r.delta);
  if constexpr (KIND == Kind::FORWARD_KL) return forward_kl<GUARDED>(p, r.delta);
  if constexpr (KIND == Kind::JSD) return jsd<GUARDED>(q, p, r, beta);
  if constexpr (KIND == Kind::SKEW_REVERSE_KL) return skew_reverse_kl<GUARDED>(q, r, beta);
  if constexpr (KIND == Kind::SKEW_FORWARD_KL) return skew_forward_kl<GUARDED>(q, p, r, beta);
  if constexpr (KIND == Kind::TVD) return tvd<GUARDED>(q, p, r);
  if constexpr (KIND == Kind::MIXED_KL) return mixed_kl<GUARDED>(q, p, r.delta, beta);
}

// u of a clipped term, whose derivative is 0: minus the multiple of q that u leaves out (Divergence.omitted), which
// cancels where nothing is clipped.
template <Kind KIND, class X>
OPSD_FORMULA X clipped_u(X q, X beta) {
  if constexpr (KIND == Kind::REVERSE_KL) return -q;
  if constexpr (KIND == Kind::MIXED_KL) return q * (X(2) * beta - X(1));
  return X(0);
}

// A term under the entry clip; taken: 1 where the clip holds, else 0.
template <class X>
struct ClippedTerms {
  X f, u, taken;
};

template <Kind KIND, class X>
OPSD_FORMULA ClippedTerms<X> clip_terms(const Terms<X>& terms, X q, const TermOptions<X>& options) {
  const auto above = terms.f > options.clip;
  return {select(above, options.clip, terms.f), select(above, clipped_u<KIND>(q, options.beta), terms.u), select(above, X(1), X(0))};
}

}  // namespace opsd
