// The statistics of one row in one read: sums relative to a student logit near its maximum and the teacher's
// there, rescaled when a larger one comes. Rows of a far teacher take two more sweeps, each side relative to
// its own maximum.
#pragma once

#include "../divergence.h"
#include "reduce.cuh"
#include "source.cuh"

namespace opsd::cuda {

// The reference may lie this far below the largest logit: a sum tolerates e^16, and rescaling costs as much
// as a vector of entries. In a thread's first forty vectors nearly every one has a new maximum for one of the
// warp's lanes.
constexpr float MARGIN = 16;
constexpr float GAP_LOW = -0.5f, GAP_HIGH = 1;  // contract.GAP_BOUNDS

struct Largest {
  float value = LOWEST;
  int at = 0;  // the first entry of its pack; then its own
  OPSD_DEVICE void absorb(const Largest& other) {
    if (other.value > value || (other.value == value && other.at < at)) *this = other;
  }
};

// With e = exp(x), g = e * exp(o).
struct NearSums {
  float e = 0, eo = 0, em = 0, g = 0, go = 0;  // sums of e, e * o, e * expm1(o), g, g * o
  float high = -INF, low = -INF;               // the largest o and -o
  float es = 0, gt = 0;                        // of the metrics: sums of e * x, g * (y - top)
  OPSD_DEVICE void absorb(const NearSums& other) {
    e += other.e, eo += other.eo, em += other.em, g += other.g, go += other.go, es += other.es, gt += other.gt;
    high = max(high, other.high), low = max(low, other.low);
  }
};

// A thread's part of the sweep.
struct Near {
  References at{LOWEST, LOWEST};
  NearSums sums;
  float top = LOWEST;  // the largest y, of the metrics
  Largest student, teacher;

  OPSD_DEVICE void move(const References& to) {
    if (at.student != LOWEST) {
      const float fall = at.student - to.student, shift = (at.teacher - at.student) - (to.teacher - to.student);
      const float shrink = expf(fall);
      const ExpPair<float> ratio = exp_pair(shift);
      const float grow = shrink * ratio.exp;
      sums.em = shrink * fmaf(ratio.exp, sums.em, ratio.expm1 * sums.e);
      sums.eo = shrink * fmaf(shift, sums.e, sums.eo);
      sums.go = grow * fmaf(shift, sums.g, sums.go);
      sums.es = shrink * fmaf(fall, sums.e, sums.es);
      sums.e *= shrink, sums.g *= grow, sums.gt *= grow;
      sums.high += shift, sums.low -= shift;
      top += at.teacher - to.teacher;
    }
    at = to;
  }

  OPSD_DEVICE void raise_top(float y) {
    sums.gt = fmaf(top - y, sums.g, sums.gt);
    top = y;
  }

  template <bool PLAIN, class In, int N>
  OPSD_DEVICE void add(const Source<PLAIN>& source, const Pack<In, N>& S, const Pack<In, N>& T, int64_t v, bool metrics) {
    typename Source<PLAIN>::Entry entry[N];
    float largest = LOWEST;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      entry[i] = source.at(to_float(S.entry[i]), to_float(T.entry[i]), v + i);
      largest = fmaxf(largest, source.student(entry[i]));
    }
    student.absorb({largest, static_cast<int>(v)});
    if (largest > at.student + (metrics ? 0 : MARGIN)) {
      float there = 0;
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (source.student(entry[i]) == largest) there = source.teacher(entry[i]);
      move({largest, there});
    }
    if (metrics) watch_teacher(source, entry, v);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Relative r = source.relative(entry[i], at);
      const float e = expf(r.x);
      const ExpPair<float> ratio = exp_pair(r.o);
      const float g = e * ratio.exp;
      sums.e += e, sums.g += g;
      sums.eo = fmaf(e, r.o, sums.eo), sums.em = fmaf(e, ratio.expm1, sums.em), sums.go = fmaf(g, r.o, sums.go);
      sums.high = fmaxf(sums.high, r.o), sums.low = fmaxf(sums.low, -r.o);
      if (metrics) {
        sums.es += guard<true>(e, e * r.x);
        sums.gt += guard<true>(g, g * (r.y - top));
      }
    }
  }

  template <bool PLAIN, class Entry, int N>
  OPSD_DEVICE void watch_teacher(const Source<PLAIN>& source, const Entry (&entry)[N], int64_t v) {
    float largest = LOWEST, y = LOWEST;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      largest = fmaxf(largest, source.teacher(entry[i]));
      y = fmaxf(y, source.relative(entry[i], at).y);
    }
    teacher.absorb({largest, static_cast<int>(v)});
    if (y > top) raise_top(y);
  }
};

// The same for a row of a far teacher, with r = exp(y); a term of probability 0 is 0.
struct FarSums {
  // sums of e * o, r, r * o, r * y; the largest y, the maximum's rounding error
  float eo = 0, r = 0, ro = 0, rt = 0, top = LOWEST;
  OPSD_DEVICE void absorb(const FarSums& other) {
    eo += other.eo, r += other.r, ro += other.ro, rt += other.rt;
    top = max(top, other.top);
  }
};

// A row's columns except CLIPPED, for the later sweeps.
struct Statistics {
  References at;
  float logsum_s, logsum_t, gap, spread, reverse_kl, forward_kl, entropy_s, entropy_t, prob_s, prob_t;
  int argmax_s, argmax_t;
  bool far;

  OPSD_DEVICE void read(const float* from, float spread_limit) {
    at = {from[STUDENT_MAX], from[TEACHER_MAX]};
    logsum_s = from[STUDENT_LOGSUM], logsum_t = from[TEACHER_LOGSUM], gap = from[GAP], spread = from[SPREAD];
    reverse_kl = from[Column::REVERSE_KL], forward_kl = from[Column::FORWARD_KL];
    far = !(spread <= spread_limit);
  }
  OPSD_DEVICE void write(float* to, const RowArgs& a) const {
    const bool m = a.metrics;
    to[STUDENT_MAX] = at.student, to[STUDENT_LOGSUM] = logsum_s, to[TEACHER_MAX] = at.teacher, to[TEACHER_LOGSUM] = logsum_t;
    to[GAP] = gap, to[SPREAD] = spread;
    to[Column::REVERSE_KL] = m || a.kind == Kind::REVERSE_KL ? reverse_kl : 0;
    to[Column::FORWARD_KL] = m || a.kind == Kind::FORWARD_KL ? forward_kl : 0;
    to[STUDENT_ENTROPY] = m ? entropy_s : 0, to[TEACHER_ENTROPY] = m ? entropy_t : 0;
    to[STUDENT_MAX_PROB] = m ? prob_s : 0, to[TEACHER_MAX_PROB] = m ? prob_t : 0;
    to[STUDENT_ARGMAX] = static_cast<float>(m ? argmax_s : 0), to[TEACHER_ARGMAX] = static_cast<float>(m ? argmax_t : 0);
    to[CLIPPED] = 0;
  }
};

// A whole row in device memory.
template <class In>
struct WholeRow {
  const In *S, *T;
  int64_t V;
};

// Finds the entry of `largest` in its known pack and sets `at` to its index. `value` computes a side's logit.
template <bool PLAIN, class In, class Read>
OPSD_DEVICE typename Source<PLAIN>::Entry locate(const Source<PLAIN>& source, const WholeRow<In>& row, Largest& largest, Read value) {
  auto at = [&](int64_t v) { return source.at(to_float(row.S[v]), to_float(row.T[v]), v); };
  for (int64_t v = largest.at; v < row.V && v < largest.at + LANES<In>; ++v) {
    const auto entry = at(v);
    if (value(entry) == largest.value) {
      largest.at = static_cast<int>(v);
      return entry;
    }
  }
  return at(largest.at);
}

template <bool PLAIN, class In>
OPSD_DEVICE void far_statistics(const Source<PLAIN>& source, const Slice<In>& slice, Exchange& x, Statistics& row, float e_sum) {
  Largest top;
  walk<PLAIN>(slice, [&]<int N>(int v, const Pack<In, N>& S, const Pack<In, N>& T) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      top.value = fmaxf(top.value, source.teacher(source.at(to_float(S.entry[i]), to_float(T.entry[i]), slice.offset + v + i)));
  });
  row.at.teacher = merge(top, x).value;
  FarSums sums;
  walk<PLAIN>(slice, [&]<int N>(int v, const Pack<In, N>& S, const Pack<In, N>& T) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Relative r = source.relative(source.at(to_float(S.entry[i]), to_float(T.entry[i]), slice.offset + v + i), row.at);
      const float e = expf(r.x), p = expf(r.y);
      sums.eo += guard<true>(e, e * r.o), sums.r += p, sums.ro += guard<true>(p, p * r.o), sums.rt += guard<true>(p, p * r.y);
      sums.top = fmaxf(sums.top, r.y);
    }
  });
  sums = merge(sums, x);
  row.logsum_t = logf(sums.r);
  row.gap = sums.r > 0 && e_sum > 0 ? row.logsum_t - row.logsum_s : NAN;  // a side may have no distribution
  row.reverse_kl = row.gap - sums.eo / e_sum;
  row.forward_kl = sums.ro / sums.r - row.gap;
  row.entropy_t = row.logsum_t - sums.rt / sums.r;
  row.prob_t = expf(sums.top) / sums.r;
}

// Reduces the threads' parts of the near sweep to the row's statistics, the same in every thread.
template <bool PLAIN, class In>
OPSD_DEVICE Statistics finish(const Source<PLAIN>& source, const WholeRow<In>& whole, const Slice<In>& slice, Near near, Exchange& x, const RowArgs& a) {
  Statistics row;
  Largest student = merge(near.student, x);
  const auto peak = locate(source, whole, student, [&](const auto& entry) { return source.student(entry); });
  row.at = {student.value, source.teacher(peak)};
  row.argmax_s = student.at;
  near.move(row.at);
  float top = 0;
  if (a.metrics) {
    Largest teacher = merge(near.teacher, x);
    top = source.relative(locate(source, whole, teacher, [&](const auto& entry) { return source.teacher(entry); }), row.at).y;
    row.argmax_t = teacher.at;
    near.raise_top(top);
  }
  const NearSums sums = merge(near.sums, x);
  const float tilt = sums.em / sums.e;
  row.logsum_s = logf(sums.e), row.logsum_t = logf(sums.g);
  row.gap = tilt > GAP_LOW && tilt < GAP_HIGH ? log1pf(tilt) : logf(sums.g / sums.e);
  row.reverse_kl = row.gap - sums.eo / sums.e;
  row.forward_kl = sums.go / sums.g - row.gap;
  row.entropy_s = row.logsum_s - sums.es / sums.e;
  row.prob_s = expf(source.relative(peak, row.at).x) / sums.e;
  const float above = sums.g * expf(-top);  // the teacher's sum relative to its own maximum, up to 20 above
  row.entropy_t = logf(above) - sums.gt / sums.g;
  row.prob_t = 1 / above;
  row.spread = sums.em == sums.em ? max(sums.high, sums.low) : INF;  // a maximum skips NaN, the sum keeps it
  row.far = !(row.spread <= static_cast<float>(a.spread_limit));
  if (row.far) far_statistics(source, slice, x, row, sums.e);
  return row;
}

}  // namespace opsd::cuda
