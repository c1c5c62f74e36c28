// The sweeps after the statistics, over the scratch rows: value and u of the divergences that need normalised probabilities, and the gradient.
#pragma once

#include "statistics.h"

namespace opsd::OPSD_CAPABILITY {

// delta off a stored row: the difference buffer itself, or the offsets that a general source left in the scratch.
template <class X, class T>
struct GapRow {
  const T* D;
  X factor, shift, gap;
  OPSD_INLINE X delta(int64_t v, int64_t count) const { return exact_fma(load_as<X>(D + v, count), factor, -shift) - gap; }
};

// expm1(delta) of a near row from the scratch row expm1(o): (expm1(o) - expm1(gap)) / exp(gap).
template <class X>
struct RatioRow {
  const ElementOf<X>* w;
  X scale, shift;
  RatioRow(const ElementOf<X>* row, double gap) : w(row), scale(::exp(-gap)), shift(::expm1(-gap)) {}
  OPSD_INLINE X at(int64_t v) const { return fma(load(w + v), scale, shift); }
};

struct Value {
  double loss, A;
};

// f and u over a row; u replaces the teacher in the scratch.
template <Kind KIND, bool FAR, class X, class T>
OPSD_SWEEP Value entry_sums(const GapRow<X, T> gap, int64_t V, const RowState row, double beta_value, const Scratch<X> w) {
  const X scale_q(row.inverse_z), scale_p(row.inverse_zt), beta(beta_value);
  const RatioRow<X> ratios(w.p, row.gap);
  Total<X> loss, A;
  auto step = [&](int64_t v, auto lanes) __attribute__((always_inline)) {
    const X q = load(w.e + v) * scale_q, delta = lanes(gap.delta(v, lanes.count), 0);
    Terms<X> terms;
    if constexpr (FAR) {
      terms = entry<KIND, true>(q, load(w.p + v) * scale_p, ratio(delta), beta);
    } else {
      const X excess = lanes(ratios.at(v), 0);
      terms = entry<KIND, false>(q, fma(q, excess, q), ratio(delta, excess), beta);
    }
    store(w.p + v, terms.u);
    loss.block = loss.block + terms.f;
    A.block = A.block + terms.u;
  };
  auto flush = [&]() __attribute__((always_inline)) { loss.flush(), A.flush(); };
  walk<X>(V, step, flush);
  return {loss.sum, A.sum};
}

// Writes one vector of the gradient through the softcap's slope.
template <class X, class Out>
OPSD_INLINE void put(Out* G, const Scratch<X>& w, bool bent, int64_t v, int64_t count, X g) {
  if (bent) g = g * load(w.slope + v);
  store_as(G + v, g, count);
}

// factor * (u - q * A) from the scratch rows e and u.
template <class X, class Out>
OPSD_SWEEP void combine(Out* G, int64_t V, double inverse_z, double A, double factor, bool bent, const Scratch<X> w) {
  const X share(-factor * A * inverse_z), scale(factor);
  auto step = [&](int64_t v, auto lanes) __attribute__((always_inline)) {
    put(G, w, bent, v, lanes.count, fma(load(w.p + v), scale, load(w.e + v) * share));
  };
  walk<X>(V, step, [] {});
}

// The gradient of the two plain KLs. Near rows fold the row's factor into q.
template <Kind KIND, bool FAR, class X, class T, class Out>
OPSD_SWEEP void kl_gradient(const GapRow<X, T> gap, Out* G, int64_t V, const RowState row, double A, double factor, bool bent, const Scratch<X> w) {
  const X scale_q(FAR ? row.inverse_z : row.inverse_z * factor), scale_p(row.inverse_zt), after(factor), dot(A);
  const RatioRow<X> ratios(w.p, row.gap);
  auto step = [&](int64_t v, auto lanes) __attribute__((always_inline)) {
    const X q = load(w.e + v) * scale_q;
    X g;
    if constexpr (KIND == Kind::FORWARD_KL) {
      if constexpr (FAR) g = (q - load(w.p + v) * scale_p) * after;
      else g = forward_kl_grad(q, ratios.at(v));
    } else {
      g = reverse_kl<FAR>(q, lanes(gap.delta(v, lanes.count), 0)).u - q * dot;
      if constexpr (FAR) g = g * after;
    }
    put(G, w, bent, v, lanes.count, g);
  };
  walk<X>(V, step, [] {});
}

}  // namespace opsd::OPSD_CAPABILITY
