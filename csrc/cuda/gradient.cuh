// The sweeps after the statistics: value and u of divergences of normalised probabilities, and the gradient.
#pragma once

#include "statistics.cuh"

namespace opsd::cuda {

// What makes probabilities of a row's entries. A reference is rounded once, which moves all of a row's x and y
// by up to 2^-24 of the logits' offset: q and p come out divided by `scale`, and o lacks `shift`.
struct Normal {
  Reference at;
  float shift, scale;
  bool far;

  template <bool PLAIN>
  OPSD_DEVICE Normal(const Source<PLAIN>& source, const Statistics& row) : far(row.far) {
    const double student = double{row.max_s} + row.logsum_s, teacher = student + (double{row.max_t - row.max_s} + row.gap);
    at = source.reference(Levels{student, teacher}, row.far);
    const Levels zero = source.levels(at);
    const double off = LOG2_E * (zero.student - student);
    shift = static_cast<float>(LOG2_E * (zero.teacher - teacher) - off), scale = exp2f(static_cast<float>(off));
  }
};

struct Distribution {
  float q, p, delta, expm1;  // delta in base 2, expm1 of it in nats
};

// NEAR: of finite PLAIN rows of a near teacher. Their p = q * 2^delta has the rounding errors of the sum that
// normalises it.
template <bool NEAR, bool PLAIN>
OPSD_DEVICE Distribution distribution(const Source<PLAIN>& source, const Entry& entry, const Normal& row) {
  const Relative r = NEAR ? source.finite(entry, row.at) : source.relative(entry, row.at);
  const float q = exp2_approx(r.x), delta = r.o + row.shift, power = exp2_approx(delta);
  return {q, NEAR ? q * power : exp2_approx(r.y + row.shift), delta, exp2m1(delta, power)};
}

template <Kind KIND, bool NEAR>
OPSD_DEVICE Terms<float> terms(const Distribution& d, float beta) {
  const float below = -fabsf(d.delta), decay = exp2_approx(below);
  return entry<KIND, !NEAR>(d.q, d.p, Ratio<float>{LN_2F * d.delta, decay, exp2m1(below, decay)}, beta);
}

enum { F, U, TAKEN };  // sums of f, of u, and of the terms under the entry clip

// Loss and A before the token clip, and the share of the terms under the entry clip; the same in every
// thread.
struct Value {
  float loss, A, clipped;
};

// Of a divergence that the statistics hold.
OPSD_DEVICE Value value_of(Kind kind, const Statistics& row, float beta) {
  if (kind == Kind::REVERSE_KL) return {row.reverse_kl, row.reverse_kl, 0};
  if (kind == Kind::FORWARD_KL) return {row.forward_kl, -1, 0};
  const float A = (1 - beta) * row.reverse_kl;
  return {fmaf(beta, row.forward_kl, A), A, 0};
}

// NEAR: of PLAIN rows of a near teacher, without an entry clip.
template <bool NEAR, bool HELD, Kind KIND, bool PLAIN, class In>
OPSD_DEVICE Sums value_sweep(const Source<PLAIN>& source, const Slice<In>& slice, const Normal& row, const TermOptions<float>& options) {
  Sums sums;
  tiles(slice, [&](const Slice<In>& part) {
    walk<NEAR ? LANES<In> : FAR_WIDTH<HELD>, NEAR ? DEPTH<PLAIN, In, HELD> : 1>(part, Apart(), [&]<int N>(int v, const Pack<In, N>& S, const Pack<In, N>& T) {
      const auto entries = entries_of(source, S, T, part.offset + v);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const Distribution d = distribution<NEAR>(source, entries.of[i], row);
        const auto term = clip_terms<KIND>(terms<KIND, NEAR>(d, options.beta), d.q, TermOptions<float>{options.beta, NEAR ? INF : options.clip});
        sums.of[F] += term.f, sums.of[U] += term.u;
        if constexpr (!NEAR) sums.of[TAKEN] += term.taken;
      }
    });
  });
  return sums;
}

OPSD_DEVICE TermOptions<float> options_of(const RowArgs& a, const Normal& row) {
  return {static_cast<float>(a.terms.beta), quotient(static_cast<float>(a.terms.clip), row.scale)};
}

template <bool HELD, Kind KIND, bool PLAIN, class In>
OPSD_DEVICE Value value(const Source<PLAIN>& source, const Slice<In>& slice, const Statistics& row, const Normal& normal, Exchange& x, const RowArgs& a) {
  constexpr bool KL = one_sweep(KIND);
  const TermOptions<float> options = options_of(a, normal);
  const bool clips = options.clip < INF;
  // A side has no distribution, which the guards would turn into 0.
  if (row.gap != row.gap) return {row.gap, row.gap, 0};
  if (KL && !clips) return value_of(KIND, row, options.beta);
  Sums sums;
  const bool far = !PLAIN || KL || normal.far || clips;
  if (far) sums = value_sweep<false, HELD, KIND>(source, slice, normal, options);
  else if constexpr (PLAIN && !KL) sums = value_sweep<true, HELD, KIND>(source, slice, normal, options);
  sums = merge(sums, x);
  return {sums.of[F] * normal.scale, sums.of[U] * normal.scale, quotient(sums.of[TAKEN], static_cast<float>(a.V))};
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
    const float outer = quotient(a.student.scale, of_row(a.student, n).temperature);
    if (clipped != 1) factor = static_cast<const float*>(a.factor)[n] * outer;
    if (a.policy) weight = static_cast<const float*>(a.policy)[n] * outer;
    if (weight != 0) label = a.labels[n];
  }
  OPSD_DEVICE bool zero() const { return factor == 0 && weight == 0; }
};

// The gradient over q: `level`, and for the KLs multiples of o and 2^o - 1. They take up the shift that o lacks.
struct Line {
  float level, of_o, of_expm1;
  template <Kind KIND>
  static OPSD_DEVICE Line of(const Normal& row, const Pull& pull, float beta) {
    const float power = exp2_approx(row.shift), by_o = -LN_2F * pull.factor, level = fmaf(-pull.factor, pull.A, pull.weight);
    if constexpr (KIND == Kind::REVERSE_KL) return {fmaf(by_o, row.shift, level), by_o, 0};
    if constexpr (KIND == Kind::FORWARD_KL) return {fmaf(-pull.factor, exp2m1(row.shift, power), pull.weight), 0, -pull.factor * power};
    if constexpr (KIND == Kind::MIXED_KL) {
      const float forward = -beta * pull.factor, reverse = (1 - beta) * by_o;
      return {fmaf(reverse, row.shift, fmaf(forward, exp2m1(row.shift, power), level)), reverse, forward * power};
    }
    return {level, 0, 0};
  }
};

// factor * (u - q * A) + weight * q of one entry.
template <Kind KIND, bool PLAIN>
OPSD_DEVICE float near_gradient(const Source<PLAIN>& source, const Entry& entry, const Normal& row, const Pull& pull, const Line& line, float beta) {
  const Relative r = source.finite(entry, row.at);
  if constexpr (KIND == Kind::REVERSE_KL) return exp2_approx(r.x) * fmaf(r.o, line.of_o, line.level);
  if constexpr (KIND == Kind::FORWARD_KL) return exp2_approx(r.x) * fmaf(exp2m1(r.o, exp2_approx(r.o)), line.of_expm1, line.level);
  if constexpr (KIND == Kind::MIXED_KL)
    return exp2_approx(r.x) * fmaf(exp2m1(r.o, exp2_approx(r.o)), line.of_expm1, fmaf(r.o, line.of_o, line.level));
  // u with the rounding errors that it has in A: they cancel in a near row
  const Distribution d = distribution<true>(source, entry, row);
  return fmaf(terms<KIND, true>(d, beta).u, pull.factor, d.q * line.level);
}

template <Kind KIND, bool PLAIN>
OPSD_DEVICE float far_gradient(const Source<PLAIN>& source, const Entry& entry, const Normal& row, const Pull& pull,
                               const TermOptions<float>& options) {
  const Distribution d = distribution<false>(source, entry, row);
  if (pull.factor == 0) return d.q * pull.weight;  // u may be infinite
  if (has_forward(KIND) && options.clip == INF) {
    const float gap = fabsf(d.delta) < 1 ? forward_kl_grad(d.q, d.expm1) : d.q - d.p;
    if (KIND == Kind::FORWARD_KL) return fmaf(gap, pull.factor, d.q * pull.weight);
    const float u = fmaf(options.beta, gap, (1 - options.beta) * reverse_kl<true>(d.q, LN_2F * d.delta).u);
    return fmaf(u, pull.factor, d.q * fmaf(-pull.factor, pull.A, pull.weight));
  }
  const auto term = clip_terms<KIND>(terms<KIND, false>(d, options.beta), d.q, options);
  return fmaf(term.u, pull.factor, d.q * fmaf(-pull.factor, pull.A, pull.weight));
}

// NEAR: of PLAIN rows of a near teacher, with a factor and without an entry clip; Out is then the type of G. `loaded`
// runs between reading and writing the same vectors: see walk.
template <bool NEAR, bool HELD, class Out, Kind KIND, bool PLAIN, class In, class Loaded>
OPSD_DEVICE void gradient_sweep(const Source<PLAIN>& source, const Slice<In>& slice, const Normal& row, const Pull& pull, const Output& G,
                                const TermOptions<float>& options, Loaded loaded) {
  const Line line = Line::of<KIND>(row, pull, options.beta);
  walk<NEAR ? LANES<In> : FAR_WIDTH<HELD>, NEAR ? DEPTH<PLAIN, In, HELD> : 1>(slice, loaded, [&]<int N>(int v, const Pack<In, N>& S, const Pack<In, N>& T) {
    const auto entries = entries_of(source, S, T, slice.offset + v);
    Floats<N> values;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Entry& entry = entries.of[i];
      if constexpr (NEAR) values.of[i] = near_gradient<KIND>(source, entry, row, pull, line, options.beta);
      else values.of[i] = far_gradient<KIND>(source, entry, row, pull, options) * source.slope(entry);
    }
    if constexpr (NEAR) G.store<Out>(v, values);
    else G.store_any(v, values);
  });
}

// `loaded`: see walk.
template <bool HELD, Kind KIND, bool PLAIN, class In, class Loaded>
OPSD_DEVICE void gradient(const Source<PLAIN>& source, const Slice<In>& slice, const Normal& row, const Pull& unscaled, const Output& G, const RowArgs& a,
                          Loaded loaded) {
  Pull pull = unscaled;  // for q and p over `scale`
  pull.factor *= row.scale, pull.weight *= row.scale;
  const TermOptions<float> options = options_of(a, row);
  // The label's entry is computed before its logits are overwritten, and written last.
  const int64_t label = pull.label - slice.offset;
  const bool labelled = pull.label >= 0 && label >= 0 && label < slice.length;
  Floats<1> at_label{};
  if (labelled) {
    const auto entry = source.at(to_float(slice.S[label]), to_float(slice.T[label]), pull.label);
    at_label.of[0] = (far_gradient<KIND>(source, entry, row, pull, options) - unscaled.weight) * source.slope(entry);
    block_sync();
  }
  const bool same = G.dtype == a.dtype, narrow = sizeof(In) == 4 && G.itemsize() == 2;
  const bool far = !(PLAIN && !row.far && options.clip == INF && pull.factor != 0 && (same || narrow));
  if (far) gradient_sweep<false, HELD, In, KIND>(source, slice, row, pull, G, options, loaded);
  if constexpr (PLAIN) {
    if (!far && same) gradient_sweep<true, HELD, In, KIND>(source, slice, row, pull, G, options, loaded);
    if constexpr (sizeof(In) == 4)
      if (!far && narrow) gradient_sweep<true, HELD, Narrow, KIND>(source, slice, row, pull, G, options, loaded);
  }
  if (!labelled) return;
  block_sync();
  if (thread() == 0) G.store_any(static_cast<int>(label), at_label);
}

OPSD_DEVICE void zero_gradient(int64_t length, const Output& G) {
  const int64_t bytes = length * G.itemsize(), whole = G.aligned(0, 8) ? bytes / 16 * 16 : 0;
#pragma unroll 1
  for (int64_t i = 16 * thread(); i < whole; i += 16 * threads()) *reinterpret_cast<Words<4>*>(G.row + i) = {};
#pragma unroll 1
  for (int64_t i = whole + 2 * thread(); i < bytes; i += 2 * threads()) *reinterpret_cast<uint16_t*>(G.row + i) = 0;
}

}  // namespace opsd::cuda
