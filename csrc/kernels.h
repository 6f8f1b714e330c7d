// The inner loops that touch hidden-sized memory, for one head and for several, and the one over
// pairs of candidates; one set per instruction set.
// No torch header and no inline code here: this file is compiled under several -m flags.
// Letters: D hidden, n rows, E heads. T is the storage type, A the accumulation type.
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

  // The three for E heads: w is (E, D), bias (E,), a row's scores and factors stand together.
  // out (n, E) = bias + rows · wᵀ. The bits of a score depend on its row and head alone.
  void (*project_heads)(
      const T* const* rows, int64_t n, int64_t E, int64_t D, const A* w, const A* bias, A* out);
  // acc = (add ? acc : 0) + coefᵀ · rows with coef (n, E); head e is at acc + e·stride.
  void (*accumulate_heads)(
      const T* const* rows, const A* coef, int64_t n, int64_t E, int64_t D, bool add, A* acc,
      int64_t stride);
  // out[i] = Σ_e scale[i, e]·w[e] for n contiguous rows, zeros where all of those are 0.
  void (*rank_heads)(T* out, const A* scale, int64_t n, int64_t E, int64_t D, const A* w);
};

// A candidate with e^z = w, chosen over n others with e^z = e[j] <= top: p_j = e[j]/(w + e[j]) is
// added to lost[j], their sum to won; returns Σ -log(1 - p_j). w and e are from e^-150 to e^150.
using Beat = double(
    const double* e, int64_t n, double w, double top, double* lost, double* won);

struct Isa {
  const char* name;
  bool (*supported)();
  Kernels<double> f64;
  Kernels<float> f32;
  Kernels<bf16> b16;
  Kernels<fp16> h16;
  Beat* beat;
};

} // namespace fastrm
