// The Plackett-Luce loss of ranked groups, O(K log K) each, from scores alone.
// With z = s / temperature, ties b in order, W_b their weight and L_b = log Σ e^z over b and all
// below it, the loss is Σ_b W_b L_b - Σ_i w_i z_i, and its derivative by z_j
// e^(z_j) Σ_(b not below j) W_b e^(-L_b) - w_j. The inner sum is carried as a multiple of e^(-L_b):
// L falls, so its factors never grow.
// Letters: N groups, M candidates, K candidates of one group.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "ranking.h"

namespace fastrm {

template <class A>
class PlackettLuce {
 public:
  explicit PlackettLuce(const Ranking<A>& o) : o_(o) {}

  // The loss of group g; its coefficients and, where asked for, the loss are written.
  double operator()(int64_t g) {
    int64_t K = o_.size(g);
    order_.sort(o_.ranks, o_.first(g), K);
    z_.resize(K);
    log_sum_.resize(K);
    double best = -kInf, sum = 0;
    for (int64_t i = 0; i < K; ++i) {
      double s = o_.scores[order_.row(i)];
      best = std::max(best, s);
      sum += s;
    }
    // The loss does not see a shift; without one, large scores would round their differences.
    double shift = std::isfinite(best) ? best : 0.0, mean = sum / double(K);
    for (int64_t i = 0; i < K; ++i)
      z_[i] = (double(o_.scores[order_.row(i)]) - shift) / o_.temperature;
    add_from_below(K);

    double loss = o_.center == 0 ? 0.0 : o_.center * 4 * mean * mean;
    double centring = o_.center == 0 ? 0.0 : o_.center * 8 * mean / double(K);
    double scale = o_.weight(g) / o_.divisor, carried = 0, above = 0;
    for (int64_t i = 0; i < K;) {
      int64_t end = order_.tie_end(i);
      double below = log_sum_[i];
      if (i && below != above) carried *= std::exp(below - above);
      for (int64_t k = i; k < end; ++k) {
        double w = position_weight(k);
        carried += w;
        if (w != 0) loss += w * (below - z_[k]);
      }
      if (o_.coef)
        for (int64_t k = i; k < end; ++k) {
          double share = z_[k] == -kInf ? 0.0 : std::exp(z_[k] - below);
          double dz = share * carried - position_weight(k);
          o_.coef[order_.row(k)] = A(scale * (dz / o_.temperature + centring));
        }
      above = below;
      i = end;
    }
    loss *= o_.weight(g);
    if (o_.losses) o_.losses[g] = A(loss);
    return loss;
  }

 private:
  static constexpr double kInf = std::numeric_limits<double>::infinity();

  double position_weight(int64_t i) const {
    if (!order_.ranked(i)) return 0.0;
    return o_.extra ? double(o_.extra[order_.row(i)]) : 1.0;
  }

  // log_sum_[i] = log Σ_(j >= i) e^(z_j)
  void add_from_below(int64_t K) {
    double top = -kInf, sum = 0;
    for (int64_t i = K; i-- > 0;) {
      double z = z_[i];
      if (z > top) {
        sum = (sum == 0 ? 0.0 : sum * std::exp(top - z)) + 1;
        top = z;
      } else if (z != -kInf) { // NaN too
        sum += std::exp(z - top);
      }
      log_sum_[i] = top + std::log(sum);
    }
  }

  const Ranking<A>& o_;
  Order order_;
  std::vector<double> z_, log_sum_;
};

// Returns the total loss, undivided.
template <class A>
double plackett_luce(const Ranking<A>& loss, const Parallel& parallel) {
  constexpr double kTaskCandidates = 4096;
  return sum_over_groups(
      loss.N, kTaskCandidates, [&](int64_t g) { return double(loss.size(g)); },
      [&] { return PlackettLuce<A>(loss); }, parallel);
}

} // namespace fastrm
