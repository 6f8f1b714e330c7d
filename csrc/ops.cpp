// The torch operators: argument checks, views, outputs. No arithmetic on hidden-sized data here.
// Letters: N groups, M candidates, T rows of hidden, D hidden, E heads; A the accumulation type.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <atomic>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "bradley_terry.h"
#include "kernels.h"
#include "listwise.h"
#include "output.h"
#include "plackett_luce.h"
#include "rows.h"

namespace fastrm {

// The compiled-in instruction sets, the best first.
#define FASTRM_DECLARE(name) extern const Isa isa_##name;
#ifdef __x86_64__
FASTRM_DECLARE(avx512bf16)
FASTRM_DECLARE(avx512)
FASTRM_DECLARE(avx2)
FASTRM_DECLARE(base)
const Isa* const all_isas[] = {&isa_avx512bf16, &isa_avx512, &isa_avx2, &isa_base};
#else
FASTRM_DECLARE(base)
const Isa* const all_isas[] = {&isa_base};
#endif

namespace {

using at::ScalarType;
using at::Tensor;
using OptTensor = std::optional<Tensor>;

const Isa* best_isa() {
  for (const Isa* isa : all_isas)
    if (isa->supported()) return isa;
  return nullptr; // unreachable: base is always supported
}

std::atomic<const Isa*> active_isa{best_isa()};

template <class T>
const Kernels<T>& kernels() {
  const Isa& isa = *active_isa.load(std::memory_order_relaxed);
  if constexpr (std::is_same_v<T, double>) return isa.f64;
  else if constexpr (std::is_same_v<T, float>) return isa.f32;
  else if constexpr (std::is_same_v<T, bf16>) return isa.b16;
  else return isa.h16;
}

template <class F>
auto with_type(ScalarType dtype, const char* what, F&& f) {
  switch (dtype) {
    case ScalarType::Double: return f(double{});
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(bf16{});
    case ScalarType::Half: return f(fp16{});
    default:
      TORCH_CHECK_TYPE(
          false, what, " must be float64, float32, bfloat16 or float16, got ", dtype);
  }
}

template <class A>
constexpr ScalarType dtype_of = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

// Each thread starts on its own share of the tasks, whose rows may be in its cache from the last
// call, and then helps the others. Which thread runs a task never changes its result.
void run_parallel(int64_t n, const std::function<void(int64_t)>& task) {
  int64_t threads = std::min<int64_t>(n, at::get_num_threads());
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) task(i);
    return;
  }
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::unique_ptr<Share[]> shares(new Share[threads]);
  for (int64_t s = 0; s < threads; ++s)
    shares[s].next = n * s / threads, shares[s].end = n * (s + 1) / threads;
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    for (int64_t s = 0; s < threads; ++s) {
      Share& share = shares[(first + s) % threads];
      for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
        task(i);
    }
  });
}

void check_cpu(const Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(
      t.device().is_cpu() && t.layout() == at::kStrided, name,
      " must be a strided CPU tensor, got one on ", t.device());
  TORCH_CHECK_VALUE(
      t.numel() == 0 || t.const_data_ptr(), name, " has no memory: its storage was resized to 0");
}

struct IndexArg {
  Tensor keep;
  Index view;
  int64_t size = 0;
};

IndexArg index_arg(const Tensor& t, const char* name) {
  check_cpu(t, name);
  TORCH_CHECK_TYPE(
      at::isIntegralType(t.scalar_type(), false) &&
          !at::isBarebonesUnsignedType(t.scalar_type()),
      name, " must hold integers, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() == 1, name, " must be 1-dimensional, got shape ", t.sizes());
  bool narrow = t.scalar_type() == ScalarType::Int;
  IndexArg arg;
  arg.keep = (narrow ? t : t.to(ScalarType::Long)).contiguous();
  arg.size = t.numel();
  static const int64_t nothing = 0; // an empty tensor's pointer is null
  arg.view = {arg.size ? arg.keep.const_data_ptr() : &nothing, !narrow};
  return arg;
}

void check_float(const Tensor& t, const char* name) {
  check_cpu(t, name);
  ScalarType dtype = t.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
          dtype == ScalarType::Double,
      name, " must be float64, float32, bfloat16 or float16, got ", dtype);
}

// A float vector in the accumulation type.
template <class A>
struct FloatArg {
  Tensor keep;
  const A* data = nullptr;
};

template <class A>
FloatArg<A> float_arg(const OptTensor& t, const char* name, int64_t size) {
  FloatArg<A> arg;
  if (!t) return arg;
  check_float(*t, name);
  TORCH_CHECK_VALUE(
      t->dim() == 1 && t->numel() == size, name, " must have shape (", size, ",), got ",
      t->sizes());
  arg.keep = t->to(dtype_of<A>).contiguous();
  static const A nothing = 0;
  arg.data = size ? static_cast<const A*>(arg.keep.const_data_ptr()) : &nothing;
  return arg;
}

double scalar_arg(const Tensor& t, const char* name) {
  check_cpu(t, name);
  TORCH_CHECK_VALUE(
      t.numel() == 1 && t.dim() <= 1, name, " must hold one number, got shape ", t.sizes());
  if (t.scalar_type() == ScalarType::Float) return *static_cast<const float*>(t.const_data_ptr());
  return t.item().toDouble();
}

double bias_arg(const Tensor& bias) {
  check_float(bias, "bias");
  return scalar_arg(bias, "bias");
}

// weight (D,), (1, D) or (E, D) widened once to the accumulation type.
template <class A>
struct WeightArg {
  Tensor keep;
  std::unique_ptr<A[]> wide;
  const A* data;
};

// E of a weight (E, D); 1 where it is not of that kind.
int64_t heads_of(const Tensor& weight) {
  return weight.dim() == 2 ? std::max<int64_t>(weight.size(0), 1) : 1;
}

template <class A>
WeightArg<A> weight_arg(const Tensor& weight, int64_t D, int64_t E = 1) {
  check_float(weight, "weight");
  bool fits = E > 1 ? weight.size(1) == D
                    : weight.numel() == D &&
          (weight.dim() == 1 || (weight.dim() == 2 && weight.size(0) == 1));
  TORCH_CHECK_VALUE(
      fits, "weight must have shape (", D, ",), (1, ", D, ") or, for E heads, (E, ", D,
      ") to match hidden, got ", weight.sizes());
  WeightArg<A> arg;
  ScalarType dtype = weight.scalar_type();
  bool half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  if (half && std::is_same_v<A, float>) {
    arg.keep = weight.contiguous();
    arg.wide.reset(new A[E * D]);
    with_type(dtype, "weight", [&](auto tag) {
      using W = decltype(tag);
      if constexpr (std::is_same_v<Acc<W>, A>) {
        const W* row = static_cast<const W*>(arg.keep.const_data_ptr());
        const A one = 1;
        kernels<W>().accumulate(&row, &one, 1, E * D, A(0), arg.wide.get());
      }
    });
    arg.data = arg.wide.get();
  } else {
    arg.keep = weight.to(dtype_of<A>).contiguous();
    arg.data = static_cast<const A*>(arg.keep.const_data_ptr());
  }
  return arg;
}

Tensor hidden_arg(const Tensor& hidden) {
  check_cpu(hidden, "hidden");
  TORCH_CHECK_VALUE(
      (hidden.dim() == 2 || hidden.dim() == 3) && hidden.size(-1) > 0,
      "hidden must have shape (T, D) or (B, S, D) with D > 0, got ", hidden.sizes());
  return hidden.size(-1) == 1 || hidden.stride(-1) == 1 ? hidden : hidden.contiguous();
}

template <class T>
Rows<T> rows_view(const Tensor& hidden, const IndexArg& rows) {
  Rows<T> view;
  view.data = static_cast<const T*>(hidden.const_data_ptr());
  int64_t inner = hidden.size(-2);
  view.count = hidden.dim() == 3 ? hidden.size(0) * inner : inner;
  view.stride_inner = hidden.stride(-2);
  view.stride_outer = hidden.dim() == 3 ? hidden.stride(0) : 0;
  if (hidden.dim() == 3 && inner == 1) // one row each: the outer stride is the only one
    view.stride_inner = view.stride_outer;
  bool flat = hidden.dim() == 2 || inner <= 1 || view.stride_outer == inner * view.stride_inner;
  view.inner = flat ? std::max<int64_t>(view.count, 1) : inner;
  view.rows = rows.view;
  return view;
}

IndexArg rows_arg(const OptTensor& rows) {
  return rows ? index_arg(*rows, "rows") : IndexArg{};
}

void check_rows(const IndexArg& rows, int64_t T, bool distinct) {
  if (!rows.view) return;
  std::vector<uint64_t> seen(distinct ? (T + 63) / 64 : 0);
  for (int64_t i = 0; i < rows.size; ++i) {
    int64_t r = rows.view[i];
    TORCH_CHECK_VALUE(
        r >= 0 && r < T, "rows[", i, "] = ", r, " is out of range: hidden has ", T, " rows");
    if (!distinct) continue;
    uint64_t bit = uint64_t(1) << (r % 64);
    TORCH_CHECK_VALUE(
        !(seen[r / 64] & bit), "rows[", i, "] = ", r, " appears twice: rows must be distinct");
    seen[r / 64] |= bit;
  }
}

void check_offsets(const IndexArg& offsets, int64_t M) {
  TORCH_CHECK_VALUE(offsets.size >= 1, "offsets must have N + 1 entries, got none");
  TORCH_CHECK_VALUE(
      offsets.view[0] == 0, "offsets[0] must be 0, got ", offsets.view[0]);
  for (int64_t n = 0; n + 1 < offsets.size; ++n)
    TORCH_CHECK_VALUE(
        offsets.view[n] < offsets.view[n + 1],
        "offsets must be strictly increasing (no empty group), but offsets[", n, "] = ",
        offsets.view[n], " and offsets[", n + 1, "] = ", offsets.view[n + 1]);
  TORCH_CHECK_VALUE(
      offsets.view[offsets.size - 1] == M, "offsets must end at the number of candidates ", M,
      ", but offsets[", offsets.size - 1, "] = ", offsets.view[offsets.size - 1]);
}

template <class A>
void check_finite(const A* data, int64_t n, const char* name) {
  if (!data) return;
  for (int64_t i = 0; i < n; ++i)
    TORCH_CHECK_VALUE(
        std::isfinite(data[i]), name, "[", i, "] must be finite, got ", data[i]);
}

// Returns the number of groups not left out.
int64_t check_target(const Index& offsets, const Index& target, int64_t N) {
  int64_t counted = 0;
  for (int64_t n = 0; n < N; ++n) {
    int64_t t = target[n], size = offsets[n + 1] - offsets[n];
    TORCH_CHECK_VALUE(
        t == -100 || (t >= 0 && t < size), "target[", n, "] = ", t,
        " must be a position in its group of ", size, " candidates, or -100 to leave it out");
    counted += t >= 0;
  }
  return counted;
}

template <class A>
void check_soft(const Index& offsets, const A* soft, int64_t N, double tolerance) {
  for (int64_t n = 0; n < N; ++n) {
    double sum = 0;
    for (int64_t i = offsets[n]; i < offsets[n + 1]; ++i) {
      TORCH_CHECK_VALUE(
          std::isfinite(soft[i]) && soft[i] >= 0, "target[", i,
          "] must be finite and >= 0, got ", soft[i]);
      sum += soft[i];
    }
    TORCH_CHECK_VALUE(
        std::abs(sum - 1) <= tolerance, "a floating target must sum to 1 over each group, but group ",
        n, " (candidates ", offsets[n], ":", offsets[n + 1], ") sums to ", sum);
  }
}

void check_options(double temperature, double center_coef, std::string_view reduction) {
  TORCH_CHECK_VALUE(
      temperature > 0 && std::isfinite(temperature), "temperature must be > 0, got ", temperature);
  TORCH_CHECK_VALUE(
      center_coef >= 0 && std::isfinite(center_coef), "center_coef must be finite and >= 0, got ",
      center_coef);
  TORCH_CHECK_VALUE(
      reduction == "mean" || reduction == "sum" || reduction == "none",
      "reduction must be 'mean', 'sum' or 'none', got '", reduction, "'");
}

// What the total loss of `counted` groups is divided by.
double divisor_arg(const OptTensor& num_items, int64_t counted, std::string_view reduction) {
  double divisor = double(std::max<int64_t>(counted, 1));
  if (num_items) {
    divisor = scalar_arg(*num_items, "num_items_in_batch");
    TORCH_CHECK_VALUE(
        divisor > 0 && std::isfinite(divisor), "num_items_in_batch must be > 0, got ", divisor);
  }
  return reduction == "mean" ? divisor : 1;
}

template <class A>
Tensor scalar_tensor(A value) {
  Tensor out = at::detail::empty_cpu({}, dtype_of<A>);
  *static_cast<A*>(out.mutable_data_ptr()) = value;
  return out;
}

template <class A>
A* data(const Tensor& t, bool needed = true) {
  return needed ? static_cast<A*>(t.mutable_data_ptr()) : nullptr;
}

// ---- score -------------------------------------------------------------------------------------

// Rows of a task for E heads: enough to make up for preparing the weights.
int64_t task_rows_heads(int64_t M, int64_t D) {
  return std::max<int64_t>(task_rows(M, D), 32);
}

template <class T>
Tensor score_heads(
    const Rows<T>& view, const Tensor& weight, const OptTensor& bias, int64_t M, int64_t E,
    int64_t D) {
  using A = Acc<T>;
  WeightArg<A> w = weight_arg<A>(weight, D, E);
  FloatArg<A> b = float_arg<A>(bias, "bias", E);
  std::vector<A> zeros(E);
  Tensor scores = at::detail::empty_cpu({M, E}, dtype_of<A>);
  int64_t step = task_rows_heads(M, D);
  run_parallel((M + step - 1) / step, [&](int64_t t) {
    const T* pointers[kMaxBlock];
    int64_t end = std::min(M, (t + 1) * step);
    for (int64_t r = t * step; r < end; r += kMaxBlock) {
      int64_t n = std::min(kMaxBlock, end - r);
      view.pointers(r, n, pointers);
      kernels<T>().project_heads(
          pointers, n, E, D, w.data, b.data ? b.data : zeros.data(), data<A>(scores) + r * E);
    }
  });
  return scores;
}

template <class T>
Tensor score_typed(
    const Tensor& hidden, const Tensor& weight, const OptTensor& bias, const OptTensor& rows) {
  using A = Acc<T>;
  int64_t D = hidden.size(-1);
  IndexArg index = rows_arg(rows);
  Rows<T> view = rows_view<T>(hidden, index);
  check_rows(index, view.count, true);
  int64_t M = rows ? index.size : view.count;
  if (int64_t E = heads_of(weight); E > 1) return score_heads<T>(view, weight, bias, M, E, D);
  WeightArg<A> w = weight_arg<A>(weight, D);
  A b = bias ? A(bias_arg(*bias)) : A(0);
  Tensor scores = at::detail::empty_cpu({M}, dtype_of<A>);
  int64_t step = task_rows(M, D), block = block_rows(D, sizeof(T));
  run_parallel((M + step - 1) / step, [&](int64_t t) {
    const T* pointers[kMaxBlock];
    int64_t end = std::min(M, (t + 1) * step);
    for (int64_t r = t * step; r < end; r += block) {
      int64_t n = std::min(block, end - r);
      view.pointers(r, n, pointers);
      kernels<T>().project(pointers, n, D, w.data, b, data<A>(scores) + r);
    }
  });
  return scores;
}

Tensor score(
    const Tensor& hidden, const Tensor& weight, const OptTensor& bias, const OptTensor& rows) {
  Tensor h = hidden_arg(hidden);
  return with_type(h.scalar_type(), "hidden", [&](auto tag) {
    return score_typed<decltype(tag)>(h, weight, bias, rows);
  });
}

// ---- listwise_fwd ------------------------------------------------------------------------------

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct ListwiseArgs {
  const OptTensor &bias, &rows, &margin, &group_weight, &num_items;
  double temperature, label_smoothing, center_coef;
  std::string_view reduction;
  bool needs_coef, needs_dweight;
};

// A loss for each of E heads, from scores (M, E); their mean, and the coefficients (M, E).
template <class A>
Forward listwise_heads(
    const Tensor& scores, Listwise<A> loss, int64_t N, bool none, bool needs_coef) {
  int64_t M = scores.size(0), E = scores.size(1);
  double divisor = loss.divisor;
  loss.divisor *= double(E);
  std::unique_ptr<A[]> columns(new A[2 * E * M]), by_head(none ? new A[E * N] : nullptr);
  std::vector<double> totals(E);
  const A one = 1, *from = static_cast<const A*>(scores.const_data_ptr());
  Tensor coef = needs_coef ? at::detail::empty_cpu({M, E}, dtype_of<A>)
                           : at::detail::empty_cpu({0}, dtype_of<A>);
  A* to = data<A>(coef, needs_coef);
  run_parallel(E, [&](int64_t e) {
    A *column = columns.get() + 2 * e * M, *slopes = column + M;
    for (int64_t i = 0; i < M; ++i) column[i] = from[i * E + e];
    ListwiseForward<A> forward; // of hidden states of size 1 and a head of weight 1
    forward.hidden = {column, M, std::max<int64_t>(M, 1), 0, 1, {}};
    forward.weight = &one;
    forward.bias = 0;
    forward.loss = loss;
    forward.N = N;
    forward.M = M;
    forward.D = 1;
    forward.kernels = forward.combine = &kernels<A>();
    forward.scores = column;
    forward.coef = needs_coef ? slopes : nullptr;
    forward.dweight = nullptr;
    forward.losses = none ? by_head.get() + e * N : nullptr;
    totals[e] = forward.run([](int64_t n, const std::function<void(int64_t)>& task) {
      for (int64_t t = 0; t < n; ++t) task(t);
    });
    for (int64_t i = 0; needs_coef && i < M; ++i) to[i * E + e] = slopes[i];
  });
  Tensor losses, dweight = at::detail::empty_cpu({0}, dtype_of<A>);
  if (none) {
    losses = at::detail::empty_cpu({N}, dtype_of<A>);
    for (int64_t g = 0; g < N; ++g) {
      double sum = 0;
      for (int64_t e = 0; e < E; ++e) sum += double(by_head[e * N + g]);
      data<A>(losses)[g] = A(sum / double(E));
    }
  } else {
    double sum = 0;
    for (double total : totals) sum += total;
    losses = scalar_tensor(A(sum / (double(E) * divisor)));
  }
  return {losses, scores, coef, dweight};
}

template <class T>
Forward listwise_typed(
    const Tensor& hidden, const Tensor& weight, const Tensor& offsets, const Tensor& target,
    const ListwiseArgs& args) {
  using A = Acc<T>;
  int64_t D = hidden.size(-1);
  IndexArg index = rows_arg(args.rows), off = index_arg(offsets, "offsets");
  Rows<T> view = rows_view<T>(hidden, index);
  int64_t M = args.rows ? index.size : view.count, N = off.size - 1;
  check_rows(index, view.count, true);
  check_offsets(off, M);

  IndexArg best;
  FloatArg<A> soft;
  int64_t counted = N;
  if (target.is_floating_point()) {
    soft = float_arg<A>(target, "target", M);
    bool half = target.scalar_type() == ScalarType::Half ||
        target.scalar_type() == ScalarType::BFloat16;
    check_soft(off.view, soft.data, N, half ? 2e-2 : 1e-3);
  } else {
    best = index_arg(target, "target");
    TORCH_CHECK_VALUE(
        best.size == N, "target must have one entry for each of the ", N, " groups, got ",
        best.size);
    counted = check_target(off.view, best.view, N);
  }
  FloatArg<A> margin = float_arg<A>(args.margin, "margin", M);
  FloatArg<A> group_weight = float_arg<A>(args.group_weight, "group_weight", N);
  check_finite(margin.data, M, "margin");
  check_finite(group_weight.data, N, "group_weight");
  double divisor = divisor_arg(args.num_items, counted, args.reduction);
  bool none = args.reduction == "none";
  Listwise<A> loss{
      off.view, best.view, soft.data, margin.data, group_weight.data,
      args.temperature, args.label_smoothing, args.center_coef, divisor};

  if (int64_t E = heads_of(weight); E > 1)
    return listwise_heads<A>(
        score_heads<T>(view, weight, args.bias, M, E, D), loss, N, none, args.needs_coef);
  WeightArg<A> w = weight_arg<A>(weight, D);
  bool needs_dweight = args.needs_dweight && !none;
  Tensor scores = at::detail::empty_cpu({M}, dtype_of<A>);
  Tensor coef = at::detail::empty_cpu({args.needs_coef ? M : 0}, dtype_of<A>);
  Tensor dweight = at::detail::empty_cpu({needs_dweight ? D : 0}, dtype_of<A>);
  Tensor losses = none ? at::detail::empty_cpu({N}, dtype_of<A>) : Tensor();

  ListwiseForward<T> forward;
  forward.hidden = view;
  forward.weight = w.data;
  forward.bias = args.bias ? A(bias_arg(*args.bias)) : A(0);
  forward.loss = loss;
  forward.N = N;
  forward.M = M;
  forward.D = D;
  forward.kernels = &kernels<T>();
  forward.combine = &kernels<A>();
  forward.scores = data<A>(scores);
  forward.coef = data<A>(coef, args.needs_coef);
  forward.dweight = data<A>(dweight, needs_dweight);
  forward.losses = none ? data<A>(losses) : nullptr;
  double total = forward.run(run_parallel);
  return {none ? losses : scalar_tensor(A(total / divisor)), scores, coef, dweight};
}

Forward listwise_fwd(
    const Tensor& hidden, const Tensor& weight, const OptTensor& bias, const Tensor& offsets,
    const Tensor& target, const OptTensor& rows, const OptTensor& margin,
    const OptTensor& group_weight, const OptTensor& num_items, double temperature,
    double label_smoothing, double center_coef, std::string_view reduction, bool needs_coef,
    bool needs_dweight) {
  TORCH_CHECK_VALUE(
      label_smoothing >= 0 && label_smoothing <= 1, "label_smoothing must be in [0, 1], got ",
      label_smoothing);
  check_options(temperature, center_coef, reduction);
  Tensor h = hidden_arg(hidden);
  ListwiseArgs args{
      bias, rows, margin, group_weight, num_items, temperature, label_smoothing, center_coef,
      reduction, needs_coef, needs_dweight};
  return with_type(h.scalar_type(), "hidden", [&](auto tag) {
    return listwise_typed<decltype(tag)>(h, weight, offsets, target, args);
  });
}

// ---- head_bwd ----------------------------------------------------------------------------------

void check_hidden_shape(at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(
      (shape.size() == 2 || shape.size() == 3) && shape.back() > 0,
      "hidden_shape must be (T, D) or (B, S, D) with D > 0, got ", shape);
}

// Row i of out gets scale[i]·mul·w: every row written once.
template <class T>
void write_rank1(
    T* out, const Acc<T>* scale, Acc<T> mul, int64_t rows, int64_t D, const Acc<T>* w) {
  constexpr int64_t kTaskBytes = 1 << 18;
  int64_t step = std::max<int64_t>(kTaskBytes / (D * int64_t(sizeof(T))), 1);
  run_parallel((rows + step - 1) / step, [&](int64_t t) {
    int64_t r = t * step, n = std::min(step, rows - r);
    kernels<T>().rank1(out + r * D, scale + r, mul, n, D, w);
  });
}

// Σ_i scale[i]·mul·hidden[i], in fixed tasks and a fixed order.
template <class T>
void sum_rows(
    const Rows<T>& hidden, const Acc<T>* scale, Acc<T> mul, int64_t M, int64_t D, Acc<T>* out) {
  using A = Acc<T>;
  int64_t step = task_rows(M, D), block = block_rows(D, sizeof(T)), count = (M + step - 1) / step;
  std::unique_ptr<A[]> partial(new A[count * D]);
  run_parallel(count, [&](int64_t t) {
    const T* pointers[kMaxBlock];
    A coef[kMaxBlock];
    A* acc = partial.get() + t * D;
    int64_t end = std::min(M, (t + 1) * step);
    for (int64_t r = t * step; r < end; r += block) {
      int64_t n = std::min(block, end - r), kept = 0;
      hidden.pointers(r, n, pointers);
      for (int64_t i = 0; i < n; ++i)
        if (A c = scale[r + i] * mul; c != 0) pointers[kept] = pointers[i], coef[kept++] = c;
      kernels<T>().accumulate(pointers, coef, kept, D, A(r > t * step), acc);
    }
  });
  std::vector<const A*> parts(count);
  for (int64_t t = 0; t < count; ++t) parts[t] = partial.get() + t * D;
  std::vector<A> ones(count, A(1));
  kernels<A>().accumulate(parts.data(), ones.data(), count, D, A(0), out);
}

// A vector of A times a factor, in another dtype and shape.
template <class A>
Tensor narrowed(const A* values, A mul, const Tensor& like) {
  int64_t D = like.numel();
  ScalarType dtype = like.scalar_type();
  bool direct = std::is_same_v<A, double> ? dtype == ScalarType::Double
                                          : dtype != ScalarType::Double;
  Tensor out = at::detail::empty_cpu(like.sizes(), direct ? dtype : dtype_of<A>);
  with_type(out.scalar_type(), "weight", [&](auto tag) {
    using W = decltype(tag);
    if constexpr (std::is_same_v<Acc<W>, A>)
      kernels<W>().rank1(data<W>(out), &mul, A(1), 1, D, values);
  });
  return direct ? out : out.to(dtype);
}

struct HeadArgs {
  const OptTensor &offsets, &rows, &hidden, &dweight_unit;
  at::IntArrayRef hidden_shape;
  bool needs_dhidden, needs_dweight, needs_dbias;
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> head_typed(
    const Tensor& grad, const Tensor& coef, const Tensor& weight, ScalarType hidden_dtype,
    const HeadArgs& args) {
  using A = Acc<T>;
  int64_t D = args.hidden_shape.back(), M = coef.numel(), count = 1;
  for (size_t k = 0; k + 1 < args.hidden_shape.size(); ++k) count *= args.hidden_shape[k];
  IndexArg rows = rows_arg(args.rows);
  check_rows(rows, count, false);
  TORCH_CHECK_VALUE(weight.numel() == D, "weight has ", weight.numel(), " entries for D = ", D);
  TORCH_CHECK_VALUE(
      M == (args.rows ? rows.size : count), "coef has ", M, " entries for ",
      args.rows ? rows.size : count, " candidates");
  FloatArg<A> scale = float_arg<A>(coef, "coef", M);
  A mul = 1;
  std::unique_ptr<A[]> scaled;
  if (grad.dim() == 0) {
    mul = A(scalar_arg(grad, "grad"));
  } else {
    TORCH_CHECK_VALUE(args.offsets.has_value(), "a (N,) grad needs offsets");
    IndexArg off = index_arg(*args.offsets, "offsets");
    check_offsets(off, M);
    FloatArg<A> g = float_arg<A>(grad, "grad", off.size - 1);
    scaled.reset(new A[M]);
    for (int64_t n = 0; n + 1 < off.size; ++n)
      for (int64_t i = off.view[n]; i < off.view[n + 1]; ++i)
        scaled[i] = scale.data[i] * g.data[n];
    scale.data = scaled.get();
  }

  Tensor dhidden = at::detail::empty_cpu({0}, hidden_dtype);
  Tensor dweight = at::detail::empty_cpu({0}, weight.scalar_type());
  Tensor dbias = at::detail::empty_cpu({0}, dtype_of<A>);
  if (args.needs_dhidden) {
    dhidden = make_output(args.hidden_shape, hidden_dtype);
    WeightArg<A> w = weight_arg<A>(weight, D);
    std::unique_ptr<A[]> by_row;
    if (rows.view) {
      by_row.reset(new A[count]());
      for (int64_t i = 0; i < M; ++i) by_row[rows.view[i]] = scale.data[i];
    }
    write_rank1<T>(
        data<T>(dhidden), by_row ? by_row.get() : scale.data, mul, count, D, w.data);
  }
  if (args.needs_dweight) {
    if (args.dweight_unit) {
      TORCH_CHECK_VALUE(grad.dim() == 0, "dweight_unit needs a 0-dimensional grad");
      FloatArg<A> unit = float_arg<A>(*args.dweight_unit, "dweight_unit", D);
      dweight = narrowed<A>(unit.data, mul, weight);
    } else {
      TORCH_CHECK_VALUE(args.hidden.has_value(), "dweight needs hidden or dweight_unit");
      Tensor h = hidden_arg(*args.hidden);
      Rows<T> view = rows_view<T>(h, rows);
      TORCH_CHECK_VALUE(
          h.scalar_type() == hidden_dtype && h.size(-1) == D && view.count == count,
          "hidden does not have the shape and dtype given");
      std::unique_ptr<A[]> sum(new A[D]);
      sum_rows<T>(view, scale.data, mul, M, D, sum.get());
      dweight = narrowed<A>(sum.get(), A(1), weight);
    }
  }
  if (args.needs_dbias) {
    double sum = 0;
    for (int64_t i = 0; i < M; ++i) sum += double(scale.data[i]) * double(mul);
    dbias = scalar_tensor(A(sum));
  }
  return {dhidden, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> head_bwd(
    const Tensor& grad, const Tensor& coef, const OptTensor& offsets, const Tensor& weight,
    const OptTensor& rows, const OptTensor& hidden, const OptTensor& dweight_unit,
    at::IntArrayRef hidden_shape, ScalarType hidden_dtype, bool needs_dhidden,
    bool needs_dweight, bool needs_dbias) {
  check_hidden_shape(hidden_shape);
  HeadArgs args{
      offsets, rows, hidden, dweight_unit, hidden_shape, needs_dhidden, needs_dweight,
      needs_dbias};
  return with_type(hidden_dtype, "hidden", [&](auto tag) {
    return head_typed<decltype(tag)>(grad, coef, weight, hidden_dtype, args);
  });
}

// ---- heads_bwd ---------------------------------------------------------------------------------

// scaleᵀ · hidden, (E, D). Tasks are columns by rows: few enough pieces of rows that their partial
// sums, E·D numbers each, stay small beside hidden itself.
template <class T>
void sum_rows_heads(
    const Rows<T>& hidden, const Acc<T>* scale, int64_t M, int64_t E, int64_t D, Acc<T>* out) {
  using A = Acc<T>;
  constexpr int64_t kColumns = 1024, kTasks = 64;
  int64_t slices = (D + kColumns - 1) / kColumns, most = std::max<int64_t>(kTasks / slices, 1);
  int64_t step = std::max<int64_t>((M + most - 1) / most, 16 * E);
  int64_t pieces = std::max<int64_t>((M + step - 1) / step, 1);
  std::unique_ptr<A[]> partial(pieces > 1 ? new A[pieces * E * D] : nullptr);
  run_parallel(pieces * slices, [&](int64_t t) {
    const T* pointers[kMaxBlock];
    int64_t piece = t / slices, d = t % slices * kColumns, width = std::min(kColumns, D - d);
    A* acc = (partial ? partial.get() + piece * E * D : out) + d;
    std::unique_ptr<A[]> coef(new A[kMaxBlock * E]);
    int64_t r = piece * step, end = std::min(M, r + step);
    bool add = false;
    do {
      int64_t n = std::min(kMaxBlock, end - r), kept = 0;
      hidden.pointers(r, n, pointers);
      for (int64_t i = 0; i < n; ++i) {
        const A* c = scale + (r + i) * E;
        if (std::all_of(c, c + E, [](A x) { return x == 0; })) continue; // its row may be NaN
        std::copy_n(c, E, coef.get() + kept * E);
        pointers[kept++] = pointers[i] + d;
      }
      kernels<T>().accumulate_heads(pointers, coef.get(), kept, E, width, add, acc, D);
      add = true;
      r += n;
    } while (r < end);
  });
  if (!partial) return;
  std::vector<A> ones(pieces, A(1));
  constexpr int64_t kSlice = 8192;
  run_parallel((E * D + kSlice - 1) / kSlice, [&](int64_t s) {
    std::vector<const A*> parts(pieces);
    for (int64_t p = 0; p < pieces; ++p) parts[p] = partial.get() + p * E * D + s * kSlice;
    int64_t width = std::min(kSlice, E * D - s * kSlice);
    kernels<A>().accumulate(parts.data(), ones.data(), pieces, width, A(0), out + s * kSlice);
  });
}

// Row i of out gets Σ_e scale[i, e]·w[e]: every row written once.
template <class T>
void write_rank_heads(
    T* out, const Acc<T>* scale, int64_t rows, int64_t E, int64_t D, const Acc<T>* w) {
  int64_t step = task_rows_heads(rows, D);
  run_parallel((rows + step - 1) / step, [&](int64_t t) {
    int64_t r = t * step, n = std::min(step, rows - r);
    kernels<T>().rank_heads(out + r * D, scale + r * E, n, E, D, w);
  });
}

struct HeadsArgs {
  const OptTensor &rows, &hidden;
  at::IntArrayRef hidden_shape;
  bool needs_dhidden, needs_dweight, needs_dbias;
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> heads_typed(
    const Tensor& dscores, const Tensor& weight, ScalarType hidden_dtype, const HeadsArgs& args) {
  using A = Acc<T>;
  int64_t D = args.hidden_shape.back(), E = weight.size(0), M = dscores.size(0), count = 1;
  for (size_t k = 0; k + 1 < args.hidden_shape.size(); ++k) count *= args.hidden_shape[k];
  IndexArg rows = rows_arg(args.rows);
  check_rows(rows, count, false);
  TORCH_CHECK_VALUE(
      M == (args.rows ? rows.size : count), "dscores has ", M, " rows for ",
      args.rows ? rows.size : count, " candidates");
  FloatArg<A> scale = float_arg<A>(dscores.reshape({-1}), "dscores", M * E);
  WeightArg<A> w = weight_arg<A>(weight, D, E);

  Tensor dhidden = at::detail::empty_cpu({0}, hidden_dtype);
  Tensor dweight = at::detail::empty_cpu({0}, weight.scalar_type());
  Tensor dbias = at::detail::empty_cpu({0}, dtype_of<A>);
  if (args.needs_dhidden) {
    dhidden = make_output(args.hidden_shape, hidden_dtype);
    std::unique_ptr<A[]> by_row;
    if (rows.view) {
      by_row.reset(new A[count * E]());
      for (int64_t i = 0; i < M; ++i)
        std::copy_n(scale.data + i * E, E, by_row.get() + rows.view[i] * E);
    }
    write_rank_heads<T>(
        data<T>(dhidden), by_row ? by_row.get() : scale.data, count, E, D, w.data);
  }
  if (args.needs_dweight) {
    TORCH_CHECK_VALUE(args.hidden.has_value(), "dweight needs hidden");
    Tensor h = hidden_arg(*args.hidden);
    Rows<T> view = rows_view<T>(h, rows);
    TORCH_CHECK_VALUE(
        h.scalar_type() == hidden_dtype && h.size(-1) == D && view.count == count,
        "hidden does not have the shape and dtype given");
    std::unique_ptr<A[]> sum(new A[E * D]);
    sum_rows_heads<T>(view, scale.data, M, E, D, sum.get());
    dweight = narrowed<A>(sum.get(), A(1), weight);
  }
  if (args.needs_dbias) {
    dbias = at::detail::empty_cpu({E}, dtype_of<A>);
    for (int64_t e = 0; e < E; ++e) {
      double sum = 0;
      for (int64_t i = 0; i < M; ++i) sum += double(scale.data[i * E + e]);
      data<A>(dbias)[e] = A(sum);
    }
  }
  return {dhidden, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> heads_bwd(
    const Tensor& dscores, const Tensor& weight, const OptTensor& rows, const OptTensor& hidden,
    at::IntArrayRef hidden_shape, ScalarType hidden_dtype, bool needs_dhidden,
    bool needs_dweight, bool needs_dbias) {
  check_hidden_shape(hidden_shape);
  check_cpu(dscores, "dscores");
  TORCH_CHECK_VALUE(
      weight.dim() == 2 && weight.size(0) > 1, "weight must have shape (E, D), E > 1, got ",
      weight.sizes());
  TORCH_CHECK_VALUE(
      dscores.dim() == 2 && dscores.size(1) == weight.size(0), "dscores must have shape (M, ",
      weight.size(0), "), got ", dscores.sizes());
  HeadsArgs args{rows, hidden, hidden_shape, needs_dhidden, needs_dweight, needs_dbias};
  return with_type(hidden_dtype, "hidden", [&](auto tag) {
    return heads_typed<decltype(tag)>(dscores, weight, hidden_dtype, args);
  });
}

// ---- plackett_luce_fwd, bradley_terry_fwd ------------------------------------------------------

struct RankingArgs {
  const Tensor &scores, &offsets, &ranks;
  const OptTensor &extra, &group_weight, &num_items;
  double temperature, center_coef;
  std::string_view reduction;
  bool needs_coef;
};

void check_ranks(const IndexArg& ranks, int64_t M) {
  TORCH_CHECK_VALUE(
      ranks.size == M, "ranks must have one entry for each of the ", M, " candidates, got ",
      ranks.size);
  for (int64_t i = 0; i < M; ++i)
    TORCH_CHECK_VALUE(
        ranks.view[i] >= -1, "ranks[", i, "] = ", ranks.view[i],
        " must be 0 or more, or -1 for unranked");
}

// total: what adds up the losses of all groups.
template <class A, class Total>
std::tuple<Tensor, Tensor> ranking_typed(
    const RankingArgs& args, const char* extra_name, Total&& total) {
  check_options(args.temperature, args.center_coef, args.reduction);
  TORCH_CHECK_VALUE(
      args.scores.dim() == 1, "scores must be 1-dimensional, got shape ", args.scores.sizes());
  int64_t M = args.scores.numel();
  IndexArg off = index_arg(args.offsets, "offsets"), ranks = index_arg(args.ranks, "ranks");
  int64_t N = off.size - 1;
  check_offsets(off, M);
  check_ranks(ranks, M);
  FloatArg<A> scores = float_arg<A>(args.scores, "scores", M);
  FloatArg<A> extra = float_arg<A>(args.extra, extra_name, M);
  FloatArg<A> group_weight = float_arg<A>(args.group_weight, "group_weight", N);
  check_finite(extra.data, M, extra_name);
  check_finite(group_weight.data, N, "group_weight");
  double divisor = divisor_arg(args.num_items, N, args.reduction);
  bool none = args.reduction == "none";

  Tensor coef = at::detail::empty_cpu({args.needs_coef ? M : 0}, dtype_of<A>);
  Tensor losses = none ? at::detail::empty_cpu({N}, dtype_of<A>) : Tensor();
  Ranking<A> ranking{
      off.view, ranks.view, scores.data, extra.data, group_weight.data, N, args.temperature,
      args.center_coef, divisor, data<A>(coef, args.needs_coef),
      none ? data<A>(losses) : nullptr};
  double sum = total(ranking);
  return {none ? losses : scalar_tensor(A(sum / divisor)), coef};
}

template <class Total>
std::tuple<Tensor, Tensor> ranking(
    const RankingArgs& args, const char* extra_name, Total&& total) {
  ScalarType dtype = args.scores.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == ScalarType::Float || dtype == ScalarType::Double,
      "scores must be float64 or float32, got ", dtype);
  return dtype == ScalarType::Double ? ranking_typed<double>(args, extra_name, total)
                                     : ranking_typed<float>(args, extra_name, total);
}

std::tuple<Tensor, Tensor> plackett_luce_fwd(
    const Tensor& scores, const Tensor& offsets, const Tensor& ranks, const OptTensor& extra,
    const OptTensor& group_weight, const OptTensor& num_items, double temperature,
    double center_coef, std::string_view reduction, bool needs_coef) {
  RankingArgs args{scores, offsets, ranks, extra, group_weight, num_items,
                   temperature, center_coef, reduction, needs_coef};
  return ranking(args, "position_weight", [](const auto& loss) {
    return plackett_luce(loss, run_parallel);
  });
}

std::tuple<Tensor, Tensor> bradley_terry_fwd(
    const Tensor& scores, const Tensor& offsets, const Tensor& ranks, const OptTensor& extra,
    const OptTensor& group_weight, const OptTensor& num_items, double temperature,
    double center_coef, std::string_view reduction, bool needs_coef) {
  RankingArgs args{scores, offsets, ranks, extra, group_weight, num_items,
                   temperature, center_coef, reduction, needs_coef};
  return ranking(args, "margin", [](const auto& loss) {
    return bradley_terry(loss, active_isa.load()->beat, run_parallel);
  });
}

// ---- switches ----------------------------------------------------------------------------------

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa* isa : all_isas)
    if (isa->supported()) names.emplace_back(isa->name);
  return names;
}

void set_isa(std::string_view name) {
  for (const Isa* isa : all_isas)
    if (isa->supported() && name == isa->name) {
      active_isa = isa;
      return;
    }
  TORCH_CHECK_VALUE(false, "'", name, "' is not one of isas()");
}

std::string isa() {
  return active_isa.load()->name;
}

void set_huge_pages(bool on) {
  huge_pages = on;
}

} // namespace
} // namespace fastrm

// Compiled graphs that torch keeps on disk call these by name: a schema that changes wants another.
TORCH_LIBRARY(fastrm_cpp, m) {
  m.def("score_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor? rows) -> Tensor");
  m.def(
      "listwise_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor offsets, Tensor target, "
      "Tensor? rows, Tensor? margin, Tensor? group_weight, Tensor? num_items, "
      "float temperature, float label_smoothing, float center_coef, str reduction, "
      "bool needs_coef, bool needs_dweight) "
      "-> (Tensor loss, Tensor scores, Tensor coef, Tensor dweight)");
  m.def(
      "head_bwd(Tensor grad, Tensor coef, Tensor? offsets, Tensor weight, Tensor? rows, "
      "Tensor? hidden, Tensor? dweight_unit, SymInt[] hidden_shape, ScalarType hidden_dtype, "
      "bool needs_dhidden, bool needs_dweight, bool needs_dbias) "
      "-> (Tensor dhidden, Tensor dweight, Tensor dbias)");
  m.def(
      "heads_bwd(Tensor dscores, Tensor weight, Tensor? rows, Tensor? hidden, "
      "SymInt[] hidden_shape, ScalarType hidden_dtype, bool needs_dhidden, bool needs_dweight, "
      "bool needs_dbias) -> (Tensor dhidden, Tensor dweight, Tensor dbias)");
  for (std::string name : {"plackett_luce_fwd", "bradley_terry_fwd"})
    m.def(name.append(
        "(Tensor scores, Tensor offsets, Tensor ranks, Tensor? extra, Tensor? group_weight, "
        "Tensor? num_items, float temperature, float center_coef, str reduction, "
        "bool needs_coef) -> (Tensor loss, Tensor coef)").c_str());
  m.def("isas() -> str[]", &fastrm::isas);
  m.def("isa() -> str", &fastrm::isa);
  m.def("set_isa(str name) -> ()", &fastrm::set_isa);
  m.def("set_huge_pages(bool on) -> ()", &fastrm::set_huge_pages);
}

TORCH_LIBRARY_IMPL(fastrm_cpp, CPU, m) {
  m.impl("score_fwd", &fastrm::score);
  m.impl("listwise_fwd", &fastrm::listwise_fwd);
  m.impl("head_bwd", &fastrm::head_bwd);
  m.impl("heads_bwd", &fastrm::heads_bwd);
  m.impl("plackett_luce_fwd", &fastrm::plackett_luce_fwd);
  m.impl("bradley_terry_fwd", &fastrm::bradley_terry_fwd);
}

// The caller's autograd.Function differentiates; these ops never record anything themselves.
TORCH_LIBRARY_IMPL(fastrm_cpp, Autograd, m) {
  for (const char* op :
       {"score_fwd", "listwise_fwd", "head_bwd", "heads_bwd", "plackett_luce_fwd",
        "bradley_terry_fwd"})
    m.impl(op, torch::CppFunction::makeFallthrough());
}
