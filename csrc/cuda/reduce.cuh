// Reduces a row's values over its threads. Thread numbers fix the order of additions: same bits in every run.
#pragma once

#include "math.cuh"

namespace opsd::cuda {

// Shared memory for the parts of warps and blocks. The other blocks of the cluster read `whole`.
struct Exchange {
  uint32_t warps[MOST_THREADS / WARP][MOST_WORDS];
  uint32_t blocks[MOST_BLOCKS][MOST_WORDS];
  uint32_t whole[MOST_WORDS];
};
static_assert(sizeof(Exchange) == EXCHANGE_BYTES);

constexpr int MOST_PARTS = 8;
static_assert(MOST_THREADS / WARP <= MOST_PARTS && MOST_BLOCKS <= MOST_PARTS);

// Returns the same Part in every thread of the row: `absorb` must be commutative, bit for bit, and a Part that has
// absorbed nothing neutral. All threads of the cluster must call it. Called, since it is a tenth of a kernel's code.
template <class Part>
OPSD_CALLED Part merge(Part part, Exchange& x) {
  static_assert(sizeof(Part) % 4 == 0 && sizeof(Part) / 4 <= MOST_WORDS);
  constexpr int WORDS = sizeof(Part) / 4;
  const int blocks = cluster_size(), own = thread() % MOST_PARTS;
#pragma unroll 1
  for (int lanes = WARP, level = 0;; lanes = MOST_PARTS, ++level) {
#pragma unroll 1  // a fifth of the code
    for (int mask = lanes / 2; mask > 0; mask /= 2) part.absorb(shuffle_xor(part, mask));
    if (level == (blocks > 1 ? 2 : 1)) break;
    if (level == 0) {
      if (thread() % WARP == 0) memcpy(x.warps[thread() / WARP], &part, sizeof(Part));
      block_sync();
    } else {
      if (thread() == 0) memcpy(x.whole, &part, sizeof(Part));
      cluster_sync();
#pragma unroll 1
      for (int i = thread(); i < blocks * WORDS; i += threads()) x.blocks[i / WORDS][i % WORDS] = in_block(x.whole, i / WORDS)[i % WORDS];
      cluster_sync();  // no block overwrites `whole`, or exits, while another one reads it
    }
    const uint32_t(*const parts)[MOST_WORDS] = level == 0 ? x.warps : x.blocks;
    part = Part();
    if (own < (level == 0 ? threads() / WARP : blocks)) memcpy(static_cast<void*>(&part), parts[own], sizeof(Part));
  }
  block_sync();
  return part;
}

// Sums of a thread, then of a row, each sweep's own; the largest and smallest o.
struct Sums {
  float of[7] = {}, high = -INF, low = INF;
  OPSD_DEVICE void absorb(const Sums& other) {
#pragma unroll
    for (int i = 0; i < 7; ++i) of[i] += other.of[i];
    high = max(high, other.high), low = min(low, other.low);
  }
};

}  // namespace opsd::cuda
