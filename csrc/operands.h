// What an op takes for granted of its operands, checked here for every caller: a tensor of another device in a kernel
// ends the CUDA context, and one of another dtype or shape is read past its end.
#pragma once

#include <climits>
#include <cstdlib>
#include <string>

#include "tensors.h"

namespace fed {

constexpr int64_t ANY = -1;  // any size

inline std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    default:
      return torch::headeronly::toString(type);
  }
}

inline std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "the CPU";
  return tensor.is_cuda() ? "CUDA device " + std::to_string(tensor.get_device_index()) : "another kind of device";
}

template <class List>
std::string text_of(const List& numbers, bool any = false) {
  std::string text = "[";
  for (size_t i = 0; i < numbers.size(); ++i)
    text += (i > 0 ? ", " : "") + (any && numbers[i] == ANY ? "any" : std::to_string(numbers[i]));
  return text + "]";
}

inline std::string text_of(const Tensor& tensor) {
  return name_of(tensor.scalar_type()) + " " + text_of(tensor.sizes()) + (tensor.is_contiguous() ? "" : ", strided,") +
         " on " + device_of(tensor);
}

// The operands of one call of `op`, all on the device of `first`.
struct Operands {
  const char* op;
  const Tensor& first;

  [[noreturn]] void refuse(const std::string& name, const std::string& found, const std::string& expected) const {
    STD_TORCH_CHECK(false, "fastensdistill::", op, ": ", name, " is ", found, "; expected ", expected);
    std::abort();  // unreachable, for compilers that cannot know
  }

  // `dense`: contiguous, as what is written in place or read without a copy has to be.
  void check(const char* name, const Tensor& tensor, ScalarType type, const Sizes& sizes, bool dense = false) const {
    const auto found = tensor.sizes();
    bool good = tensor.scalar_type() == type && found.size() == sizes.size() && (!dense || tensor.is_contiguous()) &&
                tensor.is_cuda() == first.is_cuda() && tensor.is_cpu() == first.is_cpu() &&
                tensor.get_device_index() == first.get_device_index();
    for (size_t i = 0; good && i < sizes.size(); ++i) good = sizes[i] == ANY || sizes[i] == found[i];
    if (!good)
      refuse(name, text_of(tensor),
             name_of(type) + " " + text_of(sizes, true) + (dense ? ", contiguous," : "") + " on " + device_of(first));
  }
  void check(const char* name, const Optional& tensor, ScalarType type, const Sizes& sizes, bool dense = false) const {
    if (tensor) check(name, *tensor, type, sizes, dense);
  }

  // Of a floating dtype, with the dimensions that `axes` names (... for more of them), and not empty: that divides by
  // zero, or is a grid of no blocks. Kernels count the values of a row in 32 bits.
  void check_floating(const char* name, const Tensor& tensor, const std::string& axes) const {
    const ScalarType type = tensor.scalar_type();
    const int64_t least = 1 + std::count(axes.begin(), axes.end(), ',');
    bool good = (arithmetic(type) == type || type == ScalarType::BFloat16 || type == ScalarType::Half) &&
                (axes.find("...") == std::string::npos ? tensor.dim() == least : tensor.dim() >= least);
    for (int64_t size : tensor.sizes()) good = good && size >= 1 && size <= INT_MAX;
    if (!good) refuse(name, text_of(tensor), "float32, float64, bfloat16 or float16 " + axes + ", not empty");
  }

  // Last of all, so that the rest is tested where there is no GPU.
  void check_device(const char* name) const {
    if (!on_cuda(first)) refuse(name, text_of(first), "a CUDA device");
  }
};

}  // namespace fed
