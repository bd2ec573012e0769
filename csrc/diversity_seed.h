// TDiv or SDiv of an ordered pair of members with its gradient, and the seed of ODS; equations in
// fastensdistill/kernels/diversity_seed.py. One block per image.
#pragma once

#include "block.h"

namespace fed {

constexpr int ROW_THREADS = 256;

// Blocks per processor to compile for: left to itself the compiler spills to reach 48 registers.
template <class T>
constexpr int ROW_BLOCKS = sizeof(T) == 8 ? 2 : 4;

// Shared memory of every kernel that reduces over rows.
template <class A>
struct RowScratch {
  A values[ROW_THREADS / 32];
};

// ---- mathematics

// Softmax of a row about its largest logit: probability(z) = exp((z − largest)·scale) / sum.
template <class A>
struct Softmax {
  A largest, sum, scale;

  FED_HD A weight(A z) const { return softmax_exp((z - largest) * scale); }
  // −log probability, in two terms without cancellation: this one and log(sum).
  FED_HD A distance(A z) const { return (largest - z) * scale; }
};

template <class Block, class T, class A = typename Arithmetic<T>::type>
FED_HD A row_largest(Block& block, RowScratch<A>& scratch, const T* row, int C) {
  typename Block::template PerThread<A> largest;
  block.each([&](int thread) {
    A value = -A(INFINITY);
    for (int c = thread; c < C; c += Block::threads) value = Max()(A(widen(row[c])), value);
    largest[thread] = value;
  });
  return reduce<Block, A>(block, largest, scratch.values, Max());
}

template <class Block, class T, class A = typename Arithmetic<T>::type>
FED_HD Softmax<A> row_softmax(Block& block, RowScratch<A>& scratch, const T* row, int C, A scale) {
  Softmax<A> softmax{row_largest<Block, T>(block, scratch, row, C), A(1), scale};
  typename Block::template PerThread<A> sum;
  block.each([&](int thread) {
    A value = 0;
    for (int c = thread; c < C; c += Block::threads) value += softmax.weight(widen(row[c]));
    sum[thread] = value;
  });
  softmax.sum = reduce<Block, A>(block, sum, scratch.values, Sum());
  return softmax;
}

// ---- one image of a pair

template <class T>
struct PairArgs {
  using A = typename Arithmetic<T>::type;
  const T* a;  // [B, C] logits of member a
  const T* b;  // [B, C] logits of member b
  T* gradient;  // [B, C]
  A* row_values;  // [B]
  int64_t B;
  int C;
  A sign;  // 1 for teachers, −1 for branches
};

template <class Block, class T, class A = typename Arithmetic<T>::type>
FED_HD void pair_body(Block& block, RowScratch<A>& scratch, const PairArgs<T>& args, int64_t image) {
  const int64_t base = image * args.C;
  const T* row_a = args.a + base;
  const T* row_b = args.b + base;
  const Softmax<A> p_a = row_softmax<Block, T>(block, scratch, row_a, args.C, A(1));
  const Softmax<A> p_b = row_softmax<Block, T>(block, scratch, row_b, args.C, A(1));
  const A factor = args.sign / A(args.B);
  typename Block::template PerThread<A> value;
  block.each([&](int thread) {
    A sum = 0;
    for (int c = thread; c < args.C; c += Block::threads) {
      const A z = widen(row_a[c]), target = p_b.weight(widen(row_b[c])) / p_b.sum;
      sum += target * p_a.distance(z);
      args.gradient[base + c] = narrow<T>((p_a.weight(z) / p_a.sum - target) * factor);
    }
    value[thread] = sum;
  });
  const A total = reduce<Block, A>(block, value, scratch.values, Sum()) + logarithm(p_a.sum);
  block.each([&](int thread) {
    if (thread == 0) args.row_values[image] = total;
  });
}

// Grid: B blocks for the teachers, then B for the branches (where there are any).
template <class T>
struct PairsArgs {
  PairArgs<T> teacher, branch;
};

template <class Block, class T, class A = typename Arithmetic<T>::type>
FED_HD void pairs_body(Block& block, RowScratch<A>& scratch, const PairsArgs<T>& args) {
  const bool teacher = block.index < args.teacher.B;
  const PairArgs<T>& pair = teacher ? args.teacher : args.branch;
  pair_body<Block, T>(block, scratch, pair, teacher ? block.index : block.index - args.teacher.B);
}

// ---- means of the rows' values, in a fixed order: one block

template <class A>
struct MeanArgs {
  const A* rows[2];
  A* mean[2];
  int64_t count;
};

template <class Block, class A>
FED_HD A row_sum(Block& block, RowScratch<A>& scratch, const A* rows, int64_t count) {
  typename Block::template PerThread<A> sum;
  block.each([&](int thread) {
    A value = 0;
    for (int64_t row = thread; row < count; row += Block::threads) value += rows[row];
    sum[thread] = value;
  });
  return reduce<Block, A>(block, sum, scratch.values, Sum());
}

template <class Block, class A>
FED_HD void mean_body(Block& block, RowScratch<A>& scratch, const MeanArgs<A>& args) {
  for (int i = 0; i < 2; ++i) {
    if (args.rows[i] == nullptr) continue;
    const A total = row_sum(block, scratch, args.rows[i], args.count);
    block.each([&](int thread) {
      if (thread == 0) *args.mean[i] = total / A(args.count);
    });
  }
}

// ---- one image of ODS

template <class T>
struct OdsArgs {
  using A = typename Arithmetic<T>::type;
  const T* logits;  // [B, C]
  const T* weights;  // [B, C]
  T* gradient;  // [B, C]
  A* confidence;  // [B]
  int64_t B;
  int C;
  A temperature;
};

template <class Block, class T, class A = typename Arithmetic<T>::type>
FED_HD void ods_body(Block& block, RowScratch<A>& scratch, const OdsArgs<T>& args) {
  const int64_t base = int64_t(block.index) * args.C;
  const T* row = args.logits + base;
  const T* weights = args.weights + base;
  const Softmax<A> p = row_softmax<Block, T>(block, scratch, row, args.C, A(1) / args.temperature);
  typename Block::template PerThread<A> product;
  block.each([&](int thread) {
    A sum = 0;
    for (int c = thread; c < args.C; c += Block::threads) sum += widen(weights[c]) * p.weight(widen(row[c]));
    product[thread] = sum;
  });
  const A mean = reduce<Block, A>(block, product, scratch.values, Sum()) / p.sum;
  const A factor = A(1) / (p.sum * args.temperature);
  block.each([&](int thread) {
    for (int c = thread; c < args.C; c += Block::threads) {
      const A weight = p.weight(widen(row[c]));
      args.gradient[base + c] = narrow<T>(weight * (widen(weights[c]) - mean) * factor);
    }
    if (thread == 0) args.confidence[block.index] = A(1) / p.sum;
  });
}

// ---- grids, and the CUDA launchers: 0 or the CUDA error of the launch

template <class T>
inline unsigned pairs_grid(const PairsArgs<T>& args) {
  return unsigned(args.teacher.B + args.branch.B);
}

template <class T>
int launch_pairs(const PairsArgs<T>& args, const MeanArgs<typename Arithmetic<T>::type>& means, void* stream);
template <class T>
int launch_ods(const OdsArgs<T>& args, void* stream);

}  // namespace fed
