// CUDA threads on a CPU, for csrc/cuda. Each thread is a fiber that runs until it waits for its warp, block
// or cluster.
//
// Deterministic but adversarial: the next fiber is drawn from a generator, so that code which depends on an
// order fails. Threads that wait for others that have exited are an error. The emulator cannot show races
// within a step, nor timing.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#include "launch.h"

#define OPSD_KERNEL
#define OPSD_DEVICE inline
#define OPSD_CALLED inline
#define OPSD_GRID_CONSTANT const
#define __launch_bounds__(threads, blocks)

namespace opsd::cuda {

using std::min;
using Stream = int;

int thread();
int threads();
int64_t block();
int cluster_rank();
int cluster_size();
char* shared_memory();
void block_sync();
void cluster_sync();
// Publishes `bytes` to the other lanes of the warp, then reads those of lane (own ^ mask).
void exchange_lanes(const void* mine, void* theirs, int bytes, int mask);
char* shared_of(int rank);

template <class T>
T shuffle_xor(const T& value, int mask) {
  T result;
  exchange_lanes(&value, &result, sizeof(T), mask);
  return result;
}

// The special-function units, no better than they are documented: each result is off by up to two units in the
// last place, by a number drawn from its bits, and denormal numbers are 0.
float exp2_approx(float x);
float log2_approx(float x);
float reciprocal_approx(float x);
template <class T>
T* kept(T* pointer) {
  return pointer;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

template <class T>
const T* in_block(const T* shared, int rank) {
  return reinterpret_cast<const T*>(shared_of(rank) + (reinterpret_cast<const char*>(shared) - shared_memory()));
}

// OPSD_EMULATED_DEVICE: "90:232448" for an architecture and its shared memory per block.
Device emulated_device();
void run_grid(const std::function<void()>& kernel, int64_t n, const Shape& shape);

template <class... Args>
void launch(void (*kernel)(Args...), int64_t n, const Shape& shape, Stream, Args... args) {
  run_grid([&] { kernel(args...); }, n, shape);
}

}  // namespace opsd::cuda
