// What the kernels take of a device: a thread's index in its block and cluster, their barriers and shared memory,
// the special-function units, and the launch. The tests' emulator has the same names on a CPU.
#pragma once

#include <cstdint>

#if defined(OPSD_EMULATED)
#include "emulator.h"
#else

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "launch.h"

#define OPSD_KERNEL __global__
#define OPSD_DEVICE __device__ __forceinline__
#define OPSD_CALLED __device__ __noinline__
#define OPSD_GRID_CONSTANT const __grid_constant__

namespace opsd::cuda {

OPSD_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
OPSD_DEVICE int threads() { return static_cast<int>(blockDim.x); }
OPSD_DEVICE int64_t block() { return blockIdx.x; }
OPSD_DEVICE void block_sync() { __syncthreads(); }

extern __shared__ uint4 opsd_shared[];
OPSD_DEVICE char* shared_memory() { return reinterpret_cast<char*>(opsd_shared); }

// A cluster is 1 block where the device has none.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
OPSD_DEVICE int cluster_size() { return static_cast<int>(cooperative_groups::this_cluster().num_blocks()); }
OPSD_DEVICE int cluster_rank() { return static_cast<int>(cooperative_groups::this_cluster().block_rank()); }
OPSD_DEVICE void cluster_sync() { asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory"); }
template <class T>
OPSD_DEVICE const T* in_block(const T* shared, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
}
#else
OPSD_DEVICE int cluster_size() { return 1; }
OPSD_DEVICE int cluster_rank() { return 0; }
OPSD_DEVICE void cluster_sync() { __syncthreads(); }
template <class T>
OPSD_DEVICE const T* in_block(const T* shared, int) {
  return shared;
}
#endif

// The value of the lane whose number differs in `mask`, word by word.
template <class T>
OPSD_DEVICE T shuffle_xor(const T& value, int mask) {
  constexpr int WORDS = sizeof(T) / 4;
  union Bits {
    T value;
    uint32_t words[WORDS];
    __device__ Bits() {}
  } in, out;
  in.value = value;
#pragma unroll
  for (int i = 0; i < WORDS; ++i) out.words[i] = __shfl_xor_sync(0xffffffffu, in.words[i], mask);
  return out.value;
}

// The special-function units: within 2 units in the last place, denormal numbers are 0. log2_approx: within
// 2^-22 of a number in [1/2, 2].
OPSD_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
OPSD_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
OPSD_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// A pointer to device memory that the compiler keeps as it is: else it adds up the base, the row and the entry
// again for every vector.
template <class T>
OPSD_DEVICE T* kept(T* pointer) {
  asm("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}
OPSD_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

inline void check(cudaError_t code) {
  if (code != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(code));
}

// One cluster (or block) of `shape` for each of n rows.
template <class... Args>
void launch(void (*kernel)(Args...), int64_t n, const Shape& shape, cudaStream_t stream, Args... args) {
  if (shape.shared_bytes > 48 << 10) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes)));
  const int blocks = shape.blocks > 0 ? shape.blocks : 1;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(n * blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = &cluster, config.numAttrs = blocks > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace opsd::cuda

#endif
