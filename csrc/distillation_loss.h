// Distillation loss with its gradient; equations in fastensdistill/kernels/distillation_loss.py.
// One block per row (k, b); the combined op adds one block per image and pair of members.
#pragma once

#include "diversity_seed.h"

namespace fed {

constexpr int MAX_MEAN_TEACHERS = 256;  // softmaxes that a block keeps for the mean target

template <class T>
struct LossArgs {
  using A = typename Arithmetic<T>::type;
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
};

template <class A>
struct LossScratch : RowScratch<A> {
  A largest[MAX_MEAN_TEACHERS], factor[MAX_MEAN_TEACHERS];
};

// ---- mathematics

// ∂L/∂z of one logit: soft is the distillation term's factor α·τ/(K·B), hard the cross-entropy's (1 − α)/(K·B).
template <class A>
FED_HD A logit_gradient(A q_soft, A target, A q_hard, bool is_label, A soft, A hard) {
  return (q_soft - target) * soft + (q_hard - (is_label ? A(1) : A(0))) * hard;
}

template <class A>
struct LossScalars {
  A loss, kd, ce;
};

template <class A>
FED_HD LossScalars<A> loss_scalars(A sum_kd, A sum_ce, A temperature, A alpha, int64_t rows) {
  const A kd = sum_kd * (temperature * temperature / A(rows)), ce = sum_ce / A(rows);
  // With α = 1 labels have no say, not even by a NaN.
  return {alpha == A(1) ? kd : (A(1) - alpha) * ce + alpha * kd, kd, ce};
}

// ---- one row

template <class Block, class T, class A = typename Arithmetic<T>::type>
FED_HD void loss_body(Block& block, LossScratch<A>& scratch, const LossArgs<T>& args) {
  const int64_t row = block.index, k = row / args.B, image = row % args.B;
  const int C = args.C;
  const T* z = args.branch + row * C;
  T* gradient = args.gradient + row * C;
  const A scale = A(1) / args.temperature;

  Softmax<A> soft = row_softmax<Block, T>(block, scratch, z, C, scale);
  Softmax<A> hard{soft.largest, A(1), A(1)};
  typename Block::template PerThread<A> sum;
  block.each([&](int thread) {
    A value = 0;
    for (int c = thread; c < C; c += Block::threads) value += hard.weight(widen(z[c]));
    sum[thread] = value;
  });
  hard.sum = reduce<Block, A>(block, sum, scratch.values, Sum());

  const int64_t first = args.mean_target ? 0 : k % args.M;
  const int teachers = args.mean_target ? int(args.M) : 1;
  for (int m = 0; m < teachers; ++m) {
    const T* row_t = args.teacher + ((first + m) * args.B + image) * C;
    const Softmax<A> p = row_softmax<Block, T>(block, scratch, row_t, C, scale);
    block.phase([&](int thread) {
      if (thread == 0) {
        scratch.largest[m] = p.largest;
        scratch.factor[m] = A(1) / (p.sum * A(teachers));
      }
    });
  }

  const int64_t label = args.labels[image];
  const bool valid = label >= 0 && label < C;
  const A rows = A(args.K) * A(args.B);
  const A soft_factor = args.alpha * args.temperature / rows, hard_factor = (A(1) - args.alpha) / rows;
  const A invalid = valid || args.alpha == A(1) ? A(0) : A(NAN);
  block.each([&](int thread) {
    A kd = 0;
    for (int c = thread; c < C; c += Block::threads) {
      A target = 0;
      for (int m = 0; m < teachers; ++m) {
        const A z_t = widen(args.teacher[((first + m) * args.B + image) * C + c]);
        target += softmax_exp((z_t - scratch.largest[m]) * scale) * scratch.factor[m];
      }
      const A value = widen(z[c]);
      kd += target * soft.distance(value);
      const A q_soft = soft.weight(value) / soft.sum, q_hard = hard.weight(value) / hard.sum;
      const A d = logit_gradient(q_soft, target, q_hard, c == label, soft_factor, hard_factor);
      gradient[c] = narrow<T>(d + invalid);
    }
    sum[thread] = kd;
  });
  const A kd = reduce<Block, A>(block, sum, scratch.values, Sum()) + logarithm(soft.sum);
  block.each([&](int thread) {
    if (thread != 0) return;
    args.row_kd[row] = kd;
    args.row_ce[row] = valid ? hard.distance(widen(z[label])) + logarithm(hard.sum) : A(NAN);
  });
}

// ---- the combined op: K·B blocks of rows, B of the teachers' pair, B of the branches'

template <class T>
struct BothArgs {
  using A = typename Arithmetic<T>::type;
  LossArgs<T> loss;
  const int64_t* pair;  // [2] on the device; nullptr: no pair, K·B blocks
  T* grad_teacher_a;  // [B, C]
  T* grad_branch_a;  // [B, C]
  A* row_tdiv;  // [B]
  A* row_sdiv;  // [B]
};

template <class Block, class T, class A = typename Arithmetic<T>::type>
FED_HD void both_body(Block& block, LossScratch<A>& scratch, const BothArgs<T>& args) {
  const LossArgs<T>& loss = args.loss;
  const int64_t rows = loss.K * loss.B, size = loss.B * loss.C;
  if (block.index < rows) {
    loss_body<Block, T>(block, scratch, loss);
    return;
  }
  const bool teacher = block.index < rows + loss.B;
  const int64_t image = block.index - rows - (teacher ? 0 : loss.B);
  const int64_t a = args.pair[0], b = args.pair[1], limit = loss.M < loss.K ? loss.M : loss.K;
  T* gradient = teacher ? args.grad_teacher_a : args.grad_branch_a;
  A* values = teacher ? args.row_tdiv : args.row_sdiv;
  if (a < 0 || b < 0 || a >= limit || b >= limit) {
    block.each([&](int thread) {
      for (int c = thread; c < loss.C; c += Block::threads) gradient[image * loss.C + c] = narrow<T>(A(NAN));
      if (thread == 0) values[image] = A(NAN);
    });
    return;
  }
  const T* logits = teacher ? loss.teacher : loss.branch;
  const PairArgs<T> pair{
      logits + a * size, logits + b * size, gradient, values, loss.B, loss.C, teacher ? A(1) : A(-1)};
  pair_body<Block, T>(block, scratch, pair, image);
}

// ---- the scalars, in a fixed order: one block

template <class A>
struct ScalarArgs {
  const A* row_kd;
  const A* row_ce;
  A *loss, *kd, *ce;
  int64_t rows;
  A temperature, alpha;
  MeanArgs<A> diversity;
};

template <class Block, class A>
FED_HD void scalar_body(Block& block, RowScratch<A>& scratch, const ScalarArgs<A>& args) {
  const A kd = row_sum(block, scratch, args.row_kd, args.rows);
  const A ce = row_sum(block, scratch, args.row_ce, args.rows);
  const LossScalars<A> scalars = loss_scalars(kd, ce, args.temperature, args.alpha, args.rows);
  block.each([&](int thread) {
    if (thread != 0) return;
    *args.loss = scalars.loss;
    *args.kd = scalars.kd;
    *args.ce = scalars.ce;
  });
  mean_body(block, scratch, args.diversity);
}

// ---- grid, and the CUDA launcher: 0 or the CUDA error of the launch

template <class T>
inline unsigned both_grid(const BothArgs<T>& args) {
  return unsigned(args.loss.K * args.loss.B + (args.pair != nullptr ? 2 * args.loss.B : 0));
}

template <class T>
int launch_both(const BothArgs<T>& args, const ScalarArgs<typename Arithmetic<T>::type>& scalars, void* stream);

}  // namespace fed
