// perturb_step for CPU and CUDA tensors: memory order, outputs, registration.
#include "perturb_step.h"

#include "operands.h"
#include "rows.h"

namespace fed {
namespace {

FED_VECTOR void add(const float* from, float* to, int64_t count) {
  _Pragma("omp simd") for (int64_t d = 0; d < count; ++d) to[d] += from[d];
}
FED_VECTOR void add(const double* from, double* to, int64_t count) {
  _Pragma("omp simd") for (int64_t d = 0; d < count; ++d) to[d] += from[d];
}

#define FED_STEP_ROWS(A)                                                                                         \
  FED_VECTOR A peak_of(const A* g, int64_t count) {                                                              \
    A largest = 0;                                                                                               \
    _Pragma("omp simd reduction(max : largest)") for (int64_t d = 0; d < count; ++d) {                           \
      const A size = g[d] < 0 ? -g[d] : g[d];                                                                    \
      largest = size > largest ? size : largest;                                                                 \
    }                                                                                                            \
    return largest;                                                                                              \
  }                                                                                                              \
  FED_VECTOR A scale_and_square(A* g, A peak, int64_t count) {                                                   \
    A sum = 0;                                                                                                   \
    _Pragma("omp simd reduction(+ : sum)") for (int64_t d = 0; d < count; ++d) {                                 \
      g[d] = g[d] / peak;                                                                                        \
      sum += g[d] * g[d];                                                                                        \
    }                                                                                                            \
    return sum;                                                                                                  \
  }                                                                                                              \
  FED_VECTOR void move(const A* x, const A* g, A length, A low, A high, A* out, int64_t count) {                 \
    _Pragma("omp simd") for (int64_t d = 0; d < count; ++d) out[d] = clip(x[d] + g[d] * length, low, high);      \
  }
FED_STEP_ROWS(float)
FED_STEP_ROWS(double)

template <class T, class G>
void step_on_cpu(const StepArgs<T, G>& args) {
  using A = typename Arithmetic<T>::type;
  parallel(args.B, args.D * (args.groups + 2), [&](int64_t begin, int64_t end) {
    std::vector<A> g(args.D), wide_g, wide_x, wide_out;
    for (int64_t image = begin; image < end; ++image) {
      std::fill(g.begin(), g.end(), A(0));
      for (int64_t group = 0; group < args.groups; ++group) {
        const G* from = args.gradients + group * args.group_stride + image * args.image_stride;
        add(widened(from, args.D, wide_g), g.data(), args.D);
      }
      const A largest = peak_of(g.data(), args.D);
      const A square = scale_and_square(g.data(), largest == A(0) ? A(1) : largest, args.D);
      const T* x = args.images + image * args.D;
      T* row = args.out + image * args.D;
      if (square == A(0)) {
        std::copy(x, x + args.D, row);
        continue;
      }
      const A length = step_length(args.step, args.confidence ? args.confidence[image] : A(1), square);
      A* out = writable(row, args.D, wide_out);
      move(widened(x, args.D, wide_x), g.data(), length, args.low, args.high, out, args.D);
      store(out, row, args.D);
    }
  });
}

bool same_strides(const Tensor& tensor, int64_t from, const Tensor& other) {
  for (int64_t dim = 1; dim < other.dim(); ++dim)
    if (other.size(dim) != 1 && tensor.stride(dim + from) != other.stride(dim)) return false;
  return true;
}

// The values of an image lie together, in some order, and the images one after the other.
bool images_outermost(const Tensor& images) {
  return images.size(0) == 1 || images.stride(0) == images.numel() / images.size(0);
}

template <class T, class G, bool CUDA>
void run_step(
    const Tensor& x, const Tensor& gradients, const Optional& confidence, const Tensor& out, double step, double low,
    double high) {
  using A = typename Arithmetic<T>::type;
  const int64_t B = x.size(0);
  const StepArgs<T, G> args{pointer<T>(x), pointer<G>(gradients), confidence ? pointer<A>(*confidence) : nullptr,
                            pointer<T>(out), gradients.size(0), B, x.numel() / B, gradients.stride(0),
                            gradients.stride(1), A(step), A(low), A(high)};
  if constexpr (CUDA) {
#ifdef FED_CUDA
    const auto guard = on_device(x);
    check_launch(launch_step(args, current_stream(x)));
#endif
  } else {
    step_on_cpu(args);
  }
}

template <bool CUDA>
void check_operands(const Tensor& images, const Tensor& gradients, const Optional& confidence) {
  const Operands operands{"perturb_step", images};
  operands.check_floating("images", images);
  if (images.dim() < 2) operands.refuse("images", text_of(images), "[B, ...]");
  operands.check_counts("images", images, "[B, ...]");
  operands.check_floating("input_gradients", gradients);
  // float64 for both or for neither; else any
  const bool wide = images.scalar_type() == ScalarType::Double;
  const bool same = (gradients.scalar_type() == ScalarType::Double) == wide;
  Sizes sizes{ANY};
  for (int64_t size : images.sizes()) sizes.push_back(size);
  operands.check("input_gradients", gradients, same ? gradients.scalar_type() : images.scalar_type(), sizes);
  operands.check_counts("input_gradients", gradients, "[G, B, ...]");
  operands.check("confidence", confidence, arithmetic(images.scalar_type()), {images.size(0)});
  operands.check_device<CUDA>("images");
}

template <bool CUDA>
Tensor perturb_step(
    Tensor images, Tensor input_gradients, Optional confidence, double step, double low, double high) {
  check_operands<CUDA>(images, input_gradients, confidence);
  const Tensor out = torch::stable::empty_like(images);  // dense, in the memory format of the images
  Tensor x = images, work = out;
  if (!images_outermost(out)) {  // an order in which an image is not in one piece: by way of copies
    x = torch::stable::contiguous(images);
    work = torch::stable::empty_like(x);
  } else if (!same_strides(images, 0, out) || !images_outermost(images)) {
    x = torch::stable::empty_like(out);
    torch::stable::copy_(x, images);
  }
  Tensor gradients = input_gradients;
  if (!same_strides(gradients, 1, work)) {
    std::vector<int64_t> sizes{gradients.size(0)}, strides{work.numel()};
    for (int64_t dim = 0; dim < work.dim(); ++dim) {
      sizes.push_back(work.size(dim));
      strides.push_back(work.stride(dim));
    }
    const Tensor memory = new_tensor(gradients, {gradients.numel()}, gradients.scalar_type());
    gradients = view(memory, sizes, strides);
    torch::stable::copy_(gradients, input_gradients);
  }
  if (confidence) confidence = packed_copy(*confidence);
  dispatch(x, [&](auto image_type) {
    using T = typename decltype(image_type)::type;
    if constexpr (std::is_same_v<T, double>) {
      run_step<double, double, CUDA>(x, gradients, confidence, work, step, low, high);
    } else {
      dispatch(gradients, [&](auto gradient_type) {
        using G = typename decltype(gradient_type)::type;
        if constexpr (!std::is_same_v<G, double>)
          run_step<T, G, CUDA>(x, gradients, confidence, work, step, low, high);
      });
    }
  });
  if (work.data_ptr() != out.data_ptr()) {
    Tensor result = out;
    torch::stable::copy_(result, work);
  }
  return out;
}

}  // namespace
}  // namespace fed

STABLE_TORCH_LIBRARY_IMPL(fastensdistill, CPU, library) {
  library.impl("perturb_step", TORCH_BOX(&fed::perturb_step<false>));
}
#ifdef FED_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastensdistill, CUDA, library) {
  library.impl("perturb_step", TORCH_BOX(&fed::perturb_step<true>));
}
#endif
