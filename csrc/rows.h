// Views of the caller's tensors, shared by every op.
// Letters: M candidates, T rows of hidden, D hidden.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace fastrm {

// An int32 or int64 vector.
struct Index {
  const void* data = nullptr;
  bool wide = true;
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
  explicit operator bool() const {
    return data != nullptr;
  }
};

// Candidate i sits in row rows[i] (or i) of a (B, S, D) or (T, D) tensor with any leading strides.
template <class T>
struct Rows {
  const T* data;
  int64_t count; // T
  int64_t inner, stride_outer, stride_inner; // row r is at (r / inner, r % inner)
  Index rows;

  void pointers(int64_t first, int64_t n, const T** out) const {
    for (int64_t i = 0; i < n; ++i) {
      int64_t r = rows ? rows[first + i] : first + i;
      out[i] = data +
          (inner >= count ? r * stride_inner
                          : r / inner * stride_outer + r % inner * stride_inner);
    }
  }
};

constexpr int64_t kMaxBlock = 256;

// Rows whose hidden states stay in L2 between the projection and the accumulation.
inline int64_t block_rows(int64_t D, int64_t bytes) {
  constexpr int64_t kBlockBytes = 1 << 18;
  return std::clamp<int64_t>(kBlockBytes / (D * bytes), 8, kMaxBlock);
}

// Runs task(0) to task(n - 1), on any thread each.
using Parallel = std::function<void(int64_t n, const std::function<void(int64_t)>& task)>;

// Rows of one task: at most about 64 tasks, none too small to be worth a thread.
inline int64_t task_rows(int64_t M, int64_t D) {
  constexpr int64_t kTasks = 64, kTaskElements = 1 << 17;
  return std::max<int64_t>((M + kTasks - 1) / kTasks, (kTaskElements + D - 1) / D);
}

} // namespace fastrm
