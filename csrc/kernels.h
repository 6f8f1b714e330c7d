// The three inner loops that touch hidden-sized memory, one set per instruction set.
// No torch header and no inline code here: this file is compiled under several -m flags.
// Letters: D hidden, n rows. T is the storage type, A the accumulation type.
#pragma once

#include <cstdint>

namespace fastrm {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

template <class T>
struct Kernels {
  using A = Acc<T>;
  // out[i] = bias + w · rows[i]. A row's bits do not depend on its neighbours.
  void (*project)(const T* const* rows, int64_t n, int64_t D, const A* w, A bias, A* out);
  // acc = beta·acc + Σ_i coef[i]·rows[i]; beta == 0 overwrites without reading.
  void (*accumulate)(
      const T* const* rows, const A* coef, int64_t n, int64_t D, A beta, A* acc);
  // out[i] = (scale[i]·mul)·w for n contiguous rows, zeros where that factor is 0.
  void (*rank1)(T* out, const A* scale, A mul, int64_t n, int64_t D, const A* w);
};

struct Isa {
  const char* name;
  bool (*supported)();
  Kernels<double> f64;
  Kernels<float> f32;
  Kernels<bf16> b16;
  Kernels<fp16> h16;
};

} // namespace fastrm
