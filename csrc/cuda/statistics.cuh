// The statistics of one row. Its sums are relative to one student logit near its maximum and to the teacher's
// there: in a row in shared memory the maximum itself, in a row that is read once the maximum of the row's
// start, and again relative to the maximum where that lies too low. Rows of a far teacher take two more sweeps,
// each side relative to its own maximum.
#pragma once

#include "reduce.cuh"
#include "source.cuh"

namespace opsd::cuda {

// A row's start may lie this far below its largest logit, in base 2. A sum tolerates more: 2^(40 + 2 * 35) * V
// with SPREAD_LIMIT. An entropy's digits do not.
constexpr float MARGIN = 40, METRICS_MARGIN = 20;
constexpr float GAP_LOW = -0.5f, GAP_HIGH = 1;  // contract.GAP_BOUNDS

struct Largest {
  float value = LOWEST;
  int at = 0;  // the first entry of its pack; then its own
  OPSD_DEVICE void absorb(const Largest& other) {
    if (other.value > value || (other.value == value && other.at < at)) *this = other;
  }
  // The same of a thread's own packs, which come in order, before the row's head.
  template <int N>
  OPSD_DEVICE void next(float other, int64_t v) {
    if (other > value || (N == 1 && other == value && v < at)) value = other, at = static_cast<int>(v);
  }
};

struct Peaks {
  Largest student, teacher;  // teacher: of the metrics
};

// What a row's sums are relative to.
struct Frame {
  Reference at;
  float top = 0;  // of the metrics: y near its maximum
};

// With e = 2^x, g = e * 2^o; o in base 2: sums of e, e * o, e * (2^o - 1), g, g * o; of the metrics e * x, g * (y - top).
enum { E, EO, EM, G, GO, ES, GT };

// Only the sums that KIND needs; with METRICS, and of general rows, all. HELD: o is 0 at the student's peak.
template <bool HELD, bool PLAIN, Kind KIND, bool METRICS, int N>
OPSD_DEVICE void add(Sums& sums, const Relative (&r)[N], float top) {
  constexpr bool REVERSE = METRICS || !PLAIN || has_reverse(KIND), FORWARD = METRICS || !PLAIN || has_forward(KIND);
  float* const of = sums.of;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float one = exp2_approx(r[i].x), o = r[i].o, ratio = exp2_approx(o);
    of[E] += one, of[EM] = fmaf(one, exp2m1(o, ratio), of[EM]);
    if constexpr (REVERSE) of[EO] = fmaf(one, o, of[EO]);
    if constexpr (FORWARD) {
      const float p = one * ratio;
      of[G] += p, of[GO] = fmaf(p, o, of[GO]);
      if constexpr (METRICS) of[GT] += guard<!PLAIN>(p, p * (r[i].y - top));
    } else {
      of[G] = fmaf(one, ratio, of[G]);
    }
    if constexpr (METRICS) of[ES] += guard<!PLAIN>(one, one * r[i].x);
    if constexpr (HELD) sums.high = fmaxf(sums.high, fabsf(o));
    else sums.high = fmaxf(sums.high, o), sums.low = fminf(sums.low, o);
  }
}

// A row's columns except CLIPPED, for the later sweeps.
struct Statistics {
  float max_s, max_t, logsum_s, gap, spread, reverse_kl, forward_kl, entropy_s, entropy_t, prob_s, prob_t;
  int argmax_s, argmax_t;
  bool far;

  OPSD_DEVICE void read(const float* from, float spread_limit) {
    max_s = from[STUDENT_MAX], max_t = from[TEACHER_MAX], logsum_s = from[STUDENT_LOGSUM], gap = from[GAP], spread = from[SPREAD];
    reverse_kl = from[Column::REVERSE_KL], forward_kl = from[Column::FORWARD_KL];
    far = !(spread <= spread_limit);
  }
  OPSD_DEVICE void write(float* to, const RowArgs& a) const {
    const bool m = a.metrics;
    to[STUDENT_MAX] = max_s, to[STUDENT_LOGSUM] = logsum_s, to[TEACHER_MAX] = max_t, to[TEACHER_LOGSUM] = logsum_s + gap;
    to[GAP] = gap, to[SPREAD] = spread;
    to[Column::REVERSE_KL] = m || has_reverse(a.kind) ? reverse_kl : 0;
    to[Column::FORWARD_KL] = m || has_forward(a.kind) ? forward_kl : 0;
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

template <int N>
struct Entries {
  Entry of[N];
  template <class Value>
  OPSD_DEVICE float largest(Value value) const {
    float most = LOWEST;
#pragma unroll
    for (int i = 0; i < N; ++i) most = fmaxf(most, value(of[i]));
    return most;
  }
};

template <bool PLAIN, class In, int N>
OPSD_DEVICE Entries<N> entries_of(const Source<PLAIN>& source, const Pack<In, N>& S, const Pack<In, N>& T, int64_t v) {
  const Floats<N> s = to_floats(S), t = to_floats(T);
  Entries<N> to;
#pragma unroll
  for (int i = 0; i < N; ++i) to.of[i] = source.at(s.of[i], t.of[i], v + i);
  return to;
}

// Finds the entry of `largest` in its known pack and sets `at` to its index. `value` computes a side's logit.
template <bool PLAIN, class In, class Read>
OPSD_DEVICE Entry locate(const Source<PLAIN>& source, const WholeRow<In>& row, Largest& largest, Read value) {
  const In *S = row.S + largest.at, *T = row.T + largest.at;
  const int count = min(LANES<In>, static_cast<int>(row.V) - largest.at);
  auto at = [&](int i) { return source.at(to_float(S[i]), to_float(T[i]), largest.at + i); };
  auto entry = at(0);
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const auto next = at(i);
    if (value(next) != largest.value) continue;
    largest.at += i;
    return next;
  }
  return entry;
}

// The student's largest logit of a pack: raw where the order is that of the raw ones.
template <bool PLAIN, class In, int N>
OPSD_DEVICE float largest_student(const Source<PLAIN>& source, const Pack<In, N>& S, const Entries<N>& entries) {
  if constexpr (PLAIN) return largest_of(S);
  else return entries.largest([&](const Entry& entry) { return source.student(entry); });
}

// step(METRICS, v, S, T) for vectors with and without metrics; the entries beside them take all.
template <int N, int AT_ONCE, class In, class Step>
OPSD_DEVICE void vectors_and_rest(const Slice<In>& slice, bool metrics, Step step) {
  auto with = [&](int v, const auto& S, const auto& T) { step(std::true_type(), v, S, T); };
  if (metrics) vectors<N, AT_ONCE>(slice, Apart(), with);  // metrics
  else vectors<N, AT_ONCE>(slice, Apart(), [&](int v, const auto& S, const auto& T) { step(std::false_type(), v, S, T); });
  singles(slice, Apart(), with);
}

template <bool PLAIN, class In, class Keep>
OPSD_DEVICE Peaks find_peaks(const Source<PLAIN>& source, const Slice<In>& slice, bool metrics, Keep keep) {
  Peaks peaks;
  auto step = [&]<bool METRICS, int N>(std::bool_constant<METRICS>, int v, const Pack<In, N>& S, const Pack<In, N>& T) {
    keep(v, S, T);
    const auto entries = entries_of(source, S, T, slice.offset + v);
    peaks.student.template next<N>(largest_student(source, S, entries), slice.offset + v);
    if constexpr (METRICS) peaks.teacher.template next<N>(entries.largest(source.of_teacher()), slice.offset + v);
  };
  vectors_and_rest<WIDTH<PLAIN, In>, DEPTH<PLAIN, In, false>>(slice, metrics, step);
  return peaks;
}

template <bool HELD, bool PLAIN, class In>
OPSD_DEVICE Largest far_teacher_peak(const Source<PLAIN>& source, const Slice<In>& slice) {
  Largest peak;
  walk<FAR_WIDTH<HELD>, 1>(slice, Apart(), [&]<int N>(int v, const Pack<In, N>& S, const Pack<In, N>& T) {
    peak.next<N>(entries_of(source, S, T, slice.offset + v).largest(source.of_teacher()), slice.offset + v);
  });
  return peak;
}

// A row's peaks: where they are, and what there is.
struct Found {
  Peaks peaks;
  Entry student, teacher;
};

// HELD: in shared memory, with known peaks. Else `peaks` takes the largest logits, with metrics the teacher's as y of
// the frame. The entries beside the vectors take all sums.
template <bool HELD, Kind KIND, bool PLAIN, class In>
OPSD_DEVICE Sums near_sweep(const Source<PLAIN>& source, const Slice<In>& slice, const Frame& frame, Peaks& peaks, bool metrics) {
  Sums sums;
  tiles(slice, [&](const Slice<In>& part) {
    auto step = [&]<bool METRICS, int N>(std::bool_constant<METRICS>, int v, const Pack<In, N>& S, const Pack<In, N>& T) {
      const auto entries = entries_of(source, S, T, part.offset + v);
      Relative r[N];
      float largest = LOWEST;
#pragma unroll
      for (int i = 0; i < N; ++i) r[i] = source.finite(entries.of[i], frame.at), largest = fmaxf(largest, r[i].y);
      add<HELD, PLAIN, KIND, METRICS>(sums, r, frame.top);
      if constexpr (!HELD) {
        peaks.student.template next<N>(largest_student(source, S, entries), part.offset + v);
        if constexpr (METRICS) peaks.teacher.template next<N>(largest, part.offset + v);
      }
    };
    vectors_and_rest<WIDTH<PLAIN, In>, DEPTH<PLAIN, In, HELD>>(part, metrics, step);
  });
  return sums;
}

// The same of a row of a far teacher, with g = 2^y; a term of probability 0 is 0.
template <bool HELD, bool PLAIN, class In>
OPSD_DEVICE Sums far_sweep(const Source<PLAIN>& source, const Slice<In>& slice, const Frame& frame) {
  Sums sums;
  float* const of = sums.of;
  tiles(slice, [&](const Slice<In>& part) {
    walk<FAR_WIDTH<HELD>, 1>(part, Apart(), [&]<int N>(int v, const Pack<In, N>& S, const Pack<In, N>& T) {
      const auto entries = entries_of(source, S, T, part.offset + v);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const Relative r = source.relative(entries.of[i], frame.at);
        const float e = exp2_approx(r.x), g = exp2_approx(r.y);
        of[E] += e, of[EO] += guard<true>(e, e * r.o), of[ES] += guard<true>(e, e * r.x);
        of[G] += g, of[GO] += guard<true>(g, g * r.o), of[GT] += guard<true>(g, g * r.y);
      }
    });
  });
  return sums;
}

// `row.far` tells which sweep the sums are from. Those of a near one may show that the row is far.
template <bool PLAIN>
OPSD_DEVICE void finish(Statistics& row, const Source<PLAIN>& source, const Found& found, const Frame& frame, const Sums& sums, const RowArgs& a) {
  const float e = sums.of[E], g = sums.of[G], tilt = quotient(sums.of[EM], e), log_e = log2f(e);
  const Relative peak = source.relative(found.student, frame.at);
  const Levels zero = source.levels(frame.at);
  row.max_s = source.student(found.student), row.max_t = source.teacher(found.student);
  if (row.far) row.max_t = source.teacher(found.teacher);
  row.argmax_s = found.peaks.student.at, row.argmax_t = found.peaks.teacher.at;
  float gap = !row.far && tilt > GAP_LOW && tilt < GAP_HIGH ? log1pf(tilt) : logf(quotient(g, e));
  if (!(e > 0 && g > 0)) gap = NAN;  // a side may have no distribution
  if (!row.far) row.logsum_s = static_cast<float>(zero.student + log_e * LN_2 - row.max_s);  // the teacher plays no part
  row.gap = static_cast<float>(zero.teacher - zero.student + gap - (row.max_t - row.max_s));
  row.reverse_kl = gap - LN_2F * quotient(sums.of[EO], e);
  row.forward_kl = LN_2F * quotient(sums.of[GO], g) - gap;
  row.entropy_s = LN_2F * (log_e - quotient(sums.of[ES], e));
  row.prob_s = quotient(exp2f(peak.x), e);
  const float above = g * exp2f(-frame.top);  // the teacher's sum relative to near its own maximum
  row.entropy_t = LN_2F * (log2f(above) - quotient(sums.of[GT], g));
  row.prob_t = quotient(exp2f(source.relative(found.teacher, frame.at).y - frame.top), above);
  if (row.far) return;
  const bool finite = sums.of[EM] == sums.of[EM] && g < INF;  // a maximum skips NaN, the sums keep it
  row.spread = finite ? LN_2F * max(sums.high - peak.o, peak.o - sums.low) : INF;
  row.far = !(row.spread <= static_cast<float>(a.spread_limit));
}

// Returns the row's statistics, the same in every thread. `peaks`: this thread's, of a row that is HELD in shared
// memory, or of the row's start.
template <bool HELD, Kind KIND, bool PLAIN, class In>
OPSD_DEVICE Statistics statistics(const Source<PLAIN>& source, const WholeRow<In>& whole, const Slice<In>& slice, Peaks peaks, Exchange& x,
                                  const RowArgs& a) {
  auto of_student = [&](const auto& entry) { return PLAIN ? entry.s : source.student(entry); };
  Found found;
  Frame frame;
  Sums sums;
  Statistics row;
  row.far = false;
  found.peaks.student = merge(peaks.student, x), found.student = found.teacher = locate(source, whole, found.peaks.student, of_student);
#pragma unroll 1
  for (bool far = false;; far = true) {
    if (far) peaks.teacher = far_teacher_peak<HELD>(source, slice);
    if (far || a.metrics) {
      found.peaks.teacher = merge(peaks.teacher, x);
      found.teacher = locate(source, whole, found.peaks.teacher, source.of_teacher());
    }
    if (far) {
      frame = {source.reference(Levels{row.max_s, source.teacher(found.teacher)}, true), 0};
      sums = merge(far_sweep<HELD>(source, slice, frame), x);
    }
#pragma unroll 1
    for (bool again = !far; again;) {
      const Peaks before = found.peaks;
      frame.at = source.reference(found.student);
      frame.top = a.metrics ? source.finite(found.teacher, frame.at).y : 0;
      peaks = Peaks();
      sums = merge(near_sweep<HELD, KIND>(source, slice, frame, peaks, a.metrics), x);
      if constexpr (HELD) break;
      found.peaks.student = merge(peaks.student, x), found.student = locate(source, whole, found.peaks.student, of_student);
      if (a.metrics) {
        found.peaks.teacher = merge(peaks.teacher, x);
        found.teacher = locate(source, whole, found.peaks.teacher, [&](const auto& entry) { return source.finite(entry, frame.at).y; });
      }
      const float rise = source.finite(found.student, frame.at).x, above = source.finite(found.teacher, frame.at).y - frame.top;
      const float margin = a.metrics ? METRICS_MARGIN : MARGIN;
      again = found.peaks.student.value > before.student.value && !(rise <= margin);
      again |= a.metrics && above > margin;
    }
    finish(row, source, found, frame, sums, a);
    if (far || !row.far) return row;
  }
}

}  // namespace opsd::cuda
