// Loads a row's logits: raw buffers of any dtype, through the transform, as numbers X of the sweep's
// precision.
//
// A source loads the entries of a vector and computes student and teacher from them. Logits are kept as
// multiples y * factor, so that s - max is one fused step: rounding s = 1.3 * z at |z| = 40 first would cost
// 2e-6 of every probability.
#pragma once

#include "vec_math.h"

namespace opsd::OPSD_CAPABILITY {

template <class X, class T>
OPSD_INLINE X load_as(const T* p, int64_t count = LANES<X>) {
  if (count == LANES<X>) return load(p);
  T padded[LANES<X>] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
}

template <class X, class T>
OPSD_INLINE void store_as(T* p, X value, int64_t count = LANES<X>) {
  if (count == LANES<X>) return store(p, value);
  T padded[LANES<X>];
  store(padded, value);
  for (int64_t i = 0; i < count; ++i) p[i] = padded[i];
}

// The lanes of a vector that lie within the row.
template <class X>
struct EveryLane {
  static constexpr int64_t count = LANES<X>;
  OPSD_INLINE X operator()(X value, double) const { return value; }
};
template <class X>
struct FirstLanes {
  int64_t count;
  OPSD_INLINE X operator()(X value, double outside) const {
    if constexpr (LANES<X> > 1) return select(first_lanes(static_cast<int>(count)), value, X(outside));
    return value;
  }
};

// Entries per block of the accumulation: additions to a lane in X inside a block, over blocks in double. With
// few lanes each takes more of a row: 250 additions to each of four lanes gave an error of 5e-6 in a forward
// KL of 1.8 over 1003 entries.
template <class X>
constexpr int64_t BLOCK = (LANES<X> == 4 ? 32 : LANES<X> == 8 ? 64 : 256) * LANES<X>;

// step(v, lanes) for each vector of a row, flush() after each block.
template <class X, class Step, class Flush>
OPSD_INLINE void walk(int64_t V, Step step, Flush flush) {
  const int64_t whole = V - V % LANES<X>;
  for (int64_t start = 0; start < whole; start += BLOCK<X>) {
    const int64_t end = start + BLOCK<X> < whole ? start + BLOCK<X> : whole;
    for (int64_t v = start; v < end; v += LANES<X>) step(v, EveryLane<X>{});
    flush();
  }
  if (whole < V) {
    step(whole, FirstLanes<X>{V - whole});
    flush();
  }
}

// Prefetches the next row into the second-level cache during this one; a prefetch past the last row is a
// no-op.
template <class T>
struct NextRow {
  const T* S;
  const T* D;
  NextRow(const RowArgs& a, int64_t next)
      : S(static_cast<const T*>(a.S) + next * a.stride_s), D(static_cast<const T*>(a.T) + next * a.stride_t) {}
  OPSD_INLINE void fetch(int64_t v) const {
    __builtin_prefetch(S + v, 0, 2);
    __builtin_prefetch(D + v, 0, 2);
  }
};

// A number as a sum of two floats.
template <class X>
struct Split {
  X high, low;
  explicit Split(double value) : high(value), low(value - static_cast<double>(static_cast<ElementOf<X>>(value))) {}
};

// The reference logits of a row (contract.py); shift is their rounded difference. With a mixed teacher,
// (1 - a) * t + a * s, `teacher` is the reference of t itself.
template <class X>
struct References {
  X student, teacher, shift;
  References(double s, double t, double a) : student(s), teacher(a == 0 ? t : (t - a * s) / (1 - a)), shift(t - s) {}
};

// An entry relative to them: x = s - reference, y = t - reference, and the offset o = y - x.
template <class X>
struct Relative {
  X x, y, o;
};

// A side's transform at one row.
template <class X>
Transform of_row(Transform t, int64_t row) {
  if (t.temperatures) t.temperature = static_cast<const ElementOf<X>*>(t.temperatures)[row];
  return t;
}

// The gap d is a multiple of the difference buffer, without bias or softcap: one load and one product per
// side.
template <class X, class T>
struct LinearSource {
  static constexpr bool LINEAR = true;
  const T* S;
  const T* D;
  X factor, gap_factor;
  NextRow<T> next;

  struct Entry {
    X s, d;
  };
  LinearSource(const RowArgs& a, int64_t row, int64_t next_row)
      : S(static_cast<const T*>(a.S) + row * a.stride_s),
        D(static_cast<const T*>(a.T) + row * a.stride_t),
        factor(a.student.scale / of_row<X>(a.student, row).temperature),
        gap_factor((1 - a.teacher_mix) * (a.student.scale / of_row<X>(a.student, row).temperature)),
        next(a, next_row) {}

  References<X> references(double student, double teacher) const { return {student, teacher, 0}; }
  OPSD_INLINE Entry at(int64_t v, int64_t count) const { return {load_as<X>(S + v, count), load_as<X>(D + v, count)}; }
  OPSD_INLINE X student(const Entry& e) const { return e.s * factor; }
  OPSD_INLINE X teacher(const Entry& e) const { return student(e) + e.d * gap_factor; }
  OPSD_INLINE Relative<X> relative(const Entry& e, const References<X>& r) const {
    const X x = exact_fma(e.s, factor, -r.student), o = exact_fma(e.d, gap_factor, -r.shift);
    return {x, x + o, o};
  }
  OPSD_INLINE X slope(const Entry&) const { return X(1.0); }
  bool bent() const { return false; }
};

// A sum and its rounding error: at |z| = 40 that is 2e-6, times the factor.
template <class X>
struct Exact {
  X sum, rest;
};
template <class X>
OPSD_INLINE Exact<X> add_exactly(const Exact<X>& a, X b) {
  const X sum = a.sum + b, kept = sum - a.sum, rest = (a.sum - (sum - kept)) + (b - kept);
  return {sum, a.rest + select(rest == rest, rest, X(0.0))};  // NaN where a side is infinite
}

// The general source: two heads, biases, softcaps, different temperatures, with or without the difference
// buffer.
template <class X, class T>
struct GeneralSource {
  using Bias = ElementOf<X>;
  static constexpr bool LINEAR = false;

  // softcap(scale * (z + bias)) / temperature = y * outer, with y = tanh(inner * (z + bias)) or plainly z +
  // bias
  struct Side {
    const Bias* bias;
    bool bent;
    Split<X> inner;
    X outer;
    Side(const Transform& t, const void* b)
        : bias(static_cast<const Bias*>(b)),
          bent(t.softcap > 0),
          inner(t.scale / (bent ? t.softcap : 1)),
          outer(bent ? t.softcap / t.temperature : t.scale / t.temperature) {}
    OPSD_INLINE Exact<X> operator()(Exact<X> z, int64_t v, int64_t count) const {
      if (bias) z = add_exactly(z, load_as<X>(bias + v, count));
      if (bent) z = {scaled_tanh(z.sum, inner.high, inner.low), X(0.0)};
      return z;
    }
    OPSD_INLINE X above(const Exact<X>& y, X level) const { return fma(y.rest, outer, exact_fma(y.sum, outer, -level)); }
  };

  const T* S;
  const T* T_;
  Side student_side, teacher_side;
  double teacher_mix;
  bool difference, linear, mixed;
  X kept, mix, gap_factor;  // 1 - a and a of the mix, and the factor of the raw difference
  NextRow<T> next;

  struct Entry {
    Exact<X> s, t;  // t is the raw difference where the gap is a multiple of it
  };
  GeneralSource(const RowArgs& a, int64_t row, int64_t next_row)
      : S(static_cast<const T*>(a.S) + row * a.stride_s),
        T_(static_cast<const T*>(a.T) + row * a.stride_t),
        student_side(of_row<X>(a.student, row), a.bias_s),
        teacher_side(of_row<X>(a.teacher, row), a.bias_t),
        teacher_mix(a.teacher_mix),
        difference(a.difference),
        linear(a.linear),
        mixed(a.teacher_mix != 0),
        kept(1 - a.teacher_mix),
        mix(a.teacher_mix),
        gap_factor((1 - a.teacher_mix) * (a.student.scale / of_row<X>(a.student, row).temperature)),
        next(a, next_row) {}

  OPSD_INLINE Entry at(int64_t v, int64_t count) const {
    const X z = load_as<X>(S + v, count), other = load_as<X>(T_ + v, count);
    const Exact<X> s = student_side({z, X(0.0)}, v, count);
    if (linear) return {s, {other, X(0.0)}};
    const Exact<X> t = difference ? add_exactly({z, X(0.0)}, other) : Exact<X>{other, X(0.0)};
    return {s, teacher_side(t, v, count)};
  }
  References<X> references(double student, double teacher) const { return {student, teacher, linear ? 0 : teacher_mix}; }
  OPSD_INLINE X student(const Entry& e) const { return e.s.sum * student_side.outer; }
  OPSD_INLINE X teacher(const Entry& e) const {
    if (linear) return student(e) + e.t.sum * gap_factor;
    const X t = e.t.sum * teacher_side.outer;
    return mixed ? fma(t, kept, student(e) * mix) : t;
  }
  OPSD_INLINE Relative<X> relative(const Entry& e, const References<X>& r) const {
    const X x = student_side.above(e.s, r.student);
    if (linear) {
      const X o = exact_fma(e.t.sum, gap_factor, -r.shift);
      return {x, x + o, o};
    }
    X y = teacher_side.above(e.t, r.teacher);
    if (mixed) y = fma(y, kept, x * mix);
    // both -inf: a masked entry, which does not make the row far
    return {x, y, select(x == y, X(0.0), y - x)};
  }
  // d(logit)/d(raw logit) over scale / temperature
  OPSD_INLINE X slope(const Entry& e) const { return fma(-e.s.sum, e.s.sum, X(1.0)); }
  bool bent() const { return student_side.bent; }
};

}  // namespace opsd::OPSD_CAPABILITY
