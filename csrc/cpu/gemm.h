// Two GEMMs. Torch-free.
//
// bf16 x bf16, on the micro-kernel of torch's oneDNN, has an fp32 result, or a bf16 one from which a constant
// of each row is subtracted before its one rounding; torch's own `mm` does neither. fp32 x fp32 is for AMD's
// processors, where MKL, behind `mm`, leaves AVX-512 unused.
#pragma once

#include <cstdint>

namespace opsd {

// c (M, N) fp32 (+)= a (M, K) @ b (K, N), by tiles: a row-major, b in pairs of rows (k, k + 1) interleaved.
using MicroKernel = void (*)(int64_t M, int64_t N, int64_t K, int64_t stride_a, int64_t stride_b, int64_t stride_c, bool accumulate,
                             const uint16_t* a, const uint16_t* b, float* c, bool interleaved);

// Columns are contiguous or, `transposed`, rows are; `stride` is the other one.
template <class T>
struct Operand {
  const T* data;
  int64_t stride;
  bool transposed;
};
using GemmOperand = Operand<uint16_t>;  // bf16, as bits

// Further rows of b, which lie in a matrix of their own: those of an adapter's factor under a head's. Columns of
// a beyond them meet them again, from the first one on.
template <class T>
struct Tail {
  Operand<T> rows;
  int64_t length;  // 0: none
};

struct GemmArgs {
  int64_t M, N, K;
  GemmOperand a, b;  // (M, K), (K, N); not both transposed
  Tail<uint16_t> tail;  // the last of the K rows; none where a is transposed
  int64_t of_b;         // the first of them, even in number above a tail
  float* c;          // (M, N), unit column stride; null with `narrow`
  uint16_t* narrow;  // the same as bf16: a is not transposed, and nothing is accumulated
  const float* shift;  // (M,), subtracted from the rows of `narrow`; null: nothing is
  int64_t stride_c;
  bool accumulate;
  MicroKernel kernel;
};

// The independent items of work: panels of columns times splits of the rows or, where a is transposed, panels
// of rows.
struct GemmCut {
  int64_t panel, panels, splits;
  int64_t items() const { return panels * splits; }
};

// out[i * K + k] = a[i] . b[columns[i * K + k]] over H entries, in fp32.
struct DotArgs {
  int64_t K, H;
  const uint16_t *a, *b;
  int64_t stride_a, stride_b;
  const int64_t* columns;
  float* out;
};

struct FloatGemmArgs {
  int64_t M, N, K;
  Operand<float> a, b;  // (M, K), (K, N); not both transposed
  Tail<float> tail;     // the last of the K rows; none where a is transposed
  int64_t of_b;         // the first of them
  float* c;             // (M, N), unit column stride
  int64_t stride_c;
  bool accumulate;
};

namespace avx512 {
// Items [begin, end).
void run_gemm(const FloatGemmArgs& args, const GemmCut& cut, int64_t begin, int64_t end);
// Rows [begin, end) of a.
void run_dots(const DotArgs& args, int64_t begin, int64_t end);
// Items [begin, end). `packed`: interleaved rows of b, (K + 1) / 2 by N pairs, where a is transposed; else
// unused.
void run_gemm(const GemmArgs& args, const GemmCut& cut, const uint32_t* packed, int64_t begin, int64_t end);
// Pairs of rows [begin, end) of b.
void interleave_gemm(const GemmOperand& b, int64_t K, int64_t N, uint32_t* packed, int64_t begin, int64_t end);
}  // namespace avx512

}  // namespace opsd
