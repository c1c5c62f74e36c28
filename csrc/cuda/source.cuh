// Loads a row: raw logits through the transform, relative to the row's references. contract.py defines x, y
// and o.
#pragma once

#include "vec.cuh"

namespace opsd::cuda {

constexpr float INF = __builtin_inff();
// below every logit but -inf: a maximum that starts here never makes -inf - -inf
constexpr float LOWEST = -1e38f;

// The student's logit to which the student's are relative, and the teacher's.
struct References {
  float student, teacher;
};

struct Relative {
  float x, y, o;  // s - reference, t - reference, y - x
};

// A side's transform at row n.
OPSD_DEVICE Transform of_row(Transform t, int64_t n) {
  if (t.temperatures) t.temperature = static_cast<const float*>(t.temperatures)[n];
  return t;
}

// PLAIN: no bias, no softcap, and teacher logits or a linear difference. A logit is y * outer, with
// y = tanh(inner * (z + bias)) under a softcap, else z + bias: s - reference is then one rounding.
template <bool PLAIN>
class Source {
  const float *bias_s_, *bias_t_;
  float inner_s_, outer_s_, inner_t_, outer_t_, mix_;
  bool linear_, difference_, bent_s_, bent_t_;

 public:
  struct Entry {
    float s, t;  // each side's y; the raw difference for the teacher where the gap is a multiple of it
  };

  OPSD_DEVICE Source(const RowArgs& a, int64_t n)
      : bias_s_(static_cast<const float*>(a.bias_s)),
        bias_t_(static_cast<const float*>(a.bias_t)),
        inner_s_(a.student.softcap > 0 ? a.student.scale / a.student.softcap : 1),
        outer_s_((a.student.softcap > 0 ? a.student.softcap : a.student.scale) / of_row(a.student, n).temperature),
        inner_t_(a.teacher.softcap > 0 ? a.teacher.scale / a.teacher.softcap : 1),
        outer_t_((1 - a.teacher_mix) * (a.teacher.softcap > 0 ? a.teacher.softcap : a.teacher.scale) / of_row(a.teacher, n).temperature),
        mix_(a.linear ? 0 : a.teacher_mix),
        linear_(a.linear),
        difference_(a.difference),
        bent_s_(a.student.softcap > 0),
        bent_t_(a.teacher.softcap > 0) {}

  OPSD_DEVICE Entry at(float z, float other, int64_t v) const {
    if constexpr (PLAIN) return {z, other};
    float s = z, t = other;
    if (bias_s_) s += bias_s_[v];
    if (bent_s_) s = tanhf(s * inner_s_);
    if (linear_) return {s, t};
    if (difference_) t += z;
    if (bias_t_) t += bias_t_[v];
    if (bent_t_) t = tanhf(t * inner_t_);
    return {s, t};
  }
  OPSD_DEVICE float student(const Entry& e) const { return e.s * outer_s_; }
  OPSD_DEVICE float teacher(const Entry& e) const {
    if (linear_) return fmaf(e.t, outer_t_, student(e));
    const float t = e.t * outer_t_;
    return PLAIN || mix_ == 0 ? t : fmaf(student(e), mix_, t);  // -inf * 0 is NaN
  }
  OPSD_DEVICE Relative relative(const Entry& e, const References& r) const {
    const float x = fmaf(e.s, outer_s_, -r.student);
    if (linear_) {
      const float o = fmaf(e.t, outer_t_, r.student - r.teacher);
      return {x, x + o, o};
    }
    float y = fmaf(e.t, outer_t_, PLAIN ? -r.teacher : fmaf(r.student, mix_, -r.teacher));
    if (!PLAIN && mix_ != 0) y = fmaf(x, mix_, y);
    return {x, y, x == y ? 0 : y - x};  // both -inf: a masked entry, which does not make the row far
  }
  // d(logit)/d(raw logit) over scale / temperature
  OPSD_DEVICE float slope(const Entry& e) const { return bent_s_ ? (1 - e.s) * (1 + e.s) : 1; }
  OPSD_DEVICE bool bent() const { return !PLAIN && bent_s_; }
};

inline bool plain(const RowArgs& a) {
  const bool straight = !a.bias_s && !a.bias_t && !(a.student.softcap > 0) && !(a.teacher.softcap > 0);
  return straight && (a.linear || (!a.difference && a.teacher_mix == 0));
}

// A block's part of a row. `S` and `T` may lie in shared memory.
template <class In>
struct Slice {
  const In *S, *T;
  int64_t offset;  // of its first entry in the row
  int length;
  bool aligned_s, aligned_t;
  OPSD_DEVICE Slice(const In* s, const In* t, int64_t first, int count)
      : S(s), T(t), offset(first), length(count), aligned_s(aligned(s)), aligned_t(aligned(t)) {}
};

// Calls step(v, S, T) for each of this thread's packs of the slice: vectors, with two loads of each buffer in
// flight (one in general rows, whose fused kernels spilled), then the tail, an entry per thread. `loaded`
// runs in all threads together, after the loads of the packs and before their steps.
template <bool PLAIN, class In, class Loaded, class Step>
OPSD_DEVICE void walk(const Slice<In>& slice, Loaded loaded, Step step) {
  constexpr int N = LANES<In>, AT_ONCE = PLAIN ? 2 : 1;
  const int stride = threads() * N, whole = slice.length / N * N;
  for (int base = 0; base < whole; base += AT_ONCE * stride) {
    Pack<In, N> S[AT_ONCE], T[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u) {
      const int v = base + u * stride + thread() * N;
      if (v < whole) S[u] = load<N>(slice.S + v, slice.aligned_s), T[u] = load<N>(slice.T + v, slice.aligned_t);
    }
    loaded();
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u) {
      const int v = base + u * stride + thread() * N;
      if (v < whole) step(v, S[u], T[u]);
    }
  }
  if (whole == slice.length) return;
  const int v = whole + thread();
  Pack<In, 1> S, T;
  if (v < slice.length) S = load<1>(slice.S + v, true), T = load<1>(slice.T + v, true);
  loaded();
  if (v < slice.length) step(v, S, T);
}

template <bool PLAIN, class In, class Step>
OPSD_DEVICE void walk(const Slice<In>& slice, Step step) {
  walk<PLAIN>(slice, [] {}, step);
}

}  // namespace opsd::cuda
