// The plain argument struct between the torch binding and the sweeps of every device. Torch-free.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define OPSD_ANYWHERE __host__ __device__ constexpr
#else
#define OPSD_ANYWHERE constexpr
#endif

namespace opsd {

// spec.Kind
enum class Kind : int { REVERSE_KL = 0, FORWARD_KL, JSD, SKEW_REVERSE_KL, SKEW_FORWARD_KL, TVD, MIXED_KL };
constexpr int KINDS = 7;

// spec.Divergence.one_sweep: the statistics hold the value.
OPSD_ANYWHERE bool one_sweep(Kind kind) { return kind == Kind::REVERSE_KL || kind == Kind::FORWARD_KL || kind == Kind::MIXED_KL; }

// Whether the divergence has the reverse KL among its terms, and the forward KL.
OPSD_ANYWHERE bool has_reverse(Kind kind) { return kind == Kind::REVERSE_KL || kind == Kind::MIXED_KL; }
OPSD_ANYWHERE bool has_forward(Kind kind) { return kind == Kind::FORWARD_KL || kind == Kind::MIXED_KL; }

enum class Dtype : int { FLOAT64, FLOAT32, BFLOAT16, FLOAT16 };

// Columns of the statistics: contract.Column.
enum Column : int {
  STUDENT_MAX = 0,
  STUDENT_LOGSUM,
  TEACHER_MAX,
  TEACHER_LOGSUM,
  GAP,
  SPREAD,
  REVERSE_KL,
  FORWARD_KL,
  STUDENT_ENTROPY,
  TEACHER_ENTROPY,
  STUDENT_MAX_PROB,
  TEACHER_MAX_PROB,
  STUDENT_ARGMAX,
  TEACHER_ARGMAX,
  CLIPPED,
  COLUMNS
};

enum class Sweep : int { STATS, DOT, GRAD, FUSED };

// Raw logit z -> softcap(scale * (z + bias)) / temperature. softcap 0: none.
struct Transform {
  double scale, softcap, temperature;
  const void* temperatures;  // (n,) of the statistics' type, one for each row, in place of `temperature`; or null
};

// The arguments of a divergence's terms beside the row. clip: the bound of a term; infinity: none.
template <class X>
struct TermOptions {
  X beta, clip;
};

struct RowArgs {
  int64_t n, V;
  const void* S;  // (n, V) of dtype
  const void* T;  // (n, V) of dtype
  void* G;        // (n, V) of out, written by GRAD and FUSED
  int64_t stride_s, stride_t, stride_g;  // stride_t may be 0
  Dtype dtype, out;
  const void* bias_s;  // (V,) of the statistics' type (double for FLOAT64, else float), or null
  const void* bias_t;
  void* stats;  // (n, COLUMNS) of the statistics' type, as loss, A and factor
  void* loss;   // (n,)
  void* A;      // (n,)
  const void* factor;  // (n,)
  const void* policy;  // (n,), or null for zeros
  const int64_t* labels;  // (n,) with policy; no label outside [0, V)
  Transform student, teacher;
  bool difference;  // T holds raw teacher minus raw student logits
  bool linear;      // the transformed difference is a multiple of T too: RowSpec.linear_difference
  bool metrics;
  Kind kind;
  TermOptions<double> terms;
  double teacher_mix;  // a: the teacher's logits are (1 - a) * t + a * s
  double token_clip;  // infinity: none
  double spread_limit;  // contract.SPREAD_LIMIT
};

}  // namespace opsd
