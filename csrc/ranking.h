// What the losses of ranked groups share: their arguments, a group's order, tasks of whole groups.
// Letters: N groups, M candidates, K candidates of one group.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "rows.h"

namespace fastrm {

template <class A>
struct Ranking {
  Index offsets, ranks;
  const A* scores; // (M,)
  const A* extra; // (M,) or null: position_weight or margin
  const A* group_weight; // (N,) or null
  int64_t N;
  double temperature, center;
  double divisor; // of the coefficients and of the total loss
  A* coef; // (M,) or null
  A* losses; // (N,) or null

  int64_t first(int64_t g) const { return offsets[g]; }
  int64_t size(int64_t g) const { return offsets[g + 1] - offsets[g]; }
  double weight(int64_t g) const { return group_weight ? double(group_weight[g]) : 1.0; }
};

// The candidates of a group from the best rank to the worst, equal ranks as they stand.
class Order {
 public:
  void sort(const Index& ranks, int64_t first, int64_t K) {
    sorted_.resize(K);
    // -1, unranked, becomes the largest.
    for (int64_t i = 0; i < K; ++i) sorted_[i] = {uint64_t(ranks[first + i]), first + i};
    std::sort(sorted_.begin(), sorted_.end());
  }
  int64_t row(int64_t i) const { return sorted_[i].second; }
  bool ranked(int64_t i) const { return sorted_[i].first != ~uint64_t(0); }
  // One past the last that ties with i.
  int64_t tie_end(int64_t i) const {
    int64_t end = i + 1, K = int64_t(sorted_.size());
    while (end < K && sorted_[end].first == sorted_[i].first) ++end;
    return end;
  }

 private:
  std::vector<std::pair<uint64_t, int64_t>> sorted_;
};

// The sum over N groups of what a worker makes of each, in an order that depends on the groups
// alone. A task is whole groups that cost `enough`; it has a worker of its own, for its memory.
template <class Cost, class MakeWorker>
double sum_over_groups(
    int64_t N, double enough, Cost cost, MakeWorker make_worker, const Parallel& parallel) {
  std::vector<int64_t> bounds{0};
  double costs = 0;
  for (int64_t g = 0; g < N; ++g)
    if ((costs += cost(g)) >= enough || g + 1 == N) bounds.push_back(g + 1), costs = 0;
  int64_t count = int64_t(bounds.size()) - 1;
  std::vector<double> totals(count);
  parallel(count, [&](int64_t t) {
    auto worker = make_worker();
    for (int64_t g = bounds[t]; g < bounds[t + 1]; ++g) totals[t] += worker(g);
  });
  double total = 0;
  for (double x : totals) total += x;
  return total;
}

} // namespace fastrm
