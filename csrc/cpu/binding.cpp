// The CPU sweep: rows over torch's thread pool.
#include <torch/csrc/stable/ops.h>

#include "../ops.h"
#include "rows.h"

namespace opsd::cpu {

// Below this many entries a second thread costs more than it gains.
constexpr int64_t GRAIN = 1 << 15;

void sweep(const RowArgs& a, Sweep which, int32_t) {
  const RunRows run = rows_for(a.dtype);
  const int64_t grain = GRAIN / a.V + 1;
  torch::stable::parallel_for(0, a.n, grain, [&](int64_t begin, int64_t end) { run(a, which, begin, end); });
}

std::string capability() { return cpu_capability(); }

}  // namespace opsd::cpu
