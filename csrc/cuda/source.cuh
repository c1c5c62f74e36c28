// Loads a row: raw logits through the transform, in base 2, relative to references. contract.py defines x, y
// and o.
#pragma once

#include "vec.cuh"

namespace opsd::cuda {

// below every logit but -inf: a maximum that starts here never makes -inf - -inf
constexpr float LOWEST = -1e38f;

// What is subtracted from the student's products, and from the teacher's (joined: from those of the gap). `apart`:
// a whole number near the raw gap, subtracted before T - S is rounded: a teacher 300 above cost .4 % of the gradient.
struct Reference {
  float x, y, apart;
  bool joined;
};

// Each side's y; the raw difference for the teacher where the gap is a multiple of it.
struct Entry {
  float s, t;
};

struct Relative {
  float x, y, o;  // s - reference, t - reference, y - x; in base 2
};

// The logits, in nats, at which x and y are 0.
struct Levels {
  double student, teacher;
};

// A side's transform at row n.
OPSD_DEVICE Transform of_row(Transform t, int64_t n) {
  if (t.temperatures) t.temperature = static_cast<const float*>(t.temperatures)[n];
  return t;
}

// A logit is y * outer, with y = tanh(inner * (z + bias)) under a softcap, else z + bias. In base 2 it is
// y * factor, whose one rounding makes the base e^(1 / unit).
struct Side {
  const float* bias;
  float inner, outer, factor, error;  // error: of the factor, relative
  bool bent;
  OPSD_DEVICE Side(const Transform& t, const void* biases, double share)
      : bias(static_cast<const float*>(biases)), inner(t.softcap > 0 ? quotient(t.scale, t.softcap) : 1), bent(t.softcap > 0) {
    const double exact = quotient(share * (bent ? t.softcap : t.scale), t.temperature), wanted = exact * LOG2_E;
    outer = exact, factor = wanted;
    error = factor == 0 ? 0 : static_cast<float>(factor - wanted) * reciprocal_approx(factor);
  }
  OPSD_DEVICE double unit() const { return LOG2_E * (1 + error); }
  OPSD_DEVICE double nats() const { return LN_2 * (1 - error); }
};

// PLAIN: no bias, no softcap, a student's factor above 0, and a linear difference or teacher logits with the same
// factor.
template <bool PLAIN>
class Source {
  Side s_, t_;
  float mix_, minus_;  // minus_: -1 where the gap is T - S, in PLAIN
  bool linear_, difference_, joined_;

 public:
  OPSD_DEVICE Source(const RowArgs& a, int64_t n)
      : s_(of_row(a.student, n), a.bias_s, 1),
        t_(of_row(a.teacher, n), a.bias_t, 1 - a.teacher_mix),
        mix_(a.linear ? 0 : a.teacher_mix),
        minus_(a.linear ? 0 : -1),
        linear_(a.linear),
        difference_(a.difference),
        joined_(a.linear || (mix_ == 0 && s_.factor == t_.factor)) {}

  OPSD_DEVICE Entry at(float z, float other, int64_t v) const {
    if constexpr (PLAIN) return {z, other};
    float s = z, t = other;
    if (s_.bias) s += s_.bias[v];
    if (s_.bent) s = tanhf(s * s_.inner);
    if (linear_) return {s, t};
    if (difference_) t += z;
    if (t_.bias) t += t_.bias[v];
    if (t_.bent) t = tanhf(t * t_.inner);
    return {s, t};
  }
  OPSD_DEVICE float student(const Entry& e) const { return e.s * s_.outer; }
  OPSD_DEVICE float teacher(const Entry& e) const {
    const float t = e.t * t_.outer, share = linear_ ? 1 : mix_;
    return share == 0 ? t : fmaf(student(e), share, t);  // -inf * 0 is NaN
  }
  OPSD_DEVICE auto of_teacher() const { return [this](const Entry& e) { return teacher(e); }; }
  // Near rows are joined where the gap is a multiple of a difference: it keeps the digits of a near teacher.
  OPSD_DEVICE bool joined(bool far) const { return linear_ || (joined_ && !far); }
  OPSD_DEVICE Reference reference(const Entry& e) const {
    const float apart = linear_ || !joined_ ? 0 : whole(e.t - e.s);
    return {e.s * s_.factor, gap(e, joined_, apart) * t_.factor, apart, joined_};
  }
  OPSD_DEVICE Reference reference(const Levels& at, bool far) const {
    const bool join = joined(far);
    const double y = at.teacher - (join ? 1 : mix_) * at.student;
    const float apart = linear_ || !join ? 0 : whole(quotient(static_cast<float>(y), t_.outer));
    return {static_cast<float>(at.student * s_.unit()), static_cast<float>(fma(y, t_.unit(), -double{apart} * t_.factor)), apart, join};
  }
  OPSD_DEVICE Levels levels(const Reference& r) const {
    const double student = r.x * s_.nats(), y = fma(double{r.apart}, double{t_.factor}, double{r.y}) * t_.nats();
    return {student, fma(student, r.joined ? 1.0 : double{mix_}, y)};
  }
  // Of a joined row; an infinite logit may give NaN for o.
  OPSD_DEVICE Relative finite(const Entry& e, const Reference& r) const {
    if constexpr (!PLAIN) return relative(e, r);
    // the same for both forms
    const float x = fmaf(e.s, s_.factor, -r.x), o = fmaf(fmaf(e.s, minus_, e.t - r.apart), t_.factor, -r.y);
    return {x, x + o, o};
  }
  OPSD_DEVICE Relative relative(const Entry& e, const Reference& r) const {
    const float x = fmaf(e.s, s_.factor, -r.x);
    float y = fmaf(gap(e, r.joined, r.apart), t_.factor, -r.y);
    if (r.joined) {
      const float o = !linear_ && e.s == -INF && e.t == -INF ? 0 : y;  // a masked entry does not make the row far
      return {x, x + o, o};
    }
    if (!PLAIN && mix_ != 0) y = fmaf(x, mix_, y);
    return {x, y, x == y ? 0 : y - x};
  }

 private:
  // 0 of a small gap: subtracting it would round where T - S is exact.
  static OPSD_DEVICE float whole(float gap) { return fabsf(gap) < 64 ? 0 : rintf(gap); }
  // The teacher's part of an entry, or the gap.
  OPSD_DEVICE float gap(const Entry& e, bool join, float apart) const { return linear_ || !join ? e.t : e.t - apart - e.s; }

 public:
  // d(logit)/d(raw logit) over scale / temperature
  OPSD_DEVICE float slope(const Entry& e) const { return !PLAIN && s_.bent ? (1 - e.s) * (1 + e.s) : 1; }
};

inline bool plain(const RowArgs& a) {
  const bool straight = !a.bias_s && !a.bias_t && !(a.student.softcap > 0) && !(a.teacher.softcap > 0) && a.student.scale > 0;
  const bool alike = a.student.scale == a.teacher.scale && a.student.temperature == a.teacher.temperature && a.student.temperatures == a.teacher.temperatures;
  return straight && (a.linear || (!a.difference && a.teacher_mix == 0 && alike));
}

// A block's part of a row. `S` and `T` may lie in shared memory. Vectors begin at `head` and end at `whole`:
// there are none where S and T are not aligned.
template <class In>
struct Slice {
  const In *S, *T;
  int64_t offset;  // of its first entry in the row
  int length, head, whole;
  In* staging;  // shared memory for a tile of rows that are not aligned; null if they are

  OPSD_DEVICE Slice(const In* s, const In* t, int64_t first, int count, In* tile = nullptr)
      : S(s), T(t), offset(first), length(count), head(0), whole(count / LANES<In> * LANES<In>), staging(tile) {
    const bool aligned = (reinterpret_cast<uintptr_t>(s) | reinterpret_cast<uintptr_t>(t)) % 16 == 0;
    if (aligned) staging = nullptr;
    else whole = 0;
  }
  // For sweeps that write entry by entry: vectors from the first entry on that is aligned in S, T and G.
  OPSD_DEVICE Slice peeled(const Output& G) const {
    Slice part = *this;
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(S) % 16);
    part.head = past ? (16 - past) / static_cast<int>(sizeof(In)) : 0;
    part.whole = part.head + (length - part.head) / LANES<In> * LANES<In>;
    const bool alike = past == static_cast<int>(reinterpret_cast<uintptr_t>(T) % 16) && G.aligned(part.head, LANES<In>);
    if (!alike || part.head >= length) part.head = part.whole = 0;
    return part;
  }
};

template <class In>
constexpr int TILE = STAGING_BYTES / 2 / sizeof(In);  // entries

struct Apart {  // `loaded` of a walk whose threads need not wait for each other
  OPSD_DEVICE void operator()() const {}
};

// Calls step(v, S, T) for each of this thread's vectors of N in the slice, with AT_ONCE loads of each buffer in
// flight. `loaded` runs in all threads together, unless it is Apart, after the loads and before their steps.
template <int N, int AT_ONCE, class In, class Loaded, class Step>
OPSD_DEVICE void vectors(const Slice<In>& slice, Loaded loaded, Step step) {
  constexpr bool APART = std::is_same_v<Loaded, Apart>;
  const int stride = threads() * N, first = thread() * N;
#pragma unroll 1
  for (int base = slice.head + (APART ? first : 0); base < slice.whole; base += AT_ONCE * stride) {
    Pack<In, N> S[AT_ONCE], T[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u) {
      const int v = base + u * stride + (APART ? 0 : first);
      if ((APART && u == 0) || v < slice.whole) S[u] = *reinterpret_cast<const Pack<In, N>*>(slice.S + v), T[u] = *reinterpret_cast<const Pack<In, N>*>(slice.T + v);
    }
    loaded();
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u) {
      const int v = base + u * stride + (APART ? 0 : first);
      if ((APART && u == 0) || v < slice.whole) step(v, S[u], T[u]);
    }
  }
}

// The same of the entries outside `head` to `whole`, one at a time.
template <class In, class Loaded, class Step>
OPSD_DEVICE void singles(const Slice<In>& slice, Loaded loaded, Step step) {
  const int rest = slice.head + slice.length - slice.whole;
#pragma unroll 1
  for (int base = 0; base < rest; base += threads()) {
    const int i = base + thread(), v = i < slice.head ? i : i - slice.head + slice.whole;
    Pack<In, 1> S, T;
    if (i < rest) S.entry = slice.S[v], T.entry = slice.T[v];
    loaded();
    if (i < rest) step(v, S, T);
  }
}

template <int N, int AT_ONCE, class In, class Loaded, class Step>
OPSD_DEVICE void walk(Slice<In> slice, Loaded loaded, Step step) {
  if constexpr (N == 1) slice.head = slice.whole = 0;
  else vectors<N, AT_ONCE>(slice, loaded, step);
  singles(slice, loaded, step);
}

// For sums: calls part(slice) for tiles of a slice. Their bits must not depend on a row's address: each thread has the same
// entries in the same order, of rows that are not aligned through shared memory.
template <class In, class Part>
OPSD_DEVICE void tiles(const Slice<In>& slice, Part part) {
  const int tile = slice.staging ? TILE<In> / MOST_THREADS * threads() : slice.length;
  Slice<In> now = slice;
#pragma unroll 1
  for (int first = 0; first < slice.length; first += tile) {
    if (slice.staging) {
      const int count = min(tile, slice.length - first);
      block_sync();
#pragma unroll 4
      for (int i = thread(); i < count; i += threads()) slice.staging[i] = slice.S[first + i], slice.staging[TILE<In> + i] = slice.T[first + i];
      block_sync();
      now = Slice<In>(slice.staging, slice.staging + TILE<In>, slice.offset + first, count);
    }
    part(now);
  }
}

// Entries of a vector in loops in which speed matters, and in the others: half the code.
template <bool PLAIN, class In>
constexpr int WIDTH = PLAIN ? LANES<In> : 4;
// Vectors at once: from device memory as many as its latency takes, from shared memory 8 entries.
template <bool PLAIN, class In, bool HELD>
constexpr int DEPTH = !PLAIN ? 1 : (HELD ? 8 : 16) / LANES<In>;
// Entries at once of rows of a far teacher, which are rare.
template <bool HELD>
constexpr int FAR_WIDTH = HELD ? 1 : 4;

}  // namespace opsd::cuda
