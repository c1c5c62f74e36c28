// The CPU's sweep: rows over torch's own thread pool.
#include <torch/csrc/stable/ops.h>

#include "../ops.h"
#include "rows.h"

namespace opsd::cpu {

// Entries below which a second thread costs more than it brings.
constexpr int64_t GRAIN = 1 << 15;

void sweep(const RowArgs& a, Sweep which, int32_t) {
  const RunRows run = rows_for(a.dtype);
  const int64_t grain = GRAIN / a.V + 1;
  torch::stable::parallel_for(0, a.n, grain, [&](int64_t begin, int64_t end) { run(a, which, begin, end); });
}

std::string capability() { return cpu_capability(); }

}  // namespace opsd::cpu
