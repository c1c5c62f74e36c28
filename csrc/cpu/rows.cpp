// Drives the sweeps row by row. Compiled once per instruction set, with OPSD_CAPABILITY naming its namespace;
// see vec.h.
#include "rows.h"

#include <unistd.h>

#include <cstdlib>
#include <new>

#include "gradient.h"

namespace opsd::OPSD_CAPABILITY {
namespace {

// Subnormal operands and results cost a hundred cycles each on x86 and do not matter here (1e-38): flushed to
// 0.
class FlushSubnormals {
#if defined(__AVX2__)
  unsigned saved_ = _mm_getcsr();

 public:
  FlushSubnormals() { _mm_setcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }
#endif
};

int64_t cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
}

// One thread's scratch: four rows of whole vectors. Pages that no sweep touches are never mapped.
template <class X>
class Workspace {
  using E = ElementOf<X>;
  static constexpr int64_t ALIGNMENT = 64;
  E* memory_;

 public:
  Scratch<X> rows;
  explicit Workspace(int64_t V) {
    const int64_t row = (V * static_cast<int64_t>(sizeof(E)) / ALIGNMENT + 2) * ALIGNMENT;
    memory_ = static_cast<E*>(std::aligned_alloc(ALIGNMENT, 4 * row));
    if (!memory_) throw std::bad_alloc();
    const int64_t step = row / sizeof(E);
    rows = {memory_, memory_ + step, memory_ + 2 * step, memory_ + 3 * step};
  }
  Workspace(const Workspace&) = delete;
  ~Workspace() { std::free(memory_); }
};

template <class X, class In, template <class, class> class SourceOf>
class Rows {
  using E = ElementOf<X>;
  using Source = SourceOf<X, In>;
  const RowArgs& a_;
  const Scratch<X> w_;
  const bool clip_entries_ = a_.terms.clip < INF;
  const bool one_sweep_ = one_sweep(a_.kind) && !clip_entries_;
  // 1 where two pairs of rows and the scratch fit the cache, so that a row may prefetch the next; else 0. At
  // V = 152k a bf16 row gains 40 %, and a float32 row, which does not fit, would lose 20 %.
  const int64_t ahead_;

  static int64_t bytes_per_entry(const Scratch<X>& w, Sweep sweep) {
    const int64_t scratch_rows = sweep == Sweep::STATS ? 0 : 1 + (w.p != nullptr) + !Source::LINEAR;
    return 4 * sizeof(In) + scratch_rows * sizeof(E);
  }

  Source source_of(int64_t i) const { return Source(a_, i, i + ahead_); }

  E* stats(int64_t i) const { return static_cast<E*>(a_.stats) + i * COLUMNS; }

  RowState measure(const Source& source, const Scratch<X>& w) const {
    if (a_.metrics) return row_statistics<Mode::METRICS, X>(source, a_.V, a_.spread_limit, w);
    if (has_forward(a_.kind)) return row_statistics<Mode::FORWARD, X>(source, a_.V, a_.spread_limit, w);
    return row_statistics<Mode::REVERSE, X>(source, a_.V, a_.spread_limit, w);
  }

  void write_stats(int64_t i, const RowState& row) const {
    const bool m = a_.metrics;
    const double values[COLUMNS] = {row.max_s,
                                    row.logsum_s,
                                    row.max_t,
                                    row.logsum_t,
                                    row.gap,
                                    row.spread,
                                    m || a_.kind != Kind::FORWARD_KL ? row.reverse_kl : 0,
                                    m || has_forward(a_.kind) ? row.forward_kl : 0,
                                    m ? row.entropy_s : 0,
                                    m ? row.entropy_t : 0,
                                    m ? row.prob_s : 0,
                                    m ? row.prob_t : 0,
                                    row.argmax_s,
                                    row.argmax_t,
                                    0};
    for (int c = 0; c < COLUMNS; ++c) stats(i)[c] = static_cast<E>(values[c]);
  }

  // A row's state from its statistics, with the scratch filled.
  RowState resume(const Source& source, int64_t i) const {
    const E* from = stats(i);
    RowState row;
    row.max_s = from[STUDENT_MAX], row.logsum_s = from[STUDENT_LOGSUM], row.max_t = from[TEACHER_MAX], row.logsum_t = from[TEACHER_LOGSUM];
    row.gap = from[GAP], row.spread = from[SPREAD], row.reverse_kl = from[Column::REVERSE_KL], row.forward_kl = from[Column::FORWARD_KL];
    row.inverse_z = ::exp(-row.logsum_s), row.inverse_zt = ::exp(-row.logsum_t);
    row.far = !(row.spread <= a_.spread_limit);
    refill<X>(source, a_.V, source.references(row.max_s, row.max_t), row.far, w_);
    return row;
  }

  template <Kind KIND, bool CLIP>
  Value value(const Source& source, const RowState& row) const {
    return with_gap(source, row, [&](auto gap) {
      if (row.far) return entry_sums<KIND, true, CLIP>(gap, a_.V, row, a_.terms, w_);
      return entry_sums<KIND, false, CLIP>(gap, a_.V, row, a_.terms, w_);
    });
  }

  template <bool CLIP>
  Value two_sweep_value(const Source& source, const RowState& row) const {
    switch (a_.kind) {
      case Kind::REVERSE_KL:
        if constexpr (CLIP) return value<Kind::REVERSE_KL, true>(source, row);
        break;
      case Kind::FORWARD_KL:
        if constexpr (CLIP) return value<Kind::FORWARD_KL, true>(source, row);
        break;
      case Kind::JSD: return value<Kind::JSD, CLIP>(source, row);
      case Kind::SKEW_REVERSE_KL: return value<Kind::SKEW_REVERSE_KL, CLIP>(source, row);
      case Kind::SKEW_FORWARD_KL: return value<Kind::SKEW_FORWARD_KL, CLIP>(source, row);
      case Kind::TVD: return value<Kind::TVD, CLIP>(source, row);
      case Kind::MIXED_KL:
        if constexpr (CLIP) return value<Kind::MIXED_KL, true>(source, row);
        break;
    }
    return {0, 0};
  }

  // loss and A before the token clip; where they are not in the statistics, u is in the scratch too.
  Value dot(const Source& source, const RowState& row) const {
    // A side has no distribution, which the guards would turn into 0.
    if (std::isnan(row.gap)) return {row.gap, row.gap};
    if (!one_sweep_) return clip_entries_ ? two_sweep_value<true>(source, row) : two_sweep_value<false>(source, row);
    if (a_.kind == Kind::FORWARD_KL) return {row.forward_kl, -1.0};
    if (a_.kind == Kind::REVERSE_KL) return {row.reverse_kl, row.reverse_kl};
    const double A = (1 - a_.terms.beta) * row.reverse_kl;
    return {a_.terms.beta * row.forward_kl + A, A};
  }

  // Writes loss, A and the clipped share, and returns the share. As contract.clip_tokens, the token clip
  // compares the rounded loss.
  double write_value(int64_t i, const Value& v) const {
    E loss = static_cast<E>(v.loss), clipped = static_cast<E>(v.clipped);
    if (loss > static_cast<E>(a_.token_clip)) loss = static_cast<E>(a_.token_clip), clipped = 1;
    static_cast<E*>(a_.loss)[i] = loss, static_cast<E*>(a_.A)[i] = static_cast<E>(v.A);
    if (clip_entries_ || a_.token_clip < INF) stats(i)[CLIPPED] = clipped;
    return clipped;
  }

  template <class Use>
  auto with_gap(const Source& source, const RowState& row, Use use) const {
    if constexpr (Source::LINEAR) return use(GapRow<X, In>{source.D, source.gap_factor, source.references(row.max_s, row.max_t).shift, X(row.gap)});
    else return use(GapRow<X, E>{w_.o, X(1.0), X(0.0), X(row.gap)});
  }

  template <class Out>
  void gradient(const Source& source, Out* G, const RowState& row, const Pull& pull) const {
    const bool bent = source.bent();
    if (pull.factor == 0) return policy_gradient(G, a_.V, row.inverse_z, pull, bent, w_);
    if (!one_sweep_) return combine(G, a_.V, row.inverse_z, pull, bent, w_);
    with_gap(source, row, [&](auto gap) {
      if (a_.kind == Kind::REVERSE_KL) kl_row<Kind::REVERSE_KL>(gap, G, row, pull, bent);
      else if (a_.kind == Kind::FORWARD_KL) kl_row<Kind::FORWARD_KL>(gap, G, row, pull, bent);
      else kl_row<Kind::MIXED_KL>(gap, G, row, pull, bent);
    });
  }

  template <Kind KIND, class Gap, class Out>
  void kl_row(const Gap& gap, Out* G, const RowState& row, const Pull& pull, bool bent) const {
    const double beta = a_.terms.beta;
    if (pull.weight != 0) {
      if (KIND == Kind::REVERSE_KL || row.far) kl_policy_gradient<KIND, true>(gap, G, a_.V, row, pull, beta, bent, w_);
      else if constexpr (KIND != Kind::REVERSE_KL) kl_policy_gradient<KIND, false>(gap, G, a_.V, row, pull, beta, bent, w_);
    } else if (row.far) {
      kl_gradient<KIND, true>(gap, G, a_.V, row, pull, beta, bent, w_);
    } else {
      kl_gradient<KIND, false>(gap, G, a_.V, row, pull, beta, bent, w_);
    }
  }

  // Row i's factor and policy slope through the transform's constants, without A.
  Pull pull_of(int64_t i) const {
    const double temperature = of_row<X>(a_.student, i).temperature;
    const double weight = a_.policy ? static_cast<const E*>(a_.policy)[i] * a_.student.scale / temperature : 0;
    const int64_t label = weight != 0 && a_.labels[i] >= 0 && a_.labels[i] < a_.V ? a_.labels[i] : -1;
    return {static_cast<const E*>(a_.factor)[i] * a_.student.scale / temperature, 0, weight, label};
  }

  template <class Out>
  void grad_row(Sweep sweep, int64_t i) const {
    const Source source = source_of(i);
    Out* G = static_cast<Out*>(a_.G) + i * a_.stride_g;
    Pull pull = pull_of(i);
    RowState row;
    if (sweep == Sweep::FUSED) {
      row = measure(source, w_);
      write_stats(i, row);
      const Value v = dot(source, row);
      if (write_value(i, v) == 1) pull.factor = 0;
      pull.A = v.A;
    } else {
      if (stats(i)[CLIPPED] == 1) pull.factor = 0;
      pull.A = static_cast<const E*>(a_.A)[i];
    }
    if (pull.factor == 0 && pull.weight == 0) {
      std::memset(G, 0, a_.V * sizeof(Out));
      return;
    }
    if (sweep == Sweep::GRAD) {
      row = resume(source, i);
      if (!one_sweep_ && pull.factor != 0) dot(source, row);
    }
    gradient(source, G, row, pull);
  }

 public:
  Rows(const RowArgs& a, const Scratch<X>& w, Sweep sweep) : a_(a), w_(w), ahead_(a.V * bytes_per_entry(w, sweep) <= cache_bytes()) {}

  void stats_row(int64_t i) const { write_stats(i, measure(source_of(i), Scratch<X>{})); }

  void dot_row(int64_t i) const {
    const Source source = source_of(i);
    write_value(i, dot(source, resume(source, i)));
  }

  void run(Sweep sweep, int64_t i) const {
    if (sweep == Sweep::STATS) return stats_row(i);
    if (sweep == Sweep::DOT) return dot_row(i);
    if constexpr (LANES<X> == 1) return grad_row<double>(sweep, i);
    else {
      if (a_.out == Dtype::FLOAT32) return grad_row<float>(sweep, i);
      if (a_.out == Dtype::BFLOAT16) return grad_row<BFloat16>(sweep, i);
      return grad_row<Half>(sweep, i);
    }
  }
};

template <class X, class In>
void run_dtype(const RowArgs& a, Sweep sweep, int64_t begin, int64_t end) {
  const Workspace<X> space(a.V);
  Scratch<X> w = space.rows;
  // its gradient needs q and delta alone
  if (a.kind == Kind::REVERSE_KL && a.terms.clip == INF) w.p = nullptr;
  if (a.linear && !a.bias_s && !a.bias_t) {
    const Rows<X, In, LinearSource> rows(a, w, sweep);
    for (int64_t i = begin; i < end; ++i) rows.run(sweep, i);
  } else {
    const Rows<X, In, GeneralSource> rows(a, w, sweep);
    for (int64_t i = begin; i < end; ++i) rows.run(sweep, i);
  }
}

}  // namespace

void run_rows(const RowArgs& a, Sweep sweep, int64_t begin, int64_t end) {
  [[maybe_unused]] const FlushSubnormals flush;
  switch (a.dtype) {
#if defined(OPSD_BASELINE)
    case Dtype::FLOAT64: return run_dtype<double, double>(a, sweep, begin, end);
#else
    case Dtype::FLOAT64: return;  // dispatch.cpp sends doubles to the baseline build
#endif
    case Dtype::FLOAT32: return run_dtype<Vec, float>(a, sweep, begin, end);
    case Dtype::BFLOAT16: return run_dtype<Vec, BFloat16>(a, sweep, begin, end);
    case Dtype::FLOAT16: return run_dtype<Vec, Half>(a, sweep, begin, end);
  }
}

}  // namespace opsd::OPSD_CAPABILITY
