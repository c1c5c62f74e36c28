// Launches the kernels of one buffer type: compiled once per type, with OPSD_IN as the type and OPSD_RUN the
// function.
#include "rows.cuh"

#include "rows.h"

namespace opsd::cuda {
namespace {

template <bool PLAIN, Kind KIND>
void run_kind(const RowArgs& a, Sweep which, const Shape& shape, Stream stream) {
  const Shape rows = streaming(a.V, sizeof(OPSD_IN));
  // General rows take all sums, in one kernel.
  constexpr Kind SUMS = PLAIN && one_sweep(KIND) ? KIND : Kind::JSD;
  const bool two_sweeps = !one_sweep(KIND) || a.terms.clip < INF;
  if (which == Sweep::FUSED && shape.blocks > 0) return launch(fused_kernel<OPSD_IN, PLAIN, KIND>, a.n, shape, stream, a, shape.per_block);
  if (which == Sweep::STATS || which == Sweep::FUSED) launch(stats_kernel<OPSD_IN, PLAIN, SUMS>, a.n, rows, stream, a);
  if (which == Sweep::DOT || (which == Sweep::FUSED && two_sweeps)) launch(dot_kernel<OPSD_IN, PLAIN, KIND>, a.n, rows, stream, a);
  if (which == Sweep::GRAD || which == Sweep::FUSED) launch(grad_kernel<OPSD_IN, PLAIN, KIND>, a.n, rows, stream, a);
}

template <bool PLAIN>
void run_plain(const RowArgs& a, Sweep which, const Shape& shape, Stream stream) {
  switch (a.kind) {
    case Kind::REVERSE_KL: return run_kind<PLAIN, Kind::REVERSE_KL>(a, which, shape, stream);
    case Kind::FORWARD_KL: return run_kind<PLAIN, Kind::FORWARD_KL>(a, which, shape, stream);
    case Kind::JSD: return run_kind<PLAIN, Kind::JSD>(a, which, shape, stream);
    case Kind::SKEW_REVERSE_KL: return run_kind<PLAIN, Kind::SKEW_REVERSE_KL>(a, which, shape, stream);
    case Kind::SKEW_FORWARD_KL: return run_kind<PLAIN, Kind::SKEW_FORWARD_KL>(a, which, shape, stream);
    case Kind::TVD: return run_kind<PLAIN, Kind::TVD>(a, which, shape, stream);
    case Kind::MIXED_KL: return run_kind<PLAIN, Kind::MIXED_KL>(a, which, shape, stream);
  }
}

}  // namespace

void OPSD_RUN(const RowArgs& a, Sweep which, const Shape& shape, Stream stream) {
  if (plain(a)) run_plain<true>(a, which, shape, stream);
  else run_plain<false>(a, which, shape, stream);
}

}  // namespace opsd::cuda
