// The kernels. One block per row and sweep reads the row from device memory. The fused kernel holds it in the
// shared memory of a cluster instead, so that logits are read once and the gradient is written once.
#pragma once

#include "gradient.cuh"

namespace opsd::cuda {

template <class In>
OPSD_DEVICE WholeRow<In> whole_row(const RowArgs& a, int64_t n) {
  return {kept(static_cast<const In*>(a.S) + n * a.stride_s), kept(static_cast<const In*>(a.T) + n * a.stride_t), a.V};
}

template <class In>
OPSD_DEVICE Slice<In> whole_slice(const WholeRow<In>& row) {
  return {row.S, row.T, 0, static_cast<int>(row.V), reinterpret_cast<In*>(shared_memory() + EXCHANGE_BYTES)};
}

OPSD_DEVICE Exchange& exchange() { return *reinterpret_cast<Exchange*>(shared_memory()); }

OPSD_DEVICE float* stats_of(const RowArgs& a, int64_t n) { return static_cast<float*>(a.stats) + n * COLUMNS; }

template <class In, bool PLAIN, Kind KIND>
OPSD_KERNEL void __launch_bounds__(MOST_THREADS, 2) stats_kernel(OPSD_GRID_CONSTANT RowArgs a) {
  const int64_t n = block();
  const Source<PLAIN> source(a, n);
  const WholeRow<In> whole = whole_row<In>(a, n);
  const Slice<In> slice = whole_slice(whole);
  Slice<In> start = slice;  // two vectors of each thread
  start.length = min(slice.length, 2 * threads() * LANES<In>), start.whole = min(slice.whole, start.length);
  const Peaks peaks = find_peaks(source, start, true, [](int, const auto&, const auto&) {});
  const Statistics row = statistics<false, KIND>(source, whole, slice, peaks, exchange(), a);
  if (thread() > 0) return;
  row.write(stats_of(a, n), a);
  // A KL has its loss from this sweep, if the caller wants one.
  const Kind kind = one_sweep(KIND) ? KIND : a.kind;
  if (a.loss && one_sweep(kind)) write_value(a, n, value_of(kind, row, a.terms.beta), true);
}

template <class In, bool PLAIN, Kind KIND>
OPSD_KERNEL void __launch_bounds__(MOST_THREADS, 2) dot_kernel(OPSD_GRID_CONSTANT RowArgs a) {
  const int64_t n = block();
  const Source<PLAIN> source(a, n);
  Statistics row;
  row.read(stats_of(a, n), a.spread_limit);
  const Value v = value<false, KIND>(source, whole_slice(whole_row<In>(a, n)), row, Normal(source, row), exchange(), a);
  write_value(a, n, v, thread() == 0);
}

template <class In, bool PLAIN, Kind KIND>
OPSD_KERNEL void __launch_bounds__(MOST_THREADS, 2) grad_kernel(OPSD_GRID_CONSTANT RowArgs a) {
  const int64_t n = block();
  const Source<PLAIN> source(a, n);
  const Slice<In> slice = whole_slice(whole_row<In>(a, n));
  const Pull pull(a, n, static_cast<const float*>(a.A)[n], stats_of(a, n)[CLIPPED]);
  const Output G(a.G, n * a.stride_g, a.out);
  if (pull.zero()) return zero_gradient(a.V, G);
  Statistics row;
  row.read(stats_of(a, n), a.spread_limit);
  // In a narrowed view the first tile's gradient overlaps logits that another thread loads; later tiles'
  // overlap earlier tiles' logits. So the entries are read in order, from the first on.
  const bool narrowed = sizeof(In) == 4 && a.G == a.S && a.out != a.dtype;
  Slice<In> part = slice.peeled(G);
  if (narrowed && part.head) part.head = part.whole = 0;
  gradient<false, KIND>(source, part, Normal(source, row), pull, G, a, [=] {
    if (narrowed) block_sync();
  });
}

template <class In, bool PLAIN, Kind KIND>
OPSD_KERNEL void __launch_bounds__(MOST_THREADS, 2) fused_kernel(OPSD_GRID_CONSTANT RowArgs a, const int64_t per_block) {
  const int rank = cluster_rank();
  const int64_t n = static_cast<uint32_t>(block()) / cluster_size(), first = min(rank * per_block, a.V);
  const int length = static_cast<int>(min(per_block, a.V - first));
  const Source<PLAIN> source(a, n);
  const WholeRow<In> whole = whole_row<In>(a, n);
  const Slice<In> slice(kept(whole.S + first), kept(whole.T + first), first, length);
  In* const held_s = reinterpret_cast<In*>(shared_memory() + EXCHANGE_BYTES);
  In* const held_t = held_s + per_block;
  const auto keep = [=]<int N>(int v, const Pack<In, N>& S, const Pack<In, N>& T) {
    *reinterpret_cast<Pack<In, N>*>(held_s + v) = S;
    *reinterpret_cast<Pack<In, N>*>(held_t + v) = T;
  };
  const Peaks peaks = find_peaks(source, slice, a.metrics, keep);
  const Slice<In> held(held_s, held_t, first, length);
  const Statistics row = statistics<true, KIND>(source, whole, held, peaks, exchange(), a);
  const bool writes = rank == 0 && thread() == 0;
  if (writes) row.write(stats_of(a, n), a);
  const Normal normal(source, row);
  const Value v = value<true, KIND>(source, held, row, normal, exchange(), a);
  const Pull pull(a, n, v.A, write_value(a, n, v, writes));
  const Output G(a.G, n * a.stride_g + first, a.out);
  if (pull.zero()) return zero_gradient(length, G);
  gradient<true, KIND>(source, held.peeled(G), normal, pull, G, a, Apart());
}

}  // namespace opsd::cuda
