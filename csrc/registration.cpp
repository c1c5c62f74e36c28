// Registers the compiled operators. opsd_kernels/_rows/contract.py is the contract of the sweeps.
//
// Compiled into two libraries: one for the CPU, with the schemas, and with OPSD_CUDA one for CUDA. A third
// one, of the tests, runs the CUDA sources on a CPU in a namespace of its own (OPSD_EMULATED).
//
// A fragment, because Python defines further operators in the same namespace. G may share memory with S, as
// the contract allows; the schema marks only G as written. The operators run inside an opaque operator, so
// they have neither autograd nor a fake implementation.
#include <torch/csrc/stable/library.h>

#include "ops.h"
#include "row_binding.h"

#define OPSD_DEFINE_ROWS(m)                                                                                                             \
  m.def("row_stats(Tensor S, Tensor T, Tensor? bias_s, Tensor? bias_t, bool metrics, " OPSD_SPEC_SCHEMA ") -> Tensor");               \
  m.def("row_dot(Tensor S, Tensor T, Tensor(a!) stats, Tensor? bias_s, Tensor? bias_t, " OPSD_SPEC_SCHEMA ") -> (Tensor, Tensor)");  \
  m.def("row_grad_(Tensor S, Tensor T, Tensor stats, Tensor A, Tensor factor, Tensor? policy, Tensor? labels, "                      \
        "Tensor? bias_s, Tensor? bias_t, Tensor(a!) G, " OPSD_SPEC_SCHEMA ") -> ()");                                                 \
  m.def("row_fused_(Tensor S, Tensor T, Tensor factor, Tensor? policy, Tensor? labels, Tensor? bias_s, Tensor? bias_t, bool metrics, " \
        "Tensor(a!) G, " OPSD_SPEC_SCHEMA ") -> (Tensor, Tensor, Tensor)");                                                           \
  m.def("cuda_launch(int V, int itemsize, int architecture) -> str")

#define OPSD_IMPLEMENT_ROWS(m, sweep)                                  \
  m.impl("row_stats", TORCH_BOX(&opsd::RowOps<sweep>::row_stats)); \
  m.impl("row_dot", TORCH_BOX(&opsd::RowOps<sweep>::row_dot));     \
  m.impl("row_grad_", TORCH_BOX(&opsd::RowOps<sweep>::row_grad_)); \
  m.impl("row_fused_", TORCH_BOX(&opsd::RowOps<sweep>::row_fused_))

#if defined(OPSD_EMULATED)

STABLE_TORCH_LIBRARY(opsd_emulated, m) { OPSD_DEFINE_ROWS(m); }
STABLE_TORCH_LIBRARY_IMPL(opsd_emulated, CPU, m) { OPSD_IMPLEMENT_ROWS(m, opsd::cuda::sweep); }
STABLE_TORCH_LIBRARY_IMPL(opsd_emulated, CompositeExplicitAutograd, m) { m.impl("cuda_launch", TORCH_BOX(&opsd::cuda::launch_text)); }

#elif defined(OPSD_CUDA)

namespace {

// OPSD_SOURCES: the digest of the kernels' sources, from setup.py.
std::string cuda_sources() { return OPSD_SOURCES; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(opsd_kernels, m) { m.def("cuda_sources() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(opsd_kernels, CUDA, m) { OPSD_IMPLEMENT_ROWS(m, opsd::cuda::sweep); }
STABLE_TORCH_LIBRARY_IMPL(opsd_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_launch", TORCH_BOX(&opsd::cuda::launch_text));
  m.impl("cuda_sources", TORCH_BOX(&cuda_sources));
}

#else

STABLE_TORCH_LIBRARY_FRAGMENT(opsd_kernels, m) {
  OPSD_DEFINE_ROWS(m);
  m.def("cpu_capability() -> str");
  m.def("gemm_bf16_(Tensor a, Tensor b, Tensor(a!) out, bool accumulate, Tensor? shift=None, Tensor? tail=None) -> ()");
  m.def("gemm_fp32_(Tensor a, Tensor b, Tensor(a!) out, bool accumulate, Tensor? tail=None) -> ()");
  m.def("dots_bf16_(Tensor a, Tensor b, Tensor columns, Tensor(a!) out) -> ()");
  m.def("gemm_unavailable() -> str");
  m.def("gemm_fp32_unavailable() -> str");
  m.def("column_norms(Tensor G, Tensor? scale) -> (Tensor, Tensor)");
  m.def("gather_columns_(Tensor G, Tensor columns, Tensor(a!) out, Tensor(b!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(opsd_kernels, CPU, m) {
  OPSD_IMPLEMENT_ROWS(m, opsd::cpu::sweep);
  m.impl("gemm_bf16_", TORCH_BOX(&opsd::cpu::gemm_bf16_));
  m.impl("gemm_fp32_", TORCH_BOX(&opsd::cpu::gemm_fp32_));
  m.impl("dots_bf16_", TORCH_BOX(&opsd::cpu::dots_bf16_));
  m.impl("column_norms", TORCH_BOX(&opsd::cpu::column_norms));
  m.impl("gather_columns_", TORCH_BOX(&opsd::cpu::gather_columns_));
}

STABLE_TORCH_LIBRARY_IMPL(opsd_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&opsd::cpu::capability));
  m.impl("gemm_unavailable", TORCH_BOX(&opsd::cpu::gemm_unavailable));
  m.impl("gemm_fp32_unavailable", TORCH_BOX(&opsd::cpu::gemm_fp32_unavailable));
}

#endif
