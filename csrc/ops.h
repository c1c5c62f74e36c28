// The operators of registration.cpp beside the row operators (row_binding.h), and the sweeps behind those.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "row_args.h"

namespace opsd {

using torch::stable::Tensor;

namespace cpu {

void sweep(const RowArgs& a, Sweep which, int32_t device);
std::string capability();
// out (+)= a @ [b ; tail] in fp32, the tail's rows as often as a has columns for them, of bf16 matrices with one stride of 1 each.
void gemm_bf16_(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate, const std::optional<Tensor>& shift,
                const std::optional<Tensor>& tail);
// out (+)= a @ [b ; tail] of fp32 matrices with one stride of 1 each.
void gemm_fp32_(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate, const std::optional<Tensor>& tail);
// out[i][k] = a[i] . b[columns[i][k]] in fp32, of bf16 matrices with contiguous rows; where gemm_bf16_ can run.
void dots_bf16_(const Tensor& a, const Tensor& b, const Tensor& columns, const Tensor& out);
// (V,) sums of (scale G)^2 over the rows of G (n, V), and (blocks, n) sums of G over blocks of columns.
std::tuple<Tensor, Tensor> column_norms(const Tensor& G, const std::optional<Tensor>& scale);
// out (n, K) = G[:, columns]; sums (n,) -= its row sums.
void gather_columns_(const Tensor& G, const Tensor& columns, const Tensor& out, const Tensor& sums);
// The reason why gemm_bf16_ cannot run on this machine; empty if it can.
std::string gemm_unavailable();
// The reason why gemm_fp32_ cannot run on this machine, or gains nothing; empty if it is to run.
std::string gemm_fp32_unavailable();

}  // namespace cpu

namespace cuda {

void sweep(const RowArgs& a, Sweep which, int32_t device);
// Describes the launch of rows of V entries of `itemsize` bytes.
std::string launch_text(int64_t V, int64_t itemsize, int64_t architecture);

}  // namespace cuda
}  // namespace opsd
