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
  OPSD_DEVICE void absorb(const Peaks& other) { student.absorb(other.student), teacher.absorb(other.teacher); }
};

// What a row's sums are relative to.
struct Frame {
  Reference at;
  float top = 0;  // of the metrics: y near its maximum
};

// With e = 2^x, g = e * 2^o; o in base 2.
struct NearSums {
  float e = 0, eo = 0, em = 0, g = 0, go = 0;  // sums of e, e * o, e * (2^o - 1), g, g * o
  float high = -INF, low = INF;                // the largest o, the smallest; HELD: the largest |o| alone
  float es = 0, gt = 0;                        // of the metrics: sums of e * x, g * (y - top)
  OPSD_DEVICE void absorb(const NearSums& other) {
    e += other.e, eo += other.eo, em += other.em, g += other.g, go += other.go, es += other.es, gt += other.gt;
    high = max(high, other.high), low = min(low, other.low);
  }

  // Only the sums that KIND needs; with METRICS, and of general rows, all. HELD: o is 0 at the student's peak.
  template <bool HELD, bool PLAIN, Kind KIND, bool METRICS, int N>
  OPSD_DEVICE void add(const Relative (&r)[N], float top) {
    constexpr bool REVERSE = METRICS || !PLAIN || KIND == Kind::REVERSE_KL, FORWARD = METRICS || !PLAIN || KIND == Kind::FORWARD_KL;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float one = exp2_approx(r[i].x), o = r[i].o, ratio = exp2_approx(o);
      e += one, em = fmaf(one, exp2m1(o, ratio), em);
      if constexpr (REVERSE) eo = fmaf(one, o, eo);
      if constexpr (FORWARD) {
        const float p = one * ratio;
        g += p, go = fmaf(p, o, go);
        if constexpr (METRICS) gt += guard<!PLAIN>(p, p * (r[i].y - top));
      } else {
        g = fmaf(one, ratio, g);
      }
      if constexpr (METRICS) es += guard<!PLAIN>(one, one * r[i].x);
      if constexpr (HELD) high = fmaxf(high, fabsf(o));
      else high = fmaxf(high, o), low = fminf(low, o);
    }
  }
};

// The same for a row of a far teacher, with r = 2^y; a term of probability 0 is 0.
struct FarSums {
  // sums of e, e * o, e * x, r, r * o, r * y
  float e = 0, eo = 0, es = 0, r = 0, ro = 0, rt = 0;
  OPSD_DEVICE void absorb(const FarSums& other) { e += other.e, eo += other.eo, es += other.es, r += other.r, ro += other.ro, rt += other.rt; }
};

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

template <bool PLAIN, class In, int N>
OPSD_DEVICE void entries_of(const Source<PLAIN>& source, const Pack<In, N>& S, const Pack<In, N>& T, int64_t v, typename Source<PLAIN>::Entry (&to)[N]) {
  const Floats<N> s = to_floats(S), t = to_floats(T);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = source.at(s.of[i], t.of[i], v + i);
}

// Finds the entry of `largest` in its known pack and sets `at` to its index. `value` computes a side's logit.
template <bool PLAIN, class In, class Read>
OPSD_DEVICE typename Source<PLAIN>::Entry locate(const Source<PLAIN>& source, const WholeRow<In>& row, Largest& largest, Read value) {
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
OPSD_DEVICE float largest_student(const Source<PLAIN>& source, const Pack<In, N>& S, const typename Source<PLAIN>::Entry (&entry)[N]) {
  if constexpr (PLAIN) return largest_of(S);
  float largest = LOWEST;
#pragma unroll
  for (int i = 0; i < N; ++i) largest = fmaxf(largest, source.student(entry[i]));
  return largest;
}

template <bool METRICS, bool PLAIN, class In, class Keep>
OPSD_DEVICE Peaks find_peaks(const Source<PLAIN>& source, const Slice<In>& slice, Keep keep) {
  Peaks peaks;
  walk<WIDTH<PLAIN, In>, DEPTH<PLAIN, In, false>>(slice, [&]<int N>(int v, const Pack<In, N>& S, const Pack<In, N>& T) {
    keep(v, S, T);
    typename Source<PLAIN>::Entry entry[N];
    entries_of(source, S, T, slice.offset + v, entry);
    peaks.student.template next<N>(largest_student(source, S, entry), slice.offset + v);
    if constexpr (!METRICS) return;
    float largest = LOWEST;
#pragma unroll
    for (int i = 0; i < N; ++i) largest = fmaxf(largest, source.teacher(entry[i]));
    peaks.teacher.template next<N>(largest, slice.offset + v);
  });
  return peaks;
}

// A row's peaks: where they are, and what there is.
template <bool PLAIN>
struct Found {
  Peaks peaks;
  typename Source<PLAIN>::Entry student, teacher;
};

template <bool PLAIN, class In, class OfTeacher>
OPSD_DEVICE Found<PLAIN> find(const Source<PLAIN>& source, const WholeRow<In>& whole, Peaks peaks, bool metrics, OfTeacher of_teacher) {
  Found<PLAIN> found;
  found.student = found.teacher = locate(source, whole, peaks.student, [&](const auto& entry) { return PLAIN ? entry.s : source.student(entry); });
  if (metrics) found.teacher = locate(source, whole, peaks.teacher, of_teacher);
  found.peaks = peaks;
  return found;
}

// HELD: in shared memory, with known peaks. Else `peaks` takes the largest logits, the teacher's as y of the
// frame.
template <bool HELD, Kind KIND, bool METRICS, bool PLAIN, class In>
OPSD_DEVICE NearSums near_sweep(const Source<PLAIN>& source, const Slice<In>& slice, const Frame& frame, Peaks& peaks) {
  NearSums sums;
  walk_tiles<WIDTH<PLAIN, In>, DEPTH<PLAIN, In, HELD>>(slice, [&]<int N>(int64_t v, const Pack<In, N>& S, const Pack<In, N>& T) {
    typename Source<PLAIN>::Entry entry[N];
    Relative r[N];
    entries_of(source, S, T, v, entry);
    float largest = LOWEST;
#pragma unroll
    for (int i = 0; i < N; ++i) r[i] = source.finite(entry[i], frame.at), largest = fmaxf(largest, r[i].y);
    sums.template add<HELD, PLAIN, KIND, METRICS>(r, frame.top);
    if constexpr (!HELD) {
      peaks.student.template next<N>(largest_student(source, S, entry), v);
      if constexpr (METRICS) peaks.teacher.template next<N>(largest, v);
    }
  });
  return sums;
}

template <bool HELD, bool PLAIN, class In>
OPSD_DEVICE void far_statistics(const Source<PLAIN>& source, const WholeRow<In>& whole, const Slice<In>& slice, Exchange& x, Statistics& row) {
  Peaks peaks;
  walk<FAR_WIDTH<HELD>, 1>(slice, [&]<int N>(int v, const Pack<In, N>& S, const Pack<In, N>& T) {
    typename Source<PLAIN>::Entry entry[N];
    entries_of(source, S, T, slice.offset + v, entry);
    float largest = LOWEST;
#pragma unroll
    for (int i = 0; i < N; ++i) largest = fmaxf(largest, source.teacher(entry[i]));
    peaks.teacher.template next<N>(largest, slice.offset + v);
  });
  peaks.teacher = merge(peaks.teacher, x);
  const auto peak = locate(source, whole, peaks.teacher, [&](const auto& entry) { return source.teacher(entry); });
  row.max_t = peaks.teacher.value, row.argmax_t = peaks.teacher.at;
  const Reference at = source.reference(Levels{row.max_s, row.max_t}, true);
  FarSums sums;
  walk_tiles<FAR_WIDTH<HELD>, 1>(slice, [&]<int N>(int64_t v, const Pack<In, N>& S, const Pack<In, N>& T) {
    typename Source<PLAIN>::Entry entry[N];
    entries_of(source, S, T, v, entry);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Relative r = source.relative(entry[i], at);
      const float e = exp2_approx(r.x), p = exp2_approx(r.y);
      sums.e += e, sums.eo += guard<true>(e, e * r.o), sums.es += guard<true>(e, e * r.x);
      sums.r += p, sums.ro += guard<true>(p, p * r.o), sums.rt += guard<true>(p, p * r.y);
    }
  });
  sums = merge(sums, x);
  const Levels zero = source.levels(at);
  const float log_e = log2f(sums.e), log_r = log2f(sums.r);
  const float gap = sums.r > 0 && sums.e > 0 ? log_r - log_e : NAN;  // a side may have no distribution
  const double lse_s = double{row.max_s} + row.logsum_s, lse_t = zero.teacher + log_r * LN_2;  // student: as in near rows
  row.gap = gap == gap ? static_cast<float>(lse_t - lse_s - (row.max_t - row.max_s)) : NAN;
  row.reverse_kl = LN_2F * (gap - quotient(sums.eo, sums.e));
  row.forward_kl = LN_2F * (quotient(sums.ro, sums.r) - gap);
  row.entropy_s = LN_2F * (log_e - quotient(sums.es, sums.e));
  row.entropy_t = LN_2F * (log_r - quotient(sums.rt, sums.r));
  row.prob_t = quotient(exp2f(source.relative(peak, at).y), sums.r);
}

template <bool PLAIN>
OPSD_DEVICE Statistics near_statistics(const Source<PLAIN>& source, const Found<PLAIN>& found, const Frame& frame, const NearSums& sums, const RowArgs& a) {
  Statistics row;
  const Relative peak = source.finite(found.student, frame.at);
  const Levels zero = source.levels(frame.at);
  row.max_s = source.student(found.student), row.max_t = source.teacher(found.student);
  row.argmax_s = found.peaks.student.at, row.argmax_t = found.peaks.teacher.at;
  const float log_e = log2f(sums.e), tilt = quotient(sums.em, sums.e);
  const float gap = tilt > GAP_LOW && tilt < GAP_HIGH ? log1pf(tilt) : logf(quotient(sums.g, sums.e));
  row.logsum_s = static_cast<float>(zero.student + log_e * LN_2 - row.max_s);
  row.gap = static_cast<float>(zero.teacher - zero.student + gap - (row.max_t - row.max_s));
  row.reverse_kl = gap - LN_2F * (quotient(sums.eo, sums.e));
  row.forward_kl = LN_2F * (quotient(sums.go, sums.g)) - gap;
  row.entropy_s = LN_2F * (log_e - quotient(sums.es, sums.e));
  row.prob_s = quotient(exp2f(peak.x), sums.e);
  const float above = sums.g * exp2f(-frame.top);  // the teacher's sum relative to near its own maximum
  row.entropy_t = LN_2F * (log2f(above) - quotient(sums.gt, sums.g));
  row.prob_t = quotient(exp2f(source.finite(found.teacher, frame.at).y - frame.top), above);
  const bool finite = sums.em == sums.em && sums.g < INF;  // a maximum skips NaN, the sums keep it
  row.spread = finite ? LN_2F * max(sums.high - peak.o, peak.o - sums.low) : INF;
  row.far = !(row.spread <= static_cast<float>(a.spread_limit));
  return row;
}

// Returns the row's statistics, the same in every thread. `peaks`: this thread's, of a row that is HELD in shared
// memory, or of the row's start.
template <bool HELD, Kind KIND, bool PLAIN, class In>
OPSD_DEVICE Statistics statistics(const Source<PLAIN>& source, const WholeRow<In>& whole, const Slice<In>& slice, Peaks peaks, Exchange& x,
                                  const RowArgs& a) {
  Found<PLAIN> found = find(source, whole, merge(peaks, x), a.metrics, [&](const auto& entry) { return source.teacher(entry); });
  Frame frame;
  NearSums sums;
#pragma unroll 1
  for (bool again = true; again;) {
    const Peaks before = found.peaks;
    frame.at = source.reference(found.student);
    frame.top = a.metrics ? source.finite(found.teacher, frame.at).y : 0;
    peaks = Peaks();
    if (a.metrics) sums = near_sweep<HELD, KIND, true>(source, slice, frame, peaks);  // metrics
    else sums = near_sweep<HELD, KIND, false>(source, slice, frame, peaks);
    sums = merge(sums, x);
    if constexpr (HELD) break;
    found = find(source, whole, merge(peaks, x), a.metrics, [&](const auto& entry) { return source.finite(entry, frame.at).y; });
    const float rise = source.finite(found.student, frame.at).x, above = source.finite(found.teacher, frame.at).y - frame.top;
    const float margin = a.metrics ? METRICS_MARGIN : MARGIN;
    again = found.peaks.student.value > before.student.value && !(rise <= margin);
    again |= a.metrics && above > margin;
  }
  Statistics row = near_statistics(source, found, frame, sums, a);
  if (row.far) far_statistics<HELD>(source, whole, slice, x, row);
  return row;
}

}  // namespace opsd::cuda
