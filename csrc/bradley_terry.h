// The Bradley-Terry loss of all pairs of a group whose ranks differ: O(K^2) time, O(K) memory.
// In the order of the ranks the losers to candidate i are all from the end of its tie on: one
// vector loop, `beat`, with an exponential for each candidate and none for each pair.
// Letters: N groups, M candidates, K candidates of one group, P its pairs.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "ranking.h"

namespace fastrm {

template <class A>
class BradleyTerry {
 public:
  BradleyTerry(const Ranking<A>& o, Beat* beat) : o_(o), beat_(beat) {}

  // The loss of group g; its coefficients and, where asked for, the loss are written.
  double operator()(int64_t g) {
    prepare(g);
    return close(g, rows(0, K_, lost_.data()));
  }

  // The same with the winners cut in pieces for several threads, all depending on g alone.
  double in_pieces(int64_t g, const Parallel& parallel) {
    prepare(g);
    double each = std::max(kPiecePairs, pairs_ / kPieces), pairs = 0;
    std::vector<int64_t> bounds{0};
    for (int64_t i = 0; i < K_; ++i)
      if ((pairs += double(K_ - end_[i])) >= each || i + 1 == K_)
        bounds.push_back(i + 1), pairs = 0;
    int64_t count = int64_t(bounds.size()) - 1;
    std::vector<double> losses(count);
    std::vector<std::vector<double>> lost(count);
    parallel(count, [&](int64_t p) {
      lost[p].resize(K_);
      losses[p] = rows(bounds[p], bounds[p + 1], lost[p].data());
    });
    double loss = 0;
    for (int64_t p = 0; p < count; ++p) {
      loss += losses[p];
      for (int64_t i = 0; i < K_; ++i) lost_[i] += lost[p][i];
    }
    return close(g, loss);
  }

  // Groups with more pairs than this, about a millisecond, are cut.
  static constexpr double kPiecePairs = double(1 << 20), kPieces = 64;

 private:
  // Sorts the group and fills what a pair needs of its winner and of its loser.
  void prepare(int64_t g) {
    K_ = o_.size(g);
    order_.sort(o_.ranks, o_.first(g), K_);
    for (auto* x : {&score_, &winner_, &loser_}) x->resize(K_);
    end_.resize(K_);
    won_.assign(K_, 0.0);
    lost_.assign(K_, 0.0);
    double low = std::numeric_limits<double>::infinity(), high = -low;
    for (int64_t i = 0; i < K_; ++i) {
      int64_t row = order_.row(i);
      score_[i] = winner_[i] = double(o_.scores[row]);
      loser_[i] = score_[i] + (o_.extra ? double(o_.extra[row]) : 0.0);
      low = std::min({low, winner_[i], loser_[i]});
      high = std::max({high, winner_[i], loser_[i]});
    }
    pairs_ = 0;
    for (int64_t i = 0; i < K_;) {
      int64_t end = order_.tie_end(i);
      pairs_ += double(end - i) * double(K_ - end);
      for (; i < end; ++i) end_[i] = end;
    }
    // Only differences count; beyond e^±150 their ratios would leave the range of a double.
    double middle = low / 2 + high / 2;
    exponentials_ = (high - low) / o_.temperature <= 300;
    top_ = std::exp((high - middle) / o_.temperature);
    for (auto* x : {&winner_, &loser_})
      for (double& z : *x) {
        z = (z - (exponentials_ ? middle : 0.0)) / o_.temperature;
        if (exponentials_) z = std::exp(z);
      }
  }

  // Σ -log σ over the pairs that i0:i1 win; their σ' go to won_ and to lost (K,).
  double rows(int64_t i0, int64_t i1, double* lost) {
    double loss = 0;
    for (int64_t i = i0; i < i1; ++i) {
      int64_t j = end_[i];
      if (exponentials_) {
        if (j < K_) loss += beat_(&loser_[j], K_ - j, winner_[i], top_, lost + j, &won_[i]);
        continue;
      }
      for (; j < K_; ++j) {
        double x = loser_[j] - winner_[i], e = std::exp(-std::abs(x));
        double p = (x > 0 ? 1.0 : e) / (1 + e);
        loss += std::max(x, 0.0) + std::log1p(e);
        won_[i] += p;
        lost[j] += p;
      }
    }
    return loss;
  }

  double close(int64_t g, double loss) {
    double total = 0;
    for (double s : score_) total += s;
    double weight = pairs_ == 0 ? 0.0 : o_.weight(g) / pairs_, scale = weight / o_.divisor;
    for (int64_t i = 0; i < K_;) {
      int64_t end = end_[i];
      double tied = 0, others = double(K_ - (end - i));
      for (int64_t k = i; k < end; ++k) tied += score_[k];
      // Σ (s_i + s_j)^2 over the pairs, from each candidate's side: n s^2 + s·Σ s_j.
      for (int64_t k = i; k < end; ++k) {
        double s = score_[k], both = others * s + (total - tied), dz = lost_[k] - won_[k];
        double ds = dz / o_.temperature;
        if (o_.center != 0) loss += o_.center * s * both, ds += o_.center * 2 * both;
        if (o_.coef) o_.coef[order_.row(k)] = pairs_ == 0 ? A(0) : A(scale * ds);
      }
      i = end;
    }
    loss = pairs_ == 0 ? 0.0 : weight * loss;
    if (o_.losses) o_.losses[g] = A(loss);
    return loss;
  }

  const Ranking<A>& o_;
  Beat* beat_;
  Order order_;
  int64_t K_ = 0;
  double pairs_ = 0, top_ = 0;
  bool exponentials_ = false;
  std::vector<int64_t> end_; // of the tie, which is where the losers begin
  std::vector<double> score_, winner_, loser_; // the last two e^z, or z where that could overflow
  std::vector<double> won_, lost_; // Σ of the probability of the wrong order
};

// Returns the total loss, undivided.
template <class A>
double bradley_terry(const Ranking<A>& loss, Beat* beat, const Parallel& parallel) {
  using Worker = BradleyTerry<A>;
  auto pairs = [&](int64_t g) { return double(loss.size(g)) * double(loss.size(g)) / 2; };
  auto small = [&](int64_t g) { return pairs(g) <= Worker::kPiecePairs; };
  // A candidate, with its exponentials and its sorting, costs as much as some dozens of pairs.
  auto cost = [&](int64_t g) { return small(g) ? 32.0 * double(loss.size(g)) + pairs(g) : 0.0; };
  auto make_worker = [&] {
    return [&, worker = Worker(loss, beat)](int64_t g) mutable {
      return small(g) ? worker(g) : 0.0;
    };
  };
  double total = sum_over_groups(loss.N, 1 << 17, cost, make_worker, parallel);
  for (int64_t g = 0; g < loss.N; ++g)
    if (!small(g)) total += Worker(loss, beat).in_pieces(g, parallel);
  return total;
}

} // namespace fastrm
