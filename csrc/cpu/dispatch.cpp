// Chooses the instruction set once, at run time.
#include <cstdlib>
#include <cstring>

#include "../check.h"
#include "columns.h"
#include "rows.h"
#include "topk.h"

namespace opsd {
namespace {

struct Level {
  const char* name;
  RunRows run;
  const ColumnKernels& columns;
  RunTopk topk;
  bool (*present)();
};

// Best first. Levels are built where setup.py finds an x86 compiler.
const Level LEVELS[] = {
#if defined(OPSD_X86)
    {"avx512", avx512::run_rows, avx512::COLUMN_KERNELS, avx512::run_topk,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
     }},
    {"avx2", avx2::run_rows, avx2::COLUMN_KERNELS, avx2::run_topk, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
    {"default", baseline::run_rows, baseline::COLUMN_KERNELS, baseline::run_topk, [] { return true; }},
};

const Level& choose() {
  const char* limit = std::getenv("OPSD_CPU_CAPABILITY");
  const bool limited = limit && *limit;
  expect(!limited || !std::strcmp(limit, "avx512") || !std::strcmp(limit, "avx2") || !std::strcmp(limit, "default"), "OPSD_CPU_CAPABILITY",
         "one of 'avx512', 'avx2', 'default'", limited ? limit : "");
  bool allowed = !limited;
  for (const Level& level : LEVELS) {
    allowed = allowed || !std::strcmp(limit, level.name);
    if (allowed && level.present()) return level;
  }
  return LEVELS[sizeof(LEVELS) / sizeof(Level) - 1];
}

const Level& level() {
  static const Level& chosen = choose();
  return chosen;
}

}  // namespace

const char* cpu_capability() { return level().name; }

// Doubles are processed one at a time with the C library's functions, so one build of them is enough.
RunRows rows_for(Dtype dtype) { return dtype == Dtype::FLOAT64 ? baseline::run_rows : level().run; }
const ColumnKernels& columns_for(Dtype dtype) { return dtype == Dtype::FLOAT64 ? baseline::COLUMN_KERNELS : level().columns; }
RunTopk topk_for(Dtype dtype) { return dtype == Dtype::FLOAT64 ? baseline::run_topk : level().topk; }

}  // namespace opsd
