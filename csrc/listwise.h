// The listwise loss in one pass over hidden. README.md has the algorithm.
// Letters: N groups, M candidates, K candidates of one group, D hidden.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <memory>
#include <vector>

#include "kernels.h"
#include "rows.h"

namespace fastrm {

// Everything the loss needs beside the scores; what differs between losses.
template <class A>
struct Listwise {
  Index offsets, target; // target: position in the group, -100 leaves the group out
  const A* soft; // (M,) target distribution instead of target, or null
  const A* margin; // (M,) or null
  const A* group_weight; // (N,) or null
  double temperature, smoothing, center;
  double divisor; // of the coefficients and of the total loss

  // One group's view: z and q' of candidate i, a row of the whole batch.
  struct Group {
    const Listwise& o;
    int64_t first, size;
    int64_t best; // row of the target, or -1
    double weight;
    bool left_out;

    double z(int64_t i, A score) const {
      bool negative = o.margin && (o.soft ? o.soft[i] == 0 : i != best);
      return (double(score) + (negative ? double(o.margin[i]) : 0.0)) / o.temperature;
    }
    double hard(int64_t i) const {
      return o.soft ? double(o.soft[i]) : double(i == best);
    }
    double q(int64_t i) const {
      return hard(i) + o.smoothing * (1.0 / double(size) - hard(i)); // exactly 1 for K = 1
    }
  };

  Group group(int64_t g) const {
    int64_t first = offsets[g], size = offsets[g + 1] - first;
    int64_t t = soft ? -1 : target[g];
    return {*this, first, size, soft ? -1 : first + t, group_weight ? double(group_weight[g]) : 1.0,
            !soft && t < 0};
  }
};

// e^x for x <= 0, 0 where it would reach subnormals: those make every product with hidden slow,
// and beside the group's largest term, which is 1, they are nothing.
template <class A>
A exp_flushed(A x) {
  A e = std::exp(x);
  return e < std::numeric_limits<A>::min() * A(1 << 24) ? A(0) : e;
}

// sum·e^gap; a sum that holds nothing yet, whose maximum is −inf, stays 0.
inline double moved(double sum, double gap) { return sum == 0 ? 0 : sum * std::exp(gap); }

// The running softmax sums of (a part of) one group.
struct Sums {
  double max = -std::numeric_limits<double>::infinity();
  double exp = 0; // Σ e^(z − max)
  double hard = 0, mass = 0, score = 0; // Σ q, Σ q', Σ s
  double below = 0; // Σ q'·(max − z): large scores must not round their differences away

  void raise(double top) {
    exp = moved(exp, max - top);
    if (mass != 0) below += mass * (top - max);
    max = top;
  }
  void merge(Sums o) {
    double top = std::max(max, o.max);
    raise(top), o.raise(top);
    exp += o.exp, hard += o.hard, mass += o.mass, score += o.score, below += o.below;
  }
};

// What a group's sums come to: its loss, and coef_i = p·e^(z_i − max) − q·q'_i + mean.
struct Closed {
  double loss, max, p, q, mean;
};

template <class A>
Closed close(const typename Listwise<A>::Group& group, const Sums& sums) {
  const auto& o = group.o;
  double mean = sums.score / double(group.size), scale = group.weight / o.divisor;
  double q = sums.hard + o.smoothing * (1 - sums.hard); // Σ q', without K roundings
  Closed c;
  c.loss = group.weight * (q * std::log(sums.exp) + sums.below);
  if (o.center != 0) c.loss += group.weight * o.center * 4 * mean * mean;
  c.max = sums.max;
  c.p = scale * q / (sums.exp * o.temperature);
  c.q = scale / o.temperature;
  c.mean = o.center != 0 ? scale * 8 * o.center * mean / double(group.size) : 0.0;
  return c;
}

template <class T>
class ListwiseForward {
  using A = Acc<T>;
  using Loss = Listwise<A>;
  using Group = typename Loss::Group;

 public:
  Rows<T> hidden;
  const A* weight; // (D,)
  A bias;
  Loss loss;
  int64_t N, M, D;
  const Kernels<T>* kernels;
  const Kernels<A>* combine; // the same loops over rows of A, to add partial sums
  A* scores; // (M,)
  A* coef; // (M,) or null
  A* dweight; // (D,) or null
  A* losses; // (N,) or null

  // Returns the total loss, undivided.
  double run(const Parallel& parallel) {
    block_ = block_rows(D, sizeof(T));
    piece_ = std::max(task_rows(M, D), block_);
    plan();
    int64_t count = int64_t(tasks_.size());
    buffer_.reset(dweight && count * D > 0 ? new A[stride() * count] : nullptr);
    parallel(count, [&](int64_t t) { run_task(tasks_[t]); });
    double total = 0;
    std::vector<const A*> parts;
    std::vector<A> factors;
    for (size_t t = 0; t < tasks_.size();) {
      if (tasks_[t].pieces == 0) {
        total += tasks_[t].total;
        if (dweight && tasks_[t].used[0]) {
          parts.push_back(acc(tasks_[t], 0));
          factors.push_back(1);
        }
        ++t;
      } else {
        total += join_pieces(t, parts, factors);
        t += tasks_[t].pieces;
      }
    }
    if (coef && has_pieces_)
      parallel(count, [&](int64_t t) {
        const Task& task = tasks_[t];
        if (task.pieces) fill_coef(loss.group(task.g0), task.closed, task.r0, task.r1);
      });
    if (dweight) add_parts(parallel, parts, factors);
    return total;
  }

 private:
  // Whole groups g0:g1, or one piece (rows r0:r1) of the group g0 too long for one task.
  struct Task {
    int64_t g0, g1, r0, r1;
    int64_t pieces = 0; // of the group, from this task on; 0: whole groups
    int64_t index = 0;
    double total = 0;
    Sums sums{};
    Closed closed{};
    bool used[3] = {false, false, false}; // which accumulators hold something
  };

  // Accumulators a task may need: dweight; for a group longer than a block Σ e^z h, Σ q' h, Σ h.
  int64_t stride() const {
    return (has_long_ ? (loss.center != 0 ? 4 : 3) : 1) * D;
  }
  A* acc(const Task& task, int which) const {
    return buffer_.get() + task.index * stride() + which * D;
  }

  void plan() {
    Task task{0, 0, 0, 0};
    auto push = [&](Task done) {
      done.index = int64_t(tasks_.size());
      tasks_.push_back(done);
    };
    for (int64_t g = 0; g < N; ++g) {
      int64_t r0 = loss.offsets[g], r1 = loss.offsets[g + 1];
      has_long_ |= r1 - r0 > block_;
      if (r1 - r0 > piece_) {
        if (task.g1 > task.g0) push(task);
        int64_t pieces = (r1 - r0 + piece_ - 1) / piece_;
        for (int64_t p = 0; p < pieces; ++p) {
          Task piece{g, g + 1, r0 + p * piece_, std::min(r1, r0 + (p + 1) * piece_)};
          piece.pieces = pieces - p;
          push(piece);
        }
        has_pieces_ = true;
        task = {g + 1, g + 1, r1, r1};
      } else {
        task.g1 = g + 1;
        task.r1 = r1;
        if (task.r1 - task.r0 >= piece_) {
          push(task);
          task = {g + 1, g + 1, r1, r1};
        }
      }
    }
    if (task.g1 > task.g0) push(task);
  }

  void run_task(Task& task) {
    if (task.pieces) {
      run_long(loss.group(task.g0), task.r0, task.r1, task, 0);
      return;
    }
    for (int64_t g = task.g0; g < task.g1;) {
      Group group = loss.group(g);
      if (group.size > block_) {
        Task part = task;
        part.used[0] = part.used[1] = part.used[2] = false;
        part.sums = {};
        run_long(group, group.first, group.first + group.size, part, 1);
        Closed closed = finish(g, group, part.sums);
        task.total += group.left_out ? 0.0 : closed.loss;
        if (coef) fill_coef(group, closed, group.first, group.first + group.size);
        if (dweight && !group.left_out) {
          std::vector<const A*> parts;
          std::vector<A> factors;
          add_factors(part, 1, closed, 1.0, parts, factors);
          combine->accumulate(
              parts.data(), factors.data(), int64_t(parts.size()), D, A(task.used[0]), acc(task, 0));
          task.used[0] = true;
        }
        ++g;
      } else {
        int64_t end = g + 1;
        while (end < task.g1 && loss.offsets[end + 1] - group.first <= block_) ++end;
        run_block(g, end, task);
        g = end;
      }
    }
  }

  // Whole groups that fit one cache block: exact softmax, final coefficients at once.
  void run_block(int64_t g0, int64_t g1, Task& task) {
    const T* rows[kMaxBlock];
    A factors[kMaxBlock];
    int64_t first = loss.offsets[g0], n = loss.offsets[g1] - first, kept = 0;
    hidden.pointers(first, n, rows);
    kernels->project(rows, n, D, weight, bias, scores + first);
    for (int64_t g = g0; g < g1; ++g) {
      Group group = loss.group(g);
      A* c = factors + (group.first - first);
      Sums sums{};
      if (!group.left_out) {
        double z[kMaxBlock];
        add_block(group, group.first, group.size, sums, z, c);
      }
      Closed closed = finish(g, group, sums);
      task.total += closed.loss;
      if (group.left_out)
        std::fill_n(c, group.size, A(0));
      else
        for (int64_t i = 0; i < group.size; ++i)
          c[i] = A(closed.p * c[i] - closed.q * group.q(group.first + i) + closed.mean);
    }
    if (coef) std::copy_n(factors, n, coef + first);
    if (!dweight) return;
    for (int64_t i = 0; i < n; ++i)
      if (factors[i] != 0) rows[kept] = rows[i], factors[kept++] = factors[i];
    kernels->accumulate(rows, factors, kept, D, A(task.used[0]), acc(task, 0));
    task.used[0] = true;
  }

  // Adds rows first:first+n of a group to its sums; leaves e^(z − sums.max) in e.
  void add_block(
      const Group& group, int64_t first, int64_t n, Sums& sums, double* z, A* e) const {
    double top = sums.max;
    for (int64_t i = 0; i < n; ++i) {
      A score = scores[first + i];
      z[i] = group.z(first + i, score);
      top = std::max(top, z[i]);
      sums.hard += group.hard(first + i);
      sums.score += score;
    }
    sums.raise(top);
    for (int64_t i = 0; i < n; ++i) {
      bool masked = z[i] == -std::numeric_limits<double>::infinity();
      e[i] = masked ? A(0) : exp_flushed(A(z[i] - top));
      sums.exp += e[i];
      if (double q = group.q(first + i); q != 0) sums.mass += q, sums.below += q * (top - z[i]);
    }
  }

  // Part of a group longer than a block: online softmax over blocks, carrying Σ e^z h.
  void run_long(const Group& group, int64_t r0, int64_t r1, Task& part, int base) {
    const T* rows[kMaxBlock];
    const T* kept_rows[kMaxBlock];
    A e[kMaxBlock], kept[kMaxBlock];
    double z[kMaxBlock];
    for (int64_t r = r0; r < r1; r += block_) {
      int64_t n = std::min(block_, r1 - r);
      hidden.pointers(r, n, rows);
      kernels->project(rows, n, D, weight, bias, scores + r);
      if (group.left_out) continue;
      double old_max = part.sums.max;
      add_block(group, r, n, part.sums, z, e);
      if (!dweight) continue;
      bool same_max = old_max == part.sums.max; // −inf too, which has no difference to itself
      A beta = !part.used[0] ? A(0) : same_max ? A(1) : A(std::exp(old_max - part.sums.max));
      kernels->accumulate(rows, e, n, D, beta, acc(part, base));
      part.used[0] = true;
      int64_t k = 0;
      for (int64_t i = 0; i < n; ++i)
        if (double q = group.q(r + i); q != 0) kept_rows[k] = rows[i], kept[k++] = A(q);
      if (k) {
        kernels->accumulate(kept_rows, kept, k, D, A(part.used[1]), acc(part, base + 1));
        part.used[1] = true;
      }
      if (loss.center != 0) {
        std::fill_n(kept, n, A(1));
        kernels->accumulate(rows, kept, n, D, A(part.used[2]), acc(part, base + 2));
        part.used[2] = true;
      }
    }
  }

  Closed finish(int64_t g, const Group& group, const Sums& sums) const {
    Closed closed = group.left_out ? Closed{} : close<A>(group, sums);
    if (losses) losses[g] = A(closed.loss);
    return closed;
  }

  // The dweight share of a long group: its accumulators times factors known only now.
  void add_factors(
      const Task& part, int base, const Closed& closed, double rescale,
      std::vector<const A*>& parts, std::vector<A>& factors) const {
    const double factor[3] = {closed.p * rescale, -closed.q, closed.mean};
    for (int k = 0; k < 3; ++k)
      if (part.used[k] && factor[k] != 0) {
        parts.push_back(acc(part, base + k));
        factors.push_back(A(factor[k]));
      }
  }

  double join_pieces(size_t t, std::vector<const A*>& parts, std::vector<A>& factors) {
    int64_t pieces = tasks_[t].pieces, g = tasks_[t].g0;
    Group group = loss.group(g);
    Sums sums = tasks_[t].sums;
    for (int64_t p = 1; p < pieces; ++p) sums.merge(tasks_[t + p].sums);
    Closed closed = finish(g, group, sums);
    for (int64_t p = 0; p < pieces; ++p) {
      Task& piece = tasks_[t + p];
      piece.closed = closed;
      if (dweight && !group.left_out)
        add_factors(piece, 0, closed, std::exp(piece.sums.max - sums.max), parts, factors);
    }
    return closed.loss;
  }

  void fill_coef(const Group& group, const Closed& closed, int64_t r0, int64_t r1) const {
    for (int64_t i = r0; i < r1; ++i)
      coef[i] = group.left_out
          ? A(0)
          : A(closed.p * exp_flushed(A(group.z(i, scores[i]) - closed.max)) -
              closed.q * group.q(i) + closed.mean);
  }

  void add_parts(
      const Parallel& parallel, std::vector<const A*>& parts, std::vector<A>& factors) const {
    constexpr int64_t kSlice = 1024;
    int64_t n = int64_t(parts.size()), slices = (D + kSlice - 1) / kSlice;
    auto add = [&](int64_t d, int64_t width) {
      std::vector<const A*> shifted(parts);
      for (const A*& p : shifted) p += d;
      combine->accumulate(shifted.data(), factors.data(), n, width, A(0), dweight + d);
    };
    if (n * D < (1 << 17))
      add(0, D);
    else
      parallel(slices, [&](int64_t s) { add(s * kSlice, std::min(kSlice, D - s * kSlice)); });
  }

  int64_t block_ = 0, piece_ = 0;
  bool has_long_ = false, has_pieces_ = false;
  std::vector<Task> tasks_;
  std::unique_ptr<A[]> buffer_;
};

} // namespace fastrm
