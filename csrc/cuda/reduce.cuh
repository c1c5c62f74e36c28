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

template <class Part>
OPSD_DEVICE Part fold(const uint32_t (*parts)[MOST_WORDS], int count) {
  Part total = part_of<Part>(parts[0]);
  for (int i = 1; i < count; ++i) total.absorb(part_of<Part>(parts[i]));
  return total;
}

// Returns the same Part in every thread of the row: `absorb` must be commutative, bit for bit. All threads of
// the cluster must call it.
template <class Part>
OPSD_DEVICE Part merge(Part part, Exchange& x) {
  static_assert(sizeof(Part) % 4 == 0 && sizeof(Part) / 4 <= MOST_WORDS);
  constexpr int WORDS = sizeof(Part) / 4;
#pragma unroll
  for (int mask = WARP / 2; mask > 0; mask /= 2) part.absorb(shuffle_xor(part, mask));
  if (thread() % WARP == 0) memcpy(x.warps[thread() / WARP], &part, sizeof(Part));
  block_sync();
  part = fold<Part>(x.warps, threads() / WARP);
  const int blocks = cluster_size();
  if (blocks > 1) {
    if (thread() == 0) memcpy(x.whole, &part, sizeof(Part));
    cluster_sync();
    for (int i = thread(); i < blocks * WORDS; i += threads()) x.blocks[i / WORDS][i % WORDS] = in_block(x.whole, i / WORDS)[i % WORDS];
    cluster_sync();  // no block overwrites `whole`, or exits, while another one reads it
    part = fold<Part>(x.blocks, blocks);
  }
  block_sync();
  return part;
}

}  // namespace opsd::cuda
