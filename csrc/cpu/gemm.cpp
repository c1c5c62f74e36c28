// Packs tiles into the micro-kernel's layout and walks them so that packed tiles stay in the second-level
// cache. Compiled for AVX-512, which every processor with bf16 products has.
#include "gemm.h"
#include "gemm_pack.h"

namespace opsd::avx512 {
namespace {

constexpr int64_t GROUP = 1 << 18;  // entries of b packed at once for a narrow result: 512 KiB

// to[i * stride_to + n] = (from[2i][n], from[2i + 1][n]); a missing last row counts as zeros.
void interleave(const uint16_t* from, int64_t stride, int64_t K, int64_t N, uint32_t* to, int64_t stride_to) {
  for (int64_t k = 0; k < K; k += 2, to += stride_to) {
    const uint16_t *low = from + k * stride, *high = k + 1 < K ? low + stride : nullptr;
    int64_t n = 0;
    for (; high && n + LANES <= N; n += LANES) {
      const __m512i first = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + n)));
      const __m512i second = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high + n)));
      _mm512_storeu_si512(to + n, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
    for (; n < N; ++n) to[n] = low[n] | (high ? static_cast<uint32_t>(high[n]) << 16 : 0);
  }
}

const uint16_t* bits(const Buffer<uint32_t>& pairs) { return reinterpret_cast<const uint16_t*>(pairs.get()); }

// out[row][n] = bf16(c[row][n] - shift[row]); rows of c are TILE apart.
void narrow_tile(const float* c, int64_t rows, int64_t width, const float* shift, uint16_t* out, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row, c += TILE, out += stride) {
    const __m512 subtracted = _mm512_set1_ps(shift ? shift[row] : 0.0f);
    for (int64_t n = 0; n < width; n += LANES) {
      const __m512 value = _mm512_sub_ps(_mm512_loadu_ps(c + n), subtracted);
      __m256i rounded;
      __asm__("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(value));
      const auto lanes = static_cast<__mmask16>((1u << std::min(LANES, width - n)) - 1);
      _mm256_mask_storeu_epi16(out + n, lanes, rounded);
    }
  }
}

// Columns [n, n + width) of c for rows [m0, m1), with b packed tile by tile.
class ColumnPanel {
  const GemmArgs& g_;
  // A narrow result takes all of K at once, so that no fp32 sum leaves the tile.
  const int64_t depth_ = g_.narrow ? (g_.K + 1) / 2 * 2 : DEPTH + SHORT;
  const int64_t group_ = g_.narrow ? std::clamp<int64_t>(GROUP / (TILE * depth_), 1, 8) : 1;  // packed tiles
  const Buffer<uint32_t> packed_ = allocate<uint32_t>(group_ * TILE * depth_ / 2);
  const Buffer<uint16_t> padded_ = allocate<uint16_t>(TILE * (DEPTH + SHORT + 2));

  void pack(int64_t k, int64_t depth, int64_t n, int64_t width, uint32_t* to) const {
    pack_pieces(g_, k, depth, [&](const GemmOperand& b, int64_t first, int64_t rows, int64_t done) {
      uint32_t* place = to + done / 2 * TILE;
      if (b.transposed) transpose_pairs(b.data + n * b.stride + first, b.stride, width, rows, place, TILE);
      else interleave(b.data + first * b.stride + n, b.stride, rows, width, place, TILE);
    });
  }

  // Rows of a; with an odd depth, a copy with a zero after each row.
  GemmOperand rows_of_a(int64_t m, int64_t rows, int64_t k, int64_t depth) const {
    const uint16_t* from = g_.a.data + m * g_.a.stride + k;
    if (depth % 2 == 0) return {from, g_.a.stride, false};
    for (int64_t row = 0; row < rows; ++row) {
      std::memcpy(padded_.get() + row * (depth + 1), from + row * g_.a.stride, depth * sizeof(uint16_t));
      padded_[row * (depth + 1) + depth] = 0;
    }
    return {padded_.get(), depth + 1, false};
  }

 public:
  explicit ColumnPanel(const GemmArgs& g) : g_(g) {}

  // As `run`, with a bf16 result.
  void run_narrow(int64_t n0, int64_t n1, int64_t m0, int64_t m1) const {
    alignas(64) float sum[TILE * TILE];
    for (int64_t n = n0; n < n1; n += group_ * TILE) {
      const int64_t tiles = std::min(group_, (n1 - n + TILE - 1) / TILE);
      for (int64_t i = 0; i < tiles; ++i) pack(0, g_.K, n + i * TILE, std::min(TILE, n1 - n - i * TILE), packed_.get() + i * TILE * depth_ / 2);
      for (int64_t m = m0; m < m1; m += TILE) {
        const int64_t rows = std::min(TILE, m1 - m);
        for (int64_t i = 0; i < tiles; ++i) {
          const int64_t column = n + i * TILE, width = std::min(TILE, n1 - column);
          for (int64_t k = 0, depth; k < g_.K; k += depth) {
            depth = g_.K % 2 ? depth_at(k, g_.K) : g_.K;
            const GemmOperand a = rows_of_a(m, rows, k, depth);
            const uint32_t* b = packed_.get() + (i * depth_ + k) * TILE / 2;
            g_.kernel(rows, width, depth + depth % 2, a.stride, TILE, TILE, k > 0, a.data, reinterpret_cast<const uint16_t*>(b), sum, true);
          }
          narrow_tile(sum, rows, width, g_.shift ? g_.shift + m : nullptr, g_.narrow + m * g_.stride_c + column, g_.stride_c);
        }
      }
    }
  }

  void run(int64_t n0, int64_t n1, int64_t m0, int64_t m1) const {
    for (int64_t k = 0, depth; k < g_.K; k += depth) {
      depth = depth_at(k, g_.K);
      for (int64_t n = n0; n < n1; n += TILE) {
        const int64_t width = std::min(TILE, n1 - n);
        pack(k, depth, n, width, packed_.get());
        for (int64_t m = m0; m < m1; m += TILE) {
          const int64_t rows = std::min(TILE, m1 - m);
          const GemmOperand a = rows_of_a(m, rows, k, depth);
          g_.kernel(rows, width, depth + depth % 2, a.stride, TILE, g_.stride_c, g_.accumulate || k > 0, a.data, bits(packed_),
                    g_.c + m * g_.stride_c + n, true);
        }
      }
    }
  }
};

// Rows [m0, m1) of c for all columns, with a transposed and packed tile by tile, b packed as a whole.
class RowPanel {
  const GemmArgs& g_;
  const uint32_t* packed_b_;
  const int64_t pairs_ = (g_.K + 1) / 2;
  const Buffer<uint32_t> interleaved_ = allocate<uint32_t>(TILE * pairs_), packed_ = allocate<uint32_t>(TILE * pairs_);

  // Pairs along k first, then pairs as 32-bit elements: (pairs, rows) -> (rows, pairs).
  void pack(int64_t m, int64_t rows) const {
    interleave(g_.a.data + m, g_.a.stride, g_.K, rows, interleaved_.get(), TILE);
    transpose_pairs(bits(interleaved_), 2 * TILE, pairs_, 2 * rows, packed_.get(), pairs_);
  }

 public:
  RowPanel(const GemmArgs& g, const uint32_t* packed_b) : g_(g), packed_b_(packed_b) {}

  void run(int64_t m0, int64_t m1) const {
    for (int64_t m = m0; m < m1; m += TILE) {
      const int64_t rows = std::min(TILE, m1 - m);
      pack(m, rows);
      for (int64_t n = 0; n < g_.N; n += TILE)
        g_.kernel(rows, std::min(TILE, g_.N - n), 2 * pairs_, 2 * pairs_, g_.N, g_.stride_c, g_.accumulate, bits(packed_),
                  reinterpret_cast<const uint16_t*>(packed_b_ + n), g_.c + m * g_.stride_c + n, true);
    }
  }
};

// bf16 entries [at, at + 16) as fp32; those beyond H are 0.
__m512 widened(const uint16_t* p, int64_t at, int64_t H) {
  const auto lanes = static_cast<__mmask16>((1u << std::min(LANES, H - at)) - 1);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p + at)), 16));
}

// Four sums, added in a fixed order: the same bits on every call.
float dot(const uint16_t* a, const uint16_t* b, int64_t H) {
  __m512 sums[4] = {};
  for (int64_t h = 0; h < H; h += LANES) {
    __m512& sum = sums[h / LANES % 4];
    sum = _mm512_fmadd_ps(widened(a, h, H), widened(b, h, H), sum);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

}  // namespace

void run_dots(const DotArgs& d, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    for (int64_t i = row * d.K; i < (row + 1) * d.K; ++i)
      d.out[i] = dot(d.a + row * d.stride_a, d.b + d.columns[i] * d.stride_b, d.H);
}

void interleave_gemm(const GemmOperand& b, int64_t K, int64_t N, uint32_t* packed, int64_t begin, int64_t end) {
  interleave(b.data + 2 * begin * b.stride, b.stride, std::min(2 * end, K) - 2 * begin, N, packed + begin * N, N);
}

void run_gemm(const GemmArgs& g, const GemmCut& cut, const uint32_t* packed, int64_t begin, int64_t end) {
  if (g.a.transposed) {
    const RowPanel panel(g, packed);
    for (int64_t i = begin; i < end; ++i) panel.run(i * cut.panel, std::min((i + 1) * cut.panel, g.M));
    return;
  }
  const ColumnPanel panel(g);
  const int64_t rows = (g.M + cut.splits - 1) / cut.splits;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / cut.splits * cut.panel, m = i % cut.splits * rows;
    const int64_t end_n = std::min(n + cut.panel, g.N), end_m = std::min(m + rows, g.M);
    if (g.narrow) panel.run_narrow(n, end_n, std::min(m, g.M), end_m);
    else panel.run(n, end_n, std::min(m, g.M), end_m);
  }
}

}  // namespace opsd::avx512
