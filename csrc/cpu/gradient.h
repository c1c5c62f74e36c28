// The sweeps after the statistics, over the scratch rows: value and u of divergences of normalised
// probabilities, and the gradient.
#pragma once

#include "statistics.h"

namespace opsd::OPSD_CAPABILITY {

// delta of a stored row: from the difference buffer itself, or from a general source's offsets in the
// scratch.
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
  double clipped = 0;  // share of the terms under the entry clip; 1 where the token clip holds
};

// f and u over a row; u replaces the teacher in the scratch.
template <Kind KIND, bool FAR, bool CLIP, class X, class T>
OPSD_SWEEP Value entry_sums(const GapRow<X, T> gap, int64_t V, const RowState row, const TermOptions<double> options, const Scratch<X> w) {
  const X scale_q(row.inverse_z), scale_p(row.inverse_zt), beta(options.beta);
  const TermOptions<X> bounds{beta, X(options.clip)};
  const RatioRow<X> ratios(w.p, row.gap);
  Total<X> loss, A, taken;
  auto step = [&](int64_t v, auto lanes) __attribute__((always_inline)) {
    const X q = load(w.e + v) * scale_q, delta = lanes(gap.delta(v, lanes.count), 0);
    Terms<X> terms;
    if constexpr (FAR) {
      terms = entry<KIND, true>(q, load(w.p + v) * scale_p, ratio(delta), beta);
    } else {
      const X excess = lanes(ratios.at(v), 0);
      terms = entry<KIND, false>(q, fma(q, excess, q), ratio(delta, excess), beta);
    }
    if constexpr (CLIP) {
      const ClippedTerms<X> clipped = clip_terms<KIND>(terms, q, bounds);
      terms = {clipped.f, clipped.u};
      taken.block = taken.block + lanes(clipped.taken, 0);
    }
    store(w.p + v, terms.u);
    loss.block = loss.block + terms.f;
    A.block = A.block + terms.u;
  };
  auto flush = [&]() __attribute__((always_inline)) {
    loss.flush(), A.flush();
    if constexpr (CLIP) taken.flush();
  };
  walk<X>(V, step, flush);
  return {loss.sum, A.sum, taken.sum / static_cast<double>(V)};
}

// Writes one vector of the gradient through the softcap's slope.
template <class X, class Out>
OPSD_INLINE void put(Out* G, const Scratch<X>& w, bool bent, int64_t v, int64_t count, X g) {
  if (bent) g = g * load(w.slope + v);
  store_as(G + v, g, count);
}

// A row's factor and A, and the further term weight * (q - onehot(label)); weight 0 and label -1: no such
// term.
struct Pull {
  double factor, A, weight;
  int64_t label;
  double share() const { return weight - factor * A; }  // of q
};

// Writes value(v, lanes) for each vector of a row. value lacks the onehot: the label's entry is written
// again, minus the weight, with one rounding.
template <class X, class Out, class Read>
OPSD_INLINE void write_row(Out* G, int64_t V, const Pull& pull, bool bent, const Scratch<X>& w, Read value) {
  auto step = [&](int64_t v, auto lanes) __attribute__((always_inline)) { put(G, w, bent, v, lanes.count, value(v, lanes)); };
  walk<X>(V, step, [] {});
  if (pull.label >= 0) put(G, w, bent, pull.label, 1, value(pull.label, FirstLanes<X>{1}) - X(pull.weight));
}

// factor * (u - q * A) from the scratch rows e and u.
template <class X, class Out>
OPSD_SWEEP void combine(Out* G, int64_t V, double inverse_z, const Pull pull, bool bent, const Scratch<X> w) {
  const X share(pull.share() * inverse_z), scale(pull.factor);
  auto value = [&](int64_t v, auto) __attribute__((always_inline)) { return fma(load(w.p + v), scale, load(w.e + v) * share); };
  write_row<X>(G, V, pull, bent, w, value);
}

// A row of factor 0: u may be infinite, and is not read.
template <class X, class Out>
OPSD_SWEEP void policy_gradient(Out* G, int64_t V, double inverse_z, const Pull pull, bool bent, const Scratch<X> w) {
  const X share(pull.weight * inverse_z);
  auto value = [&](int64_t v, auto) __attribute__((always_inline)) { return load(w.e + v) * share; };
  write_row<X>(G, V, pull, bent, w, value);
}

// The gradient of a KL, or of the sum of both, and a policy term. FAR and reverse KL differ only in the guard,
// which near rows tolerate.
template <Kind KIND, bool FAR, class X, class T, class Out>
OPSD_SWEEP void kl_policy_gradient(const GapRow<X, T> gap, Out* G, int64_t V, const RowState row, const Pull pull, double mixture, bool bent, const Scratch<X> w) {
  const X scale_q(row.inverse_z), scale_p(row.inverse_zt), factor(pull.factor), weight(pull.weight), share(pull.share()), beta(mixture);
  const RatioRow<X> ratios(w.p, row.gap);
  auto value = [&](int64_t v, auto lanes) __attribute__((always_inline)) {
    const X q = load(w.e + v) * scale_q;
    const X delta = KIND == Kind::FORWARD_KL ? q : lanes(gap.delta(v, lanes.count), 0);
    if constexpr (KIND == Kind::REVERSE_KL) return fma(reverse_kl<FAR>(q, delta).u, factor, q * share);
    else if constexpr (KIND == Kind::MIXED_KL && FAR) return fma(mixed_kl<FAR>(q, load(w.p + v) * scale_p, delta, beta).u, factor, q * share);
    else if constexpr (KIND == Kind::MIXED_KL) return q * fma(mixed_kl_ratio(delta, ratios.at(v), beta), factor, share);
    else if constexpr (FAR) return fma(load(w.p + v) * scale_p, -factor, q * share);
    else return q * fma(ratios.at(v), -factor, weight);
  };
  write_row<X>(G, V, pull, bent, w, value);
}

// The gradient of a KL, or of the sum of both, alone. Near rows fold the row's factor into q.
template <Kind KIND, bool FAR, class X, class T, class Out>
OPSD_SWEEP void kl_gradient(const GapRow<X, T> gap, Out* G, int64_t V, const RowState row, const Pull pull, double mixture, bool bent, const Scratch<X> w) {
  const X scale_q(FAR ? row.inverse_z : row.inverse_z * pull.factor), scale_p(row.inverse_zt), after(pull.factor), dot(pull.A), beta(mixture);
  const RatioRow<X> ratios(w.p, row.gap);
  auto step = [&](int64_t v, auto lanes) __attribute__((always_inline)) {
    const X q = load(w.e + v) * scale_q;
    X g;
    if constexpr (KIND == Kind::FORWARD_KL) {
      if constexpr (FAR) g = (q - load(w.p + v) * scale_p) * after;
      else g = forward_kl_grad(q, ratios.at(v));
    } else {
      const X delta = lanes(gap.delta(v, lanes.count), 0);
      if constexpr (KIND == Kind::REVERSE_KL) g = reverse_kl<FAR>(q, delta).u - q * dot;
      else if constexpr (FAR) g = mixed_kl<FAR>(q, load(w.p + v) * scale_p, delta, beta).u - q * dot;
      else g = q * (mixed_kl_ratio(delta, ratios.at(v), beta) - dot);
      if constexpr (FAR) g = g * after;
    }
    put(G, w, bent, v, lanes.count, g);
  };
  walk<X>(V, step, [] {});
}

}  // namespace opsd::OPSD_CAPABILITY
