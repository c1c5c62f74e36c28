// The statistics of one row: extrema, then the shifted sums, near (relative to the student alone) or far (each side to its own maximum).
#pragma once

#include <cmath>

#include "source.h"

namespace opsd::OPSD_CAPABILITY {

constexpr double INF = __builtin_inf();

// Rows of V numbers that live while one row is worked on, so in the cache. Null where a sweep has no use for them.
template <class X>
struct Scratch {
  using E = ElementOf<X>;
  E* e = nullptr;      // exp(s - max s)
  E* p = nullptr;      // exp(t - max t) of a far row; then u
  E* d = nullptr;      // the gap, of a general source
  E* slope = nullptr;  // of a softcap
};

// What the statistics leave behind, in double: the two dozen scalars of a row cost nothing.
struct RowState {
  double max_s = 0, logsum_s = 0, max_t = 0, logsum_t = 0, gap = 0, spread = 0, reverse_kl = 0, forward_kl = 0;
  double entropy_s = 0, entropy_t = 0, prob_s = 0, prob_t = 0, argmax_s = 0, argmax_t = 0;
  double inverse_z = 0, inverse_zt = 0;  // of the scratch rows e and p
  bool far = false;
};

enum class Mode { REVERSE, FORWARD, METRICS };  // what the sums must hold beside the normalisers and the reverse KL

struct Extrema {
  double student = -INF, teacher = -INF, spread = 0;
};

template <class X, class Source>
OPSD_SWEEP double student_maximum(const Source& source, int64_t V) {
  // Four chains: one maximum every four cycles would be slower than the loads.
  X top[4] = {X(-INF), X(-INF), X(-INF), X(-INF)};
  constexpr int64_t STEP = 4 * LANES<X>;
  const int64_t whole = V - V % STEP;
  for (int64_t v = 0; v < whole; v += STEP)
    for (int i = 0; i < 4; ++i) top[i] = max(source.student(source.at(v + i * LANES<X>, LANES<X>)), top[i]);
  for (int64_t v = whole; v < V; v += LANES<X>) {
    const int64_t count = V - v < LANES<X> ? V - v : LANES<X>;
    const X s = source.student(source.at(v, count));
    top[0] = max(count == LANES<X> ? s : FirstLanes<X>{count}(s, -INF), top[0]);
  }
  return reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
}

template <class X, class Source>
OPSD_SWEEP Extrema extrema(const Source& source, int64_t V) {
  X student(-INF), teacher(-INF), spread(0.0);
  auto step = [&](int64_t v, auto lanes) __attribute__((always_inline)) {
    const auto entry = source.at(v, lanes.count);
    const X gap = abs(source.gap(entry));
    student = max(lanes(source.student(entry), -INF), student);
    teacher = max(lanes(source.teacher(entry), -INF), teacher);
    spread = max(lanes(select(gap <= X(3e38), gap, X(INF)), 0), spread);
  };
  walk<X>(V, step, [] {});
  return {reduce_max(student), reduce_max(teacher), reduce_max(spread)};
}

// Where a maximum stands: the lowest index, 0 if the row holds none (NaN).
template <class X, class Source, class Read>
OPSD_SWEEP double first_index(const Source& source, int64_t V, double top, Read read) {
  for (int64_t v = 0; v < V; v += LANES<X>) {
    const int64_t count = V - v < LANES<X> ? V - v : LANES<X>;
    const int lane = lowest_lane(read(source.at(v, count)) == X(top));
    if (lane >= 0 && lane < count) return static_cast<double>(v + lane);
  }
  return 0;
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
OPSD_INLINE void keep(const Scratch<X>& w, const Source& source, const typename Source::Entry& entry, int64_t v, X e, X d) {
  if (w.e) {
    store(w.e + v, e);
    if constexpr (!Source::LINEAR) {
      store(w.d + v, d);
      if (source.bent()) store(w.slope + v, source.slope(entry));
    }
  }
}

struct Sums {
  double z, zt, ed, second, pd, ex, py, spread;
  double top_e, top_p, top_y;  // largest term of z and of zt, and largest y: not quite 1, 1 and 0, for a maximum is rounded
};

// Sums of q against functions of d. `second` is sum e * (expm1(d) - d), a sum of terms >= 0: near the teacher the KLs come from it
// without the cancellation of L - sum q d. `pd` is the forward KL's own second order, sum e * (d exp(d) - expm1(d)).
template <Mode MODE, class X, class Source>
OPSD_SWEEP Sums near_sums(const Source& source, int64_t V, const Extrema& top, const Scratch<X>& w) {
  Total<X> z, ed, second, pd, ex, py;
  X spread(0.0), top_e(0.0), top_p(0.0), top_y(-INF);
  auto step = [&](int64_t v, auto lanes) __attribute__((always_inline)) {
    const auto entry = source.at(v, lanes.count);
    const X x = lanes(source.student_above(entry, top.student), -INF), d = lanes(source.gap(entry), 0);
    const X e = exp(x), c = exp_second_order(d);
    keep(w, source, entry, v, e, d);
    z.block = z.block + e;
    ed.block = fma(e, d, ed.block);
    second.block = fma(e, c, second.block);
    spread = max(abs(d), spread);
    if constexpr (MODE != Mode::REVERSE) pd.block = fma(e, fma(d, c + d, -c), pd.block);
    if constexpr (MODE == Mode::METRICS) {
      const X p = fma(e, c + d, e), y = lanes(source.teacher_above(entry, top.teacher), -INF);
      ex.block = fma(e, max(x, X(2 * EXP_FLOOR)), ex.block);
      py.block = fma(p, max(y, X(2 * EXP_FLOOR)), py.block);
      top_e = max(e, top_e), top_p = max(p, top_p), top_y = max(y, top_y);
    }
  };
  auto flush = [&]() __attribute__((always_inline)) {
    z.flush(), ed.flush(), second.flush();
    if constexpr (MODE != Mode::REVERSE) pd.flush();
    if constexpr (MODE == Mode::METRICS) ex.flush(), py.flush();
  };
  walk<X>(V, step, flush);
  const double zt = z.sum + ed.sum + second.sum;
  const double tops[3] = {reduce_max(top_e), reduce_max(top_p), reduce_max(top_y)};
  return {z.sum, zt, ed.sum, second.sum, pd.sum, ex.sum, py.sum, reduce_max(spread), tops[0], tops[1], tops[2]};
}

template <Mode MODE, class X, class Source>
OPSD_SWEEP Sums far_sums(const Source& source, int64_t V, const Extrema& top, const Scratch<X>& w) {
  Total<X> z, zt, ed, pd, ex, py;
  X top_e(0.0), top_p(0.0), top_y(-INF);
  auto step = [&](int64_t v, auto lanes) __attribute__((always_inline)) {
    const auto entry = source.at(v, lanes.count);
    const X x = lanes(source.student_above(entry, top.student), -INF), y = lanes(source.teacher_above(entry, top.teacher), -INF);
    const X d = lanes(source.gap(entry), 0), e = exp(x), p = exp(y);
    keep(w, source, entry, v, e, d);
    if (w.e) store(w.p + v, p);
    z.block = z.block + e;
    zt.block = zt.block + p;
    ed.block = ed.block + guard<true>(e, e * d);
    if constexpr (MODE != Mode::REVERSE) pd.block = pd.block + guard<true>(p, p * d);
    if constexpr (MODE == Mode::METRICS) {
      ex.block = fma(e, max(x, X(2 * EXP_FLOOR)), ex.block);
      py.block = fma(p, max(y, X(2 * EXP_FLOOR)), py.block);
      top_e = max(e, top_e), top_p = max(p, top_p), top_y = max(y, top_y);
    }
  };
  auto flush = [&]() __attribute__((always_inline)) {
    z.flush(), zt.flush(), ed.flush();
    if constexpr (MODE != Mode::REVERSE) pd.flush();
    if constexpr (MODE == Mode::METRICS) ex.flush(), py.flush();
  };
  walk<X>(V, step, flush);
  const double tops[3] = {reduce_max(top_e), reduce_max(top_p), reduce_max(top_y)};
  return {z.sum, zt.sum, ed.sum, 0, pd.sum, ex.sum, py.sum, top.spread, tops[0], tops[1], tops[2]};
}

// The scratch rows alone, for a sweep that starts from given statistics.
template <class X, class Source>
OPSD_SWEEP void refill(const Source& source, int64_t V, const RowState& row, const Scratch<X>& w) {
  auto step = [&](int64_t v, auto lanes) __attribute__((always_inline)) {
    const auto entry = source.at(v, lanes.count);
    keep(w, source, entry, v, exp(lanes(source.student_above(entry, row.max_s), -INF)), lanes(source.gap(entry), 0));
    if (row.far) store(w.p + v, exp(lanes(source.teacher_above(entry, row.max_t), -INF)));
  };
  walk<X>(V, step, [] {});
}

// What both ways share. Each entropy is measured from its own side's peak, so that a peaked row's small one keeps its digits.
inline void finish(RowState& row, const Sums& sums) {
  row.inverse_z = 1 / sums.z;
  row.inverse_zt = 1 / sums.zt;
  row.logsum_s = ::log(sums.z);
  row.prob_s = sums.top_e / sums.z;
  row.prob_t = sums.top_p / sums.zt;
  row.entropy_s = row.logsum_s - sums.ex / sums.z;
  row.entropy_t = ::log(sums.zt / sums.top_p) - (sums.py / sums.zt - sums.top_y);
}

inline void finish_near(RowState& row, const Sums& sums) {
  finish(row, sums);
  const double tilt = (sums.ed + sums.second) / sums.z;  // exp(L) - 1
  row.gap = ::log1p(tilt);
  row.max_t = row.max_s;
  row.logsum_t = row.logsum_s + row.gap;
  row.reverse_kl = tilt < 0.5 ? sums.second / sums.z - (tilt - row.gap) : row.gap - sums.ed / sums.z;
  row.forward_kl = sums.pd / sums.z / (1 + tilt) + (tilt / (1 + tilt) - row.gap);
}

inline void finish_far(RowState& row, const Sums& sums) {
  finish(row, sums);
  row.logsum_t = ::log(sums.zt);
  row.gap = (row.max_t - row.max_s) + (row.logsum_t - row.logsum_s);
  row.reverse_kl = row.gap - sums.ed / sums.z;
  row.forward_kl = sums.pd / sums.zt - row.gap;
}

// exp(L) below which sum q * expm1(d) has lost too much beside 1: a row like that is summed with both maxima.
constexpr double LEAST_TILT = 0.25;

template <Mode MODE, class X, class Source>
RowState row_statistics(const Source& source, int64_t V, double spread_limit, const Scratch<X>& w) {
  RowState row;
  Extrema top;
  const bool both = !Source::LINEAR || MODE == Mode::METRICS;
  if (both) top = extrema<X>(source, V);
  else top.student = student_maximum<X>(source, V);
  row.max_s = top.student;
  bool summed = false;
  if (!both || top.spread <= spread_limit) {
    const Sums sums = near_sums<MODE, X>(source, V, top, w);
    row.spread = sums.spread;
    finish_near(row, sums);
    summed = sums.spread <= spread_limit && (sums.ed + sums.second) / sums.z > LEAST_TILT - 1;
  }
  if (!summed) {
    if (!both) top = extrema<X>(source, V);
    row.max_t = top.teacher;
    row.spread = top.spread;
    finish_far(row, far_sums<MODE, X>(source, V, top, w));
  }
  row.far = !(row.spread <= spread_limit);
  if constexpr (MODE == Mode::METRICS) {
    row.argmax_s = first_index<X>(source, V, top.student, [&](const auto& entry) { return source.student(entry); });
    row.argmax_t = first_index<X>(source, V, top.teacher, [&](const auto& entry) { return source.teacher(entry); });
  }
  return row;
}

}  // namespace opsd::OPSD_CAPABILITY
