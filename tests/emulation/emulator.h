// CUDA's threads on a CPU, for csrc/cuda: each is a fiber of its own, and runs until it waits for others of its warp, block or cluster.
//
// Deterministic but adversarial: whoever may run next is drawn from a generator, so that code which leans on an order fails. A kernel in which some threads
// wait for others that have left is an error. What it cannot show: races between accesses that no order of whole steps brings out, and anything about time.
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
// Writes `bytes` for the other lanes of the warp to read, and reads those of lane (own ^ mask).
void exchange_lanes(const void* mine, void* theirs, int bytes, int mask);
char* shared_of(int rank);

template <class T>
T shuffle_xor(const T& value, int mask) {
  T result;
  exchange_lanes(&value, &result, sizeof(T), mask);
  return result;
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
