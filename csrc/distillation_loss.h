// Distillation loss with its gradient; equations in fastensdistill/kernels/distillation_loss.py.
// One block per row (k, b); the combined op adds one block per image and pair of members.
#pragma once

#include "diversity_seed.h"

namespace fed {

constexpr int MAX_MEAN_TEACHERS = 256;  // softmaxes that a block keeps for the mean target

// ∂L/∂z of one logit: soft is the distillation term's factor α·τ/(K·B), hard the cross-entropy's (1 − α)/(K·B).
template <class A>
FED_HD A logit_gradient(A q_soft, A target, A q_hard, bool is_label, A soft, A hard) {
  return (q_soft - target) * soft + (q_hard - (is_label ? A(1) : A(0))) * hard;
}

// K·B blocks of rows; with a pair, B of the teachers' and B of the branches' too.
template <class T>
struct LossRows : RowKernel<T> {
  using A = typename Arithmetic<T>::type;
  struct Scratch {
    A values[RowKernel<T>::THREADS / 32], largest[MAX_MEAN_TEACHERS], factor[MAX_MEAN_TEACHERS];
  };
  const T* teacher;  // [M, B, C]
  const T* branch;  // [K, B, C]
  const int64_t* labels;  // [B]
  T* gradient;  // [K, B, C]
  A* row_kd;  // [K·B]
  A* row_ce;  // [K·B]
  int64_t M, K, B;
  int C;
  bool mean_target;
  A temperature, alpha;
  const int64_t* pair;  // [2] on the device, or nullptr
  T* grad_teacher_a;  // [B, C]
  T* grad_branch_a;  // [B, C]
  A* row_tdiv;  // [B]
  A* row_sdiv;  // [B]

  unsigned grid() const { return unsigned(K * B + (pair != nullptr ? 2 * B : 0)); }

  template <class Block>
  FED_HD void run(Block& block, Scratch& scratch) const {
    const int64_t rest = block.index - K * B;
    if (rest < 0)
      row(block, scratch);
    else if (rest < B)
      seed(block, scratch, rest, teacher, grad_teacher_a, row_tdiv, A(1));
    else
      seed(block, scratch, rest - B, branch, grad_branch_a, row_sdiv, A(-1));
  }

  template <class Block>
  FED_HD void row(Block& block, Scratch& scratch) const {
    const int64_t row = block.index, k = row / B, image = row % B;
    const T* z = branch + row * C;
    const A scale = A(1) / temperature;
    const Softmax<A> soft = row_softmax(block, scratch.values, z, C, scale);
    Softmax<A> hard{soft.largest, A(1), A(1)};
    hard.sum = over_classes(block, scratch.values, C, A(0), Sum(), [&](int c) { return hard.weight(widen(z[c])); });

    const int64_t first = mean_target ? 0 : k % M;
    const int teachers = mean_target ? int(M) : 1;
    const auto logits_of = [&](int m) { return teacher + ((first + m) * B + image) * C; };
    for (int m = 0; m < teachers; ++m) {
      const Softmax<A> p = row_softmax(block, scratch.values, logits_of(m), C, scale);
      block.phase([&](int thread) {
        if (thread == 0) {
          scratch.largest[m] = p.largest;
          scratch.factor[m] = A(1) / (p.sum * A(teachers));
        }
      });
    }

    const int64_t label = labels[image];
    const bool valid = label >= 0 && label < C;
    const A rows = A(K) * A(B), soft_factor = alpha * temperature / rows, hard_factor = (A(1) - alpha) / rows;
    const A invalid = valid || alpha == A(1) ? A(0) : A(NAN);
    const A kd = over_classes(block, scratch.values, C, A(0), Sum(), [&](int c) {
      A target = 0;
      for (int m = 0; m < teachers; ++m)
        target += exponential((A(widen(logits_of(m)[c])) - scratch.largest[m]) * scale) * scratch.factor[m];
      const A value = widen(z[c]);
      const A q_soft = soft.weight(value) / soft.sum, q_hard = hard.weight(value) / hard.sum;
      const A d = logit_gradient(q_soft, target, q_hard, c == label, soft_factor, hard_factor);
      gradient[row * C + c] = narrow<T>(d + invalid);
      return target * soft.distance(value);
    });
    block.each([&](int thread) {
      if (thread != 0) return;
      row_kd[row] = kd + logarithm(soft.sum);
      row_ce[row] = valid ? hard.distance(widen(z[label])) + logarithm(hard.sum) : A(NAN);
    });
  }

  template <class Block>
  FED_HD void seed(
      Block& block, Scratch& scratch, int64_t image, const T* logits, T* gradient, A* values, A sign) const {
    const int64_t a = pair[0], b = pair[1], limit = M < K ? M : K, size = B * C;
    if (a >= 0 && b >= 0 && a < limit && b < limit) {
      const Pair<T> members{logits + a * size, logits + b * size, gradient, values, B, C, sign};
      members.image(block, scratch.values, image);
      return;
    }
    block.each([&](int thread) {
      for (int c = thread; c < C; c += Block::threads) gradient[image * C + c] = narrow<T>(A(NAN));
      if (thread == 0) values[image] = A(NAN);
    });
  }
};

// The scalars, in a fixed order: one block.
template <class A>
struct LossScalars : RowKernel<A> {
  static constexpr int BLOCKS = 8;
  const A* row_kd;
  const A* row_ce;
  A *loss, *kd, *ce;
  int64_t rows;
  A temperature, alpha;
  Means<A> diversity;

  unsigned grid() const { return 1; }

  template <class Block, class Scratch>
  FED_HD void run(Block& block, Scratch& scratch) const {
    const A sum_kd = Means<A>::total(block, scratch.values, row_kd, rows);
    const A mean_kd = sum_kd * (temperature * temperature / A(rows));
    const A mean_ce = Means<A>::total(block, scratch.values, row_ce, rows) / A(rows);
    block.each([&](int thread) {
      if (thread != 0) return;
      // With α = 1 labels have no say, not even by a NaN.
      *loss = alpha == A(1) ? mean_kd : (A(1) - alpha) * mean_ce + alpha * mean_kd;
      *kd = mean_kd;
      *ce = mean_ce;
    });
    diversity.run(block, scratch);
  }
};

#define FED_LOSS_KERNELS(X)                                                                                \
  X(fed::LossRows<float>) X(fed::LossRows<double>) X(fed::LossRows<fed::bf16>) X(fed::LossRows<fed::half>) \
  X(fed::LossScalars<float>) X(fed::LossScalars<double>)

}  // namespace fed
