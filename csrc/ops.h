// The operators' C++ signatures, in the order of the schemas in registration.cpp. One set per device; dispatch keys choose.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace opsd {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// RowSpec as plain values. A softcap of 0 is none.
#define OPSD_SPEC_PARAMETERS                                                                                                             \
  int64_t kind, double beta, double student_scale, double student_softcap, double student_temperature, double teacher_scale,             \
      double teacher_softcap, double teacher_temperature, bool difference, bool linear, double teacher_mix, double entry_clip,      \
      double token_clip, double spread_limit

namespace cpu {

Tensor row_stats(const Tensor& S, const Tensor& T, const Optional& bias_s, const Optional& bias_t, bool metrics, OPSD_SPEC_PARAMETERS);
std::tuple<Tensor, Tensor> row_dot(const Tensor& S, const Tensor& T, const Tensor& stats, const Optional& bias_s, const Optional& bias_t,
                                   OPSD_SPEC_PARAMETERS);
void row_grad_(const Tensor& S, const Tensor& T, const Tensor& stats, const Tensor& A, const Tensor& factor, const Optional& policy,
               const Optional& labels, const Optional& bias_s, const Optional& bias_t, const Tensor& G, OPSD_SPEC_PARAMETERS);
std::tuple<Tensor, Tensor, Tensor> row_fused_(const Tensor& S, const Tensor& T, const Tensor& factor, const Optional& policy,
                                              const Optional& labels, const Optional& bias_s, const Optional& bias_t, bool metrics,
                                              const Tensor& G, OPSD_SPEC_PARAMETERS);
std::string capability();
// out (+)= a @ b in fp32, of bf16 matrices with one stride of 1 each.
void gemm_bf16_(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate);
// Why gemm_bf16_ cannot run here; empty if it can.
std::string gemm_unavailable();

}  // namespace cpu
}  // namespace opsd
