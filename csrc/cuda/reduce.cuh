// Reduces a row's values over its threads. Thread numbers fix the order of additions: same bits in every run.
#pragma once

#include "cluster.cuh"
#include "launch.h"

namespace opsd::cuda {

// Shared memory for the parts of warps and blocks. The other blocks of the cluster read `whole`.
struct Exchange {
  uint32_t warps[MOST_THREADS / WARP][MOST_WORDS];
  uint32_t blocks[MOST_BLOCKS][MOST_WORDS];
  uint32_t whole[MOST_WORDS];
};
static_assert(sizeof(Exchange) == EXCHANGE_BYTES);

// A Part as words: shared memory is untyped.
template <class Part>
OPSD_DEVICE Part part_of(const uint32_t* words) {
  Part part;
  memcpy(static_cast<void*>(&part), words, sizeof(Part));
  return part;
}

// Over each `lanes` neighbours of a warp.
template <class Part>
OPSD_DEVICE Part over_lanes(Part part, int lanes) {
#pragma unroll 1  // a fifth of the code
  for (int mask = lanes / 2; mask > 0; mask /= 2) part.absorb(shuffle_xor(part, mask));
  return part;
}

constexpr int MOST_PARTS = 8;
static_assert(MOST_THREADS / WARP <= MOST_PARTS && MOST_BLOCKS <= MOST_PARTS);

// A Part that has absorbed nothing must be neutral.
template <class Part>
OPSD_DEVICE Part over_parts(const uint32_t (*parts)[MOST_WORDS], int count) {
  const int i = thread() % MOST_PARTS;
  return over_lanes(i < count ? part_of<Part>(parts[i]) : Part(), MOST_PARTS);
}

// Returns the same Part in every thread of the row: `absorb` must be commutative, bit for bit. All threads of
// the cluster must call it.
template <class Part>
OPSD_DEVICE Part merge(Part part, Exchange& x) {
  static_assert(sizeof(Part) % 4 == 0 && sizeof(Part) / 4 <= MOST_WORDS);
  constexpr int WORDS = sizeof(Part) / 4;
  part = over_lanes(part, WARP);
  if (thread() % WARP == 0) memcpy(x.warps[thread() / WARP], &part, sizeof(Part));
  block_sync();
  part = over_parts<Part>(x.warps, threads() / WARP);
  const int blocks = cluster_size();
  if (blocks > 1) {
    if (thread() == 0) memcpy(x.whole, &part, sizeof(Part));
    cluster_sync();
#pragma unroll 1
    for (int i = thread(); i < blocks * WORDS; i += threads()) x.blocks[i / WORDS][i % WORDS] = in_block(x.whole, i / WORDS)[i % WORDS];
    cluster_sync();  // no block overwrites `whole`, or exits, while another one reads it
    part = over_parts<Part>(x.blocks, blocks);
  }
  block_sync();
  return part;
}

}  // namespace opsd::cuda
