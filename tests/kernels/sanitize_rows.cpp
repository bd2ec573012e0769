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

// z̃: of mean 0 and standard deviation 1, Bessel's.
Row standardized(Row z) {
  double mean = 0, square = 0;
  for (double value : z) mean += value / double(z.size());
  for (double value : z) square += (value - mean) * (value - mean) / double(z.size() - 1);
  for (double& value : z) value = (value - mean) / (std::sqrt(square) + 1e-7);
  return z;
}

// The paper's loss; or, with `options`, that of labels as probabilities, smoothed, standardised logits and weights.
template <class T>
void loss_case(Line& line, int64_t M, int64_t K, int64_t B, int C, bool mean, bool options) {
  using A = typename Arithmetic<T>::type;
  const double temperature = 2, alpha = 0.75, smoothing = options ? 0.1 : 0;
  Numbers numbers(C + 2 * mean);
  const auto teacher = numbers.list<T>(M * B * C, 4), branch = numbers.list<T>(K * B * C, 4);
  const auto probabilities = numbers.list<A>(B * C, 0.01, 0.02);
  std::vector<int64_t> labels(B);
  for (int64_t b = 0; b < B; ++b) labels[b] = (7 * b + 3) % C;

  const Buffer<T> d_teacher(teacher), d_branch(branch), gradient(K * B * C);
  const Buffer<int64_t> d_labels(labels);
  const Buffer<A> d_probabilities(probabilities), rows(2 * K * B), scalars(3);
  const auto ran = [&](auto loss) {
    loss.teacher = d_teacher, loss.branch = d_branch, loss.labels = options ? nullptr : d_labels.operator int64_t*();
    loss.gradient = gradient, loss.row_kd = rows, loss.row_ce = rows + K * B;
    loss.M = M, loss.K = K, loss.B = B, loss.C = C, loss.mean_target = mean;
    loss.temperature = A(temperature), loss.alpha = A(alpha);
    return line.ran(launch(loss, nullptr));
  };
  std::vector<double> weights(mean ? M : K, mean ? 1 / double(M) : 1);
  LossRows<T, true> with_options{};
  if (options) {
    for (size_t i = 0; i < weights.size(); ++i) weights[i] *= i == 0 ? 0.5 : 1 + 0.5 / double(weights.size() - 1);
    with_options.options.probabilities = d_probabilities;
    with_options.options.smoothing = A(smoothing);
    with_options.options.standardize = true;
    with_options.options.weighted = int(weights.size());
    for (size_t i = 0; i < weights.size(); ++i) with_options.options.weights[i] = A(weights[i]);
  }
  if (!(options ? ran(with_options) : ran(LossRows<T>{}))) return;
  LossScalars<A> finish{{}, rows, rows + K * B, scalars, scalars + 1, scalars + 2, K * B, A(temperature), A(alpha)};
  if (!line.ran(launch(finish, nullptr))) return;

  const auto scaled = [&](const auto& logits, int64_t row) {
    Row z = row_of(logits, row, C);
    if (options) z = standardized(z);
    for (double& value : z) value /= temperature;
    return z;
  };
  Row expected(K * B * C);
  double kd = 0, ce = 0;
  for (int64_t k = 0; k < K; ++k)
    for (int64_t b = 0; b < B; ++b) {
      Row target(C);
      for (int64_t m = mean ? 0 : k % M; m < (mean ? M : k % M + 1); ++m) {
        const Row p = softmax(scaled(teacher, m * B + b));
        for (int c = 0; c < C; ++c) target[c] += p[c] * (mean ? weights[m] : 1);
      }
      double total = 0;
      const Row z = row_of(branch, k * B + b, C), moved = scaled(branch, k * B + b);
      const Row soft = log_softmax(moved), hard = log_softmax(z);
      Row label(C), back(C);
      for (int c = 0; c < C; ++c) {
        const double own = options ? double(probabilities[b * C + c]) : c == labels[b];
        label[c] = (1 - smoothing) * own + smoothing / C;
        total += label[c];
      }
      const double weight = mean ? 1 : weights[k];
      double inner = 0, square = 0, middle = 0;
      for (int c = 0; c < C; ++c) {
        ce -= label[c] * hard[c] / double(K * B);
        kd -= weight * target[c] * soft[c] * temperature * temperature / double(K * B);
        back[c] = alpha * temperature * weight * (std::exp(soft[c]) - target[c]);
        inner += back[c] * moved[c] * temperature;
        middle += z[c] / C;
      }
      for (int c = 0; c < C; ++c) square += (z[c] - middle) * (z[c] - middle) / (C - 1);
      const double sigma = std::sqrt(square), spread = sigma + 1e-7;
      for (int c = 0; c < C; ++c) {
        const double pulled = back[c] - moved[c] * temperature * inner * spread / (sigma * (C - 1));
        expected[(k * B + b) * C + c] =
            ((options ? pulled / spread : back[c]) + (1 - alpha) * (std::exp(hard[c]) * total - label[c])) /
            double(K * B);
      }
    }
  line.compare("gradient", gradient.read(), expected);
  line.compare("loss", scalars.read(), {(1 - alpha) * ce + alpha * kd, kd, ce});
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
