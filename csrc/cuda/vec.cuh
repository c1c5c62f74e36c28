// Sixteen bytes of a row at a time, as floats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "math.cuh"
#include "../row_args.h"

namespace opsd::cuda {

using BFloat16 = __nv_bfloat16;
using Half = __half;

template <class T>
constexpr int LANES = 16 / sizeof(T);

OPSD_DEVICE float to_float(float x) { return x; }
OPSD_DEVICE float to_float(BFloat16 x) { return __bfloat162float(x); }
OPSD_DEVICE float to_float(Half x) { return __half2float(x); }

template <int COUNT>
struct alignas(4 * COUNT) Words {
  uint32_t word[COUNT];
};

// N neighbours of a row. In words: 16-bit members cost two instructions each to bring into registers.
template <class T, int N>
struct Pack : Words<N * sizeof(T) / 4> {};
template <class T>
struct Pack<T, 1> {
  T entry;
};

template <int N>
struct Floats {
  float of[N];
};

template <class T>
using Two = std::conditional_t<std::is_same_v<T, Half>, __half2, __nv_bfloat162>;

template <class T>
OPSD_DEVICE Two<T> two(uint32_t word) {
  Two<T> pair;
  memcpy(static_cast<void*>(&pair), &word, 4);
  return pair;
}

template <class T, int N>
OPSD_DEVICE Floats<N> to_floats(const Pack<T, N>& pack) {
  Floats<N> to;
  if constexpr (N == 1) {
    to.of[0] = to_float(pack.entry);
  } else if constexpr (sizeof(T) == 4) {
    memcpy(to.of, pack.word, sizeof(pack));
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if constexpr (std::is_same_v<T, Half>) to.of[2 * i] = to_float(two<T>(pack.word[i]).x), to.of[2 * i + 1] = to_float(two<T>(pack.word[i]).y);
      else to.of[2 * i] = float_of(pack.word[i] << 16), to.of[2 * i + 1] = float_of(pack.word[i] & 0xffff0000u);
    }
  }
  return to;
}

// The largest entry; NaN is none.
template <class T, int N>
OPSD_DEVICE float largest_of(const Pack<T, N>& pack) {
  if constexpr (sizeof(T) == 2 && N > 1) {
    Two<T> pair = two<T>(pack.word[0]);
#pragma unroll
    for (int i = 1; i < N / 2; ++i) pair = __hmax2(pair, two<T>(pack.word[i]));
    return fmaxf(to_float(pair.x), to_float(pair.y));
  } else {
    const Floats<N> entry = to_floats(pack);
    float largest = entry.of[0];
#pragma unroll
    for (int i = 1; i < N; ++i) largest = fmaxf(largest, entry.of[i]);
    return largest;
  }
}

// Two floats as a 16-bit type.
template <class T>
OPSD_DEVICE uint32_t word_of(float a, float b) {
  uint32_t word;
  Two<T> pair;
  if constexpr (std::is_same_v<T, Half>) pair = __floats2half2_rn(a, b);
  else pair = __floats2bfloat162_rn(a, b);
  memcpy(&word, &pair, 4);
  return word;
}

// One of the 16-bit types, known at run time.
struct Narrow {
  uint16_t bits;
};

// A row that a sweep writes, of any type.
struct Output {
  char* row;
  Dtype dtype;
  OPSD_DEVICE Output(void* base, int64_t first, Dtype type) : row(kept(static_cast<char*>(base) + first * (type == Dtype::FLOAT32 ? 4 : 2))), dtype(type) {}
  OPSD_DEVICE int itemsize() const { return dtype == Dtype::FLOAT32 ? 4 : 2; }
  // True if N entries from `first` on, and every Nth, can be stored at once.
  OPSD_DEVICE bool aligned(int first, int N) const {
    return (reinterpret_cast<uintptr_t>(row) + first * itemsize()) % min(16, N * itemsize()) == 0;
  }
  template <class T>
  OPSD_DEVICE uint32_t pair(float a, float b) const {
    if constexpr (!std::is_same_v<T, Narrow>) return word_of<T>(a, b);
    return dtype == Dtype::FLOAT16 ? word_of<Half>(a, b) : word_of<BFloat16>(a, b);
  }
  // T: the row's type.
  template <class T, int N>
  OPSD_DEVICE void store(int v, const Floats<N>& values) const {
    char* const to = row + sizeof(T) * v;
    if constexpr (N == 1) {
      if constexpr (sizeof(T) == 4) *reinterpret_cast<float*>(to) = values.of[0];
      else *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(pair<T>(values.of[0], 0));
    } else {
      constexpr int WORDS = N * sizeof(T) / 4, AT_ONCE = WORDS < 4 ? WORDS : 4;
      Words<AT_ONCE> parts[WORDS / AT_ONCE];
      if constexpr (sizeof(T) == 4) {
        memcpy(parts, values.of, sizeof(values));
      } else {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) parts[i / AT_ONCE].word[i % AT_ONCE] = pair<T>(values.of[2 * i], values.of[2 * i + 1]);
      }
#pragma unroll
      for (int i = 0; i < WORDS / AT_ONCE; ++i) reinterpret_cast<Words<AT_ONCE>*>(to)[i] = parts[i];
    }
  }
  template <int N>
  OPSD_DEVICE void store_any(int v, const Floats<N>& values) const {
    if (dtype == Dtype::FLOAT32) store<float>(v, values);
    else store<Narrow>(v, values);
  }
};

}  // namespace opsd::cuda
