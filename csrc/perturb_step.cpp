// perturb_step for CUDA tensors: operands, memory order, outputs, registration.
#include "perturb_step.h"

#include "operands.h"

namespace fed {
namespace {

// A tensor [*sizes of `like`], or [G, *sizes of `like`], whose images have their values in the order of `like`; the
// images themselves lie one after the other, with groups anywhere. Itself where it is so, else a copy.
Tensor in_order_of(const Tensor& like, const Tensor& tensor) {
  const int64_t groups = tensor.dim() - like.dim();
  Sizes sizes, strides;
  if (groups == 1) {
    sizes = {tensor.size(0)};
    strides = {like.numel()};
  }
  bool same = true;
  for (int64_t dim = 0; dim < like.dim(); ++dim) {
    sizes.push_back(like.size(dim));
    strides.push_back(like.stride(dim));
    if (like.size(dim) != 1 && (dim > 0 || groups == 0))
      same = same && tensor.stride(groups + dim) == like.stride(dim);
  }
  if (same) return tensor;
  Tensor copy = view(new_tensor(tensor, {tensor.numel()}, tensor.scalar_type()), sizes, strides);
  torch::stable::copy_(copy, tensor);
  return copy;
}

void check_operands(const Tensor& images, const Tensor& gradients, const Optional& confidence) {
  const Operands operands{"perturb_step", images};
  const ScalarType type = images.scalar_type(), given = gradients.scalar_type();
  operands.check_floating("images", images, "[B, ...]");
  Sizes sizes{ANY};
  for (int64_t size : images.sizes()) sizes.push_back(size);
  operands.check_floating("input_gradients", gradients, "[G, B, ...]");
  operands.check("input_gradients", gradients, arithmetic(given) == arithmetic(type) ? given : type, sizes);
  operands.check("confidence", confidence, arithmetic(type), {images.size(0)});
  operands.check_device("images");
}

Tensor perturb_step(
    Tensor images, Tensor input_gradients, Optional confidence, double step, double low, double high) {
  check_operands(images, input_gradients, confidence);
  const int64_t B = images.size(0), D = images.numel() / B;
  Tensor out = torch::stable::empty_like(images);  // dense, in the memory format of the images
  // An order in which an image is not in one piece: by way of another.
  const bool whole = B == 1 || out.stride(0) == D;
  const Tensor work = whole ? out : new_tensor(out, Sizes(out.sizes().begin(), out.sizes().end()), out.scalar_type());
  const Tensor x = in_order_of(work, images), gradients = in_order_of(work, input_gradients);
  if (confidence) confidence = packed_copy(*confidence);
  const Launches launch(x);
  dispatch(x.scalar_type(), [&](auto image_type) {
    dispatch(gradients.scalar_type(), [&](auto gradient_type) {
      using T = typename decltype(image_type)::type;
      using G = typename decltype(gradient_type)::type;
      using A = typename Arithmetic<T>::type;
      if constexpr (std::is_same_v<T, double> == std::is_same_v<G, double>)
        launch(Step<T, G>{pointer<T>(x), pointer<G>(gradients), pointer<A>(confidence), pointer<T>(work),
                          gradients.size(0), B, D, gradients.stride(0), gradients.stride(1), A(step), A(low),
                          A(high)});
    });
  });
  if (!whole) torch::stable::copy_(out, work);
  return out;
}

}  // namespace
}  // namespace fed

STABLE_TORCH_LIBRARY_IMPL(fastensdistill, FED_KEY, library) {
  library.impl("perturb_step", TORCH_BOX(&fed::perturb_step));
}
