// The loss, the diversity seeds and both together for CUDA tensors: operands, outputs, registration.
#include "distillation_loss.h"
#include "operands.h"

namespace fed {
namespace {

// Value (a scalar with B row values behind it) and gradient of a pair's members in logits [.., B, C].
struct PairOutput {
  Tensor value, gradient;

  explicit PairOutput(const Tensor& logits)
      : value(new_scalar(logits, logits.size(1))),
        gradient(new_tensor(logits, {logits.size(1), logits.size(2)}, logits.scalar_type())) {}

  template <class T>
  Pair<T> of(const Tensor& pair, int sign) const {
    using A = typename Arithmetic<T>::type;
    const T* a = pointer<T>(pair);
    const int64_t B = pair.size(1), C = pair.size(2);
    return {a, a + B * C, pointer<T>(gradient), pointer<A>(value) + 1, B, int(C), A(sign)};
  }
};

void check_pair(const Operands& operands, const char* name, const Tensor& pair) {
  operands.check_floating(name, pair, "[2, B, C]");
  const ScalarType type = operands.first.scalar_type();
  operands.check(name, pair, type, {2, operands.first.size(1), operands.first.size(2)});
}

std::tuple<Tensor, Tensor> teacher_diversity_seed(Tensor teacher_pair) {
  const Operands operands{"teacher_diversity_seed", teacher_pair};
  check_pair(operands, "teacher_pair", teacher_pair);
  operands.check_device("teacher_pair");
  const Tensor teacher = packed_copy(teacher_pair);
  const PairOutput out(teacher);
  const Launches launch(teacher);
  dispatch(teacher.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = typename Arithmetic<T>::type;
    const PairRows<T> rows{{}, out.of<T>(teacher, 1), {}};
    launch(rows);
    launch(Means<A>{{}, {rows.teacher.row_values}, {pointer<A>(out.value)}, rows.teacher.B});
  });
  return {out.value, out.gradient};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> diversity_seed(Tensor teacher_pair, Tensor branch_pair) {
  const Operands operands{"diversity_seed", teacher_pair};
  check_pair(operands, "teacher_pair", teacher_pair);
  check_pair(operands, "branch_pair", branch_pair);
  operands.check_device("teacher_pair");
  const Tensor teacher = packed_copy(teacher_pair), branch = packed_copy(branch_pair);
  const PairOutput t(teacher), s(branch);
  const Launches launch(teacher);
  dispatch(teacher.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = typename Arithmetic<T>::type;
    const PairRows<T> rows{{}, t.of<T>(teacher, 1), s.of<T>(branch, -1)};
    launch(rows);
    launch(Means<A>{{}, {rows.teacher.row_values, rows.branch.row_values}, {pointer<A>(t.value), pointer<A>(s.value)},
                    rows.teacher.B});
  });
  return {t.value, s.value, t.gradient, s.gradient};
}

std::tuple<Tensor, Tensor> ods_seed(Tensor logits, Tensor weights, double temperature) {
  const Operands operands{"ods_seed", logits};
  operands.check_floating("logits", logits, "[B, C]");
  operands.check("weights", weights, logits.scalar_type(), {logits.size(0), logits.size(1)});
  operands.check_device("logits");
  const Tensor z = packed_copy(logits), w = packed_copy(weights);
  const int64_t B = z.size(0), C = z.size(1);
  const Tensor gradient = new_tensor(z, {B, C}, z.scalar_type());
  const Tensor confidence = new_tensor(z, {B}, arithmetic(z.scalar_type()));
  const Launches launch(z);
  dispatch(z.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = typename Arithmetic<T>::type;
    launch(OdsRows<T>{{}, pointer<T>(z), pointer<T>(w), pointer<T>(gradient), pointer<A>(confidence), B, int(C),
                      A(temperature)});
  });
  return {gradient, confidence};
}

// What both ops of the loss take; `pair` is null for the loss alone.
struct LossInputs {
  Tensor teacher, branch, labels;
  const Tensor* pair;
  double temperature, alpha;
  bool mean_target;

  void check(const char* op) const {
    const Operands operands{op, branch};
    const ScalarType type = branch.scalar_type();
    operands.check_floating("branch_logits", branch, "[K, B, C]");
    operands.check("teacher_logits", teacher, type, {ANY, branch.size(1), branch.size(2)});
    operands.check_floating("teacher_logits", teacher, "[M, B, C]");
    operands.check("labels", labels, ScalarType::Long, {branch.size(1)});
    if (pair != nullptr) operands.check("pair", *pair, ScalarType::Long, {2});
    if (mean_target && teacher.size(0) > MAX_MEAN_TEACHERS)
      operands.refuse("teacher_logits", text_of(teacher),
                      "a mean of at most " + std::to_string(MAX_MEAN_TEACHERS) + " teachers");
    operands.check_device("branch_logits");
  }
};

using LossOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// t and s: outputs of the teachers' and the branches' pair, where there is one.
LossOutputs run_loss(const LossInputs& in, const PairOutput* t, const PairOutput* s) {
  const Tensor teacher = packed_copy(in.teacher), branch = packed_copy(in.branch), labels = packed_copy(in.labels);
  const Optional pair = in.pair != nullptr ? Optional(packed_copy(*in.pair)) : std::nullopt;
  const int64_t M = teacher.size(0), K = branch.size(0), B = branch.size(1), C = branch.size(2);
  const Tensor loss = new_scalar(branch, 2 * K * B), kd = new_scalar(branch), ce = new_scalar(branch);
  const Tensor gradient = new_tensor(branch, {K, B, C}, branch.scalar_type());
  const Launches launch(branch);
  dispatch(branch.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = typename Arithmetic<T>::type;
    A* values = pointer<A>(loss);
    LossRows<T> rows{{}, pointer<T>(teacher), pointer<T>(branch), pointer<int64_t>(labels), pointer<T>(gradient),
                     values + 1, values + 1 + K * B, M, K, B, int(C), in.mean_target, A(in.temperature), A(in.alpha),
                     pointer<int64_t>(pair), nullptr, nullptr, nullptr, nullptr};
    LossScalars<A> scalars{{}, rows.row_kd, rows.row_ce, values, pointer<A>(kd), pointer<A>(ce), K * B,
                           rows.temperature, rows.alpha, {}};
    if (pair) {
      A *tdiv = pointer<A>(t->value), *sdiv = pointer<A>(s->value);
      rows.grad_teacher_a = pointer<T>(t->gradient);
      rows.grad_branch_a = pointer<T>(s->gradient);
      rows.row_tdiv = tdiv + 1;
      rows.row_sdiv = sdiv + 1;
      scalars.diversity = {{}, {rows.row_tdiv, rows.row_sdiv}, {tdiv, sdiv}, B};
    }
    launch(rows);
    launch(scalars);
  });
  return {loss, kd, ce, gradient};
}

LossOutputs distillation_loss(
    Tensor teacher_logits, Tensor branch_logits, Tensor labels, double temperature, double alpha, bool mean_target) {
  const LossInputs in{teacher_logits, branch_logits, labels, nullptr, temperature, alpha, mean_target};
  in.check("distillation_loss");
  return run_loss(in, nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> distill_and_diversify(
    Tensor teacher_logits, Tensor branch_logits, Tensor labels, Tensor pair, double temperature, double alpha,
    bool mean_target) {
  const LossInputs in{teacher_logits, branch_logits, labels, &pair, temperature, alpha, mean_target};
  in.check("distill_and_diversify");
  const PairOutput t(branch_logits), s(branch_logits);
  return std::tuple_cat(run_loss(in, &t, &s), std::make_tuple(t.value, s.value, t.gradient, s.gradient));
}

}  // namespace
}  // namespace fed

STABLE_TORCH_LIBRARY_IMPL(fastensdistill, FED_KEY, library) {
  library.impl("teacher_diversity_seed", TORCH_BOX(&fed::teacher_diversity_seed));
  library.impl("diversity_seed", TORCH_BOX(&fed::diversity_seed));
  library.impl("ods_seed", TORCH_BOX(&fed::ods_seed));
  library.impl("distillation_loss", TORCH_BOX(&fed::distillation_loss));
  library.impl("distill_and_diversify", TORCH_BOX(&fed::distill_and_diversify));
}
