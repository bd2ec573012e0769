// One pair of members on the CPU, for diversity_seed and distill_and_diversify.
#pragma once

#include "rows.h"
#include "tensors.h"

namespace fed {

template <class T>
void pair_on_cpu(const PairArgs<T>& args) {
  using A = typename Arithmetic<T>::type;
  parallel(args.B, 4 * args.C, [&](int64_t begin, int64_t end) {
    std::vector<A> wide_a, wide_b, wide_out, weights(args.C), target(args.C);
    for (int64_t image = begin; image < end; ++image) {
      const A* z_a = widened(args.a + image * args.C, args.C, wide_a);
      const A* z_b = widened(args.b + image * args.C, args.C, wide_b);
      T* row = args.gradient + image * args.C;
      A* out = writable(row, args.C, wide_out);
      const Softmax<A> p_b = softmax_of(z_b, A(1), target.data(), args.C);
      blend(target.data(), A(1) / p_b.sum, false, target.data(), args.C);
      const Softmax<A> p_a = softmax_of(z_a, A(1), weights.data(), args.C);
      args.row_values[image] = cross(p_a, target.data(), z_a, args.C) + logarithm(p_a.sum);
      // Divided before the subtraction, as p_b was: equal members then differ by exactly nothing.
      blend(weights.data(), A(1) / p_a.sum, false, weights.data(), args.C);
      difference(weights.data(), A(1), target.data(), args.sign / A(args.B), out, args.C);
      store(out, row, args.C);
    }
  });
}

template <class A>
void mean_on_cpu(const MeanArgs<A>& args) {
  for (int i = 0; i < 2; ++i) {
    if (args.rows[i] == nullptr) continue;
    A sum = 0;
    for (int64_t row = 0; row < args.count; ++row) sum += args.rows[i][row];
    *args.mean[i] = sum / A(args.count);
  }
}

}  // namespace fed
