// The row operators of every device: check tensors, fill RowArgs, call the device's sweep.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "row_args.h"

namespace opsd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// RowSpec.scalars, in one order: the schema, the parameters, the arguments. A softcap of 0 is none.
#define OPSD_SPEC_SCHEMA                                                                                                         \
  "int kind, float beta, float student_scale, float student_softcap, float student_temperature, "                               \
  "float teacher_scale, float teacher_softcap, float teacher_temperature, bool difference, bool linear, float teacher_mix, "            \
  "float entry_clip, float token_clip, float spread_limit, Tensor? student_temperatures=None, Tensor? teacher_temperatures=None"
#define OPSD_SPEC_PARAMETERS                                                                                                             \
  int64_t kind, double beta, double student_scale, double student_softcap, double student_temperature, double teacher_scale,             \
      double teacher_softcap, double teacher_temperature, bool difference, bool linear, double teacher_mix, double entry_clip,      \
      double token_clip, double spread_limit, const Optional &student_temperatures, const Optional &teacher_temperatures
#define OPSD_SPEC                                                                                                                       \
  kind, beta, student_scale, student_softcap, student_temperature, teacher_scale, teacher_softcap, teacher_temperature, difference, \
      linear, teacher_mix, entry_clip, token_clip, spread_limit, student_temperatures, teacher_temperatures

inline Dtype dtype_of(const Tensor& x, const char* argument) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return Dtype::FLOAT64;
    case ScalarType::Float: return Dtype::FLOAT32;
    case ScalarType::BFloat16: return Dtype::BFLOAT16;
    case ScalarType::Half: return Dtype::FLOAT16;
    default: expect(false, argument, "float64, float32, bfloat16 or float16", torch::headeronly::toString(x.scalar_type()));
  }
  return Dtype::FLOAT64;
}

inline ScalarType stats_type(const Tensor& S) { return S.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

inline Tensor rows_of(const Tensor& S, std::vector<int64_t> shape) { return torch::stable::new_empty(S, shape, stats_type(S)); }

inline const void* bias_pointer(const Optional& bias, const char* argument, const Tensor& S) {
  if (!bias) return nullptr;
  check_vector(*bias, argument, {S.size(1)}, stats_type(S));
  check_device(*bias, argument, S);
  return bias->const_data_ptr();
}

inline const void* row_pointer(const Optional& values, const char* argument, const Tensor& S) {
  if (!values) return nullptr;
  check_vector(*values, argument, {S.size(0)}, stats_type(S));
  check_device(*values, argument, S);
  return values->const_data_ptr();
}

// The arguments of every sweep.
inline RowArgs logits(const Tensor& S, const Tensor& T, const Optional& bias_s, const Optional& bias_t, bool metrics, OPSD_SPEC_PARAMETERS) {
  expect(S.dim() == 2, "S", "2 dimensions (n, V)", S.dim());
  const int64_t n = S.size(0), V = S.size(1);
  expect(V >= 1, "S", "at least one column", V);
  check_rows(S, "S", n, V);
  check_rows(T, "T", n, V, true);
  check_dtype(T, "T", S.scalar_type());
  check_device(T, "T", S);
  expect(kind >= 0 && kind < KINDS, "kind", "0 to " + std::to_string(KINDS - 1), kind);
  expect(teacher_mix >= 0 && teacher_mix < 1, "teacher_mix", "a number in [0, 1)", teacher_mix);
  expect(entry_clip >= 0, "entry_clip", "a number of at least 0", entry_clip);
  RowArgs a{};
  a.n = n, a.V = V;
  a.S = S.const_data_ptr(), a.T = T.const_data_ptr();
  a.stride_s = S.stride(0), a.stride_t = T.stride(0);
  a.dtype = a.out = dtype_of(S, "S");
  a.bias_s = bias_pointer(bias_s, "bias_s", S), a.bias_t = bias_pointer(bias_t, "bias_t", S);
  a.student = {student_scale, student_softcap, student_temperature, row_pointer(student_temperatures, "student_temperatures", S)};
  a.teacher = {teacher_scale, teacher_softcap, teacher_temperature, row_pointer(teacher_temperatures, "teacher_temperatures", S)};
  a.difference = difference, a.linear = linear, a.metrics = metrics;
  a.kind = static_cast<Kind>(kind), a.terms = {beta, entry_clip}, a.spread_limit = spread_limit;
  a.teacher_mix = teacher_mix, a.token_clip = token_clip;
  return a;
}

// A contiguous input or result of the statistics' type.
inline void* vector_pointer(const Tensor& x, const char* argument, const std::vector<int64_t>& shape, const Tensor& S) {
  check_vector(x, argument, shape, stats_type(S));
  check_device(x, argument, S);
  return const_cast<void*>(x.const_data_ptr());
}

inline void read_policy(RowArgs& a, const Tensor& S, const Optional& policy, const Optional& labels) {
  if (!policy) return;
  expect(labels.has_value(), "labels", "a tensor, as there is a policy", "None");
  check_vector(*labels, "labels", {a.n}, ScalarType::Long);
  check_device(*labels, "labels", S);
  a.policy = vector_pointer(*policy, "policy", {a.n}, S);
  a.labels = static_cast<const int64_t*>(labels->const_data_ptr());
}

inline void write_gradient(RowArgs& a, const Tensor& S, const Tensor& G) {
  check_rows(G, "G", a.n, a.V);
  check_device(G, "G", S);
  a.out = dtype_of(G, "G");
  expect((a.out == Dtype::FLOAT64) == (a.dtype == Dtype::FLOAT64), "G", a.dtype == Dtype::FLOAT64 ? "float64, as S" : "float32 or a 16-bit type",
         torch::headeronly::toString(G.scalar_type()));
  a.G = G.mutable_data_ptr(), a.stride_g = G.stride(0);
}

// The operators over a device's sweep; `device` is the index that S lives on.
template <void (*SWEEP)(const RowArgs&, Sweep, int32_t device)>
struct RowOps {
  static Tensor row_stats(const Tensor& S, const Tensor& T, const Optional& bias_s, const Optional& bias_t, bool metrics, OPSD_SPEC_PARAMETERS) {
    RowArgs a = logits(S, T, bias_s, bias_t, metrics, OPSD_SPEC);
    Tensor stats = rows_of(S, {a.n, COLUMNS});
    a.stats = stats.mutable_data_ptr();
    SWEEP(a, Sweep::STATS, S.get_device_index());
    return stats;
  }

  static std::tuple<Tensor, Tensor> row_dot(const Tensor& S, const Tensor& T, const Tensor& stats, const Optional& bias_s, const Optional& bias_t,
                                            OPSD_SPEC_PARAMETERS) {
    RowArgs a = logits(S, T, bias_s, bias_t, false, OPSD_SPEC);
    a.stats = vector_pointer(stats, "stats", {a.n, COLUMNS}, S);
    Tensor loss = rows_of(S, {a.n}), A = rows_of(S, {a.n});
    a.loss = loss.mutable_data_ptr(), a.A = A.mutable_data_ptr();
    SWEEP(a, Sweep::DOT, S.get_device_index());
    return {loss, A};
  }

  static void row_grad_(const Tensor& S, const Tensor& T, const Tensor& stats, const Tensor& A, const Tensor& factor, const Optional& policy,
                        const Optional& labels, const Optional& bias_s, const Optional& bias_t, const Tensor& G, OPSD_SPEC_PARAMETERS) {
    RowArgs a = logits(S, T, bias_s, bias_t, false, OPSD_SPEC);
    a.stats = vector_pointer(stats, "stats", {a.n, COLUMNS}, S);
    a.factor = vector_pointer(factor, "factor", {a.n}, S);
    a.A = vector_pointer(A, "A", {a.n}, S);
    read_policy(a, S, policy, labels);
    write_gradient(a, S, G);
    SWEEP(a, Sweep::GRAD, S.get_device_index());
  }

  static std::tuple<Tensor, Tensor, Tensor> row_fused_(const Tensor& S, const Tensor& T, const Tensor& factor, const Optional& policy,
                                                       const Optional& labels, const Optional& bias_s, const Optional& bias_t, bool metrics,
                                                       const Tensor& G, OPSD_SPEC_PARAMETERS) {
    RowArgs a = logits(S, T, bias_s, bias_t, metrics, OPSD_SPEC);
    a.factor = vector_pointer(factor, "factor", {a.n}, S);
    read_policy(a, S, policy, labels);
    write_gradient(a, S, G);
    Tensor stats = rows_of(S, {a.n, COLUMNS}), loss = rows_of(S, {a.n}), A = rows_of(S, {a.n});
    a.stats = stats.mutable_data_ptr(), a.loss = loss.mutable_data_ptr(), a.A = A.mutable_data_ptr();
    SWEEP(a, Sweep::FUSED, S.get_device_index());
    return {stats, loss, A};
  }
};

}  // namespace opsd
