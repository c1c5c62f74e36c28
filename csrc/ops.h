// The operators of registration.cpp beside the row operators (row_binding.h), and the sweeps behind those.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>

#include "row_args.h"

namespace opsd {

using torch::stable::Tensor;

namespace cpu {

void sweep(const RowArgs& a, Sweep which, int32_t device);
std::string capability();
// out (+)= a @ b in fp32, of bf16 matrices with one stride of 1 each.
void gemm_bf16_(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate, const std::optional<Tensor>& shift);
// out[i][k] = a[i] . b[columns[i][k]] in fp32, of bf16 matrices with contiguous rows; where gemm_bf16_ can run.
void dots_bf16_(const Tensor& a, const Tensor& b, const Tensor& columns, const Tensor& out);
// The reason why gemm_bf16_ cannot run on this machine; empty if it can.
std::string gemm_unavailable();

}  // namespace cpu

namespace cuda {

void sweep(const RowArgs& a, Sweep which, int32_t device);
// Describes the launch of rows of V entries of `itemsize` bytes.
std::string launch_text(int64_t V, int64_t itemsize, int64_t architecture);

}  // namespace cuda
}  // namespace opsd
