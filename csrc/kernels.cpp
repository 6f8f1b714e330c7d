// Compiled once per instruction set (build.py passes FASTRM_ISA and the -m flags). Everything
// sits in an anonymous namespace and no library header brings inline functions in, so the linker
// can never pick code built for one instruction set to serve another.
#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastrm {
namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(BYTES)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(BYTES)));
};
template <class A>
using Vec = typename VecOf<A>::type;
typedef uint32_t U32 __attribute__((vector_size(BYTES)));
typedef uint16_t U16 __attribute__((vector_size(BYTES / 2)));
template <class A>
constexpr int LANES = BYTES / int(sizeof(A));

template <class V>
inline V load_raw(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline Vec<double> load(const double* p) {
  return load_raw<Vec<double>>(p);
}
inline Vec<float> load(const float* p) {
  return load_raw<Vec<float>>(p);
}
// gcc splits a __builtin_convertvector between 16 and 32 bits in two halves: hence the intrinsics.
inline U32 widen(U16 v) {
#if defined(__AVX512F__)
  return (U32)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
  return (U32)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, U32);
#endif
}
inline U16 truncate(U32 v) {  // lanes below 2^16
#if defined(__AVX512F__)
  return (U16)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
  __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  return (U16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0xd8));
#else
  return __builtin_convertvector(v, U16);
#endif
}

inline Vec<float> load(const bf16* p) {
  return (Vec<float>)(widen(load_raw<U16>(p)) << 16);
}
inline Vec<float> load(const fp16* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(load_raw<__m256i>(p));
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_cvtph_ps(load_raw<__m128i>(p));
#else
  U32 h = widen(load_raw<U16>(p));
  U32 body = (h & 0x7fff) << 13;
  U32 bits = (U32)((Vec<float>)body * 0x1p112f);  // rebias; also normalises subnormals
  bits |= (U32)(body >= 0x0f800000) & 0x7f800000;  // inf and NaN
  return (Vec<float>)(bits | ((h & 0x8000) << 16));
#endif
}

inline U32 select(U32 mask, U32 a, U32 b) {
  return (a & mask) | (b & ~mask);
}

inline Vec<double> narrow(Vec<double> v, double) {
  return v;
}
inline Vec<float> narrow(Vec<float> v, float) {
  return v;
}
inline U16 narrow(Vec<float> v, bf16) {
#if defined(__AVX512BF16__)
  return (U16)_mm512_cvtneps_pbh((__m512)v);
#else
  U32 bits = (U32)v;
  U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even
  U32 is_nan = (U32)(v != v);
  return truncate(select(is_nan, (bits >> 16) | 0x40, rounded));
#endif
}
inline U16 narrow(Vec<float> v, fp16) {
#if defined(__AVX512F__)
  return (U16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (U16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  U32 bits = (U32)v & 0x7fffffff;
  U32 normal = (bits + 0xc8000fff + ((bits >> 13) & 1)) >> 13;
  U32 small = (U32)((Vec<float>)bits + 0.5f) - 0x3f000000;  // the adder rounds subnormals
  U32 big = select((U32)(bits > 0x7f800000), U32{} + 0x7e00, U32{} + 0x7c00);
  U32 h = select((U32)(bits < 0x38800000), small, normal);
  h = select((U32)(bits >= 0x47800000), big, h);
  return truncate(h | (((U32)v >> 16) & 0x8000));
#endif
}

template <class V>
inline void store_raw(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class A>
inline A lane_sum(Vec<A> v) {
  A lanes[LANES<A>];
  store_raw(lanes, v);
  for (int width = LANES<A> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// Two vectors of a row, in the order that is cheapest to widen: with AVX-512 bf16 comes as the even
// and the odd elements, a shift and a mask, where the natural order takes a shuffle for each vector.
template <class A>
struct Pair {
  Vec<A> lo, hi;
};

template <class T>
inline Pair<Acc<T>> load_pair(const T* p) {
  return {load(p), load(p + LANES<Acc<T>>)};
}
// Accumulation-type elements in the order of load_pair<T>, and back.
template <class T>
inline Pair<Acc<T>> to_pair(Pair<Acc<T>> v) {
  return v;
}
template <class T>
inline Pair<Acc<T>> from_pair(Pair<Acc<T>> v) {
  return v;
}
#if defined(__AVX512F__)
template <>
inline Pair<float> load_pair(const bf16* p) {
  U32 both = load_raw<U32>(p);
  return {(Vec<float>)(both << 16), (Vec<float>)(both & 0xffff0000)};
}
inline Pair<float> shuffled(Pair<float> v, __m512i lo, __m512i hi) {
  return {(Vec<float>)_mm512_permutex2var_ps((__m512)v.lo, lo, (__m512)v.hi),
          (Vec<float>)_mm512_permutex2var_ps((__m512)v.lo, hi, (__m512)v.hi)};
}
template <>
inline Pair<float> to_pair<bf16>(Pair<float> v) {
  return shuffled(
      v, _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
      _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
}
template <>
inline Pair<float> from_pair<bf16>(Pair<float> v) {
  return shuffled(
      v, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
      _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
}
#endif

template <class T>
inline Pair<Acc<T>> load_pair_tail(const T* p, int64_t n) {
  T buffer[2 * LANES<Acc<T>>] = {};
  __builtin_memcpy(buffer, p, n * sizeof(T));
  return load_pair(buffer);
}

template <class T>
inline void store_pair(T* p, Vec<Acc<T>> lo, Vec<Acc<T>> hi) {
  store_raw(p, narrow(lo, T{}));
  store_raw(p + LANES<Acc<T>>, narrow(hi, T{}));
}
#if defined(__AVX512BF16__)
template <>
inline void store_pair(bf16* p, Vec<float> lo, Vec<float> hi) {
  store_raw(p, _mm512_cvtne2ps_pbh((__m512)hi, (__m512)lo));
}
#endif
template <class T>
inline void store_pair_tail(T* p, Vec<Acc<T>> lo, Vec<Acc<T>> hi, int64_t n) {
  T buffer[2 * LANES<Acc<T>>];
  store_pair(buffer, lo, hi);
  __builtin_memcpy(p, buffer, n * sizeof(T));
}

// ROWS dot products at once. Two accumulators a row, emptied every SPAN pairs into a total:
// short summation chains keep the error low at any D.
template <class T, int ROWS>
void project_rows(const T* const* rows, int64_t D, const Acc<T>* w, Acc<T> bias, Acc<T>* out) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t W2 = 2 * LANES<A>, SPAN = 32;
  V total[ROWS] = {};
  int64_t d = 0;
  while (d < D) {
    V lo[ROWS] = {}, hi[ROWS] = {};
    int64_t left = (D - d) / W2;
    for (int64_t span = left < SPAN ? left : SPAN; span > 0; --span, d += W2) {
      Pair<A> x = to_pair<T>(load_pair(w + d));
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        Pair<A> h = load_pair(rows[r] + d);
        lo[r] += h.lo * x.lo;
        hi[r] += h.hi * x.hi;
      }
    }
    if (D - d < W2 && d < D) {
      Pair<A> x = to_pair<T>(load_pair_tail(w + d, D - d));
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        Pair<A> h = load_pair_tail(rows[r] + d, D - d);
        lo[r] += h.lo * x.lo;
        hi[r] += h.hi * x.hi;
      }
      d = D;
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) total[r] += lo[r] + hi[r];
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) out[r] = lane_sum<A>(total[r]) + bias;
}

inline float widened(const float* p) {
  return *p;
}
inline double widened(const double* p) {
  return *p;
}
template <class T>
inline float widened(const T* p) {
  return load_pair_tail(p, 1).lo[0];
}

template <class T>
void project(
    const T* const* rows, int64_t n, int64_t D, const Acc<T>* w, Acc<T> bias, Acc<T>* out) {
  if (D == 1) {  // scores that are already there; two loops, for the roundings of the others
    for (int64_t i = 0; i < n; ++i) out[i] = widened(rows[i]) * w[0];
    for (int64_t i = 0; i < n; ++i) out[i] += bias;
    return;
  }
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) project_rows<T, 4>(rows + i, D, w, bias, out + i);
  for (; i + 2 <= n; i += 2) project_rows<T, 2>(rows + i, D, w, bias, out + i);
  if (i < n) project_rows<T, 1>(rows + i, D, w, bias, out + i);
}

// sum = (first ? 0 : sum) + Σ_r coef[r]·rows[r] over elements d:d+width, in pair order. Each row is
// one long sequential stream, which the prefetchers follow; narrow column tiles were slower, and
// software prefetch of the rows that come next gained nothing.
template <class T, int ROWS>
void add_rows(
    const T* const* rows, const Acc<T>* coef, int64_t d, int64_t width, bool first, Acc<T>* sum) {
  using A = Acc<T>;
  constexpr int64_t W2 = 2 * LANES<A>;
  const T* p[ROWS];  // copies: sum might alias the originals
  Vec<A> c[ROWS];
  for (int r = 0; r < ROWS; ++r) p[r] = rows[r] + d, c[r] = Vec<A>{} + coef[r];
  int64_t v = 0;
  for (; v + W2 <= width; v += W2) {
    Pair<A> s = first ? Pair<A>{} : load_pair(sum + v);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      Pair<A> h = load_pair(p[r] + v);
      s.lo += h.lo * c[r];
      s.hi += h.hi * c[r];
    }
    store_pair(sum + v, s.lo, s.hi);
  }
  if (v == width) return;
  Pair<A> s = first ? Pair<A>{} : load_pair(sum + v);
  for (int r = 0; r < ROWS; ++r) {
    Pair<A> h = load_pair_tail(p[r] + v, width - v);
    s.lo += h.lo * c[r];
    s.hi += h.hi * c[r];
  }
  store_pair(sum + v, s.lo, s.hi);
}

template <class T>
void accumulate(
    const T* const* rows, const Acc<T>* coef, int64_t n, int64_t D, Acc<T> beta, Acc<T>* acc) {
  using A = Acc<T>;
  constexpr int64_t W2 = 2 * LANES<A>, TILE = 1024;
  alignas(64) A sum[TILE];  // over this call's rows alone: keeps the summation two-level
  for (int64_t d = 0; d < D; d += TILE) {
    int64_t width = D - d < TILE ? D - d : TILE, i = 0;
    for (; i + 8 <= n; i += 8) add_rows<T, 8>(rows + i, coef + i, d, width, i == 0, sum);
    for (; i + 4 <= n; i += 4) add_rows<T, 4>(rows + i, coef + i, d, width, i == 0, sum);
    for (; i + 2 <= n; i += 2) add_rows<T, 2>(rows + i, coef + i, d, width, i == 0, sum);
    for (; i < n; ++i) add_rows<T, 1>(rows + i, coef + i, d, width, i == 0, sum);
    A* to = acc + d;
    for (int64_t v = 0; v < width; v += W2) {
      Pair<A> total = n ? from_pair<T>(load_pair(sum + v)) : Pair<A>{};
      bool whole = v + W2 <= width;
      if (beta != 0) {
        Pair<A> old = whole ? load_pair(to + v) : load_pair_tail(to + v, width - v);
        total.lo += old.lo * beta;
        total.hi += old.hi * beta;
      }
      if (whole) store_pair(to + v, total.lo, total.hi);
      else store_pair_tail(to + v, total.lo, total.hi, width - v);
    }
  }
}

// Plain stores: out is fresh memory, whose lines the kernel's zeroing has just left in cache.
// Streaming stores took twice the time.
template <class T>
void rank1(T* out, const Acc<T>* scale, Acc<T> mul, int64_t n, int64_t D, const Acc<T>* w) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t W2 = 2 * LANES<A>;
  if (D == 1) {  // rows side by side
    for (int64_t i = 0; i < n; i += W2) {
      bool whole = i + W2 <= n;
      Pair<A> s = whole ? load_pair(scale + i) : load_pair_tail(scale + i, n - i);
      s.lo *= mul;
      s.hi *= mul;
      V lo = s.lo != 0 ? s.lo * w[0] : V{}, hi = s.hi != 0 ? s.hi * w[0] : V{};
      if (whole) store_pair(out + i, lo, hi);
      else store_pair_tail(out + i, lo, hi, n - i);
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i, out += D) {
    A s = scale[i] * mul;
    if (s == 0) {  // 0·inf must not make NaN in a row that takes no part
      __builtin_memset(out, 0, D * sizeof(T));
      continue;
    }
    int64_t d = 0;
    for (; d + W2 <= D; d += W2) {
      Pair<A> x = load_pair(w + d);
      store_pair(out + d, (V)(x.lo * s), (V)(x.hi * s));
    }
    if (d < D) {
      Pair<A> x = load_pair_tail(w + d, D - d);
      store_pair_tail(out + d, (V)(x.lo * s), (V)(x.hi * s), D - d);
    }
  }
}

// ---- several heads -----------------------------------------------------------------------------

// What stays in registers at once: products of so many rows and heads, sums of so many heads.
#if defined(__AVX512F__)
constexpr int ROWS = 4, HEADS = 4, SUM_HEADS = 8;
#else
constexpr int ROWS = 2, HEADS = 4, SUM_HEADS = 4;
#endif
// What stays in L1: so many heads, and columns of each (16 pairs).
constexpr int64_t TILE_HEADS = 8;
template <class A>
constexpr int64_t TILE = 32 * LANES<A>;

// Asks for a pair into L2. A tile's piece of a row is too short for the hardware to see it coming.
template <class T>
inline void prefetch_pair(const T* p) {
  constexpr int64_t LINE = 64 / int64_t(sizeof(T)), W2 = 2 * LANES<Acc<T>>;
  for (int64_t i = 0; i < W2; i += LINE) __builtin_prefetch(p + i, 0, 2);
}

// total[r, e] += rows[r, d:d+width] · w[e], w packed in pair order with zeros at its end; `next`
// are the rows that come after.
template <class T, int R, int H>
void project_tile(
    const T* const* rows, const T* const* next, int64_t d, int64_t width, const Acc<T>* w,
    Vec<Acc<T>>* total) {
  using A = Acc<T>;
  constexpr int64_t W2 = 2 * LANES<A>;
  const T *p[R], *ahead[R];
  for (int r = 0; r < R; ++r) p[r] = rows[r] + d, ahead[r] = next[r] + d;
  Vec<A> sum[R][H] = {};
  auto add = [&](const Pair<A>* h, int64_t v) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int e = 0; e < H; ++e) {
      Vec<A> lo = load(w + e * TILE<A> + v), hi = load(w + e * TILE<A> + v + LANES<A>);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][e] += h[r].lo * lo;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][e] += h[r].hi * hi;
    }
  };
  int64_t v = 0;
  for (; v + W2 <= width; v += W2) {
    Pair<A> h[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      prefetch_pair(ahead[r] + v);
      h[r] = load_pair(p[r] + v);
    }
    add(h, v);
  }
  if (v < width) {
    Pair<A> h[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) h[r] = load_pair_tail(p[r] + v, width - v);
    add(h, v);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int e = 0; e < H; ++e) total[r * TILE_HEADS + e] += sum[r][e];
}

template <class T, int H>
void project_tile_rows(
    const T* const* rows, int64_t n, int64_t d, int64_t width, const Acc<T>* w,
    Vec<Acc<T>>* total) {
  int64_t i = 0;
  for (; i + ROWS <= n; i += ROWS)
    project_tile<T, ROWS, H>(
        rows + i, rows + (i + 2 * ROWS <= n ? i + ROWS : i), d, width, w, total + i * TILE_HEADS);
  for (; i < n; ++i)
    project_tile<T, 1, H>(rows + i, rows + i, d, width, w, total + i * TILE_HEADS);
}

template <class T>
void project_heads(
    const T* const* rows, int64_t n, int64_t E, int64_t D, const Acc<T>* w, const Acc<T>* bias,
    Acc<T>* out) {
  using A = Acc<T>;
  constexpr int64_t W2 = 2 * LANES<A>, TILE_ROWS = 32;
  alignas(64) A packed[TILE_HEADS * TILE<A>];  // rows of w may lie on the same lines of a cache
  Vec<A> total[TILE_ROWS * TILE_HEADS];
  for (int64_t i = 0; i < n; i += TILE_ROWS, rows += TILE_ROWS, out += TILE_ROWS * E) {
    int64_t some = n - i < TILE_ROWS ? n - i : TILE_ROWS;
    for (int64_t first = 0; first < E; first += TILE_HEADS) {
      int64_t heads = E - first < TILE_HEADS ? E - first : TILE_HEADS;
      for (int64_t k = 0; k < some * TILE_HEADS; ++k) total[k] = Vec<A>{};
      for (int64_t d = 0; d < D; d += TILE<A>) {
        int64_t width = D - d < TILE<A> ? D - d : TILE<A>, e = 0;
        for (int64_t k = 0; k < heads; ++k)
          for (int64_t v = 0; v < width; v += W2) {
            const A* from = w + (first + k) * D + d + v;
            Pair<A> x = v + W2 <= width ? load_pair(from) : load_pair_tail(from, width - v);
            x = to_pair<T>(x);
            store_pair(packed + k * TILE<A> + v, x.lo, x.hi);
          }
        for (; e + HEADS <= heads; e += HEADS)
          project_tile_rows<T, HEADS>(rows, some, d, width, packed + e * TILE<A>, total + e);
        for (; e + 2 <= heads; e += 2)
          project_tile_rows<T, 2>(rows, some, d, width, packed + e * TILE<A>, total + e);
        if (e < heads)
          project_tile_rows<T, 1>(rows, some, d, width, packed + e * TILE<A>, total + e);
      }
      for (int64_t r = 0; r < some; ++r)
        for (int64_t e = 0; e < heads; ++e)
          out[r * E + first + e] = lane_sum<A>(total[r * TILE_HEADS + e]) + bias[first + e];
    }
  }
}

// sum[e] = (first ? 0 : sum[e]) + Σ_r coef[r, e]·rows[r] over elements d:d+width, in pair order.
template <class T, int R, int H>
void add_rows_heads(
    const T* const* rows, const T* const* next, const Acc<T>* coef, int64_t E, int64_t d,
    int64_t width, bool first, Acc<T>* sum) {
  using A = Acc<T>;
  constexpr int64_t W2 = 2 * LANES<A>;
  const T *p[R], *ahead[R];  // copies: sum might alias the originals
  A c[R][H];
  for (int r = 0; r < R; ++r) {
    p[r] = rows[r] + d, ahead[r] = next[r] + d;
    for (int e = 0; e < H; ++e) c[r][e] = coef[r * E + e];
  }
  for (int64_t v = 0; v < width; v += W2) {
    bool whole = v + W2 <= width;
    Pair<A> s[H];
#pragma GCC unroll 8
    for (int e = 0; e < H; ++e) s[e] = first ? Pair<A>{} : load_pair(sum + e * TILE<A> + v);
#pragma GCC unroll 1  // or all R·H coefficients are spilled, each as a whole vector
    for (int r = 0; r < R; ++r) {
      if (whole) prefetch_pair(ahead[r] + v);
      Pair<A> h = whole ? load_pair(p[r] + v) : load_pair_tail(p[r] + v, width - v);
#pragma GCC unroll 8
      for (int e = 0; e < H; ++e) {
        s[e].lo += h.lo * c[r][e];
        s[e].hi += h.hi * c[r][e];
      }
    }
#pragma GCC unroll 8
    for (int e = 0; e < H; ++e) store_pair(sum + e * TILE<A> + v, s[e].lo, s[e].hi);
  }
}

template <class T, int H>
void add_tile_heads(
    const T* const* rows, const Acc<T>* coef, int64_t n, int64_t E, int64_t d, int64_t width,
    Acc<T>* sum) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    add_rows_heads<T, 8, H>(
        rows + i, rows + (i + 16 <= n ? i + 8 : i), coef + i * E, E, d, width, i == 0, sum);
  for (; i < n; ++i)
    add_rows_heads<T, 1, H>(rows + i, rows + i, coef + i * E, E, d, width, i == 0, sum);
}

template <class T>
void accumulate_heads(
    const T* const* rows, const Acc<T>* coef, int64_t n, int64_t E, int64_t D, bool add,
    Acc<T>* acc, int64_t stride) {
  using A = Acc<T>;
  constexpr int64_t W2 = 2 * LANES<A>;
  alignas(64) A sum[TILE_HEADS * TILE<A>];  // over this call's rows alone, as in accumulate
  for (int64_t d = 0; d < D; d += TILE<A>)
    for (int64_t first = 0; first < E; first += TILE_HEADS) {
      int64_t width = D - d < TILE<A> ? D - d : TILE<A>;
      int64_t heads = E - first < TILE_HEADS ? E - first : TILE_HEADS, e = 0;
      const A* c = coef + first;
      for (; e + SUM_HEADS <= heads; e += SUM_HEADS)
        add_tile_heads<T, SUM_HEADS>(rows, c + e, n, E, d, width, sum + e * TILE<A>);
      for (; e + 2 <= heads; e += 2)
        add_tile_heads<T, 2>(rows, c + e, n, E, d, width, sum + e * TILE<A>);
      if (e < heads) add_tile_heads<T, 1>(rows, c + e, n, E, d, width, sum + e * TILE<A>);
      for (int64_t k = 0; k < heads; ++k)
        for (int64_t v = 0; v < width; v += W2) {
          A* to = acc + (first + k) * stride + d + v;
          bool whole = v + W2 <= width;
          Pair<A> x = n ? from_pair<T>(load_pair(sum + k * TILE<A> + v)) : Pair<A>{};
          if (add) {
            Pair<A> old = whole ? load_pair(to) : load_pair_tail(to, width - v);
            x.lo += old.lo;
            x.hi += old.hi;
          }
          if (whole) store_pair(to, x.lo, x.hi);
          else store_pair_tail(to, x.lo, x.hi, width - v);
        }
    }
}

// out[r, d:d+width] = Σ_e scale[r, e]·w[e].
template <class T, int R>
void write_heads(
    T* const* out, const Acc<T>* const* scale, int64_t E, int64_t D, int64_t d, int64_t width,
    const Acc<T>* w) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t W2 = 2 * LANES<A>;
  for (int64_t v = 0; v < width; v += W2) {
    bool whole = v + W2 <= width;
    V lo[R] = {}, hi[R] = {};
    const A* at = w + d + v;
    for (int64_t e = 0; e < E; ++e, at += D) {
      Pair<A> x = whole ? load_pair(at) : load_pair_tail(at, width - v);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        lo[r] += x.lo * scale[r][e];
        hi[r] += x.hi * scale[r][e];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      if (whole) store_pair(out[r] + d + v, lo[r], hi[r]);
      else store_pair_tail(out[r] + d + v, lo[r], hi[r], width - v);
  }
}

template <class T>
void rank_heads(T* out, const Acc<T>* scale, int64_t n, int64_t E, int64_t D, const Acc<T>* w) {
  using A = Acc<T>;
  constexpr int64_t R = 4, SOME = 64;
  T* to[SOME];
  const A* factors[SOME];
  while (n > 0) {
    int64_t some = n < SOME ? n : SOME, kept = 0;
    for (int64_t i = 0; i < some; ++i, out += D, scale += E) {
      bool any = false;
      for (int64_t e = 0; e < E; ++e) any |= scale[e] != 0;
      if (any) to[kept] = out, factors[kept++] = scale;
      else __builtin_memset(out, 0, D * sizeof(T));
    }
    for (int64_t d = 0; d < D; d += TILE<A>) {
      int64_t width = D - d < TILE<A> ? D - d : TILE<A>, i = 0;
      for (; i + R <= kept; i += R) write_heads<T, R>(to + i, factors + i, E, D, d, width, w);
      for (; i < kept; ++i) write_heads<T, 1>(to + i, factors + i, E, D, d, width, w);
    }
    n -= some;
  }
}

// ---- pairs of candidates -----------------------------------------------------------------------

// log Π (1 + r_j) is the log of a running product, kept as q = product - 1 so that small r_j are
// not rounded away, and taken before the product can overflow.
double beat(const double* e, int64_t n, double w, double top, double* lost, double* won) {
  constexpr int64_t L = LANES<double>;
  double inverse = 1 / w, longest = 700 / __builtin_log1p(top * inverse);
  int64_t run = longest > 1e6 ? 1000000 : longest > 1 ? int64_t(longest) : 1;
  double loss = 0, sum = 0;
  Vec<double> sums = {};
  int64_t j = 0;
  while (j + L <= n) {
    Vec<double> q = {};
    for (int64_t left = run; left > 0 && j + L <= n; --left, j += L) {
      Vec<double> r = load(e + j) * inverse, p = r / (1 + r);
      q += r + q * r;
      sums += p;
      store_raw(lost + j, load(lost + j) + p);
    }
    for (int64_t l = 0; l < L; ++l) loss += __builtin_log1p(q[l]);
  }
  while (j < n) {
    double q = 0;
    for (int64_t left = run; left > 0 && j < n; --left, ++j) {
      double r = e[j] * inverse, p = r / (1 + r);
      q += r + q * r;
      sum += p;
      lost[j] += p;
    }
    loss += __builtin_log1p(q);
  }
  *won += sum + lane_sum<double>(sums);
  return loss;
}

bool supported() {
#if defined(__AVX512BF16__)
  if (!__builtin_cpu_supports("avx512bf16")) return false;
#endif
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(__AVX2__)
  // f16c has no name in older compilers' cpu_supports; every CPU with AVX2 and FMA has it.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

template <class T>
constexpr Kernels<T> kernels = {
    project<T>,       accumulate<T>,       rank1<T>,
    project_heads<T>, accumulate_heads<T>, rank_heads<T>,
};

} // namespace

#define FASTRM_CAT2(a, b) a##b
#define FASTRM_CAT(a, b) FASTRM_CAT2(a, b)
#define FASTRM_STR2(a) #a
#define FASTRM_STR(a) FASTRM_STR2(a)
extern const Isa FASTRM_CAT(isa_, FASTRM_ISA);
constexpr Isa FASTRM_CAT(isa_, FASTRM_ISA) = {
    FASTRM_STR(FASTRM_ISA), supported,     kernels<double>, kernels<float>,
    kernels<bf16>,          kernels<fp16>, beat,
};

} // namespace fastrm
