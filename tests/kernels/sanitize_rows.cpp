// The loss, the seeds and the perturbation step by their CUDA kernels, against plain loops in float64.
#include <algorithm>

#include "distillation_loss.h"
#include "perturb_step.h"
#include "sanitize_driver.h"

namespace sanitize {
namespace {

using namespace fed;
using Row = std::vector<double>;

template <class T>
Row row_of(const std::vector<T>& values, int64_t row, int C, double scale = 1) {
  Row result(C);
  for (int c = 0; c < C; ++c) result[c] = widen(values[row * C + c]) * scale;
  return result;
}

Row log_softmax(Row z) {
  double largest = -INFINITY, sum = 0;
  for (double value : z) largest = std::max(largest, value);
  for (double value : z) sum += std::exp(value - largest);
  for (double& value : z) value -= largest + std::log(sum);
  return z;
}

Row softmax(Row z) {
  z = log_softmax(std::move(z));
  for (double& value : z) value = std::exp(value);
  return z;
}

// Value and gradient of a pair of members of `logits`, rows a and b of each of B images.
template <class T>
double pair_value(const std::vector<T>& logits, int64_t a, int64_t b, int64_t B, int C, double sign, Row& gradient) {
  double value = 0;
  for (int64_t image = 0; image < B; ++image) {
    const Row log_a = log_softmax(row_of(logits, a * B + image, C)), p_b = softmax(row_of(logits, b * B + image, C));
    for (int c = 0; c < C; ++c) {
      value -= p_b[c] * log_a[c] / double(B);
      gradient[image * C + c] = sign * (std::exp(log_a[c]) - p_b[c]) / double(B);
    }
  }
  return value;
}

template <class T>
void loss_case(Line& line, int64_t M, int64_t K, int64_t B, int C, bool mean, bool with_pair) {
  using A = typename Arithmetic<T>::type;
  const double temperature = 2, alpha = 0.75;
  Numbers numbers(C + 2 * mean);
  const auto teacher = numbers.list<T>(M * B * C, 4), branch = numbers.list<T>(K * B * C, 4);
  std::vector<int64_t> labels(B);
  for (int64_t b = 0; b < B; ++b) labels[b] = (7 * b + 3) % C;
  const std::vector<int64_t> pair{1, 0};

  const Buffer<T> d_teacher(teacher), d_branch(branch), gradient(K * B * C), grad_a(B * C), grad_b(B * C);
  const Buffer<int64_t> d_labels(labels), d_pair(pair);
  const Buffer<A> rows(2 * K * B), row_tdiv(B), row_sdiv(B), scalars(3), diversities(2);
  LossRows<T> loss{{}, d_teacher, d_branch, d_labels, gradient, rows, rows + K * B, M, K, B, C, mean, A(temperature),
                   A(alpha), nullptr, nullptr, nullptr, nullptr, nullptr};
  LossScalars<A> finish{{}, rows, rows + K * B, scalars, scalars + 1, scalars + 2, K * B, A(temperature), A(alpha), {}};
  if (with_pair) {
    loss.pair = d_pair;
    loss.grad_teacher_a = grad_a;
    loss.grad_branch_a = grad_b;
    loss.row_tdiv = row_tdiv;
    loss.row_sdiv = row_sdiv;
    finish.diversity = {{}, {row_tdiv, row_sdiv}, {diversities, diversities + 1}, B};
  }
  if (!line.ran(launch(loss, nullptr)) || !line.ran(launch(finish, nullptr))) return;

  Row expected(K * B * C);
  double kd = 0, ce = 0;
  for (int64_t k = 0; k < K; ++k)
    for (int64_t b = 0; b < B; ++b) {
      Row target(C);
      for (int64_t m = mean ? 0 : k % M; m < (mean ? M : k % M + 1); ++m) {
        const Row p = softmax(row_of(teacher, m * B + b, C, 1 / temperature));
        for (int c = 0; c < C; ++c) target[c] += p[c] / double(mean ? M : 1);
      }
      const Row soft = log_softmax(row_of(branch, k * B + b, C, 1 / temperature));
      const Row hard = log_softmax(row_of(branch, k * B + b, C));
      ce -= hard[labels[b]] / double(K * B);
      for (int c = 0; c < C; ++c) {
        kd -= target[c] * soft[c] * temperature * temperature / double(K * B);
        expected[(k * B + b) * C + c] = (alpha * temperature * (std::exp(soft[c]) - target[c]) +
                                         (1 - alpha) * (std::exp(hard[c]) - (c == labels[b]))) / double(K * B);
      }
    }
  line.compare("gradient", gradient.read(), expected);
  line.compare("loss", scalars.read(), {(1 - alpha) * ce + alpha * kd, kd, ce});
  if (!with_pair) return;
  Row of_teacher(B * C), of_branch(B * C);
  const double tdiv = pair_value(teacher, 1, 0, B, C, 1, of_teacher);
  const double sdiv = pair_value(branch, 1, 0, B, C, -1, of_branch);
  line.compare("diversities", diversities.read(), {tdiv, sdiv});
  line.compare("grad_teacher_a", grad_a.read(), of_teacher);
  line.compare("grad_branch_a", grad_b.read(), of_branch);
}

template <class T>
void pairs_case(Line& line, int64_t B, int C, bool with_branch) {
  using A = typename Arithmetic<T>::type;
  Numbers numbers(C);
  const auto teacher = numbers.list<T>(2 * B * C, 4), branch = numbers.list<T>(2 * B * C, 4);
  const Buffer<T> d_teacher(teacher), d_branch(branch), grad_a(B * C), grad_b(B * C);
  const Buffer<A> rows_a(B), rows_b(B), value_a(1), value_b(1);
  PairRows<T> pairs{{}, {d_teacher, d_teacher + B * C, grad_a, rows_a, B, C, A(1)}, {}};
  Means<A> means{{}, {rows_a, nullptr}, {value_a, nullptr}, B};
  if (with_branch) {
    pairs.branch = {d_branch, d_branch + B * C, grad_b, rows_b, B, C, A(-1)};
    means.rows[1] = rows_b;
    means.mean[1] = value_b;
  }
  if (!line.ran(launch(pairs, nullptr)) || !line.ran(launch(means, nullptr))) return;
  Row gradient(B * C);
  line.compare("tdiv", value_a.read(), {pair_value(teacher, 0, 1, B, C, 1, gradient)});
  line.compare("grad_teacher_a", grad_a.read(), gradient);
  if (!with_branch) return;
  line.compare("sdiv", value_b.read(), {pair_value(branch, 0, 1, B, C, -1, gradient)});
  line.compare("grad_branch_a", grad_b.read(), gradient);
}

template <class T>
void ods_case(Line& line, int64_t B, int C) {
  using A = typename Arithmetic<T>::type;
  const double temperature = 2;
  Numbers numbers(C);
  const auto logits = numbers.list<T>(B * C, 4), weights = numbers.list<T>(B * C);
  const Buffer<T> z(logits), w(weights), gradient(B * C);
  const Buffer<A> confidence(B);
  const OdsRows<T> rows{{}, z, w, gradient, confidence, B, C, A(temperature)};
  if (!line.ran(launch(rows, nullptr))) return;
  Row expected(B * C), largest(B);
  for (int64_t b = 0; b < B; ++b) {
    const Row p = softmax(row_of(logits, b, C, 1 / temperature)), own = row_of(weights, b, C);
    double mean = 0;
    for (int c = 0; c < C; ++c) mean += own[c] * p[c];
    for (int c = 0; c < C; ++c) expected[b * C + c] = p[c] * (own[c] - mean) / temperature;
    largest[b] = *std::max_element(p.begin(), p.end());
  }
  line.compare("gradient", gradient.read(), expected);
  line.compare("confidence", confidence.read(), largest);
}

template <class T, class G>
void step_case(Line& line, int64_t groups, int64_t B, int64_t D, bool confident) {
  using A = typename Arithmetic<T>::type;
  const double step = 0.5, low = 0.1, high = 0.9;
  Numbers numbers(D);
  auto images = numbers.list<T>(B * D, 0.5, 0.5);
  auto gradients = numbers.list<G>(groups * B * D, 1e-2);
  const auto confidence = numbers.list<A>(B, 0.5, 0.5);
  for (int64_t g = 0; g < groups; ++g)  // the second image has no direction to move in
    for (int64_t d = 0; d < D && B > 1; ++d) gradients[(g * B + 1) * D + d] = G{};
  const Buffer<T> x(images), out(B * D);
  const Buffer<G> g(gradients);
  const Buffer<A> c(confidence);
  const Step<T, G> kernel{x, g, confident ? static_cast<A*>(c) : nullptr, out, groups, B, D, B * D, D, A(step), A(low),
                          A(high)};
  if (!line.ran(launch(kernel, nullptr))) return;
  Row expected(B * D);
  for (int64_t b = 0; b < B; ++b) {
    Row sum(D);
    double square = 0;
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t n = 0; n < groups; ++n) sum[d] += widen(gradients[(n * B + b) * D + d]);
      square += sum[d] * sum[d];
    }
    for (int64_t d = 0; d < D; ++d) {
      const double value = widen(images[b * D + d]);
      const double moved = value + step * (confident ? widen(confidence[b]) : 1) * sum[d] / std::sqrt(square);
      expected[b * D + d] = square == 0 ? value : std::min(std::max(moved, low), high);
    }
  }
  line.compare("images", out.read(), expected);
}

template <class T>
bool rows_of() {
  const std::string of = std::string("<") + name_of<T>() + ">";
  Line loss("LossRows" + of), pairs("PairRows" + of), ods("OdsRows" + of);
  for (bool second : {false, true}) {
    poisoned = second;
    for (int C : {7, 301})  // more classes than threads
      for (bool flag : {false, true}) {
        loss_case<T>(loss, 3, 2, 3, C, flag, true);
        loss_case<T>(loss, 2, 3, 2, C, flag, false);
        pairs_case<T>(pairs, 3, C, flag);
        ods_case<T>(ods, flag ? 1 : 3, C);
      }
  }
  const bool good[] = {loss.end(), pairs.end(), ods.end()};
  return good[0] && good[1] && good[2];
}

template <class T, class G>
bool step_of() {
  Line line(std::string("Step<") + name_of<T>() + ", " + name_of<G>() + ">");
  for (bool second : {false, true}) {
    poisoned = second;
    step_case<T, G>(line, 1, 3, 37, false);
    step_case<T, G>(line, 3, 2, 1025, true);  // more values than threads
  }
  return line.end();
}

}  // namespace

bool rows() {
  const bool good[] = {rows_of<float>(), rows_of<double>(), rows_of<bf16>(), rows_of<half>()};
  return std::all_of(good, good + 4, [](bool one) { return one; });
}

bool steps() {
  const bool good[] = {
      step_of<double, double>(), step_of<float, float>(), step_of<float, bf16>(), step_of<float, half>(),
      step_of<bf16, float>(),    step_of<bf16, bf16>(),   step_of<bf16, half>(),  step_of<half, float>(),
      step_of<half, bf16>(),     step_of<half, half>()};
  return std::all_of(good, good + 10, [](bool one) { return one; });
}

}  // namespace sanitize
