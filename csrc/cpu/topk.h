// The k largest logits of each row, in order, and the mass of the rest. Compiled from topk.cpp once per
// instruction set. opsd_kernels/_rows/contract.py has the contract of `row_topk_`.
#pragma once

#include "../row_args.h"

namespace opsd {

struct TopkArgs {
  int64_t n, V, k;
  const void* S;  // (n, V) of dtype, FLOAT64 or FLOAT32
  int64_t stride;
  Dtype dtype;
  const void* bias;  // (V,) of dtype, or null
  Transform transform;
  int64_t* ids;  // (n, k)
  void* values;  // (n, k) of dtype: the transformed logits
  void* tail;    // (n,) of dtype: log sum exp(x - the largest x) over the entries that are not listed
};

// Rows [begin, end). Each row depends on itself alone.
using RunTopk = void (*)(const TopkArgs& args, int64_t begin, int64_t end);

namespace baseline {
void run_topk(const TopkArgs& args, int64_t begin, int64_t end);
}
namespace avx2 {
void run_topk(const TopkArgs& args, int64_t begin, int64_t end);
}
namespace avx512 {
void run_topk(const TopkArgs& args, int64_t begin, int64_t end);
}

RunTopk topk_for(Dtype dtype);

}  // namespace opsd
