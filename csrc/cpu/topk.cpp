// Compiled once per instruction set (OPSD_CAPABILITY), doubles in the baseline build alone.
//
// Two reads of a row, the second from the cache. The first takes the maximum of every group of GROUP entries.
// The k-th largest of these maxima is a bound that at least k entries reach, and few others: they are the
// candidates that the second read collects, while it adds up the mass of all other entries.
#include "topk.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "source.h"

namespace opsd::OPSD_CAPABILITY {
namespace {

constexpr double INF = __builtin_inf();
constexpr int64_t GROUP = 32;  // vectors in a block; lane l of them is a group of GROUP columns

template <class E>
struct Candidate {
  E value;
  int64_t id;
  // The order of the list: the larger first, the lower id first among equals.
  bool operator<(const Candidate& other) const { return value > other.value || (value == other.value && id < other.id); }
};

template <class X>
class Lister {
  using E = ElementOf<X>;
  using Side = typename GeneralSource<X, E>::Side;
  static constexpr int64_t L = LANES<X>, BLOCK = GROUP * L;

  const TopkArgs& a_;
  std::vector<E> maxima_;  // (blocks, L), in any order after `bound`
  std::vector<Candidate<E>> candidates_;
  size_t kept_;  // candidates that are left when their number reaches twice that

  OPSD_INLINE static Exact<X> at(const Side& side, const E* row, int64_t v, int64_t count) {
    return side({load_as<X>(row + v, count), X(0.0)}, v, count);
  }

  // Fills the maxima of the groups. NaN is passed over.
  OPSD_SWEEP double maximum(const Side side, const E* row) {
    maxima_.clear();
    X largest(-INF);
    for (int64_t start = 0; start < a_.V; start += BLOCK) {
      const int64_t end = std::min(start + BLOCK, a_.V);
      X top[2] = {X(-INF), X(-INF)};
      int64_t v = start;
      for (; v + 2 * L <= end; v += 2 * L)
        for (int i = 0; i < 2; ++i) top[i] = max(at(side, row, v + i * L, L).sum * side.outer, top[i]);
      for (; v < end; v += L) {
        const int64_t count = std::min(L, end - v);
        top[0] = max(FirstLanes<X>{count}(at(side, row, v, count).sum * side.outer, -INF), top[0]);
      }
      const X group = max(top[0], top[1]);
      largest = max(group, largest);
      maxima_.resize(maxima_.size() + L);
      store(maxima_.data() + maxima_.size() - L, group);
    }
    return reduce_max(largest);
  }

  double bound() {
    if (static_cast<size_t>(a_.k) > maxima_.size()) return -INF;
    std::nth_element(maxima_.begin(), maxima_.begin() + (a_.k - 1), maxima_.end(), std::greater<E>());
    return static_cast<double>(maxima_[a_.k - 1]);
  }

  // Leaves the first `kept` candidates; returns the sum of exp(x - largest) of the others.
  double prune(size_t kept, double largest) {
    if (candidates_.size() <= kept) return 0;
    std::nth_element(candidates_.begin(), candidates_.begin() + (kept - 1), candidates_.end());
    double sum = 0;
    for (size_t i = kept; i < candidates_.size(); ++i)
      if (candidates_[i].value != static_cast<E>(-INF)) sum += ::exp(static_cast<double>(candidates_[i].value) - largest);
    candidates_.resize(kept);
    return sum;
  }

  // Adds the entries of a vector from `least` on; returns what pruning returns.
  OPSD_SWEEP double add(X value, int64_t v, int64_t count, double least, double largest) {
    E values[L];
    store(values, value);
    for (int64_t lane = 0; lane < count; ++lane)
      if (values[lane] >= least) candidates_.push_back({values[lane], v + lane});
    return candidates_.size() >= 2 * kept_ ? prune(kept_, largest) : 0;
  }

  // Collects the candidates; returns the sum of exp(x - largest) of all other entries.
  OPSD_SWEEP double collect(const Side side, const E* row, double largest) {
    candidates_.clear();
    const X least(bound()), level(largest);
    X block(0.0);
    double sum = 0;
    walk<X>(
        a_.V,
        [&](int64_t v, auto lanes) {
          const Exact<X> y = at(side, row, v, lanes.count);
          const X value = y.sum * side.outer;
          const auto listed = least <= value;  // not a NaN, which reaches the sum
          block = block + lanes(select(listed, X(0.0), exp(side.above(y, level))), 0.0);
          if (lowest_lane(listed) >= 0) sum += add(value, v, lanes.count, first_lane(least), largest);
        },
        [&] {
          sum += reduce_add(block);
          block = X(0.0);
        });
    return sum + prune(a_.k, largest);
  }

 public:
  explicit Lister(const TopkArgs& a) : a_(a), kept_(static_cast<size_t>(a.k) + 64) {
    maxima_.reserve((a.V / BLOCK + 1) * L);
    candidates_.reserve(2 * kept_ + L);
  }

  void run(int64_t i) {
    const E* row = static_cast<const E*>(a_.S) + i * a_.stride;
    const Side side(of_row<X>(a_.transform, i), a_.bias);
    const double rest = collect(side, row, maximum(side, row));
    // Rows of NaN alone have fewer candidates than entries.
    for (int64_t v = 0; candidates_.size() < static_cast<size_t>(a_.k); ++v) fill(v);
    std::sort(candidates_.begin(), candidates_.end());
    E* values = static_cast<E*>(a_.values) + i * a_.k;
    for (int64_t j = 0; j < a_.k; ++j) values[j] = candidates_[j].value, a_.ids[i * a_.k + j] = candidates_[j].id;
    static_cast<E*>(a_.tail)[i] = static_cast<E>(std::log(rest));
  }

 private:
  // Adds column v, a NaN that was passed over, as an entry of probability 0.
  void fill(int64_t v) {
    const auto same = [v](const Candidate<E>& c) { return c.id == v; };
    if (std::none_of(candidates_.begin(), candidates_.end(), same)) candidates_.push_back({static_cast<E>(-INF), v});
  }
};

template <class X>
void run_dtype(const TopkArgs& a, int64_t begin, int64_t end) {
  Lister<X> lister(a);
  for (int64_t i = begin; i < end; ++i) lister.run(i);
}

}  // namespace

void run_topk(const TopkArgs& a, int64_t begin, int64_t end) {
#if defined(OPSD_BASELINE)
  if (a.dtype == Dtype::FLOAT64) return run_dtype<double>(a, begin, end);
#endif
  run_dtype<Vec>(a, begin, end);  // dispatch.cpp sends doubles to the baseline build
}

}  // namespace opsd::OPSD_CAPABILITY
