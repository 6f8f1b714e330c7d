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

template <class T>
void project(
    const T* const* rows, int64_t n, int64_t D, const Acc<T>* w, Acc<T> bias, Acc<T>* out) {
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
constexpr Kernels<T> kernels = {project<T>, accumulate<T>, rank1<T>};

} // namespace

#define FASTRM_CAT2(a, b) a##b
#define FASTRM_CAT(a, b) FASTRM_CAT2(a, b)
#define FASTRM_STR2(a) #a
#define FASTRM_STR(a) FASTRM_STR2(a)
extern const Isa FASTRM_CAT(isa_, FASTRM_ISA);
constexpr Isa FASTRM_CAT(isa_, FASTRM_ISA) = {
    FASTRM_STR(FASTRM_ISA), supported, kernels<double>, kernels<float>, kernels<bf16>, kernels<fp16>};

} // namespace fastrm
