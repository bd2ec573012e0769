// Tensors of the libtorch stable ABI (2.10), which makes one binary serve every later PyTorch and every Python:
// operands, outputs, dispatch over dtypes, CPU threads, and the current CUDA stream. Only .cpp files include this.
// What it costs: ods_seed on 1 x 2 logits, two operands and two outputs, takes 4.7 us from Python, aten::add 2.5 and
// aten::std_mean 7.3 (PyTorch 2.11, one thread of an EPYC): boxing is lost among the outputs' allocations.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "numbers.h"

namespace fed {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

inline Tensor packed_copy(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline ScalarType arithmetic(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor new_tensor(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

// A view of `base`'s storage from its first element on.
inline Tensor view(const Tensor& base, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      base.get(), int64_t(sizes.size()), sizes.data(), strides.data(), base.storage_offset(), &handle));
  return Tensor(handle);
}

// A new scalar whose storage has room for `extra` values behind it: row results that the next launch reduces need no
// second allocation.
inline Tensor new_scalar(const Tensor& like, ScalarType type, int64_t extra = 0) {
  return extra == 0 ? new_tensor(like, {}, type) : view(new_tensor(like, {1 + extra}, type), {}, {});
}

template <class T>
struct Type {
  using type = T;
};

// f(Type<T>()) for the tensor's dtype.
template <class F>
auto dispatch(const Tensor& tensor, F f) {
  switch (tensor.scalar_type()) {
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
  return f(Type<float>());
}

// f(begin, end) over [0, count) on PyTorch's threads, at least `work` elements of `each` per item in a piece.
template <class F>
void parallel(int64_t count, int64_t each, F f) {
  constexpr int64_t WORK = 16384;
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, WORK / std::max<int64_t>(1, each)), f);
}

#ifdef FED_CUDA
// PyTorch's current stream of the device. Its symbol is in libtorch_cuda, which a CPU-only PyTorch has not, so it is
// looked up when first needed and its absence is an error: the default stream instead would race with PyTorch's work.
void* current_stream(const Tensor& tensor);
void check_launch(int status);
const char* launch_error(int status);

// Makes the tensor's device current for the launches of a scope.
inline torch::stable::accelerator::DeviceGuard on_device(const Tensor& tensor) {
  return torch::stable::accelerator::DeviceGuard(tensor.get_device_index());
}
#endif

}  // namespace fed
