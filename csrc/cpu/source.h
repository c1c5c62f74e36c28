// Where a row's logits come from: raw buffers of any dtype, through the transform, as numbers X of the sweep's precision.
//
// A source hands out the entries of a vector and reads student and teacher off them. Logits are kept as multiples y * factor, so that s - max is one
// fused step: rounding s = 1.3 * z at |z| = 40 first would cost 2e-6 of every probability.
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

// Entries per step of the accumulation: sums run in X within a block, in double over blocks.
constexpr int64_t BLOCK = 4096;

// step(v, lanes) for each vector of a row, flush() after each block.
template <class X, class Step, class Flush>
OPSD_INLINE void walk(int64_t V, Step step, Flush flush) {
  const int64_t whole = V - V % LANES<X>;
  for (int64_t start = 0; start < whole; start += BLOCK) {
    const int64_t end = start + BLOCK < whole ? start + BLOCK : whole;
    for (int64_t v = start; v < end; v += LANES<X>) step(v, EveryLane<X>{});
    flush();
  }
  if (whole < V) {
    step(whole, FirstLanes<X>{V - whole});
    flush();
  }
}

// The pair of logits that a row is taken relative to (contract.py); shift is the rounded difference.
template <class X>
struct References {
  double student, teacher, shift;
  References(double s, double t) : student(s), teacher(t), shift(static_cast<ElementOf<X>>(t - s)) {}
};

// An entry relative to them: x = s - reference, y = t - reference, and the offset o = y - x.
template <class X>
struct Relative {
  X x, y, o;
};

// The difference buffer holds what the gap d is a multiple of, and nothing bends or shifts the student: one load and one product per side.
template <class X, class T>
struct LinearSource {
  static constexpr bool LINEAR = true;
  const T* S;
  const T* D;
  double factor;

  struct Entry {
    X s, d;
  };
  LinearSource(const RowArgs& a, int64_t row)
      : S(static_cast<const T*>(a.S) + row * a.stride_s),
        D(static_cast<const T*>(a.T) + row * a.stride_t),
        factor(a.student.scale / a.student.temperature) {}

  OPSD_INLINE Entry at(int64_t v, int64_t count) const { return {load_as<X>(S + v, count), load_as<X>(D + v, count)}; }
  OPSD_INLINE X student(const Entry& e) const { return e.s * X(factor); }
  OPSD_INLINE X teacher(const Entry& e) const { return student(e) + e.d * X(factor); }
  OPSD_INLINE Relative<X> relative(const Entry& e, const References<X>& r) const {
    const X x = fma(e.s, X(factor), X(-r.student)), o = fma(e.d, X(factor), X(-r.shift));
    return {x, x + o, o};
  }
  OPSD_INLINE X slope(const Entry&) const { return X(1.0); }
  bool bent() const { return false; }
};

// Anything: two heads, biases, softcaps, different temperatures, with or without the difference buffer.
template <class X, class T>
struct GeneralSource {
  using Bias = ElementOf<X>;
  static constexpr bool LINEAR = false;

  // softcap(scale * (z + bias)) / temperature = y * outer, with y = tanh(inner * (z + bias)) or plainly z + bias
  struct Side {
    const Bias* bias;
    bool bent;
    double inner, outer;
    Side(const Transform& t, const void* b)
        : bias(static_cast<const Bias*>(b)),
          bent(t.softcap > 0),
          inner(bent ? t.scale / t.softcap : 1),
          outer(bent ? t.softcap / t.temperature : t.scale / t.temperature) {}
    OPSD_INLINE X operator()(X z, int64_t v, int64_t count) const {
      if (bias) z = z + load_as<X>(bias + v, count);
      if (bent) z = scaled_tanh(z, inner);
      return z;
    }
  };

  const T* S;
  const T* T_;
  Side student_side, teacher_side;
  bool difference, linear;

  struct Entry {
    X s, t;    // t is the raw difference where the gap is a multiple of it
    X t_rest;  // what rounding student plus difference lost: at |z| = 40, 2e-6 times the factor
  };
  GeneralSource(const RowArgs& a, int64_t row)
      : S(static_cast<const T*>(a.S) + row * a.stride_s),
        T_(static_cast<const T*>(a.T) + row * a.stride_t),
        student_side(a.student, a.bias_s),
        teacher_side(a.teacher, a.bias_t),
        difference(a.difference),
        linear(a.linear) {}

  OPSD_INLINE Entry at(int64_t v, int64_t count) const {
    const X z = load_as<X>(S + v, count), other = load_as<X>(T_ + v, count);
    const X s = student_side(z, v, count);
    if (linear) return {s, other, X(0.0)};
    if (!difference) return {s, teacher_side(other, v, count), X(0.0)};
    const X t = z + other, kept = t - z, rest = (z - (t - kept)) + (other - kept);
    return {s, teacher_side(t, v, count), teacher_side.bent ? X(0.0) : select(rest == rest, rest, X(0.0))};  // rest: NaN where a side is infinite
  }
  OPSD_INLINE X student(const Entry& e) const { return e.s * X(student_side.outer); }
  OPSD_INLINE X teacher(const Entry& e) const {
    if (linear) return student(e) + e.t * X(student_side.outer);
    return e.t * X(teacher_side.outer);
  }
  OPSD_INLINE Relative<X> relative(const Entry& e, const References<X>& r) const {
    const X x = fma(e.s, X(student_side.outer), X(-r.student));
    if (linear) {
      const X o = fma(e.t, X(student_side.outer), X(-r.shift));
      return {x, x + o, o};
    }
    const X ft(teacher_side.outer), y = fma(e.t_rest, ft, fma(e.t, ft, X(-r.teacher)));
    return {x, y, select(x == y, X(0.0), y - x)};  // both -inf: masked, and no reason to call the row far
  }
  // d(logit)/d(raw logit) over scale / temperature
  OPSD_INLINE X slope(const Entry& e) const { return fma(-e.s, e.s, X(1.0)); }
  bool bent() const { return student_side.bent; }
};

}  // namespace opsd::OPSD_CAPABILITY
