// The kernels. One block per row and sweep reads the row from device memory. The fused kernel holds it in the
// shared memory of a cluster instead, so that logits are read once and the gradient is written once.
#pragma once

#include "gradient.cuh"

namespace opsd::cuda {

template <class In>
OPSD_DEVICE WholeRow<In> whole_row(const RowArgs& a, int64_t n) {
  return {static_cast<const In*>(a.S) + n * a.stride_s, static_cast<const In*>(a.T) + n * a.stride_t, a.V};
}

template <class In>
OPSD_DEVICE Slice<In> whole_slice(const WholeRow<In>& row) {
  return {row.S, row.T, 0, static_cast<int>(row.V)};
}

OPSD_DEVICE Exchange& exchange() { return *reinterpret_cast<Exchange*>(shared_memory()); }

OPSD_DEVICE float* stats_of(const RowArgs& a, int64_t n) { return static_cast<float*>(a.stats) + n * COLUMNS; }

template <class In, bool PLAIN, class Loaded>
OPSD_DEVICE Near near_sweep(const Source<PLAIN>& source, const Slice<In>& slice, bool metrics, Loaded keep) {
  Near near;
  walk<PLAIN>(slice, [&]<int N>(int v, const Pack<In, N>& S, const Pack<In, N>& T) {
    keep(v, S, T);
    constexpr int PART = N < 4 ? N : 4;  // eight 16-bit entries at once spilled
#pragma unroll
    for (int i = 0; i < N; i += PART) near.add(source, part<PART>(S, i), part<PART>(T, i), slice.offset + v + i, metrics);
  });
  return near;
}

template <class In, bool PLAIN>
OPSD_KERNEL void __launch_bounds__(MOST_THREADS, 2) stats_kernel(OPSD_GRID_CONSTANT RowArgs a) {
  const int64_t n = block();
  const Source<PLAIN> source(a, n);
  const WholeRow<In> whole = whole_row<In>(a, n);
  const Slice<In> slice = whole_slice(whole);
  const Near near = near_sweep(source, slice, a.metrics, [](int, const auto&, const auto&) {});
  const Statistics row = finish(source, whole, slice, near, exchange(), a);
  if (thread() > 0) return;
  row.write(stats_of(a, n), a);
  // A plain KL has its loss from this sweep, if the caller wants one.
  if (a.loss && a.kind == Kind::REVERSE_KL) write_value(a, n, {row.reverse_kl, row.reverse_kl, 0}, true);
  if (a.loss && a.kind == Kind::FORWARD_KL) write_value(a, n, {row.forward_kl, -1, 0}, true);
}

template <class In, bool PLAIN, Kind KIND>
OPSD_KERNEL void __launch_bounds__(MOST_THREADS, 2) dot_kernel(OPSD_GRID_CONSTANT RowArgs a) {
  const int64_t n = block();
  const Source<PLAIN> source(a, n);
  Statistics row;
  row.read(stats_of(a, n), a.spread_limit);
  write_value(a, n, value<KIND>(source, whole_slice(whole_row<In>(a, n)), row, exchange(), a), thread() == 0);
}

template <class In, bool PLAIN, Kind KIND>
OPSD_KERNEL void __launch_bounds__(MOST_THREADS, 2) grad_kernel(OPSD_GRID_CONSTANT RowArgs a) {
  const int64_t n = block();
  const Source<PLAIN> source(a, n);
  const Slice<In> slice = whole_slice(whole_row<In>(a, n));
  const Pull pull(a, n, static_cast<const float*>(a.A)[n], stats_of(a, n)[CLIPPED]);
  const Output G(a.G, n * a.stride_g, a.out);
  if (pull.zero()) return zero_gradient<PLAIN>(slice, G);
  Statistics row;
  row.read(stats_of(a, n), a.spread_limit);
  // In a narrowed view the first tile's gradient overlaps logits that another thread loads; later tiles'
  // overlap earlier tiles' logits.
  const bool narrowed = a.G == a.S && a.out != a.dtype;
  gradient<KIND>(source, slice, row, pull, G, a, [=] {
    if (narrowed) block_sync();
  });
}

template <class In, bool PLAIN, Kind KIND>
OPSD_KERNEL void __launch_bounds__(MOST_THREADS, 2) fused_kernel(OPSD_GRID_CONSTANT RowArgs a, const int64_t per_block) {
  const int rank = cluster_rank();
  const int64_t n = block() / cluster_size(), first = min(rank * per_block, a.V);
  const int length = static_cast<int>(min(per_block, a.V - first));
  const Source<PLAIN> source(a, n);
  const WholeRow<In> whole = whole_row<In>(a, n);
  const Slice<In> slice(whole.S + first, whole.T + first, first, length);
  In* const held_s = reinterpret_cast<In*>(shared_memory() + EXCHANGE_BYTES);
  In* const held_t = held_s + per_block;
  const Near near = near_sweep(source, slice, a.metrics, [=]<int N>(int v, const Pack<In, N>& S, const Pack<In, N>& T) {
    *reinterpret_cast<Pack<In, N>*>(held_s + v) = S;
    *reinterpret_cast<Pack<In, N>*>(held_t + v) = T;
  });
  const Slice<In> held(held_s, held_t, first, length);
  const Statistics row = finish(source, whole, held, near, exchange(), a);
  const bool writes = rank == 0 && thread() == 0;
  if (writes) row.write(stats_of(a, n), a);
  const Value v = value<KIND>(source, held, row, exchange(), a);
  const Pull pull(a, n, v.A, write_value(a, n, v, writes));
  const Output G(a.G, n * a.stride_g + first, a.out);
  if (pull.zero()) return zero_gradient<PLAIN>(held, G);
  gradient<KIND>(source, held, row, pull, G, a, [] {});
}

}  // namespace opsd::cuda
