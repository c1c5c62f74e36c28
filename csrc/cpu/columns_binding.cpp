// Checks the tensors of the column operators, and spreads their work over torch's thread pool.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../check.h"
#include "../ops.h"
#include "../row_binding.h"
#include "columns.h"

namespace opsd::cpu {
namespace {

constexpr int64_t GRAIN = 1 << 15;  // entries below which a second thread costs more than it gains

const int64_t* indices(const Tensor& x, const char* argument, int64_t limit) {
  check_vector(x, argument, {x.numel()}, ScalarType::Long);
  const auto* ids = static_cast<const int64_t*>(x.const_data_ptr());
  const int64_t* outside = std::find_if(ids, ids + x.numel(), [limit](int64_t id) { return id < 0 || id >= limit; });
  if (outside != ids + x.numel()) expect(false, argument, "entries in [0, " + std::to_string(limit) + ")", *outside);
  return ids;
}

}  // namespace

std::tuple<Tensor, Tensor> column_norms(const Tensor& G, const Optional& scale) {
  expect(G.dim() == 2, "G", "2 dimensions (n, V)", G.dim());
  const int64_t n = G.size(0), V = G.size(1), blocks = (V + NORM_BLOCK - 1) / NORM_BLOCK;
  expect(n >= 1 && V >= 1, "G", "at least one row and column", shape_text({n, V}));
  check_rows(G, "G", n, V);
  Tensor norms = rows_of(G, {V}), sums = rows_of(G, {blocks, n});
  const NormArgs a{n, V, G.const_data_ptr(), G.stride(0), dtype_of(G, "G"), row_pointer(scale, "scale", G), norms.mutable_data_ptr(), sums.mutable_data_ptr()};
  const ColumnKernels& kernels = columns_for(a.dtype);
  torch::stable::parallel_for(0, blocks, GRAIN / (n * NORM_BLOCK) + 1, [&](int64_t begin, int64_t end) { kernels.norms(a, begin, end); });
  return {norms, sums};
}

void gather_columns_(const Tensor& G, const Tensor& columns, const Tensor& out, const Tensor& sums) {
  expect(G.dim() == 2, "G", "2 dimensions (n, V)", G.dim());
  const int64_t n = G.size(0), V = G.size(1), K = columns.numel();
  check_rows(G, "G", n, V);
  const int64_t* ids = indices(columns, "columns", V);
  const bool ascending = std::adjacent_find(ids, ids + K, [](int64_t a, int64_t b) { return a >= b; }) == ids + K;
  expect(ascending, "columns", "ascending entries", "others");
  check_rows(out, "out", n, K);
  check_dtype(out, "out", G.scalar_type());
  check_vector(sums, "sums", {n}, stats_type(G));
  if (n == 0 || K == 0) return;
  const GatherArgs a{n, K, G.const_data_ptr(), G.stride(0), dtype_of(G, "G"), ids, out.mutable_data_ptr(), std::max(out.stride(0), K), sums.mutable_data_ptr()};
  const ColumnKernels& kernels = columns_for(a.dtype);
  torch::stable::parallel_for(0, n, GRAIN / K + 1, [&](int64_t begin, int64_t end) { kernels.gather(a, begin, end); });
}

}  // namespace opsd::cpu
