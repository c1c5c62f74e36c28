// The sweeps after the statistics: value and u of divergences of normalised probabilities, and the gradient.
#pragma once

#include "statistics.cuh"

namespace opsd::cuda {

struct Distribution {
  float q, p, delta, expm1;  // expm1(delta), of near rows
};

// Near rows take p = q * exp(delta), so that p - q keeps delta's digits.
template <bool FAR>
OPSD_DEVICE Distribution distribution(const Relative& r, const Statistics& row) {
  const float q = expf(r.x - row.logsum_s), delta = r.o - row.gap;
  if constexpr (FAR) return {q, expf(r.y - row.logsum_t), delta, 0};
  const ExpPair<float> ratio = exp_pair(delta);
  return {q, q * ratio.exp, delta, ratio.expm1};
}

template <Kind KIND, bool FAR>
OPSD_DEVICE ClippedTerms<float> terms(const Distribution& d, const TermOptions<float>& options) {
  Terms<float> term;
  if constexpr (FAR) term = entry<KIND, true>(d.q, d.p, ratio(d.delta), options.beta);
  else term = entry<KIND, false>(d.q, d.p, ratio(d.delta, d.expm1), options.beta);
  if (options.clip < INF) return clip_terms<KIND>(term, d.q, options.clip);
  return {term.f, term.u, 0};
}

struct ValueSums {
  float f = 0, u = 0, taken = 0;
  OPSD_DEVICE void absorb(const ValueSums& other) { f += other.f, u += other.u, taken += other.taken; }
};

// Loss and A before the token clip, and the share of the terms under the entry clip; the same in every
// thread.
struct Value {
  float loss, A, clipped;
};

template <Kind KIND, bool PLAIN, class In>
OPSD_DEVICE Value value(const Source<PLAIN>& source, const Slice<In>& slice, const Statistics& row, Exchange& x, const RowArgs& a) {
  const TermOptions<float> options{static_cast<float>(a.terms.beta), static_cast<float>(a.terms.clip)};
  const bool clips = options.clip < INF;
  // A side has no distribution, which the guards would turn into 0.
  if (row.gap != row.gap) return {row.gap, row.gap, 0};
  if (KIND == Kind::REVERSE_KL && !clips) return {row.reverse_kl, row.reverse_kl, 0};
  if (KIND == Kind::FORWARD_KL && !clips) return {row.forward_kl, -1, 0};
  ValueSums sums;
  walk<PLAIN>(slice, [&]<int N>(int v, const Pack<In, N>& S, const Pack<In, N>& T) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Relative r = source.relative(source.at(to_float(S.entry[i]), to_float(T.entry[i]), slice.offset + v + i), row.at);
      const auto term = row.far ? terms<KIND, true>(distribution<true>(r, row), options) : terms<KIND, false>(distribution<false>(r, row), options);
      sums.f += term.f, sums.u += term.u, sums.taken += term.taken;
    }
  });
  sums = merge(sums, x);
  return {sums.f, sums.u, sums.taken / static_cast<float>(a.V)};
}

// Writes a row's loss, A and clipped share from one thread, and returns the share in all.
OPSD_DEVICE float write_value(const RowArgs& a, int64_t n, const Value& v, bool writes) {
  const float limit = a.token_clip;
  const bool above = v.loss > limit;
  const float clipped = above ? 1 : v.clipped;
  if (writes) {
    static_cast<float*>(a.loss)[n] = above ? limit : v.loss;
    static_cast<float*>(a.A)[n] = v.A;
    if (a.terms.clip < INF || limit < INF) static_cast<float*>(a.stats)[n * COLUMNS + CLIPPED] = clipped;
  }
  return clipped;
}

// A row's factor and A, and the further term weight * (q - onehot(label)); weight 0 and label -1: no such
// term.
struct Pull {
  float factor, A, weight;
  int64_t label;

  OPSD_DEVICE Pull(const RowArgs& a, int64_t n, float dot, float clipped) : factor(0), A(dot), weight(0), label(-1) {
    const float outer = a.student.scale / of_row(a.student, n).temperature;
    if (clipped != 1) factor = static_cast<const float*>(a.factor)[n] * outer;
    if (a.policy) weight = static_cast<const float*>(a.policy)[n] * outer;
    if (weight != 0) label = a.labels[n];
  }
  OPSD_DEVICE bool zero() const { return factor == 0 && weight == 0; }
};

// factor * (u - q * A) + weight * q of one entry.
template <Kind KIND, bool FAR>
OPSD_DEVICE float logit_gradient(const Relative& r, const Statistics& row, const Pull& pull, const TermOptions<float>& options) {
  const Distribution d = distribution<FAR>(r, row);
  if (pull.factor == 0) return d.q * pull.weight;  // u may be infinite
  if (KIND == Kind::FORWARD_KL && options.clip == INF) {
    if constexpr (!FAR) return fmaf(forward_kl_grad(d.q, d.expm1), pull.factor, d.q * pull.weight);
    return fmaf(d.q - d.p, pull.factor, d.q * pull.weight);
  }
  return fmaf(terms<KIND, FAR>(d, options).u, pull.factor, d.q * fmaf(-pull.factor, pull.A, pull.weight));
}

// `loaded` runs between reading and writing the same vectors: see walk.
template <Kind KIND, bool PLAIN, class In, class Loaded>
OPSD_DEVICE void gradient(const Source<PLAIN>& source, const Slice<In>& slice, const Statistics& row, const Pull& pull, const Output& G, const RowArgs& a,
                          Loaded loaded) {
  const TermOptions<float> options{static_cast<float>(a.terms.beta), static_cast<float>(a.terms.clip)};
  const int label = pull.label < slice.offset || pull.label >= slice.offset + slice.length ? -1 : static_cast<int>(pull.label - slice.offset);
  walk<PLAIN>(slice, loaded, [&]<int N>(int v, const Pack<In, N>& S, const Pack<In, N>& T) {
    float values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const auto entry = source.at(to_float(S.entry[i]), to_float(T.entry[i]), slice.offset + v + i);
      const Relative r = source.relative(entry, row.at);
      float g = row.far ? logit_gradient<KIND, true>(r, row, pull, options) : logit_gradient<KIND, false>(r, row, pull, options);
      if (v + i == label) g -= pull.weight;
      values[i] = source.bent() ? g * source.slope(entry) : g;
    }
    G.store(v, values);
  });
}

template <bool PLAIN, class In>
OPSD_DEVICE void zero_gradient(const Slice<In>& slice, const Output& G) {
  walk<PLAIN>(slice, [&]<int N>(int v, const Pack<In, N>&, const Pack<In, N>&) {
    constexpr float zeros[N] = {};
    G.store(v, zeros);
  });
}

}  // namespace opsd::cuda
