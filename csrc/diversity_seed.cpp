// teacher_diversity_seed, diversity_seed and ods_seed for CPU and CUDA tensors: operands, outputs, registration.
#include "operands.h"
#include "pairs.h"

namespace fed {
namespace {

// Value (a scalar with B row values behind it) and gradient of one pair.
struct PairOutput {
  Tensor value, gradient;
};

PairOutput new_pair_output(const Tensor& pair) {
  return {new_scalar(pair, arithmetic(pair.scalar_type()), pair.size(1)),
          new_tensor(pair, {pair.size(1), pair.size(2)}, pair.scalar_type())};
}

template <class T>
PairArgs<T> pair_args(const Tensor& pair, const PairOutput& out, typename Arithmetic<T>::type sign) {
  using A = typename Arithmetic<T>::type;
  const T* a = pointer<T>(pair);
  const int64_t B = pair.size(1), C = pair.size(2);
  return {a, a + B * C, pointer<T>(out.gradient), pointer<A>(out.value) + 1, B, int(C), sign};
}

template <bool CUDA>
void run_pairs(
    const Tensor& teacher, const Tensor* branch, const PairOutput& teacher_out, const PairOutput* branch_out) {
  dispatch(teacher, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = typename Arithmetic<T>::type;
    PairsArgs<T> args{pair_args<T>(teacher, teacher_out, A(1)), {}};
    MeanArgs<A> means{{args.teacher.row_values, nullptr}, {pointer<A>(teacher_out.value), nullptr}, args.teacher.B};
    if (branch != nullptr) {
      args.branch = pair_args<T>(*branch, *branch_out, A(-1));
      means.rows[1] = args.branch.row_values;
      means.mean[1] = pointer<A>(branch_out->value);
    }
    if constexpr (CUDA) {
#ifdef FED_CUDA
      const auto guard = on_device(teacher);
      check_launch(launch_pairs(args, means, current_stream(teacher)));
#endif
    } else {
      pair_on_cpu(args.teacher);
      if (branch != nullptr) pair_on_cpu(args.branch);
      mean_on_cpu(means);
    }
  });
}

template <bool CUDA>
void check_pairs(const char* op, const Tensor& teacher, const Tensor* branch) {
  const Operands operands{op, teacher};
  operands.check_floating("teacher_pair", teacher);
  operands.check("teacher_pair", teacher, teacher.scalar_type(), {2, ANY, ANY});
  operands.check_counts("teacher_pair", teacher, "[2, B, C]");
  if (branch != nullptr)
    operands.check("branch_pair", *branch, teacher.scalar_type(), {2, teacher.size(1), teacher.size(2)});
  operands.check_device<CUDA>("teacher_pair");
}

template <bool CUDA>
std::tuple<Tensor, Tensor> teacher_diversity_seed(Tensor teacher_pair) {
  check_pairs<CUDA>("teacher_diversity_seed", teacher_pair, nullptr);
  const Tensor pair = packed_copy(teacher_pair);
  const PairOutput out = new_pair_output(pair);
  run_pairs<CUDA>(pair, nullptr, out, nullptr);
  return {out.value, out.gradient};
}

template <bool CUDA>
std::tuple<Tensor, Tensor, Tensor, Tensor> diversity_seed(Tensor teacher_pair, Tensor branch_pair) {
  check_pairs<CUDA>("diversity_seed", teacher_pair, &branch_pair);
  const Tensor teacher = packed_copy(teacher_pair), branch = packed_copy(branch_pair);
  const PairOutput teacher_out = new_pair_output(teacher), branch_out = new_pair_output(branch);
  run_pairs<CUDA>(teacher, &branch, teacher_out, &branch_out);
  return {teacher_out.value, branch_out.value, teacher_out.gradient, branch_out.gradient};
}

template <class T>
void ods_on_cpu(const OdsArgs<T>& args) {
  using A = typename Arithmetic<T>::type;
  parallel(args.B, 3 * args.C, [&](int64_t begin, int64_t end) {
    std::vector<A> wide_z, wide_w, wide_out, weights(args.C);
    for (int64_t image = begin; image < end; ++image) {
      const A* z = widened(args.logits + image * args.C, args.C, wide_z);
      const A* w = widened(args.weights + image * args.C, args.C, wide_w);
      T* row = args.gradient + image * args.C;
      A* out = writable(row, args.C, wide_out);
      const Softmax<A> p = softmax_of(z, A(1) / args.temperature, weights.data(), args.C);
      const A mean = dot(w, weights.data(), args.C) / p.sum;
      centred(weights.data(), w, mean, A(1) / (p.sum * args.temperature), out, args.C);
      store(out, row, args.C);
      args.confidence[image] = A(1) / p.sum;
    }
  });
}

template <bool CUDA>
std::tuple<Tensor, Tensor> ods_seed(Tensor logits, Tensor weights, double temperature) {
  const Operands operands{"ods_seed", logits};
  operands.check_floating("logits", logits);
  operands.check("logits", logits, logits.scalar_type(), {ANY, ANY});
  operands.check_counts("logits", logits, "[B, C]");
  operands.check("weights", weights, logits.scalar_type(), {logits.size(0), logits.size(1)});
  operands.check_device<CUDA>("logits");
  const Tensor z = packed_copy(logits), w = packed_copy(weights);
  const int64_t B = z.size(0), C = z.size(1);
  const Tensor gradient = new_tensor(z, {B, C}, z.scalar_type());
  const Tensor confidence = new_tensor(z, {B}, arithmetic(z.scalar_type()));
  dispatch(z, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = typename Arithmetic<T>::type;
    const OdsArgs<T> args{
        pointer<T>(z), pointer<T>(w), pointer<T>(gradient), pointer<A>(confidence), B, int(C), A(temperature)};
    if constexpr (CUDA) {
#ifdef FED_CUDA
      const auto guard = on_device(z);
      check_launch(launch_ods(args, current_stream(z)));
#endif
    } else {
      ods_on_cpu(args);
    }
  });
  return {gradient, confidence};
}

template <bool CUDA>
void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("teacher_diversity_seed", TORCH_BOX(&teacher_diversity_seed<CUDA>));
  library.impl("diversity_seed", TORCH_BOX(&diversity_seed<CUDA>));
  library.impl("ods_seed", TORCH_BOX(&ods_seed<CUDA>));
}

}  // namespace
}  // namespace fed

STABLE_TORCH_LIBRARY_IMPL(fastensdistill, CPU, library) { fed::implement<false>(library); }
#ifdef FED_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastensdistill, CUDA, library) { fed::implement<true>(library); }
#endif
