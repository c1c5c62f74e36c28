// The operators' C++ signatures, in the order of the schemas in registration.cpp. One set per device; dispatch keys choose.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace opsd {

using torch::stable::Tensor;
using Bias = std::optional<Tensor>;

// RowSpec as plain values. A softcap of 0 is none.
#define OPSD_SPEC_PARAMETERS                                                                                                             \
  int64_t kind, double beta, double student_scale, double student_softcap, double student_temperature, double teacher_scale,             \
      double teacher_softcap, double teacher_temperature, bool difference, bool linear, double spread_limit

namespace cpu {

Tensor row_stats(const Tensor& S, const Tensor& T, const Bias& bias_s, const Bias& bias_t, bool metrics, OPSD_SPEC_PARAMETERS);
std::tuple<Tensor, Tensor> row_dot(const Tensor& S, const Tensor& T, const Tensor& stats, const Bias& bias_s, const Bias& bias_t,
                                   OPSD_SPEC_PARAMETERS);
void row_grad_(const Tensor& S, const Tensor& T, const Tensor& stats, const Tensor& A, const Tensor& factor, const Bias& bias_s,
               const Bias& bias_t, const Tensor& G, OPSD_SPEC_PARAMETERS);
std::tuple<Tensor, Tensor, Tensor> row_fused_(const Tensor& S, const Tensor& T, const Tensor& factor, const Bias& bias_s,
                                              const Bias& bias_t, bool metrics, const Tensor& G, OPSD_SPEC_PARAMETERS);
std::string capability();

}  // namespace cpu
}  // namespace opsd
