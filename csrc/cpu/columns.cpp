// Compiled once per instruction set (OPSD_CAPABILITY), doubles in the baseline build alone.
#include "columns.h"

#include <algorithm>
#include <vector>

#include "vec.h"

namespace opsd::OPSD_CAPABILITY {
namespace {

constexpr int ROWS = 4;  // for each load and store of the sums

// sums[v] += (weight G)^2 over R rows; totals[r] = the sum of row r. Weights and totals count from row 0.
template <class X, class In, int R>
OPSD_INLINE void add_rows(const In* const* rows, const ElementOf<X>* weights, ElementOf<X>* sums, ElementOf<X>* totals, int64_t width) {
  constexpr int L = LANES<X>;
  X total[R], weight[R];
  for (int r = 0; r < R; ++r) total[r] = X(0.0), weight[r] = X(static_cast<double>(weights[r]));
  int64_t v = 0;
  for (; v + L <= width; v += L) {
    X sum = load(sums + v);
    for (int r = 0; r < R; ++r) {
      const X g = load(rows[r] + v), scaled = weight[r] * g;
      total[r] = total[r] + g;
      sum = fma(scaled, scaled, sum);
    }
    store(sums + v, sum);
  }
  for (int r = 0; r < R; ++r) totals[r] = static_cast<ElementOf<X>>(reduce_add(total[r]));
  if (v == width) return;
  // The last columns of a row, padded with zeros.
  In padded[L] = {};
  ElementOf<X> last[L] = {};
  for (int64_t i = v; i < width; ++i) last[i - v] = sums[i];
  X sum = load(last);
  for (int r = 0; r < R; ++r) {
    std::copy(rows[r] + v, rows[r] + width, padded);
    const X g = load(padded), scaled = weight[r] * g;
    totals[r] += static_cast<ElementOf<X>>(reduce_add(g));
    sum = fma(scaled, scaled, sum);
  }
  store(last, sum);
  std::copy(last, last + (width - v), sums + v);
}

template <class X, class In>
void norms_of(const NormArgs& a, int64_t begin, int64_t end) {
  using Sum = ElementOf<X>;
  const auto* scale = static_cast<const Sum*>(a.scale);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * NORM_BLOCK, width = std::min(a.V - start, NORM_BLOCK);
    Sum* norms = static_cast<Sum*>(a.norms) + start;
    Sum* totals = static_cast<Sum*>(a.sums) + block * a.n;
    std::fill(norms, norms + width, Sum{0});
    const auto row = [&](int64_t i) { return static_cast<const In*>(a.G) + i * a.stride + start; };
    const auto weight = [&](int64_t i) { return scale ? scale[i] : Sum{1}; };
    int64_t i = 0;
    for (; i + ROWS <= a.n; i += ROWS) {
      const In* rows[ROWS] = {row(i), row(i + 1), row(i + 2), row(i + 3)};
      const Sum weights[ROWS] = {weight(i), weight(i + 1), weight(i + 2), weight(i + 3)};
      add_rows<X, In, ROWS>(rows, weights, norms, totals + i, width);
    }
    for (; i < a.n; ++i) {
      const In* rows[1] = {row(i)};
      const Sum weights[1] = {weight(i)};
      add_rows<X, In, 1>(rows, weights, norms, totals + i, width);
    }
  }
}

#if defined(__AVX512F__)
// Which of 16 columns from `start` on are gathered.
struct Group {
  int64_t start;
  __mmask16 lanes;
};

OPSD_INLINE Vec load_lanes(const float* p, __mmask16 lanes) { return Vec(_mm512_maskz_loadu_ps(lanes, p)); }
OPSD_INLINE Ints load_lanes(const uint16_t* p, __mmask16 lanes) {
  return (Ints)_mm512_maskz_cvtepu16_epi32(ALL, _mm256_maskz_loadu_epi16(lanes, p));
}

// Writes the entries of the lanes side by side, and returns them in their lanes, zero elsewhere.
OPSD_INLINE Vec compress(const float* from, __mmask16 lanes, __mmask16 first, float* to) {
  const Vec entries = load_lanes(from, lanes);
  _mm512_mask_storeu_ps(to, first, _mm512_maskz_compress_ps(lanes, entries.v));
  return entries;
}
OPSD_INLINE Ints compress_bits(const uint16_t* from, __mmask16 lanes, __mmask16 first, uint16_t* to) {
  const Ints entries = load_lanes(from, lanes);
  const __m512i together = _mm512_maskz_compress_epi32(lanes, (__m512i)entries);
  _mm256_mask_storeu_epi16(to, first, _mm512_maskz_cvtepi32_epi16(ALL, together));
  return entries;
}
OPSD_INLINE Vec compress(const BFloat16* from, __mmask16 lanes, __mmask16 first, BFloat16* to) {
  return from_bits(compress_bits(&from->bits, lanes, first, &to->bits) << 16);
}
OPSD_INLINE Vec compress(const Half* from, __mmask16 lanes, __mmask16 first, Half* to) {
  const Ints entries = compress_bits(&from->bits, lanes, first, &to->bits);
  return Vec(_mm512_maskz_cvtph_ps(ALL, _mm512_maskz_cvtepi32_epi16(ALL, (__m512i)entries)));
}

template <class X, class In>
void gather_of(const GatherArgs& a, int64_t begin, int64_t end) {
  std::vector<Group> groups;
  for (int64_t k = 0; k < a.K; ++k) {
    const int64_t start = a.columns[k] / VEC_LANES * VEC_LANES;
    if (groups.empty() || groups.back().start != start) groups.push_back({start, 0});
    groups.back().lanes = static_cast<__mmask16>(groups.back().lanes | 1u << (a.columns[k] - start));
  }
  for (int64_t i = begin; i < end; ++i) {
    const In* row = static_cast<const In*>(a.G) + i * a.stride;
    In* out = static_cast<In*>(a.out) + i * a.stride_out;
    Vec total;
    for (const Group& group : groups) {
      const int count = __builtin_popcount(group.lanes);
      total = total + compress(row + group.start, group.lanes, first_lanes(count).m, out);
      out += count;
    }
    static_cast<float*>(a.sums)[i] -= static_cast<float>(reduce_add(total));
  }
}
#else
template <class X, class In>
void gather_of(const GatherArgs& a, int64_t begin, int64_t end) {
  using Sum = ElementOf<X>;
  constexpr int L = LANES<X>;
  for (int64_t i = begin; i < end; ++i) {
    const In* row = static_cast<const In*>(a.G) + i * a.stride;
    In* out = static_cast<In*>(a.out) + i * a.stride_out;
    X total(0.0);
    int64_t k = 0;
    for (; k + L <= a.K; k += L) {
      for (int lane = 0; lane < L; ++lane) out[k + lane] = row[a.columns[k + lane]];
      total = total + load(out + k);
    }
    In last[L] = {};
    for (int64_t rest = k; rest < a.K; ++rest) out[rest] = last[rest - k] = row[a.columns[rest]];
    total = total + load(last);
    static_cast<Sum*>(a.sums)[i] -= static_cast<Sum>(reduce_add(total));
  }
}
#endif

#if defined(OPSD_BASELINE)
#define OPSD_DOUBLES(run) \
  case Dtype::FLOAT64: return run<double, double>(a, begin, end);
#else
#define OPSD_DOUBLES(run) \
  case Dtype::FLOAT64: return;  // dispatch.cpp sends doubles to the baseline build
#endif
#define OPSD_BY_DTYPE(run)                                             \
  switch (a.dtype) {                                                   \
    OPSD_DOUBLES(run)                                                  \
    case Dtype::FLOAT32: return run<Vec, float>(a, begin, end);        \
    case Dtype::BFLOAT16: return run<Vec, BFloat16>(a, begin, end);    \
    case Dtype::FLOAT16: return run<Vec, Half>(a, begin, end);         \
  }

void norms(const NormArgs& a, int64_t begin, int64_t end) { OPSD_BY_DTYPE(norms_of) }
void gather(const GatherArgs& a, int64_t begin, int64_t end) { OPSD_BY_DTYPE(gather_of) }

}  // namespace

const ColumnKernels COLUMN_KERNELS{norms, gather};

}  // namespace opsd::OPSD_CAPABILITY
