// Checks the tensors of the list's operator, registers it, and spreads its rows over torch's thread pool. It
// is defined here, not in registration.cpp, whose text belongs to the record of the checked CUDA kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../row_binding.h"
#include "topk.h"

namespace opsd::cpu {
namespace {

constexpr int64_t GRAIN = 1 << 15;  // entries below which a second thread costs more than it gains

void row_topk_(const Tensor& S, const Optional& bias, double scale, double softcap, double temperature, const Optional& temperatures, const Tensor& ids,
               const Tensor& values, const Tensor& tail) {
  expect(S.dim() == 2, "S", "2 dimensions (n, V)", S.dim());
  const int64_t n = S.size(0), V = S.size(1);
  check_rows(S, "S", n, V);
  expect(S.scalar_type() == ScalarType::Float || S.scalar_type() == ScalarType::Double, "S", "float32 or float64", torch::headeronly::toString(S.scalar_type()));
  expect(values.dim() == 2, "values", "2 dimensions (n, k)", values.dim());
  const int64_t k = values.size(1);
  expect(k >= 1 && k <= V, "values", "1 to V columns", k);
  check_vector(values, "values", {n, k}, S.scalar_type());
  check_vector(ids, "ids", {n, k}, ScalarType::Long);
  check_vector(tail, "tail", {n}, S.scalar_type());
  const TopkArgs a{n, V, k, S.const_data_ptr(), S.stride(0), dtype_of(S, "S"), bias_pointer(bias, "bias", S),
                   {scale, softcap, temperature, row_pointer(temperatures, "temperatures", S)},
                   static_cast<int64_t*>(ids.mutable_data_ptr()), values.mutable_data_ptr(), tail.mutable_data_ptr()};
  const RunTopk run = topk_for(a.dtype);
  torch::stable::parallel_for(0, n, GRAIN / V + 1, [&](int64_t begin, int64_t end) { run(a, begin, end); });
}

}  // namespace
}  // namespace opsd::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(opsd_kernels, m) {
  m.def(
      "row_topk_(Tensor S, Tensor? bias, float scale, float softcap, float temperature, Tensor? temperatures, "
      "Tensor(a!) ids, Tensor(b!) values, Tensor(c!) tail) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(opsd_kernels, CPU, m) { m.impl("row_topk_", TORCH_BOX(&opsd::cpu::row_topk_)); }
