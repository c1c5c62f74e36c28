// The CPU sweeps: one entry point per instruction set, all compiled from rows.cpp.
#pragma once

#include "../row_args.h"

namespace opsd {

// Rows [begin, end) of one sweep. Each row depends on itself alone.
using RunRows = void (*)(const RowArgs& args, Sweep sweep, int64_t begin, int64_t end);

namespace baseline {
void run_rows(const RowArgs& args, Sweep sweep, int64_t begin, int64_t end);
}
namespace avx2 {
void run_rows(const RowArgs& args, Sweep sweep, int64_t begin, int64_t end);
}
namespace avx512 {
void run_rows(const RowArgs& args, Sweep sweep, int64_t begin, int64_t end);
}

// "avx512", "avx2" or "default": the best that processor, build and OPSD_CPU_CAPABILITY allow.
const char* cpu_capability();
RunRows rows_for(Dtype dtype);

}  // namespace opsd
