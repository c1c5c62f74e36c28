// Spreads a row over threads and blocks, by its size and the device alone: a row gives the same bits in every
// batch.
#pragma once

#include <algorithm>
#include <cstdint>

namespace opsd::cuda {

// The device's properties behind the choice.
struct Device {
  int architecture = 0;      // 90: sm_90
  int64_t shared_bytes = 0;  // that a block may ask for
};

struct Shape {
  int threads;
  // Blocks of the cluster that holds the row; 0: every sweep reads it from device memory.
  int blocks;
  int64_t per_block;     // entries
  int64_t shared_bytes;  // of a block
};

// of a block: at a hundred registers each, two blocks fit on a multiprocessor
constexpr int MOST_THREADS = 256;
constexpr int MOST_BLOCKS = 8;     // of a portable cluster
constexpr int WARP = 32;
constexpr int MOST_WORDS = 12;  // of what a warp or a block hands to the others
// Bytes of Exchange, before the rows in shared memory.
constexpr int64_t EXCHANGE_BYTES = 4 * MOST_WORDS * (MOST_THREADS / WARP + MOST_BLOCKS + 1);
static_assert(EXCHANGE_BYTES % 16 == 0);

// Of a tile of both sides in shared memory: two vectors for each thread.
constexpr int64_t STAGING_BYTES = 2 * 2 * 16 * MOST_THREADS;

inline int threads_for(int64_t entries, int64_t itemsize) {
  return entries * itemsize / 16 > 512 ? MOST_THREADS : MOST_THREADS / 2;
}

inline Shape streaming(int64_t V, int64_t itemsize) { return {threads_for(V, itemsize), 0, V, EXCHANGE_BYTES + STAGING_BYTES}; }

// The smallest cluster of which two fit on a multiprocessor, so that one loads while the other computes; else
// the smallest that holds the row.
inline Shape shape_for(int64_t V, int64_t itemsize, const Device& device, int most_blocks) {
  if (device.architecture >= 90) {
    for (const int64_t room : {device.shared_bytes / 2 - 512, device.shared_bytes}) {
      for (int blocks = 1; blocks <= most_blocks; blocks *= 2) {
        const int64_t per_block = ((V + blocks - 1) / blocks + 15) / 16 * 16, bytes = EXCHANGE_BYTES + 2 * per_block * itemsize;
        if (bytes <= room) return {threads_for(per_block, itemsize), blocks, per_block, bytes};
      }
    }
  }
  return streaming(V, itemsize);
}

}  // namespace opsd::cuda
