// The columns of a logit gradient: their norms, and the selected ones side by side. Compiled from columns.cpp
// once per instruction set. opsd_kernels/_core/columns.py says what for.
#pragma once

#include "../row_args.h"

namespace opsd {

constexpr int64_t NORM_BLOCK = 2048;  // columns: their sums are 8 KiB and stay in the innermost cache

// The statistics' type is double for FLOAT64, else float.
struct NormArgs {
  int64_t n, V;
  const void* G;  // (n, V) of dtype
  int64_t stride;
  Dtype dtype;
  const void* scale;  // (n,) of the statistics' type, or null for ones
  void* norms;  // (V,): the sums of (scale G)^2 over the rows
  void* sums;  // (blocks, n): the sums of G over the columns of each block
};

struct GatherArgs {
  int64_t n, K;
  const void* G;  // (n, V) of dtype
  int64_t stride;
  Dtype dtype;
  const int64_t* columns;  // (K,), ascending, in [0, V)
  void* out;  // (n, K) of dtype
  int64_t stride_out;
  void* sums;  // (n,) of the statistics' type: the gathered entries are subtracted
};

struct ColumnKernels {
  // Blocks [begin, end) of NORM_BLOCK columns. Each depends on itself alone, so that threads change no bit.
  void (*norms)(const NormArgs& args, int64_t begin, int64_t end);
  // Rows [begin, end).
  void (*gather)(const GatherArgs& args, int64_t begin, int64_t end);
};

namespace baseline {
extern const ColumnKernels COLUMN_KERNELS;
}
namespace avx2 {
extern const ColumnKernels COLUMN_KERNELS;
}
namespace avx512 {
extern const ColumnKernels COLUMN_KERNELS;
}

const ColumnKernels& columns_for(Dtype dtype);

}  // namespace opsd
