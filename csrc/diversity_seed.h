// TDiv or SDiv of an ordered pair of members with its gradient, and the seed of ODS; equations in
// fastensdistill/kernels/diversity_seed.py. One block per image.
#pragma once

#include "block.h"

namespace fed {

// What kernels over rows of logits share. Left to itself the compiler spills to reach 48 registers.
template <class T>
struct RowKernel {
  using A = typename Arithmetic<T>::type;
  static constexpr int THREADS = 256, BLOCKS = sizeof(T) == 8 ? 2 : 4;
  struct Scratch {
    A values[THREADS / 32];
  };
};

// Softmax of a row about its largest logit: probability(z) = exp((z − largest)·scale) / sum.
template <class A>
struct Softmax {
  A largest, sum, scale;

  FED_HD A weight(A z) const { return exponential((z - largest) * scale); }
  // −log probability, in two terms without cancellation: this one and log(sum).
  FED_HD A distance(A z) const { return (largest - z) * scale; }
};

// Σ f(c) over the classes, or what else `op` makes of them, starting from `from`.
template <class A, class Block, class Op, class F>
FED_HD A over_classes(Block& block, A* scratch, int C, A from, Op op, F f) {
  return reduce(block, scratch, op, [&](int thread) {
    A value = from;
    for (int c = thread; c < C; c += Block::threads) value = op(f(c), value);
    return value;
  });
}

template <class A, class Block, class T>
FED_HD Softmax<A> row_softmax(Block& block, A* scratch, const T* row, int C, A scale) {
  const auto z = [&](int c) { return A(widen(row[c])); };
  Softmax<A> softmax{over_classes(block, scratch, C, -A(INFINITY), Max(), z), A(1), scale};
  softmax.sum = over_classes(block, scratch, C, A(0), Sum(), [&](int c) { return softmax.weight(z(c)); });
  return softmax;
}

template <class T>
struct Pair {
  using A = typename Arithmetic<T>::type;
  const T* a;  // [B, C] logits of member a
  const T* b;  // [B, C] logits of member b
  T* gradient;  // [B, C]
  A* row_values;  // [B]
  int64_t B;
  int C;
  A sign;  // 1 for teachers, −1 for branches

  template <class Block>
  FED_HD void image(Block& block, A* scratch, int64_t n) const {
    const T *row_a = a + n * C, *row_b = b + n * C;
    const Softmax<A> p_a = row_softmax(block, scratch, row_a, C, A(1));
    const Softmax<A> p_b = row_softmax(block, scratch, row_b, C, A(1));
    const A factor = sign / A(B);
    const A sum = over_classes(block, scratch, C, A(0), Sum(), [&](int c) {
      const A z = widen(row_a[c]), target = p_b.weight(widen(row_b[c])) / p_b.sum;
      // Divided before the subtraction, both of them: equal members then differ by exactly nothing.
      gradient[n * C + c] = narrow<T>((p_a.weight(z) / p_a.sum - target) * factor);
      return target * p_a.distance(z);
    });
    block.each([&](int thread) {
      if (thread == 0) row_values[n] = sum + logarithm(p_a.sum);
    });
  }
};

// B blocks for the teachers, then B for the branches (where there are any).
template <class T>
struct PairRows : RowKernel<T> {
  Pair<T> teacher, branch;

  unsigned grid() const { return unsigned(teacher.B + branch.B); }

  template <class Block, class Scratch>
  FED_HD void run(Block& block, Scratch& scratch) const {
    const bool first = block.index < teacher.B;
    (first ? teacher : branch).image(block, scratch.values, first ? block.index : block.index - teacher.B);
  }
};

// Means of the rows' values, in a fixed order: one block.
template <class A>
struct Means : RowKernel<A> {
  static constexpr int BLOCKS = 8;
  const A* rows[2];  // nullptr: none
  A* mean[2];
  int64_t count;

  unsigned grid() const { return 1; }

  template <class Block>
  FED_HD static A total(Block& block, A* scratch, const A* rows, int64_t count) {
    return reduce(block, scratch, Sum(), [&](int thread) {
      A value = 0;
      for (int64_t row = thread; row < count; row += Block::threads) value += rows[row];
      return value;
    });
  }

  template <class Block, class Scratch>
  FED_HD void run(Block& block, Scratch& scratch) const {
    for (int i = 0; i < 2; ++i) {
      if (rows[i] == nullptr) continue;
      const A sum = total(block, scratch.values, rows[i], count);
      block.each([&](int thread) {
        if (thread == 0) *mean[i] = sum / A(count);
      });
    }
  }
};

template <class T>
struct OdsRows : RowKernel<T> {
  using A = typename Arithmetic<T>::type;
  const T* logits;  // [B, C]
  const T* weights;  // [B, C]
  T* gradient;  // [B, C]
  A* confidence;  // [B]
  int64_t B;
  int C;
  A temperature;

  unsigned grid() const { return unsigned(B); }

  template <class Block, class Scratch>
  FED_HD void run(Block& block, Scratch& scratch) const {
    const int64_t base = int64_t(block.index) * C;
    const T *row = logits + base, *w = weights + base;
    const Softmax<A> p = row_softmax(block, scratch.values, row, C, A(1) / temperature);
    const A mean = over_classes(block, scratch.values, C, A(0), Sum(), [&](int c) {
      return widen(w[c]) * p.weight(widen(row[c]));
    }) / p.sum;
    const A factor = A(1) / (p.sum * temperature);
    block.each([&](int thread) {
      for (int c = thread; c < C; c += Block::threads)
        gradient[base + c] = narrow<T>(p.weight(widen(row[c])) * (widen(w[c]) - mean) * factor);
      if (thread == 0) confidence[block.index] = A(1) / p.sum;
    });
  }
};

#define FED_SEED_KERNELS(X)                                                          \
  X(fed::PairRows<float>) X(fed::PairRows<double>) X(fed::PairRows<fed::bf16>) X(fed::PairRows<fed::half>) \
  X(fed::OdsRows<float>) X(fed::OdsRows<double>) X(fed::OdsRows<fed::bf16>) X(fed::OdsRows<fed::half>)     \
  X(fed::Means<float>) X(fed::Means<double>)

}  // namespace fed
