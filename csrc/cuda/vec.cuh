// Sixteen bytes of a row at a time, as floats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cluster.cuh"
#include "../row_args.h"

namespace opsd::cuda {

using BFloat16 = __nv_bfloat16;
using Half = __half;

OPSD_DEVICE float to_float(float x) { return x; }
OPSD_DEVICE float to_float(BFloat16 x) { return __bfloat162float(x); }
OPSD_DEVICE float to_float(Half x) { return __half2float(x); }
OPSD_DEVICE void assign(float& to, float x) { to = x; }
OPSD_DEVICE void assign(BFloat16& to, float x) { to = __float2bfloat16_rn(x); }
OPSD_DEVICE void assign(Half& to, float x) { to = __float2half_rn(x); }

template <class T>
constexpr int LANES = 16 / sizeof(T);

// N neighbours of a row: sixteen bytes, or one entry.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T entry[N];
};

template <int M, class T, int N>
OPSD_DEVICE Pack<T, M> part(const Pack<T, N>& whole, int first) {
  Pack<T, M> result;
#pragma unroll
  for (int i = 0; i < M; ++i) result.entry[i] = whole.entry[first + i];
  return result;
}

template <class T>
OPSD_DEVICE bool aligned(const T* row) {
  return reinterpret_cast<uintptr_t>(row) % 16 == 0;
}

template <int N, class T>
OPSD_DEVICE Pack<T, N> load(const T* from, bool aligned) {
  if (aligned) return *reinterpret_cast<const Pack<T, N>*>(from);
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.entry[i] = from[i];
  return pack;
}

template <class T, int N>
OPSD_DEVICE void store_as(T* to, bool aligned, const float (&values)[N]) {
  constexpr int COUNT = N * sizeof(T) < 16 ? N : 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < N; i += COUNT) {
    Pack<T, COUNT> part;
#pragma unroll
    for (int j = 0; j < COUNT; ++j) assign(part.entry[j], values[i + j]);
    if (aligned) {
      *reinterpret_cast<Pack<T, COUNT>*>(to + i) = part;
    } else {
#pragma unroll
      for (int j = 0; j < COUNT; ++j) to[i + j] = part.entry[j];
    }
  }
}

// A row of any type, written a pack at a time.
struct Output {
  void* row;
  Dtype dtype;
  bool aligned;
  OPSD_DEVICE Output(void* base, int64_t first, Dtype type) : dtype(type) {
    const int64_t bytes = type == Dtype::FLOAT32 ? 4 : 2;
    row = static_cast<char*>(base) + first * bytes;
    aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0;
  }
  template <int N>
  OPSD_DEVICE void store(int v, const float (&values)[N]) const {
    const bool whole = aligned || N == 1;
    if (dtype == Dtype::FLOAT32) store_as(static_cast<float*>(row) + v, whole, values);
    else if (dtype == Dtype::BFLOAT16) store_as(static_cast<BFloat16*>(row) + v, whole, values);
    else store_as(static_cast<Half*>(row) + v, whole, values);
  }
};

}  // namespace opsd::cuda
