// distillation_loss and distill_and_diversify for CPU and CUDA tensors: operands, outputs, registration.
#include "distillation_loss.h"

#include "operands.h"
#include "pairs.h"

namespace fed {
namespace {

// Rows of one thread: buffers of C values that live as long as its piece of the batch.
template <class A>
struct LossBuffers {
  std::vector<A> wide_t, wide_z, wide_out, weights, hard, target;
};

template <class T, class A = typename Arithmetic<T>::type>
void add_teacher(const LossArgs<T>& args, int64_t m, int64_t image, A share, bool add, LossBuffers<A>& buffers) {
  const A* z = widened(args.teacher + (m * args.B + image) * args.C, args.C, buffers.wide_t);
  const Softmax<A> p = softmax_of(z, A(1) / args.temperature, buffers.weights.data(), args.C);
  blend(buffers.weights.data(), share / p.sum, add, buffers.target.data(), args.C);
}

template <class T, class A = typename Arithmetic<T>::type>
void branch_row(const LossArgs<T>& args, int64_t k, int64_t image, LossBuffers<A>& buffers) {
  const int64_t row = k * args.B + image;
  const int C = args.C;
  const A* z = widened(args.branch + row * C, C, buffers.wide_z);
  A* weights = buffers.weights.data();
  const A* target = buffers.target.data();
  const Softmax<A> soft = softmax_of(z, A(1) / args.temperature, weights, C);
  const bool labels_count = args.alpha != A(1);
  Softmax<A> hard{soft.largest, A(1), A(1)};
  hard.sum = weigh(hard, z, labels_count ? buffers.hard.data() : nullptr, C);
  args.row_kd[row] = cross(soft, target, z, C) + logarithm(soft.sum);
  const int64_t label = args.labels[image];
  const bool valid = label >= 0 && label < C;
  args.row_ce[row] = valid ? hard.distance(z[label]) + logarithm(hard.sum) : A(NAN);

  T* row_out = args.gradient + row * C;
  A* out = writable(row_out, C, buffers.wide_out);
  const A rows = A(args.K) * A(args.B), hard_factor = (A(1) - args.alpha) / rows;
  difference(weights, A(1) / soft.sum, target, args.alpha * args.temperature / rows, out, C);
  if (labels_count) {
    blend(buffers.hard.data(), valid ? hard_factor / hard.sum : A(NAN), true, out, C);
    if (valid) out[label] -= hard_factor;
  }
  store(out, row_out, C);
}

template <class T>
void loss_on_cpu(const LossArgs<T>& args) {
  using A = typename Arithmetic<T>::type;
  parallel(args.B, (args.K + args.M) * args.C, [&](int64_t begin, int64_t end) {
    LossBuffers<A> buffers;
    buffers.weights.resize(args.C);
    buffers.hard.resize(args.C);
    buffers.target.resize(args.C);
    for (int64_t image = begin; image < end; ++image) {
      if (args.mean_target)
        for (int64_t m = 0; m < args.M; ++m) add_teacher(args, m, image, A(1) / A(args.M), m > 0, buffers);
      for (int64_t k = 0; k < args.K; ++k) {
        if (!args.mean_target) add_teacher(args, k % args.M, image, A(1), false, buffers);
        branch_row(args, k, image, buffers);
      }
    }
  });
}

template <class A>
void scalars_on_cpu(const ScalarArgs<A>& args) {
  A kd = 0, ce = 0;
  for (int64_t row = 0; row < args.rows; ++row) {
    kd += args.row_kd[row];
    ce += args.row_ce[row];
  }
  const LossScalars<A> scalars = loss_scalars(kd, ce, args.temperature, args.alpha, args.rows);
  *args.loss = scalars.loss;
  *args.kd = scalars.kd;
  *args.ce = scalars.ce;
}

struct Outputs {
  Tensor loss, kd, ce, gradient;
};

struct PairOutputs {
  Tensor tdiv, sdiv, grad_teacher_a, grad_branch_a;
};

template <class T>
void seed_on_cpu(const LossArgs<T>& loss, const int64_t* pair, const PairOutputs& seed) {
  using A = typename Arithmetic<T>::type;
  const int64_t limit = std::min(loss.M, loss.K), size = loss.B * loss.C, a = pair[0], b = pair[1];
  const bool inside = a >= 0 && b >= 0 && a < limit && b < limit;
  for (const bool teacher : {true, false}) {
    const T* logits = teacher ? loss.teacher : loss.branch;
    T* gradient = pointer<T>(teacher ? seed.grad_teacher_a : seed.grad_branch_a);
    A* value = pointer<A>(teacher ? seed.tdiv : seed.sdiv);
    if (!inside) {
      std::fill(gradient, gradient + size, narrow<T>(A(NAN)));
      *value = A(NAN);
      continue;
    }
    pair_on_cpu<T>({logits + a * size, logits + b * size, gradient, value + 1, loss.B, loss.C, teacher ? A(1) : A(-1)});
    mean_on_cpu<A>({{value + 1, nullptr}, {value, nullptr}, loss.B});
  }
}

// The loss, and on CUDA the pair's seed in the same launch. `pair` and `seed` are null for the loss alone.
template <bool CUDA>
Outputs run_loss(
    const Tensor& teacher, const Tensor& branch, const Tensor& labels, double temperature, double alpha,
    bool mean_target, const Tensor* pair, const PairOutputs* seed) {
  const int64_t M = teacher.size(0), K = branch.size(0), B = branch.size(1), C = branch.size(2);
  const ScalarType scalar = arithmetic(branch.scalar_type());
  const Outputs out{new_scalar(branch, scalar, 2 * K * B), new_scalar(branch, scalar), new_scalar(branch, scalar),
                    new_tensor(branch, {K, B, C}, branch.scalar_type())};
  dispatch(branch, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = typename Arithmetic<T>::type;
    A* rows = pointer<A>(out.loss) + 1;
    BothArgs<T> args{};
    args.loss = {pointer<T>(teacher), pointer<T>(branch), pointer<int64_t>(labels), pointer<T>(out.gradient), rows,
                 rows + K * B, M, K, B, int(C), mean_target, A(temperature), A(alpha)};
    ScalarArgs<A> scalars{rows, rows + K * B, pointer<A>(out.loss), pointer<A>(out.kd), pointer<A>(out.ce), K * B,
                          A(temperature), A(alpha), {}};
    if constexpr (CUDA) {
#ifdef FED_CUDA
      STD_TORCH_CHECK(!mean_target || M <= MAX_MEAN_TEACHERS, "fastensdistill: the mean target of ", M,
                      " teachers; the CUDA kernel takes up to ", MAX_MEAN_TEACHERS);
      if (pair != nullptr) {
        args.pair = pointer<int64_t>(*pair);
        args.grad_teacher_a = pointer<T>(seed->grad_teacher_a);
        args.grad_branch_a = pointer<T>(seed->grad_branch_a);
        args.row_tdiv = pointer<A>(seed->tdiv) + 1;
        args.row_sdiv = pointer<A>(seed->sdiv) + 1;
        scalars.diversity = {{args.row_tdiv, args.row_sdiv}, {pointer<A>(seed->tdiv), pointer<A>(seed->sdiv)}, B};
      }
      const auto guard = on_device(branch);
      check_launch(launch_both(args, scalars, current_stream(branch)));
#endif
    } else {
      loss_on_cpu(args.loss);
      scalars_on_cpu(scalars);
      if (pair != nullptr) seed_on_cpu(args.loss, pointer<int64_t>(*pair), *seed);
    }
  });
  return out;
}

template <bool CUDA>
void check_operands(
    const char* op, const Tensor& teacher, const Tensor& branch, const Tensor& labels, const Tensor* pair) {
  const Operands operands{op, branch};
  const ScalarType type = branch.scalar_type();
  operands.check_floating("branch_logits", branch);
  operands.check("branch_logits", branch, type, {ANY, ANY, ANY});
  operands.check_counts("branch_logits", branch, "[K, B, C]");
  operands.check("teacher_logits", teacher, type, {ANY, branch.size(1), branch.size(2)});
  operands.check_counts("teacher_logits", teacher, "[M, B, C]");
  operands.check("labels", labels, ScalarType::Long, {branch.size(1)});
  if (pair != nullptr) operands.check("pair", *pair, ScalarType::Long, {2});
  operands.check_device<CUDA>("branch_logits");
}

template <bool CUDA>
std::tuple<Tensor, Tensor, Tensor, Tensor> distillation_loss(
    Tensor teacher_logits, Tensor branch_logits, Tensor labels, double temperature, double alpha, bool mean_target) {
  check_operands<CUDA>("distillation_loss", teacher_logits, branch_logits, labels, nullptr);
  const Tensor teacher = packed_copy(teacher_logits), branch = packed_copy(branch_logits);
  const Outputs out =
      run_loss<CUDA>(teacher, branch, packed_copy(labels), temperature, alpha, mean_target, nullptr, nullptr);
  return {out.loss, out.kd, out.ce, out.gradient};
}

template <bool CUDA>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> distill_and_diversify(
    Tensor teacher_logits, Tensor branch_logits, Tensor labels, Tensor pair, double temperature, double alpha,
    bool mean_target) {
  check_operands<CUDA>("distill_and_diversify", teacher_logits, branch_logits, labels, &pair);
  const Tensor teacher = packed_copy(teacher_logits), branch = packed_copy(branch_logits), ab = packed_copy(pair);
  const int64_t B = branch.size(1), C = branch.size(2);
  const ScalarType type = branch.scalar_type(), scalar = arithmetic(type);
  const PairOutputs seed{new_scalar(branch, scalar, B), new_scalar(branch, scalar, B), new_tensor(branch, {B, C}, type),
                         new_tensor(branch, {B, C}, type)};
  const Outputs out = run_loss<CUDA>(teacher, branch, packed_copy(labels), temperature, alpha, mean_target, &ab, &seed);
  return {out.loss, out.kd, out.ce, out.gradient, seed.tdiv, seed.sdiv, seed.grad_teacher_a, seed.grad_branch_a};
}

template <bool CUDA>
void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("distillation_loss", TORCH_BOX(&distillation_loss<CUDA>));
  library.impl("distill_and_diversify", TORCH_BOX(&distill_and_diversify<CUDA>));
}

}  // namespace
}  // namespace fed

STABLE_TORCH_LIBRARY_IMPL(fastensdistill, CPU, library) { fed::implement<false>(library); }
#ifdef FED_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastensdistill, CUDA, library) { fed::implement<true>(library); }
#endif
