// Fresh output tensors. A big one costs more in page faults than in stores. So blocks of up to
// kKeepBytes come back to a small pool, already touched; bigger ones ask for huge pages.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastrm {

inline std::atomic<bool> huge_pages{true};
constexpr size_t kPoolBytes = size_t(256) << 10; // smaller outputs are the allocator's business
constexpr size_t kKeepBytes = size_t(32) << 20; // the most the pool ever holds
constexpr size_t kHugePage = size_t(1) << 21;

struct Block {
  void* data;
  size_t bytes;
};

class Pool {
 public:
  // A block that fits without waste, or null.
  Block* take(size_t bytes) {
    std::lock_guard<std::mutex> guard(mutex_);
    for (size_t i = free_.size(); i-- > 0;)
      if (free_[i]->bytes >= bytes && free_[i]->bytes <= bytes + bytes / 4) {
        Block* block = free_[i];
        free_.erase(free_.begin() + i);
        held_ -= block->bytes;
        return block;
      }
    return nullptr;
  }

  void give(Block* block) {
    std::lock_guard<std::mutex> guard(mutex_);
    free_.push_back(block);
    held_ += block->bytes;
    while (held_ > kKeepBytes) { // the oldest go first
      held_ -= free_.front()->bytes;
      release(free_.front());
      free_.erase(free_.begin());
    }
  }

  static void release(Block* block) {
    std::free(block->data);
    delete block;
  }

 private:
  std::mutex mutex_;
  std::vector<Block*> free_; // oldest first
  size_t held_ = 0;
};

inline Pool& pool() {
  static Pool* const leaked = new Pool; // tensors may be freed after static destructors have run
  return *leaked;
}

inline void give_back(void* context) {
  Block* block = static_cast<Block*>(context);
  block->bytes <= kKeepBytes ? pool().give(block) : Pool::release(block);
}

inline Block* new_block(size_t bytes) {
  size_t align = huge_pages && bytes >= kHugePage ? kHugePage : 64;
  bytes = (bytes + align - 1) / align * align;
  void* data = std::aligned_alloc(align, bytes);
  TORCH_CHECK(data, "cannot allocate ", bytes, " bytes");
#ifdef __linux__
  if (align == kHugePage) madvise(data, bytes, MADV_HUGEPAGE); // advice: it may be refused
#endif
  return new Block{data, bytes};
}

inline at::Tensor make_output(at::IntArrayRef sizes, at::ScalarType dtype) {
  size_t bytes = c10::elementSize(dtype);
  for (int64_t size : sizes) bytes *= size_t(size);
  if (bytes < kPoolBytes) return at::detail::empty_cpu(sizes, dtype);
  Block* block = pool().take(bytes);
  if (!block) block = new_block(bytes);
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes,
      at::DataPtr(block->data, block, &give_back, at::kCPU), c10::GetCPUAllocator(), true);
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU),
      c10::scalarTypeToTypeMeta(dtype));
  out.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return out;
}

} // namespace fastrm
