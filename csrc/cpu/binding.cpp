// From tensors to RowArgs, and rows over torch's own thread pool.
#include <torch/csrc/stable/ops.h>

#include "../check.h"
#include "../ops.h"
#include "rows.h"

namespace opsd::cpu {
namespace {

using torch::headeronly::ScalarType;

Dtype dtype_of(const Tensor& x, const char* argument) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return Dtype::FLOAT64;
    case ScalarType::Float: return Dtype::FLOAT32;
    case ScalarType::BFloat16: return Dtype::BFLOAT16;
    case ScalarType::Half: return Dtype::FLOAT16;
    default: expect(false, argument, "float64, float32, bfloat16 or float16", torch::headeronly::toString(x.scalar_type()));
  }
  return Dtype::FLOAT64;
}

ScalarType stats_type(const Tensor& S) { return S.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

const void* bias_pointer(const Optional& bias, const char* argument, const Tensor& S) {
  if (!bias) return nullptr;
  check_vector(*bias, argument, {S.size(1)}, stats_type(S));
  return bias->const_data_ptr();
}

// The arguments that every sweep has.
RowArgs logits(const Tensor& S, const Tensor& T, const Optional& bias_s, const Optional& bias_t, bool metrics, OPSD_SPEC_PARAMETERS) {
  expect(S.dim() == 2, "S", "2 dimensions (n, V)", S.dim());
  const int64_t n = S.size(0), V = S.size(1);
  expect(V >= 1, "S", "at least one column", V);
  check_rows(S, "S", n, V);
  check_rows(T, "T", n, V, true);
  check_dtype(T, "T", S.scalar_type());
  expect(kind >= 0 && kind < KINDS, "kind", "0 to " + std::to_string(KINDS - 1), kind);
  expect(teacher_mix >= 0 && teacher_mix < 1, "teacher_mix", "a number in [0, 1)", teacher_mix);
  expect(entry_clip >= 0, "entry_clip", "a number of at least 0", entry_clip);
  RowArgs a{};
  a.n = n, a.V = V;
  a.S = S.const_data_ptr(), a.T = T.const_data_ptr();
  a.stride_s = S.stride(0), a.stride_t = T.stride(0);
  a.dtype = a.out = dtype_of(S, "S");
  a.bias_s = bias_pointer(bias_s, "bias_s", S), a.bias_t = bias_pointer(bias_t, "bias_t", S);
  a.student = {student_scale, student_softcap, student_temperature};
  a.teacher = {teacher_scale, teacher_softcap, teacher_temperature};
  a.difference = difference, a.linear = linear, a.metrics = metrics;
  a.kind = static_cast<Kind>(kind), a.beta = beta, a.spread_limit = spread_limit;
  a.teacher_mix = teacher_mix, a.entry_clip = entry_clip, a.token_clip = token_clip;
  return a;
}

#define OPSD_SPEC                                                                                                                       \
  kind, beta, student_scale, student_softcap, student_temperature, teacher_scale, teacher_softcap, teacher_temperature, difference, \
      linear, teacher_mix, entry_clip, token_clip, spread_limit

Tensor rows_of(const Tensor& S, std::vector<int64_t> shape) { return torch::stable::new_empty(S, shape, stats_type(S)); }

void read_stats(RowArgs& a, const Tensor& S, const Tensor& stats) {
  check_vector(stats, "stats", {a.n, COLUMNS}, stats_type(S));
  a.stats = const_cast<void*>(stats.const_data_ptr());
}

void read_factor(RowArgs& a, const Tensor& S, const Tensor& factor) {
  check_vector(factor, "factor", {a.n}, stats_type(S));
  a.factor = factor.const_data_ptr();
}

void read_policy(RowArgs& a, const Tensor& S, const Optional& policy, const Optional& labels) {
  if (!policy) return;
  check_vector(*policy, "policy", {a.n}, stats_type(S));
  expect(labels.has_value(), "labels", "a tensor, as there is a policy", "None");
  check_vector(*labels, "labels", {a.n}, ScalarType::Long);
  a.policy = policy->const_data_ptr();
  a.labels = static_cast<const int64_t*>(labels->const_data_ptr());
}

void write_gradient(RowArgs& a, const Tensor& G) {
  check_rows(G, "G", a.n, a.V);
  a.out = dtype_of(G, "G");
  expect((a.out == Dtype::FLOAT64) == (a.dtype == Dtype::FLOAT64), "G", a.dtype == Dtype::FLOAT64 ? "float64, as S" : "float32 or a 16-bit type",
         torch::headeronly::toString(G.scalar_type()));
  a.G = G.mutable_data_ptr(), a.stride_g = G.stride(0);
}

// Entries below which a second thread costs more than it brings.
constexpr int64_t GRAIN = 1 << 15;

void sweep(const RowArgs& a, Sweep which) {
  const RunRows run = rows_for(a.dtype);
  const int64_t grain = GRAIN / a.V + 1;
  torch::stable::parallel_for(0, a.n, grain, [&](int64_t begin, int64_t end) { run(a, which, begin, end); });
}

}  // namespace

Tensor row_stats(const Tensor& S, const Tensor& T, const Optional& bias_s, const Optional& bias_t, bool metrics, OPSD_SPEC_PARAMETERS) {
  RowArgs a = logits(S, T, bias_s, bias_t, metrics, OPSD_SPEC);
  Tensor stats = rows_of(S, {a.n, COLUMNS});
  a.stats = stats.mutable_data_ptr();
  sweep(a, Sweep::STATS);
  return stats;
}

std::tuple<Tensor, Tensor> row_dot(const Tensor& S, const Tensor& T, const Tensor& stats, const Optional& bias_s, const Optional& bias_t,
                                   OPSD_SPEC_PARAMETERS) {
  RowArgs a = logits(S, T, bias_s, bias_t, false, OPSD_SPEC);
  read_stats(a, S, stats);
  Tensor loss = rows_of(S, {a.n}), A = rows_of(S, {a.n});
  a.loss = loss.mutable_data_ptr(), a.A = A.mutable_data_ptr();
  sweep(a, Sweep::DOT);
  return {loss, A};
}

void row_grad_(const Tensor& S, const Tensor& T, const Tensor& stats, const Tensor& A, const Tensor& factor, const Optional& policy,
               const Optional& labels, const Optional& bias_s, const Optional& bias_t, const Tensor& G, OPSD_SPEC_PARAMETERS) {
  RowArgs a = logits(S, T, bias_s, bias_t, false, OPSD_SPEC);
  read_stats(a, S, stats);
  read_factor(a, S, factor);
  read_policy(a, S, policy, labels);
  check_vector(A, "A", {a.n}, stats_type(S));
  a.A = const_cast<void*>(A.const_data_ptr());
  write_gradient(a, G);
  sweep(a, Sweep::GRAD);
}

std::tuple<Tensor, Tensor, Tensor> row_fused_(const Tensor& S, const Tensor& T, const Tensor& factor, const Optional& policy,
                                              const Optional& labels, const Optional& bias_s, const Optional& bias_t, bool metrics,
                                              const Tensor& G, OPSD_SPEC_PARAMETERS) {
  RowArgs a = logits(S, T, bias_s, bias_t, metrics, OPSD_SPEC);
  read_factor(a, S, factor);
  read_policy(a, S, policy, labels);
  write_gradient(a, G);
  Tensor stats = rows_of(S, {a.n, COLUMNS}), loss = rows_of(S, {a.n}), A = rows_of(S, {a.n});
  a.stats = stats.mutable_data_ptr(), a.loss = loss.mutable_data_ptr(), a.A = A.mutable_data_ptr();
  sweep(a, Sweep::FUSED);
  return {stats, loss, A};
}

std::string capability() { return cpu_capability(); }

}  // namespace opsd::cpu
