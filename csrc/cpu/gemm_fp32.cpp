// fp32 GEMM. Registers hold a tile of c, 6 rows of 64 columns; b is packed into such columns where its rows
// lie far apart, and a where it is transposed. Each entry of c is summed in the same order on any number of
// threads. Compiled for AVX-512.
#include "gemm.h"
#include "gemm_pack.h"

namespace opsd::avx512 {
namespace {

constexpr int64_t SMALL = 1 << 18;  // entries of b: 1 MiB
constexpr int VECTORS = TILE / LANES, HEIGHT = 6;
constexpr int THIN_HEIGHT = 8;  // of tiles one register wide, for the thin products of adapters

// c[r][n] (+)= sum over k of a[r][k] * b[k][n] for R rows and up to 16 C columns, the lanes of `columns`.
struct Step {
  int64_t depth, stride_a, step_a, stride_b, stride_c;  // step_a: from k to k + 1 in a
  __mmask16 columns[VECTORS];
  bool accumulate;
};

// Sums of at most CHAIN products are added up: the error of one long chain grows with the root of its length, and
// with 1024 is 2.3 times that of a product of MKL's. The tile of c stays in the cache of the core meanwhile.
constexpr int64_t CHAIN = 256;

template <int R, int C>
void multiply(const Step& s, const float* a, const float* b, float* c) {
  for (int64_t done = 0, end = 0; done < s.depth; done = end) {
    end = std::min(done + CHAIN, s.depth);
    __m512 sum[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < C; ++i) sum[r][i] = _mm512_setzero_ps();
    for (int64_t k = done; k < end; ++k, a += s.step_a, b += s.stride_b) {
      __m512 row[C];
#pragma GCC unroll 4
      for (int i = 0; i < C; ++i) row[i] = _mm512_maskz_loadu_ps(s.columns[i], b + i * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512 entry = _mm512_set1_ps(a[r * s.stride_a]);
#pragma GCC unroll 4
        for (int i = 0; i < C; ++i) sum[r][i] = _mm512_fmadd_ps(entry, row[i], sum[r][i]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < C; ++i) {
        float* to = c + r * s.stride_c + i * LANES;
        if (s.accumulate || done) sum[r][i] = _mm512_add_ps(_mm512_maskz_loadu_ps(s.columns[i], to), sum[r][i]);
        _mm512_mask_storeu_ps(to, s.columns[i], sum[r][i]);
      }
  }
}

// `rows` rows of c, as many at a time as registers hold.
void multiply_rows(const Step& s, int64_t rows, const float* a, const float* b, float* c) {
  using Multiply = void (*)(const Step&, const float*, const float*, float*);
  constexpr Multiply WIDE[HEIGHT] = {multiply<1, 4>, multiply<2, 4>, multiply<3, 4>, multiply<4, 4>, multiply<5, 4>, multiply<6, 4>};
  constexpr Multiply THIN[THIN_HEIGHT] = {multiply<1, 1>, multiply<2, 1>, multiply<3, 1>, multiply<4, 1>,
                                          multiply<5, 1>, multiply<6, 1>, multiply<7, 1>, multiply<8, 1>};
  const bool thin = !s.columns[1];
  const int64_t height = thin ? THIN_HEIGHT : HEIGHT;
  for (int64_t m = 0; m < rows; m += height) {
    const int64_t last = std::min(height, rows - m) - 1;
    (thin ? THIN[last] : WIDE[last])(s, a + m * s.stride_a, b, c + m * s.stride_c);
  }
}

Step step(int64_t depth, int64_t width, bool accumulate) {
  Step s{};
  s.depth = depth, s.accumulate = accumulate;
  for (int i = 0; i < VECTORS; ++i) s.columns[i] = static_cast<__mmask16>((1u << std::clamp<int64_t>(width - i * LANES, 0, LANES)) - 1);
  return s;
}

// to[k * TILE + n] = b[k][n]
void pack(const Operand<float>& b, int64_t k, int64_t depth, int64_t n, int64_t width, float* to) {
  if (b.transposed) {
    const float* from = b.data + n * b.stride + k;
    transpose_pairs(reinterpret_cast<const uint16_t*>(from), 2 * b.stride, width, 2 * depth, reinterpret_cast<uint32_t*>(to), TILE);
    return;
  }
  for (int64_t row = 0; row < depth; ++row) std::memcpy(to + row * TILE, b.data + (k + row) * b.stride + n, width * sizeof(float));
}

// Columns [n0, n1) of c for rows [m0, m1), with b packed tile by tile. Read in place it costs a third more.
void column_panel(const FloatGemmArgs& g, float* packed, int64_t n0, int64_t n1, int64_t m0, int64_t m1) {
  for (int64_t k = 0, depth; k < g.K; k += depth) {
    depth = depth_at(k, g.K);
    for (int64_t n = n0; n < n1; n += TILE) {
      const int64_t width = std::min(TILE, n1 - n);
      pack_pieces(g, k, depth, [&](const Operand<float>& b, int64_t first, int64_t rows, int64_t done) {
        pack(b, first, rows, n, width, packed + done * TILE);
      });
      Step s = step(depth, width, g.accumulate || k > 0);
      s.stride_a = g.a.stride, s.step_a = 1, s.stride_b = TILE, s.stride_c = g.stride_c;
      multiply_rows(s, m1 - m0, g.a.data + m0 * g.a.stride + k, packed, g.c + m0 * g.stride_c + n);
    }
  }
}

// Rows [m0, m1) of c for all columns, with the transposed a packed tile by tile.
void row_panel(const FloatGemmArgs& g, float* packed, int64_t m0, int64_t m1) {
  for (int64_t m = m0; m < m1; m += TILE) {
    const int64_t rows = std::min(TILE, m1 - m);
    for (int64_t k = 0, depth; k < g.K; k += depth) {
      depth = depth_at(k, g.K);
      pack({g.a.data, g.a.stride, false}, k, depth, m, rows, packed);
      // A small b stays in the cache while whole rows of c are written.
      const int64_t height = g.N > TILE && depth * g.N <= SMALL ? HEIGHT : rows;
      for (int64_t row = 0; row < rows; row += height)
        for (int64_t n = 0; n < g.N; n += TILE) {
          Step s = step(depth, g.N - n, g.accumulate || k > 0);
          s.stride_a = 1, s.step_a = TILE, s.stride_b = g.b.stride, s.stride_c = g.stride_c;
          multiply_rows(s, std::min(height, rows - row), packed + row, g.b.data + k * g.b.stride + n, g.c + (m + row) * g.stride_c + n);
        }
    }
  }
}

}  // namespace

void run_gemm(const FloatGemmArgs& g, const GemmCut& cut, int64_t begin, int64_t end) {
  const Buffer<float> packed = allocate<float>(TILE * std::min(DEPTH + SHORT, g.K));
  const int64_t rows = (g.M + cut.splits - 1) / cut.splits;
  for (int64_t i = begin; i < end; ++i) {
    if (g.a.transposed) {
      row_panel(g, packed.get(), i * cut.panel, std::min((i + 1) * cut.panel, g.M));
      continue;
    }
    const int64_t n = i / cut.splits * cut.panel, m = i % cut.splits * rows;
    column_panel(g, packed.get(), n, std::min(n + cut.panel, g.N), std::min(m, g.M), std::min(m + rows, g.M));
  }
}

}  // namespace opsd::avx512
