// The statistics of one row: its peak, then the shifted sums, near (relative to the student's peak alone) or
// far (each side relative to its own maximum).
#pragma once

#include <cmath>

#include "source.h"

namespace opsd::OPSD_CAPABILITY {

constexpr double INF = __builtin_inf();

// Scratch rows of V numbers, in the cache while one row is processed. Null where a sweep does not need them.
template <class X>
struct Scratch {
  using E = ElementOf<X>;
  E* e = nullptr;      // exp(x)
  E* p = nullptr;      // of the teacher: expm1(o) in a near row, exp(y) in a far one; then u
  E* o = nullptr;      // the offset, of a general source
  E* slope = nullptr;  // of a softcap
};

// The statistics of a row, in double: two dozen scalars cost nothing.
struct RowState {
  double max_s = 0, logsum_s = 0, max_t = 0, logsum_t = 0, gap = 0, spread = 0, reverse_kl = 0, forward_kl = 0;
  double entropy_s = 0, entropy_t = 0, prob_s = 0, prob_t = 0, argmax_s = 0, argmax_t = 0;
  double inverse_z = 0, inverse_zt = 0;  // of the scratch rows e and p
  bool far = false;
};

// The sweeps take everything by value: a reference that a store might alias is loaded again for every vector.

// sums beside the student's normaliser, the gap and the reverse KL
enum class Mode { REVERSE, FORWARD, METRICS };

struct Peak {
  double value;
  int64_t index;  // the first; 0 if there is none (NaN)
};

template <class X, class Source, class Read>
OPSD_SWEEP Peak maximum(const Source source, int64_t V, Read read) {
  constexpr int64_t N = LANES<X>, STEP = 256 * N;
  Peak peak{-INF, 0};
  for (int64_t start = 0; start < V; start += STEP) {
    const int64_t end = start + STEP < V ? start + STEP : V;
    // Four chains: one maximum every four cycles would be slower than the loads. max() skips NaN.
    X top[4] = {X(-INF), X(-INF), X(-INF), X(-INF)};
    int64_t v = start;
    for (; v + 4 * N <= end; v += 4 * N)
      for (int i = 0; i < 4; ++i) top[i] = max(read(source, source.at(v + i * N, N)), top[i]);
    for (; v < end; v += N) {
      const int64_t count = end - v < N ? end - v : N;
      const X value = read(source, source.at(v, count));
      top[0] = max(count == N ? value : FirstLanes<X>{count}(value, -INF), top[0]);
    }
    const double value = reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
    if (value > peak.value) peak = {value, start};
  }
  for (int64_t v = peak.index; v < V && v < peak.index + STEP; v += N) {
    const int64_t count = V - v < N ? V - v : N;
    const int lane = lowest_lane(read(source, source.at(v, count)) == X(peak.value));
    if (lane >= 0 && lane < count) return {peak.value, v + lane};
  }
  return peak;
}

template <class X>
struct Total {
  X block{};
  double sum = 0;
  OPSD_INLINE void flush() {
    sum += reduce_add(block);
    block = X(0.0);
  }
};

// Fills the scratch rows of an entry, for the sweeps that follow over the same row.
template <class X, class Source>
OPSD_INLINE void keep(const Scratch<X>& w, const Source& source, const typename Source::Entry& entry, int64_t v, X e, X o) {
  if (w.e) {
    store(w.e + v, e);
    if constexpr (!Source::LINEAR) {
      store(w.o + v, o);
      if (source.bent()) store(w.slope + v, source.slope(entry));
    }
  }
}

// Sums over e = exp(x) and p = exp(y).
struct Sums {
  double z, zt, eo, ew, po, spread;
  // Of METRICS. The largest e and p are not quite 1, since a maximum is rounded.
  double ex = 0, py = 0, p = 1, top_e = 1, top_p = 1;
};

// The sums of METRICS, each side relative to its own maximum in near rows too: an entropy has the rounding
// error of 20 * exp(20) otherwise.
template <class X>
struct MetricSums {
  Total<X> ex, py, p;
  X top_e{0.0}, top_p{0.0};
  OPSD_INLINE void add(X x, X y, X e) {
    const X term = exp(y);
    ex.block = fma(e, max(x, X(2 * EXP_FLOOR)), ex.block);  // 0 * -inf is no entropy
    py.block = fma(term, max(y, X(2 * EXP_FLOOR)), py.block);
    p.block = p.block + term;
    top_e = max(e, top_e), top_p = max(term, top_p);
  }
  OPSD_INLINE void flush() { ex.flush(), py.flush(), p.flush(); }
  OPSD_INLINE void report(Sums& sums) const {
    sums.ex = ex.sum, sums.py = py.sum, sums.p = p.sum;
    sums.top_e = reduce_max(top_e), sums.top_p = reduce_max(top_p);
  }
};

// The teacher's terms are p = e * exp(o). sum e * expm1(o) keeps the gap's digits however near the teacher
// is; sum p, which the forward KL needs anyway, keeps them where the teacher has little mass on the student's
// likely entries.
template <Mode MODE, class X, class Source>
OPSD_SWEEP Sums near_sums(const Source source, int64_t V, const References<X> references, const References<X> maxima, const Scratch<X> w) {
  Total<X> z, zt, eo, ew, po;
  MetricSums<X> metrics;
  X spread(0.0);
  auto step = [&](int64_t v, auto lanes) __attribute__((always_inline)) {
    source.next.fetch(v);
    const auto entry = source.at(v, lanes.count);
    const Relative<X> r = source.relative(entry, references);
    const X x = lanes(r.x, -INF), o = lanes(r.o, 0), e = exp(x);
    const ExpPair<X> ratio = bounded_exp_pair(o);
    keep(w, source, entry, v, e, o);
    if (w.p) store(w.p + v, ratio.expm1);
    z.block = z.block + e;
    eo.block = fma(e, o, eo.block);
    ew.block = fma(e, ratio.expm1, ew.block);
    spread = max_abs(spread, o);
    if constexpr (MODE != Mode::REVERSE) {
      const X p = e * ratio.exp;
      zt.block = zt.block + p;
      po.block = fma(p, o, po.block);
      if constexpr (MODE == Mode::METRICS) metrics.add(x, lanes(source.relative(entry, maxima).y, -INF), e);
    }
  };
  auto flush = [&]() __attribute__((always_inline)) {
    z.flush(), eo.flush(), ew.flush();
    if constexpr (MODE != Mode::REVERSE) zt.flush(), po.flush();
    if constexpr (MODE == Mode::METRICS) metrics.flush();
  };
  walk<X>(V, step, flush);
  Sums sums{z.sum, MODE == Mode::REVERSE ? z.sum + ew.sum : zt.sum, eo.sum, ew.sum, po.sum, reduce_max(spread)};
  if (!std::isfinite(sums.eo)) sums.spread = INF;  // a NaN among the offsets, which max() skips
  if constexpr (MODE == Mode::METRICS) metrics.report(sums);
  return sums;
}

template <Mode MODE, class X, class Source>
OPSD_SWEEP Sums far_sums(const Source source, int64_t V, const References<X> references, const Scratch<X> w) {
  Total<X> z, zt, eo, po;
  MetricSums<X> metrics;
  auto step = [&](int64_t v, auto lanes) __attribute__((always_inline)) {
    const auto entry = source.at(v, lanes.count);
    const Relative<X> r = source.relative(entry, references);
    const X x = lanes(r.x, -INF), y = lanes(r.y, -INF), o = lanes(r.o, 0), e = exp(x), p = exp(y);
    keep(w, source, entry, v, e, o);
    if (w.p) store(w.p + v, p);
    z.block = z.block + e;
    zt.block = zt.block + p;
    eo.block = eo.block + guard<true>(e, e * o);
    if constexpr (MODE != Mode::REVERSE) po.block = po.block + guard<true>(p, p * o);
    if constexpr (MODE == Mode::METRICS) metrics.add(x, y, e);
  };
  auto flush = [&]() __attribute__((always_inline)) {
    z.flush(), zt.flush(), eo.flush();
    if constexpr (MODE != Mode::REVERSE) po.flush();
    if constexpr (MODE == Mode::METRICS) metrics.flush();
  };
  walk<X>(V, step, flush);
  Sums sums{z.sum, zt.sum, eo.sum, 0, po.sum, 0};
  if constexpr (MODE == Mode::METRICS) metrics.report(sums);
  return sums;
}

// The scratch rows alone, for a sweep that starts from given statistics.
template <class X, class Source>
OPSD_SWEEP void refill(const Source source, int64_t V, const References<X> references, bool far, const Scratch<X> w) {
  auto step = [&](int64_t v, auto lanes) __attribute__((always_inline)) {
    source.next.fetch(v);
    const auto entry = source.at(v, lanes.count);
    const Relative<X> r = source.relative(entry, references);
    keep(w, source, entry, v, exp(lanes(r.x, -INF)), lanes(r.o, 0));
    if (w.p) store(w.p + v, far ? exp(lanes(r.y, -INF)) : bounded_exp_pair(lanes(r.o, 0)).expm1);
  };
  walk<X>(V, step, [] {});
}

inline void finish(RowState& row, const Sums& sums) {
  row.inverse_z = 1 / sums.z;
  row.inverse_zt = 1 / sums.zt;
  row.logsum_s = ::log(sums.z);
  row.logsum_t = ::log(sums.zt);
  const double tilt = sums.ew / sums.z;  // exp(gap) - 1 of a near row
  row.gap = row.far || tilt < -0.5 ? ::log(sums.zt / sums.z) : ::log1p(tilt);
  row.reverse_kl = row.gap - sums.eo / sums.z;
  row.forward_kl = sums.po / sums.zt - row.gap;
  row.entropy_s = row.logsum_s - sums.ex / sums.z;
  row.entropy_t = ::log(sums.p) - sums.py / sums.p;
  row.prob_s = sums.top_e / sums.z;
  row.prob_t = sums.top_p / sums.p;
}

// zt / z below which sum e * expm1(o) has lost too much beside sum e.
constexpr double LEAST_RATIO = 0.25;

template <Mode MODE, class X, class Source>
RowState row_statistics(const Source& source, int64_t V, double spread_limit, const Scratch<X>& w) {
  auto student = [](const Source& from, const auto& entry) __attribute__((always_inline)) { return from.student(entry); };
  auto teacher = [](const Source& from, const auto& entry) __attribute__((always_inline)) { return from.teacher(entry); };
  const Peak peak = maximum<X>(source, V, student);
  Peak top = peak;
  if constexpr (MODE == Mode::METRICS) top = maximum<X>(source, V, teacher);
  RowState row;
  row.max_s = peak.value;
  row.max_t = first_lane(source.teacher(source.at(peak.index, 1)));
  const References<X> at_peak = source.references(row.max_s, row.max_t), maxima = source.references(row.max_s, top.value);
  Sums sums = near_sums<MODE>(source, V, at_peak, maxima, w);
  row.spread = sums.spread;
  row.far = !(row.spread <= spread_limit);
  if (row.far) {
    if constexpr (MODE != Mode::METRICS) top = maximum<X>(source, V, teacher);
    row.max_t = top.value;
    sums = far_sums<MODE>(source, V, source.references(row.max_s, row.max_t), w);
  } else if (MODE == Mode::REVERSE && !(sums.zt / sums.z > LEAST_RATIO)) {
    sums = near_sums<Mode::FORWARD>(source, V, at_peak, maxima, w);
  }
  finish(row, sums);
  if constexpr (MODE == Mode::METRICS) row.argmax_s = static_cast<double>(peak.index), row.argmax_t = static_cast<double>(top.index);
  return row;
}

}  // namespace opsd::OPSD_CAPABILITY
