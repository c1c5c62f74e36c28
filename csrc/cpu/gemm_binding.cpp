// Tensors to GemmArgs, the address of the micro-kernel, and items over torch's thread pool.
#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../check.h"
#include "../ops.h"
#include "gemm.h"
#include "rows.h"

namespace opsd::cpu {
namespace {

using torch::headeronly::ScalarType;

// at::native::cpublas::brgemm(..., const BFloat16*, const BFloat16*, float*, bool) and brgemm_release(bool),
// which torch's attention calls. They are not part of its public interface: where they are missing the caller
// takes another GEMM, and extension.py tries this one on small products first.
constexpr const char* KERNEL = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb";
constexpr const char* RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb";

void* symbol(const char* name) {
  static void* const library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  return library ? dlsym(library, name) : nullptr;
}

struct Kernel {
  MicroKernel run = reinterpret_cast<MicroKernel>(symbol(KERNEL));
  void (*release)(bool) = reinterpret_cast<void (*)(bool)>(symbol(RELEASE));  // releases the AMX tiles
};

const Kernel& kernel() {
  static const Kernel found;
  return found;
}

template <class T>
Operand<T> operand(const Tensor& x, const char* argument, ScalarType dtype) {
  check_dtype(x, argument, dtype);
  expect(x.dim() == 2, argument, "2 dimensions", x.dim());
  const bool transposed = x.stride(1) != 1 && x.size(1) != 1;
  expect(!transposed || x.stride(0) == 1 || x.size(0) == 1, argument, "one stride of 1", x.stride(0));
  const int64_t length = transposed ? x.size(0) : x.size(1), stride = transposed ? x.stride(1) : x.stride(0);
  // An expanded matrix has a stride of 0, which the max below would read past.
  expect(stride >= length || x.numel() <= length, argument, "a stride of at least " + std::to_string(length), stride);
  return {static_cast<const T*>(x.const_data_ptr()), std::max(stride, length), transposed};
}

GemmOperand bf16_operand(const Tensor& x, const char* argument) { return operand<uint16_t>(x, argument, ScalarType::BFloat16); }

// `tail` are the last of the K rows.
template <class T>
void check_inner(int64_t K, const Tensor& b, const Tail<T>& tail, bool a_transposed, bool b_transposed) {
  const int64_t rows = b.size(0);
  if (tail.length) expect(rows < K, "b", "fewer than " + std::to_string(K) + " rows above a tail", rows);
  else expect(rows == K, "b", std::to_string(K) + " rows", rows);
  expect(!a_transposed || !b_transposed, "b", "contiguous columns beside a transposed a", "a transposed one");
  expect(!a_transposed || !tail.length, "tail", "none beside a transposed a", "one");
}

template <class T>
Tail<T> tail_of(const std::optional<Tensor>& tail, int64_t N, ScalarType dtype) {
  if (!tail) return {};
  const Operand<T> rows = operand<T>(*tail, "tail", dtype);
  expect(tail->size(0) >= 1, "tail", "at least one row", tail->size(0));
  expect(tail->size(1) == N, "tail", std::to_string(N) + " columns, as in b", tail->size(1));
  return {rows, tail->size(0)};
}

#if defined(OPSD_X86)
constexpr int64_t PANEL = 512;  // columns: 256 rows of c beside them are 512 KiB
constexpr int64_t TILE = 64;

template <class Args>
GemmCut cut(const Args& g, int64_t threads) {
  if (g.a.transposed) return {TILE, (g.M + TILE - 1) / TILE, 1};
  const int64_t rounds = (g.N + threads * PANEL - 1) / (threads * PANEL), share = (g.N + threads * rounds - 1) / (threads * rounds);
  // Each thread gets as many.
  const int64_t panel = (share + TILE - 1) / TILE * TILE, panels = (g.N + panel - 1) / panel;
  return {panel, panels, std::clamp<int64_t>(threads / panels, 1, (g.M + TILE - 1) / TILE)};
}
#endif

}  // namespace

std::string gemm_unavailable() {
#if defined(OPSD_X86)
  if (std::strcmp(cpu_capability(), "avx512") || !__builtin_cpu_supports("avx512bf16")) return "the processor has no bf16 products (avx512_bf16), or OPSD_CPU_CAPABILITY forbids them";
  if (!kernel().run || !kernel().release) return "this torch does not export oneDNN's micro-kernel";
  return "";
#else
  return "not an x86 processor";
#endif
}

std::string gemm_fp32_unavailable() {
#if defined(OPSD_X86)
  if (!__builtin_cpu_is("amd")) return "torch.mm uses the vector units of this processor";
  if (std::strcmp(cpu_capability(), "avx512")) return "the processor has no AVX-512, or OPSD_CPU_CAPABILITY forbids it";
  return "";
#else
  return "not an x86 processor";
#endif
}

void gemm_bf16_(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate, const std::optional<Tensor>& shift,
                const std::optional<Tensor>& tail) {
  const bool narrow = out.scalar_type() == ScalarType::BFloat16;
  check_dtype(out, "out", narrow ? ScalarType::BFloat16 : ScalarType::Float);
  GemmArgs g{a.size(0), b.size(1), a.size(1), bf16_operand(a, "a"), bf16_operand(b, "b"), tail_of<uint16_t>(tail, b.size(1), ScalarType::BFloat16),
             b.size(0), nullptr, nullptr, nullptr, 0, accumulate, kernel().run};
  expect(!tail || b.size(0) % 2 == 0, "b", "an even number of rows above a tail", b.size(0));
  const bool once = !tail || g.K - b.size(0) <= g.tail.length;
  expect(once || g.tail.length % 2 == 0, "tail", "an even number of rows where they repeat", g.tail.length);
  if (narrow) g.narrow = static_cast<uint16_t*>(out.mutable_data_ptr());
  else g.c = static_cast<float*>(out.mutable_data_ptr());
  check_rows(out, "out", g.M, g.N);
  expect(!narrow || !accumulate, "accumulate", "false with a bf16 out", "true");
  expect(!narrow || !g.a.transposed, "a", "contiguous columns with a bf16 out", "a transposed one");
  if (shift) {
    expect(narrow, "shift", "none with an fp32 out", "one");
    check_dtype(*shift, "shift", ScalarType::Float);
    expect(shift->dim() == 1 && shift->size(0) == g.M && (g.M < 2 || shift->stride(0) == 1), "shift", "contiguous, one per row of a", shift->numel());
    g.shift = static_cast<const float*>(shift->const_data_ptr());
  }
  g.stride_c = std::max(out.stride(0), g.N);
  check_inner(g.K, b, g.tail, g.a.transposed, g.b.transposed);
  expect(gemm_unavailable().empty(), "gemm_bf16_", "a machine that can", gemm_unavailable());
  if (g.M == 0 || g.N == 0) return;
#if defined(OPSD_X86)
  const GemmCut items = cut(g, torch::stable::get_num_threads());
  const int64_t pairs = (g.K + 1) / 2;
  std::vector<uint32_t> packed(g.a.transposed ? pairs * g.N : 0);
  torch::stable::parallel_for(0, g.a.transposed ? pairs : 0, TILE, [&](int64_t begin, int64_t end) {
    avx512::interleave_gemm(g.b, g.K, g.N, packed.data(), begin, end);
  });
  torch::stable::parallel_for(0, items.items(), 1, [&](int64_t begin, int64_t end) {
    avx512::run_gemm(g, items, packed.data(), begin, end);
    kernel().release(true);
  });
#endif
}

void gemm_fp32_(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate, const std::optional<Tensor>& tail) {
  check_dtype(out, "out", ScalarType::Float);
  const auto left = operand<float>(a, "a", ScalarType::Float), right = operand<float>(b, "b", ScalarType::Float);
  const int64_t M = a.size(0), N = b.size(1), K = a.size(1);
  check_rows(out, "out", M, N);
  const auto more = tail_of<float>(tail, N, ScalarType::Float);
  check_inner(K, b, more, left.transposed, right.transposed);
  expect(gemm_fp32_unavailable().empty(), "gemm_fp32_", "a machine that can", gemm_fp32_unavailable());
  if (M == 0 || N == 0) return;
  expect(K >= 1, "a", "at least one column", K);
  const FloatGemmArgs g{M, N, K, left, right, more, b.size(0), static_cast<float*>(out.mutable_data_ptr()), std::max(out.stride(0), N), accumulate};
#if defined(OPSD_X86)
  const GemmCut items = cut(g, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, items.items(), 1, [&](int64_t begin, int64_t end) { avx512::run_gemm(g, items, begin, end); });
#endif
}

void dots_bf16_(const Tensor& a, const Tensor& b, const Tensor& columns, const Tensor& out) {
  const GemmOperand rows = bf16_operand(a, "a"), head = bf16_operand(b, "b");
  expect(!rows.transposed && !head.transposed, "a", "contiguous columns, as in b", "transposed ones");
  expect(b.size(1) == a.size(1), "b", std::to_string(a.size(1)) + " columns", b.size(1));
  check_dtype(columns, "columns", ScalarType::Long);
  check_dtype(out, "out", ScalarType::Float);
  expect(columns.dim() == 2 && columns.size(0) == a.size(0) && columns.is_contiguous(), "columns", "contiguous, a row per row of a", columns.dim());
  expect(out.numel() == columns.numel() && out.is_contiguous(), "out", "contiguous, as large as columns", out.numel());
  expect(gemm_unavailable().empty(), "dots_bf16_", "a machine that can", gemm_unavailable());
  const auto* ids = static_cast<const int64_t*>(columns.const_data_ptr());
  const int64_t V = b.size(0), *end = ids + columns.numel();
  const int64_t* outside = std::find_if(ids, end, [V](int64_t id) { return id < 0 || id >= V; });
  if (outside != end) expect(false, "columns", "entries in [0, " + std::to_string(V) + ")", *outside);
#if defined(OPSD_X86)
  const DotArgs d{columns.size(1), a.size(1), rows.data, head.data, rows.stride, head.stride, ids, static_cast<float*>(out.mutable_data_ptr())};
  torch::stable::parallel_for(0, a.size(0), 16, [&](int64_t begin, int64_t end) { avx512::run_dots(d, begin, end); });
#endif
}

}  // namespace opsd::cpu
