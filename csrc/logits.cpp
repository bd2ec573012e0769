// The loss and the diversity seeds for CUDA tensors: operands, outputs, registration.
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

using LossOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

LossOutputs distillation_loss(
    Tensor teacher_logits, Tensor branch_logits, Tensor labels, double temperature, double alpha, bool mean_target,
    double label_smoothing, bool standardize, std::vector<double> weights) {
  const Operands operands{"distillation_loss", branch_logits};
  const ScalarType type = branch_logits.scalar_type();
  operands.check_floating("branch_logits", branch_logits, "[K, B, C]");
  const int64_t M = teacher_logits.size(0), K = branch_logits.size(0), B = branch_logits.size(1),
                C = branch_logits.size(2);
  operands.check("teacher_logits", teacher_logits, type, {ANY, B, C});
  operands.check_floating("teacher_logits", teacher_logits, "[M, B, C]");
  const bool soft = labels.scalar_type() == arithmetic(type);
  operands.check("labels", labels, soft ? arithmetic(type) : ScalarType::Long, soft ? Sizes{B, C} : Sizes{B});
  const std::string most = std::to_string(MAX_MEAN_TEACHERS);
  if (mean_target && M > MAX_MEAN_TEACHERS)
    operands.refuse("teacher_logits", text_of(teacher_logits), "a mean of at most " + most + " teachers");
  const int64_t weighted = int64_t(weights.size());
  if (weighted > MAX_MEAN_TEACHERS || (weighted > 0 && weighted != (mean_target ? M : K)))
    operands.refuse("weights", std::to_string(weighted) + " numbers",
                    (mean_target ? "one for each teacher" : "one for each branch") + (", at most " + most));
  operands.check_device("branch_logits");

  const Tensor teacher = packed_copy(teacher_logits), branch = packed_copy(branch_logits), y = packed_copy(labels);
  const Tensor loss = new_scalar(branch, 2 * K * B), kd = new_scalar(branch), ce = new_scalar(branch);
  const Tensor gradient = new_tensor(branch, {K, B, C}, branch.scalar_type());
  const Launches launch(branch);
  dispatch(type, [&](auto of_type) {
    using T = typename decltype(of_type)::type;
    using A = typename Arithmetic<T>::type;
    A *const values = pointer<A>(loss), *const row_kd = values + 1, *const row_ce = row_kd + K * B;
    const auto launch_rows = [&](auto rows) {
      rows.teacher = pointer<T>(teacher);
      rows.branch = pointer<T>(branch);
      rows.labels = soft ? nullptr : pointer<int64_t>(y);
      rows.gradient = pointer<T>(gradient);
      rows.row_kd = row_kd;
      rows.row_ce = row_ce;
      rows.M = M, rows.K = K, rows.B = B, rows.C = int(C);
      rows.mean_target = mean_target, rows.temperature = A(temperature), rows.alpha = A(alpha);
      launch(rows);
    };
    if (soft || label_smoothing != 0 || standardize || weighted > 0) {
      LossRows<T, true> rows{};
      rows.options.probabilities = soft ? pointer<A>(y) : nullptr;
      rows.options.smoothing = A(label_smoothing);
      rows.options.standardize = standardize;
      rows.options.weighted = int(weighted);
      for (int64_t i = 0; i < weighted; ++i) rows.options.weights[i] = A(weights[i]);
      launch_rows(rows);
    } else {
      launch_rows(LossRows<T>{});
    }
    launch(LossScalars<A>{
        {}, row_kd, row_ce, values, pointer<A>(kd), pointer<A>(ce), K * B, A(temperature), A(alpha)});
  });
  return {loss, kd, ce, gradient};
}

}  // namespace
}  // namespace fed

STABLE_TORCH_LIBRARY_IMPL(fastensdistill, FED_KEY, library) {
  library.impl("teacher_diversity_seed", TORCH_BOX(&fed::teacher_diversity_seed));
  library.impl("diversity_seed", TORCH_BOX(&fed::diversity_seed));
  library.impl("ods_seed", TORCH_BOX(&fed::ods_seed));
  library.impl("distillation_loss", TORCH_BOX(&fed::distillation_loss));
}
