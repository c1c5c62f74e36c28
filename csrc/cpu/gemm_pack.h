// Tiles of the GEMMs: their size, aligned buffers, and transposition of 32-bit elements. Compiled for AVX-512.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of both in its own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace opsd::avx512 {

// rows and columns of a micro-kernel call: within 5 % of 32 and 128 in every role
constexpr int64_t TILE = 64;
constexpr int64_t LANES = 16;  // 32-bit elements of a register
constexpr int64_t DEPTH = 1024;  // of a packed tile of b: 128 KiB in bf16, 256 in fp32
constexpr int64_t SHORT = 128;   // a last step of at most as much joins the one before

// The depth of the step that starts at k.
inline int64_t depth_at(int64_t k, int64_t K) { return K - k <= DEPTH + SHORT ? K - k : DEPTH; }

// Calls pack(operand, first row, rows, place among the packed ones) for rows [k, k + depth) of b and its tail.
template <class Args, class Pack>
void pack_pieces(const Args& g, int64_t k, int64_t depth, const Pack& pack) {
  for (int64_t done = 0, rows; done < depth; done += rows) {
    const bool inside = k + done < g.of_b;
    const int64_t first = inside ? k + done : (k + done - g.of_b) % g.tail.length;
    rows = std::min(depth - done, (inside ? g.of_b : g.tail.length) - first);
    pack(inside ? g.b : g.tail.rows, first, rows, done);
  }
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> allocate(int64_t count) {
  void* p = std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64);
  if (!p) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(p));
}

inline uint32_t load_pair(const uint16_t* p) {
  uint32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return pair;
}

// 16 x 16 pairs: to[j * stride_to + i] = pair j of row i, rows `stride` 16-bit elements apart.
inline void transpose_block(const uint16_t* from, int64_t stride, uint32_t* to, int64_t stride_to) {
  __m512i r[LANES], t[LANES];
  for (int i = 0; i < LANES; ++i) r[i] = _mm512_loadu_si512(from + i * stride);
  for (int i = 0; i < 8; ++i) {  // pairs of rows, then of pairs
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // 128-bit quarters within each half, then across halves
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(to + i * stride_to, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(to + (i + 8) * stride_to, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
  }
}

// to[j * stride_to + i] = (from[i][2j], from[i][2j + 1]) for `rows` rows of K elements; a missing last
// element is zero.
inline void transpose_pairs(const uint16_t* from, int64_t stride, int64_t rows, int64_t K, uint32_t* to, int64_t stride_to) {
  for (int64_t i = 0; i < rows; i += LANES)
    for (int64_t k = 0; k < K; k += 2 * LANES) {
      if (i + LANES <= rows && k + 2 * LANES <= K) {
        transpose_block(from + i * stride + k, stride, to + k / 2 * stride_to + i, stride_to);
        continue;
      }
      for (int64_t row = i; row < std::min(i + LANES, rows); ++row)
        for (int64_t at = k; at < std::min(k + 2 * LANES, K); at += 2) {
          const uint16_t* p = from + row * stride + at;
          to[at / 2 * stride_to + row] = at + 1 < K ? load_pair(p) : *p;
        }
    }
}

}  // namespace opsd::avx512
