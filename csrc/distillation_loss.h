// Distillation loss with its gradient; equations in fastensdistill/kernels/distillation_loss.py.
// One block per row (k, b).
#pragma once

#include <type_traits>

#include "diversity_seed.h"

namespace fed {

// Softmaxes that a block keeps for the mean target, and weights of teachers or branches that it is given.
constexpr int MAX_MEAN_TEACHERS = 256;

// ∂L/∂z of one logit: soft is the distillation term's factor α·τ/(K·B), hard the cross-entropy's (1 − α)/(K·B).
template <class A>
FED_HD A logit_gradient(A q_soft, A target, A q_hard, bool is_label, A soft, A hard) {
  return (q_soft - target) * soft + (q_hard - (is_label ? A(1) : A(0))) * hard;
}

// What the paper's loss does without. A kernel of its own has it, so that the paper's has nothing to pay.
template <class A>
struct LossOptions {
  const A* probabilities;  // [B, C], in the place of labels, or nullptr
  A smoothing;
  bool standardize;
  int weighted;  // how many weights there are
  A weights[MAX_MEAN_TEACHERS];  // a share of each teacher in the mean, or a factor of each branch's distillation term
};
struct NoOptions {};

// Of a row of logits: softmax of z̃/τ, as one of z at a temperature of its own, and what standardisation leaves.
template <class A>
struct Softened {
  Softmax<A> softmax;
  A mean, sigma, spread;  // of z − largest; σ + 1e-7
};

template <class T, bool OPTIONS>
struct LossScratch {
  using A = typename Arithmetic<T>::type;
  A values[RowKernel<T>::THREADS / 32], largest[MAX_MEAN_TEACHERS], factor[MAX_MEAN_TEACHERS];
};
template <class T>
struct LossScratch<T, true> : LossScratch<T, false> {
  typename Arithmetic<T>::type scale[MAX_MEAN_TEACHERS];
};

// K·B blocks.
template <class T, bool OPTIONS = false>
struct LossRows : RowKernel<T> {
  using A = typename Arithmetic<T>::type;
  using Scratch = LossScratch<T, OPTIONS>;
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
  std::conditional_t<OPTIONS, LossOptions<A>, NoOptions> options;

  unsigned grid() const { return unsigned(K * B); }

  template <class Block>
  FED_HD void run(Block& block, Scratch& scratch) const {
    const int64_t row = block.index, k = row / B, image = row % B;
    const T* z = branch + row * C;
    const Softened<A> softened = soften(block, scratch.values, z);
    const Softmax<A> soft = softened.softmax;
    Softmax<A> hard{soft.largest, A(1), A(1)};
    hard.sum = over_classes(block, scratch.values, C, A(0), Sum(), [&](int c) { return hard.weight(widen(z[c])); });

    const int64_t first = mean_target ? 0 : k % M;
    const int teachers = mean_target ? int(M) : 1;
    const auto logits_of = [&](int m) { return teacher + ((first + m) * B + image) * C; };
    for (int m = 0; m < teachers; ++m) {
      const Softmax<A> p = soften(block, scratch.values, logits_of(m)).softmax;
      block.phase([&](int thread) {
        if (thread == 0) {
          scratch.largest[m] = p.largest;
          scratch.factor[m] = A(1) / (p.sum * A(teachers));
          if constexpr (OPTIONS) {
            scratch.scale[m] = p.scale;
            if (mean_target && options.weighted > 0) scratch.factor[m] = options.weights[m] / p.sum;
          }
        }
      });
    }
    const auto target_of = [&](int c) {
      A target = 0;
      for (int m = 0; m < teachers; ++m) {
        A scale = soft.scale;
        if constexpr (OPTIONS) scale = scratch.scale[m];
        target += exponential((A(widen(logits_of(m)[c])) - scratch.largest[m]) * scale) * scratch.factor[m];
      }
      return target;
    };
    const A rows = A(K) * A(B), soft_factor = alpha * temperature / rows, hard_factor = (A(1) - alpha) / rows;
    if constexpr (OPTIONS) {
      const A weight = mean_target || options.weighted == 0 ? A(1) : options.weights[k];
      rest(block, scratch, row, image, softened, hard, target_of, soft_factor, hard_factor, weight);
    } else {
      const int64_t label = labels[image];
      const bool valid = label >= 0 && label < C;
      const A invalid = valid || alpha == A(1) ? A(0) : A(NAN);
      const A kd = over_classes(block, scratch.values, C, A(0), Sum(), [&](int c) {
        const A target = target_of(c), value = widen(z[c]);
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
  }

  template <class Block>
  FED_HD Softened<A> soften(Block& block, A* values, const T* z) const {
    Softened<A> found{{A(0), A(1), A(1) / temperature}, A(0), A(0), A(1)};
    if constexpr (OPTIONS) {
      if (options.standardize) {
        // About the largest logit, so that equal logits differ by exactly nothing
        const A largest = over_classes(block, values, C, -A(INFINITY), Max(), [&](int c) { return A(widen(z[c])); });
        const auto sum = [&](auto f) { return over_classes(block, values, C, A(0), Sum(), f); };
        const A mean = sum([&](int c) { return A(widen(z[c])) - largest; }) / A(C);
        const A square = sum([&](int c) {
          const A d = A(widen(z[c])) - largest - mean;
          return d * d;
        });
        found.mean = mean;
        found.sigma = square_root(square / A(C > 1 ? C - 1 : 1));
        found.spread = found.sigma + A(1e-7);
        found.softmax.scale = found.softmax.scale / found.spread;
      }
    }
    found.softmax = row_softmax(block, values, z, C, found.softmax.scale);
    return found;
  }

  // With options, what comes after the targets: the gradient, L_KD and L_CE of a row.
  template <class Block, class Target>
  FED_HD void rest(
      Block& block, Scratch& scratch, int64_t row, int64_t image, const Softened<A>& softened, const Softmax<A>& hard,
      Target target_of, A soft_factor, A hard_factor, A weight) const {
    const T* z = branch + row * C;
    const Softmax<A> soft = softened.softmax;
    const auto sum = [&](auto f) { return over_classes(block, scratch.values, C, A(0), Sum(), f); };
    const int64_t label = options.probabilities == nullptr ? labels[image] : 0;
    const bool valid = label >= 0 && label < C;
    const A invalid = valid || alpha == A(1) ? A(0) : A(NAN);
    const A kept = A(1) - options.smoothing, spread_out = options.smoothing / A(C);
    const auto label_of = [&](int c) {
      const A* p = options.probabilities;
      return kept * (p != nullptr ? p[image * C + c] : c == label ? A(1) : A(0)) + spread_out;
    };
    const A total = sum(label_of);
    const A ce = sum([&](int c) { return label_of(c) * hard.distance(widen(z[c])); });
    // z̃'s part of a logit's gradient passes on, less what moves mean and σ; the gradient's own mean is 0.
    const auto moved = [&](int c) { return A(widen(z[c])) - soft.largest - softened.mean; };
    const auto apart = [&](int c) { return soft.weight(widen(z[c])) / soft.sum - target_of(c); };
    A pull = 0;
    if (options.standardize && softened.sigma > A(0))
      pull = sum([&](int c) { return apart(c) * moved(c); }) / (softened.spread * softened.sigma * A(C - 1));
    const A factor = soft_factor * weight / softened.spread;
    const A kd = sum([&](int c) {
      const A value = widen(z[c]);
      A d = (apart(c) - (options.standardize ? pull * moved(c) : A(0))) * factor;
      if (alpha != A(1)) d += (hard.weight(value) / hard.sum * total - label_of(c)) * hard_factor;
      gradient[row * C + c] = narrow<T>(d + invalid);
      return target_of(c) * soft.distance(value);
    });
    block.each([&](int thread) {
      if (thread != 0) return;
      row_kd[row] = (kd + logarithm(soft.sum)) * weight;
      row_ce[row] = valid ? ce + total * logarithm(hard.sum) : A(NAN);
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
  }
};

#define FED_LOSS_KERNELS(X)                                                                                \
  X(fed::LossRows<float>) X(fed::LossRows<double>) X(fed::LossRows<fed::bf16>) X(fed::LossRows<fed::half>) \
  X(fed::LossRows<float, true>) X(fed::LossRows<double, true>) X(fed::LossRows<fed::bf16, true>)           \
  X(fed::LossRows<fed::half, true>) X(fed::LossScalars<float>) X(fed::LossScalars<double>)

}  // namespace fed
