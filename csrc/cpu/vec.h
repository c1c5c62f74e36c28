// A SIMD vector of floats, as wide as the flags of this translation unit allow, and the same operations for a
// double.
//
// Everything is in namespace opsd::OPSD_CAPABILITY and inlined, so that the linker cannot pick a function
// that was compiled for a newer processor.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../row_args.h"

#define OPSD_INLINE inline __attribute__((always_inline))
#define OPSD_SWEEP __attribute__((noinline))  // one copy of each sweep, however many drivers call it

namespace opsd::OPSD_CAPABILITY {

#if defined(__AVX512F__)
constexpr int VEC_LANES = 16;
#elif defined(__AVX2__)
constexpr int VEC_LANES = 8;
#else
constexpr int VEC_LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * VEC_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * VEC_LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * VEC_LANES)));

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

#if defined(__AVX512F__)
struct Mask {
  __mmask16 m;
};
#else
struct Mask {
  Ints m;
};
#endif

struct Vec {
  Floats v;
  OPSD_INLINE Vec() : v{} {}
  OPSD_INLINE explicit Vec(Floats raw) : v(raw) {}
  OPSD_INLINE explicit Vec(double a) : v(Floats{} + static_cast<float>(a)) {}
};

template <class X>
constexpr int LANES = 1;
template <>
inline constexpr int LANES<Vec> = VEC_LANES;

// The type of a scratch element and of the statistics.
template <class X>
struct Element {
  using type = X;
};
template <>
struct Element<Vec> {
  using type = float;
};
template <class X>
using ElementOf = typename Element<X>::type;

OPSD_INLINE Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
OPSD_INLINE Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
OPSD_INLINE Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
OPSD_INLINE Vec operator/(Vec a, Vec b) { return Vec(a.v / b.v); }
OPSD_INLINE Vec operator-(Vec a) { return Vec(-a.v); }

#if defined(__AVX512F__)
constexpr __mmask16 ALL = 0xffff;  // the unmasked forms make GCC 12 warn about its own header
OPSD_INLINE Vec fma(Vec a, Vec b, Vec c) { return Vec(_mm512_fmadd_ps(a.v, b.v, c.v)); }
OPSD_INLINE Vec max(Vec a, Vec b) { return Vec(_mm512_maskz_max_ps(ALL, a.v, b.v)); }
OPSD_INLINE Vec abs(Vec a) { return Vec(_mm512_abs_ps(a.v)); }
OPSD_INLINE Vec max_abs(Vec a, Vec b) { return Vec(_mm512_maskz_range_ps(ALL, a.v, b.v, 0b1011)); }
OPSD_INLINE Vec reciprocal(Vec a) {
  const __m512 guess = _mm512_maskz_rcp14_ps(ALL, a.v);
  return Vec(_mm512_fmadd_ps(guess, _mm512_fnmadd_ps(a.v, guess, Floats{} + 1.0f), guess));
}
OPSD_INLINE Mask operator>(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
OPSD_INLINE Mask operator<(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
OPSD_INLINE Mask operator<=(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
OPSD_INLINE Mask operator==(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
OPSD_INLINE Vec select(Mask m, Vec yes, Vec no) { return Vec(_mm512_mask_blend_ps(m.m, no.v, yes.v)); }
OPSD_INLINE Mask first_lanes(int count) { return {static_cast<__mmask16>((1u << count) - 1)}; }
OPSD_INLINE int lowest_lane(Mask m) { return m.m ? __builtin_ctz(m.m) : -1; }
#else
#if defined(__AVX2__)
OPSD_INLINE Vec fma(Vec a, Vec b, Vec c) { return Vec(_mm256_fmadd_ps(a.v, b.v, c.v)); }
OPSD_INLINE Vec max(Vec a, Vec b) { return Vec(_mm256_max_ps(a.v, b.v)); }
#else
OPSD_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__FP_FAST_FMAF)
  for (int i = 0; i < VEC_LANES; ++i) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
#else
  return Vec(a.v * b.v + c.v);
#endif
}
OPSD_INLINE Vec max(Vec a, Vec b) { return Vec(a.v > b.v ? a.v : b.v); }
#endif
#if !defined(__AVX2__) && !defined(__FP_FAST_FMAF)
// The unrounded product, where rounding a logit would cost too much.
OPSD_INLINE Vec exact_fma(Vec a, Vec b, Vec c) {
  typedef double Doubles __attribute__((vector_size(8 * VEC_LANES)));
  const Doubles x = __builtin_convertvector(a.v, Doubles), y = __builtin_convertvector(b.v, Doubles), z = __builtin_convertvector(c.v, Doubles);
  return Vec(__builtin_convertvector(x * y + z, Floats));
}
#endif
OPSD_INLINE Vec abs(Vec a) { return Vec((Floats)((Ints)a.v & 0x7fffffff)); }
OPSD_INLINE Vec max_abs(Vec a, Vec b) { return max(abs(b), a); }
OPSD_INLINE Vec reciprocal(Vec a) { return Vec(1.0) / a; }
OPSD_INLINE Mask operator>(Vec a, Vec b) { return {a.v > b.v}; }
OPSD_INLINE Mask operator<(Vec a, Vec b) { return {a.v < b.v}; }
OPSD_INLINE Mask operator<=(Vec a, Vec b) { return {a.v <= b.v}; }
OPSD_INLINE Mask operator==(Vec a, Vec b) { return {a.v == b.v}; }
OPSD_INLINE Vec select(Mask m, Vec yes, Vec no) { return Vec((Floats)((m.m & (Ints)yes.v) | (~m.m & (Ints)no.v))); }
OPSD_INLINE Mask first_lanes(int count) {
  Mask mask{};
  for (int i = 0; i < count; ++i) mask.m[i] = -1;
  return mask;
}
OPSD_INLINE int lowest_lane(Mask m) {
  for (int i = 0; i < VEC_LANES; ++i)
    if (m.m[i]) return i;
  return -1;
}
#endif

#if defined(__AVX2__) || defined(__FP_FAST_FMAF)
OPSD_INLINE Vec exact_fma(Vec a, Vec b, Vec c) { return fma(a, b, c); }
#endif

// In double over a fixed tree: the same bits on every call.
OPSD_INLINE double reduce_add(Vec a) {
#if defined(__AVX512F__)
  const __m256 low = _mm512_maskz_extractf32x8_ps(0xff, a.v, 0), high = _mm512_maskz_extractf32x8_ps(0xff, a.v, 1);
  const __m512d pairs = _mm512_maskz_cvtps_pd(0xff, low) + _mm512_maskz_cvtps_pd(0xff, high);
  const __m256d fours = _mm512_maskz_extractf64x4_pd(0xf, pairs, 0) + _mm512_maskz_extractf64x4_pd(0xf, pairs, 1);
  return (fours[0] + fours[2]) + (fours[1] + fours[3]);
#else
  double sums[VEC_LANES];
  for (int i = 0; i < VEC_LANES; ++i) sums[i] = static_cast<double>(a.v[i]);
  for (int width = VEC_LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  return sums[0];
#endif
}
OPSD_INLINE double reduce_max(Vec a) {
  float top = a.v[0];
  for (int i = 1; i < VEC_LANES; ++i) top = a.v[i] > top ? a.v[i] : top;
  return static_cast<double>(top);
}

OPSD_INLINE double first_lane(Vec a) { return static_cast<double>(a.v[0]); }

OPSD_INLINE Ints bits(Vec a) { return (Ints)a.v; }
OPSD_INLINE Vec from_bits(Ints a) { return Vec((Floats)a); }
OPSD_INLINE Vec to_float(Ints a) { return Vec(__builtin_convertvector(a, Floats)); }
OPSD_INLINE Ints to_int(Vec a) { return __builtin_convertvector(a.v, Ints); }

// y * 2^n for integer n <= 127; 0 where n < -126.
OPSD_INLINE Vec scale_by_power(Vec y, Vec n) {
#if defined(__AVX512F__)
  return Vec(_mm512_maskz_scalef_ps(ALL, y.v, n.v));
#else
  return y * from_bits((to_int(max(n, Vec(-127.0))) + 127) << 23);
#endif
}

// ---- memory: 16-bit floats widen to exact floats, and narrow to the nearest, ties to even ----

OPSD_INLINE Vec load(const float* p) {
  Vec a;
  std::memcpy(&a.v, p, sizeof(a.v));
  return a;
}
// One uop instead of four: GCC splits __builtin_convertvector into halves.
OPSD_INLINE Ints widen(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Ints)_mm512_maskz_cvtepu16_epi32(ALL, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Shorts raw;
  std::memcpy(&raw, p, sizeof(raw));
  return __builtin_convertvector(raw, Ints);
#endif
}
OPSD_INLINE Vec load(const BFloat16* p) { return from_bits(widen(&p->bits) << 16); }
OPSD_INLINE void store(float* p, Vec a) { std::memcpy(p, &a.v, sizeof(a.v)); }

OPSD_INLINE void narrow(uint16_t* p, Ints a) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(ALL, (__m512i)a));
#else
  const Shorts low = __builtin_convertvector(a, Shorts);
  std::memcpy(p, &low, sizeof(low));
#endif
}

#if defined(__AVX512F__)
// One instruction for the rounding below, if the processor has it: checked at run time, so that one AVX-512
// build serves all processors.
static const bool HAS_BF16 = __builtin_cpu_supports("avx512bf16");
#endif

OPSD_INLINE void store(BFloat16* p, Vec a) {
#if defined(__AVX512F__)
  if (HAS_BF16) {
    __m256i rounded;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(a.v));
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded);
  }
#endif
  const Ints raw = bits(a);
  const Ints rounded = raw + 0x7fff + ((raw >> 16) & 1);
  // a NaN must not be rounded into a number
  const Vec kept = select(a == a, from_bits(rounded), from_bits(raw | 0x400000));
  narrow(&p->bits, bits(kept) >> 16);
}

#if defined(__AVX512F__)
OPSD_INLINE Vec load(const Half* p) { return Vec(_mm512_maskz_cvtph_ps(ALL, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))); }
OPSD_INLINE void store(Half* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(ALL, a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
OPSD_INLINE Vec load(const Half* p) { return Vec(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
OPSD_INLINE void store(Half* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
OPSD_INLINE Ints select_ints(Ints m, Ints yes, Ints no) { return (m & yes) | (~m & no); }
OPSD_INLINE Vec load(const Half* p) {
  const Ints wide = widen(&p->bits);
  const Ints magnitude = wide & 0x7fff, sign = (wide & 0x8000) << 16;
  const Vec normal = from_bits((magnitude << 13) + (112 << 23));
  const Vec special = from_bits((magnitude << 13) | 0x7f800000);
  const Vec tiny = to_float(magnitude) * Vec(0x1p-24);
  const Vec value = select({magnitude < 0x400}, tiny, select({magnitude >= 0x7c00}, special, normal));
  return from_bits(bits(value) | sign);
}
OPSD_INLINE void store(Half* p, Vec a) {
  const Ints raw = bits(a), magnitude = raw & 0x7fffffff, sign = (raw >> 16) & 0x8000;
  const Ints normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112 << 23)) >> 13;
  // 0.5 has the spacing of a subnormal half: the addition rounds
  const Ints tiny = bits(from_bits(magnitude) + Vec(0.5)) - 0x3f000000;
  const Ints special = select_ints(magnitude > 0x7f800000, Ints{} + 0x7e00, Ints{} + 0x7c00);
  const Ints finite = select_ints(magnitude < 0x38800000, tiny, normal);
  const Ints value = select_ints(magnitude >= 0x477ff000, special, finite) | sign;  // from 65520 up: infinity
  narrow(&p->bits, value);
}
#endif

// ---- the same for a double, one lane wide ----

OPSD_INLINE double fma(double a, double b, double c) { return a * b + c; }
OPSD_INLINE double exact_fma(double a, double b, double c) { return a * b + c; }
OPSD_INLINE double max_abs(double a, double b) { return b < 0 ? (-b > a ? -b : a) : (b > a ? b : a); }
OPSD_INLINE double reduce_add(double a) { return a; }
OPSD_INLINE double reduce_max(double a) { return a; }
OPSD_INLINE double first_lane(double a) { return a; }
OPSD_INLINE double load(const double* p) { return *p; }
OPSD_INLINE void store(double* p, double a) { *p = a; }
OPSD_INLINE int lowest_lane(bool m) { return m ? 0 : -1; }

}  // namespace opsd::OPSD_CAPABILITY
