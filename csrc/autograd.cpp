// The differentiable operators `listwise_loss`, `score`, `plackett_luce` and `bradley_terry`: graph
// nodes in C++, because one in Python costs more than the arithmetic of a small batch. They call
// the operators of ops.cpp through the dispatcher, so fake tensors and torch.compile see those.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace fastrm {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptTensor = std::optional<Tensor>;

template <class Signature>
auto operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

const auto& score_fwd() {
  static const auto op = operator_named<Tensor(
      const Tensor&, const Tensor&, const OptTensor&, const OptTensor&)>("fastrm_cpp::score_fwd");
  return op;
}

const auto& listwise_fwd() {
  static const auto op = operator_named<Forward(
      const Tensor&, const Tensor&, const OptTensor&, const Tensor&, const Tensor&,
      const OptTensor&, const OptTensor&, const OptTensor&, const OptTensor&, double, double,
      double, std::string_view, bool, bool)>("fastrm_cpp::listwise_fwd");
  return op;
}

const auto& head_bwd() {
  static const auto op = operator_named<Gradients(
      const Tensor&, const Tensor&, const OptTensor&, const Tensor&, const OptTensor&,
      const OptTensor&, const OptTensor&, c10::SymIntArrayRef, at::ScalarType, bool, bool,
      bool)>("fastrm_cpp::head_bwd");
  return op;
}

const auto& heads_bwd() {
  static const auto op = operator_named<Gradients(
      const Tensor&, const Tensor&, const OptTensor&, const OptTensor&, c10::SymIntArrayRef,
      at::ScalarType, bool, bool, bool)>("fastrm_cpp::heads_bwd");
  return op;
}

// plackett_luce_fwd and bradley_terry_fwd.
using RankingSignature = std::tuple<Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const OptTensor&, const OptTensor&,
    const OptTensor&, double, double, std::string_view, bool);
using RankingFwd = c10::TypedOperatorHandle<RankingSignature>;

OptTensor optional(const Tensor& t) {
  return t.defined() ? OptTensor(t) : OptTensor();
}

// What backward needs beside tensors. Kept as one entry of saved_data, each of which is a string and
// a hash; of plain values, because compiled autograd hashes them.
struct Facts {
  std::vector<c10::SymInt> shape; // of hidden
  at::ScalarType dtype; // likewise
  bool has_bias;
  std::vector<c10::SymInt> bias_shape;
  at::ScalarType bias_dtype;
  bool shift_invariant;
};

c10::IValue shape_of(const Tensor& t) {
  c10::SymIntArrayRef sizes = t.sym_sizes();
  return c10::ivalue::Tuple::create(std::vector<c10::IValue>(sizes.begin(), sizes.end()));
}

std::vector<c10::SymInt> sizes_in(const c10::IValue& shape) {
  std::vector<c10::SymInt> sizes;
  for (const c10::IValue& n : shape.toTupleRef().elements()) sizes.push_back(n.toSymInt());
  return sizes;
}

void keep_facts(
    AutogradContext* ctx, const Tensor& hidden, const OptTensor& bias, bool shift_invariant) {
  const Tensor& b = bias ? *bias : hidden;
  ctx->saved_data["facts"] = c10::ivalue::Tuple::create(std::vector<c10::IValue>{
      shape_of(hidden), int64_t(hidden.scalar_type()), bias.has_value(), shape_of(b),
      int64_t(b.scalar_type()), shift_invariant});
}

Facts facts_of(AutogradContext* ctx) {
  const auto& kept = ctx->saved_data["facts"].toTupleRef().elements();
  return {sizes_in(kept[0]), at::ScalarType(kept[1].toInt()), kept[2].toBool(), sizes_in(kept[3]),
          at::ScalarType(kept[4].toInt()), kept[5].toBool()};
}

// The gradients have no graph of their own: with create_graph they would look constant.
void refuse_second_order() {
  TORCH_CHECK(
      !at::GradMode::is_enabled(),
      "the fused backends are differentiable once; create_graph=True needs backend='torch'");
}

// Which of dhidden = coef·w, dweight = Σ coef·h and dbias = Σ coef are asked for.
struct Needs {
  bool dhidden, dweight, dbias;
  bool sum_coef; // dbias is exactly 0 where the loss does not see a shift of all scores

  Needs(AutogradContext* ctx, const Facts& facts)
      : dhidden(ctx->needs_input_grad(0)), dweight(ctx->needs_input_grad(1)),
        dbias(facts.has_bias && ctx->needs_input_grad(2)),
        sum_coef(dbias && !facts.shift_invariant) {}
};

variable_list answer(const Facts& facts, const Needs& needs, const Gradients& grads) {
  auto& [dh, dw, db] = grads;
  Tensor dbias;
  if (needs.sum_coef)
    dbias = db.to(facts.bias_dtype).view_symint(facts.bias_shape);
  else if (needs.dbias)
    dbias = at::zeros_symint(facts.bias_shape, db.options().dtype(facts.bias_dtype));
  return {needs.dhidden ? dh : Tensor(), needs.dweight ? dw : Tensor(), dbias, Tensor()};
}

variable_list gradients(
    AutogradContext* ctx, const Tensor& grad, const Tensor& coef, const OptTensor& offsets,
    const Tensor& weight, const OptTensor& rows, const OptTensor& hidden,
    const OptTensor& dweight) {
  refuse_second_order();
  Facts facts = facts_of(ctx);
  Needs needs(ctx, facts);
  return answer(facts, needs, head_bwd().call(
      grad, coef, offsets, weight, rows, hidden, needs.dweight ? dweight : OptTensor(),
      facts.shape, facts.dtype, needs.dhidden, needs.dweight, needs.sum_coef));
}

// The same for E heads: coef is (M, E).
variable_list gradients_of_heads(
    AutogradContext* ctx, const Tensor& coef, const Tensor& weight, const OptTensor& rows,
    const OptTensor& hidden) {
  refuse_second_order();
  Facts facts = facts_of(ctx);
  Needs needs(ctx, facts);
  return answer(facts, needs, heads_bwd().call(
      coef, weight, rows, hidden, facts.shape, facts.dtype, needs.dhidden, needs.dweight,
      needs.sum_coef));
}

// A gradient () or, with offsets, (N,), times the coefficients (M,) or (M, E).
Tensor scaled(const Tensor& grad, const Tensor& coef, const Tensor& offsets) {
  if (!offsets.defined()) return grad.mul(coef);
  Tensor each = at::repeat_interleave_symint(
      grad, offsets.to(at::kLong).diff(), 0, coef.sym_size(0));
  return coef.dim() == 2 ? each.unsqueeze(1).mul(coef) : each.mul(coef);
}

struct Score : torch::autograd::Function<Score> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& hidden, const Tensor& weight, const OptTensor& bias,
      const OptTensor* rows) {
    ctx->save_for_backward(
        {weight.requires_grad() ? hidden : Tensor(), weight, rows->value_or(Tensor())});
    keep_facts(ctx, hidden, bias, false);
    return score_fwd().call(hidden, weight, bias, *rows);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    if (grads[0].dim() == 2)
      return gradients_of_heads(ctx, grads[0], saved[1], optional(saved[2]), optional(saved[0]));
    return gradients(
        ctx, at::ones({}, grads[0].options()), grads[0], {}, saved[1], optional(saved[2]),
        optional(saved[0]), {});
  }
};

struct Groups {
  const Tensor &offsets, &target;
  const OptTensor &rows, &margin, &group_weight, &num_items;
  double temperature, label_smoothing, center_coef;
  std::string_view reduction;
  Tensor* scores; // where a differentiable loss leaves them

  Forward run(
      const Tensor& hidden, const Tensor& weight, const OptTensor& bias, bool needs_coef,
      bool needs_dweight) const {
    return listwise_fwd().call(
        hidden, weight, bias, offsets, target, rows, margin, group_weight, num_items, temperature,
        label_smoothing, center_coef, reduction, needs_coef, needs_dweight);
  }
};

// The scores, which have no gradient, are handed out beside the node: compiled autograd takes none
// with an output marked as not differentiable.
struct ListwiseLoss : torch::autograd::Function<ListwiseLoss> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& hidden, const Tensor& weight, const OptTensor& bias,
      const Groups& groups) {
    bool none = groups.reduction == "none";
    bool needs_dweight = weight.requires_grad();
    auto [loss, scores, coef, dweight] = groups.run(hidden, weight, bias, true, needs_dweight);
    // Per-group gradients come after forward, and several heads have no one pass: dweight then
    // needs hidden once more.
    bool again = none || coef.dim() == 2;
    ctx->save_for_backward(
        {coef, weight, groups.rows.value_or(Tensor()), none ? groups.offsets : Tensor(),
         again ? Tensor() : dweight, again && needs_dweight ? hidden : Tensor()});
    keep_facts(ctx, hidden, bias, groups.center_coef == 0);
    *groups.scores = scores;
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    OptTensor rows = optional(saved[2]), hidden = optional(saved[5]);
    if (saved[0].dim() == 2)
      return gradients_of_heads(ctx, scaled(grads[0], saved[0], saved[3]), saved[1], rows, hidden);
    return gradients(
        ctx, grads[0], saved[0], optional(saved[3]), saved[1], rows, hidden, optional(saved[4]));
  }
};

struct Ranks {
  const RankingFwd& fwd;
  const Tensor &offsets, &ranks;
  const OptTensor &extra, &group_weight, &num_items;
  double temperature, center_coef;
  std::string_view reduction;

  std::tuple<Tensor, Tensor> run(const Tensor& scores, bool needs_coef) const {
    return fwd.call(
        scores, offsets, ranks, extra, group_weight, num_items, temperature, center_coef,
        reduction, needs_coef);
  }
};

// Any loss of scores alone whose forward knows its coefficients.
struct RankingLoss : torch::autograd::Function<RankingLoss> {
  static Tensor forward(AutogradContext* ctx, const Tensor& scores, const Ranks& ranks) {
    auto [loss, coef] = ranks.run(scores, true);
    ctx->save_for_backward({coef, ranks.reduction == "none" ? ranks.offsets : Tensor()});
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_second_order();
    auto saved = ctx->get_saved_variables();
    return {scaled(grads[0], saved[0], saved[1]), Tensor()};
  }
};

// In forward mode too, which no_grad does not end: the node refuses it.
bool differentiable(const Tensor& t) {
  return (at::GradMode::is_enabled() && t.requires_grad()) || t._fw_grad(0).defined();
}

bool wants_grad(const Tensor& hidden, const Tensor& weight, const OptTensor& bias) {
  return differentiable(hidden) || differentiable(weight) || (bias && differentiable(*bias));
}

Tensor score(
    const Tensor& hidden, const Tensor& weight, const OptTensor& bias, const OptTensor& rows) {
  return wants_grad(hidden, weight, bias) ? Score::apply(hidden, weight, bias, &rows)
                                          : score_fwd().call(hidden, weight, bias, rows);
}

std::tuple<Tensor, Tensor> listwise_loss(
    const Tensor& hidden, const Tensor& weight, const OptTensor& bias, const Tensor& offsets,
    const Tensor& target, const OptTensor& rows, const OptTensor& margin,
    const OptTensor& group_weight, const OptTensor& num_items, double temperature,
    double label_smoothing, double center_coef, std::string_view reduction) {
  Tensor scores;
  Groups groups{offsets, target, rows, margin, group_weight, num_items,
                temperature, label_smoothing, center_coef, reduction, &scores};
  if (wants_grad(hidden, weight, bias)) {
    Tensor loss = ListwiseLoss::apply(hidden, weight, bias, groups);
    return {loss, scores};
  }
  auto [loss, found, coef, dweight] = groups.run(hidden, weight, bias, false, false);
  return {loss, found};
}

Tensor ranking_loss(const Tensor& scores, const Ranks& ranks) {
  return differentiable(scores)
      ? RankingLoss::apply(scores, ranks)
      : std::get<0>(ranks.run(scores, false));
}

Tensor plackett_luce(
    const Tensor& scores, const Tensor& offsets, const Tensor& ranks, const OptTensor& extra,
    const OptTensor& group_weight, const OptTensor& num_items, double temperature,
    double center_coef, std::string_view reduction) {
  static const auto fwd = operator_named<RankingSignature>("fastrm_cpp::plackett_luce_fwd");
  return ranking_loss(
      scores, {fwd, offsets, ranks, extra, group_weight, num_items, temperature, center_coef,
               reduction});
}

Tensor bradley_terry(
    const Tensor& scores, const Tensor& offsets, const Tensor& ranks, const OptTensor& extra,
    const OptTensor& group_weight, const OptTensor& num_items, double temperature,
    double center_coef, std::string_view reduction) {
  static const auto fwd = operator_named<RankingSignature>("fastrm_cpp::bradley_terry_fwd");
  return ranking_loss(
      scores, {fwd, offsets, ranks, extra, group_weight, num_items, temperature, center_coef,
               reduction});
}

} // namespace
} // namespace fastrm

TORCH_LIBRARY_FRAGMENT(fastrm_cpp, m) {
  m.def(
      "score(Tensor hidden, Tensor weight, Tensor? bias=None, Tensor? rows=None) -> Tensor",
      &fastrm::score);
  m.def(
      "listwise_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor offsets, Tensor target, "
      "Tensor? rows=None, Tensor? margin=None, Tensor? group_weight=None, Tensor? num_items=None, "
      "float temperature=1.0, float label_smoothing=0.0, float center_coef=0.0, "
      "str reduction='mean') -> (Tensor loss, Tensor scores)",
      &fastrm::listwise_loss);
  const char* ranking =
      "(Tensor scores, Tensor offsets, Tensor ranks, Tensor? extra=None, "
      "Tensor? group_weight=None, Tensor? num_items=None, float temperature=1.0, "
      "float center_coef=0.0, str reduction='mean') -> Tensor";
  m.def((std::string("plackett_luce") + ranking).c_str(), &fastrm::plackett_luce);
  m.def((std::string("bradley_terry") + ranking).c_str(), &fastrm::bradley_terry);
}
