// Tensors of the libtorch stable ABI (2.10), which makes one binary serve every later PyTorch and every Python:
// outputs, dispatch over dtypes, launches. Only .cpp files include this.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "block.h"

// The dispatch key that the ops are registered for.
#ifndef FED_KEY
#define FED_KEY CUDA
#endif

namespace fed {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

template <class T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}
template <class T>
T* pointer(const Optional& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}

inline Tensor packed_copy(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline ScalarType arithmetic(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor new_tensor(const Tensor& like, const Sizes& sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

// A view of `base`'s storage from its first element on.
inline Tensor view(const Tensor& base, const Sizes& sizes, const Sizes& strides) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      base.get(), int64_t(sizes.size()), sizes.data(), strides.data(), base.storage_offset(), &handle));
  return Tensor(handle);
}

// A new scalar whose storage has room for `extra` values behind it: row results that the next launch reduces need no
// second allocation.
inline Tensor new_scalar(const Tensor& like, int64_t extra = 0) {
  const ScalarType type = arithmetic(like.scalar_type());
  return extra == 0 ? new_tensor(like, {}, type) : view(new_tensor(like, {1 + extra}, type), {}, {});
}

template <class T>
struct Type {
  using type = T;
};

// f(Type<T>()) for a dtype that has been checked.
template <class F>
void dispatch(ScalarType type, F f) {
  switch (type) {
    case ScalarType::Float:
      return f(Type<float>());
    case ScalarType::Double:
      return f(Type<double>());
    case ScalarType::BFloat16:
      return f(Type<bf16>());
    case ScalarType::Half:
      return f(Type<half>());
    default:
      STD_TORCH_CHECK(false, "fastensdistill: expected a tensor of float32, float64, bfloat16 or float16");
  }
}

// Whether kernels can be launched on the tensor's device.
bool on_cuda(const Tensor& tensor);

// Launches, one after the other, on PyTorch's current stream of a tensor's device, which is current as long as this is.
class Launches {
 public:
  explicit Launches(const Tensor& tensor);
  template <class Kernel>
  void operator()(const Kernel& kernel) const {
    check(launch(kernel, stream));
  }
  static void check(int status, const char* hint = "");

  void* stream = nullptr;

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
};

}  // namespace fed
