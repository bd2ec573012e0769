#include "tensors.h"

#include "loaded_symbol.h"

namespace fed {

const char* launch_error(int status);

bool on_cuda(const Tensor& tensor) { return tensor.is_cuda(); }

// The stream's symbol is in libtorch_cuda, which a CPU-only PyTorch has not, so it is looked up when first needed and
// its absence is an error: the default stream instead would race with PyTorch's work.
Launches::Launches(const Tensor& tensor) : guard(tensor.get_device_index()) {
  using Lookup = AOTITorchError (*)(int32_t, void**);
  static LoadedSymbol symbol{"libtorch_cuda.so", "aoti_torch_get_current_cuda_stream"};
  const auto lookup = reinterpret_cast<Lookup>(symbol.get());
  STD_TORCH_CHECK(
      lookup != nullptr, "fastensdistill: no ", symbol.name, " in a loaded ", symbol.library,
      ": expected a PyTorch with CUDA, 2.10 or later");
  TORCH_ERROR_CODE_CHECK(lookup(tensor.get_device_index(), &stream));
}

void Launches::check(int status, const char* hint) {
  STD_TORCH_CHECK(status == 0, "fastensdistill: CUDA kernel not launched: ", launch_error(status), hint);
}

}  // namespace fed
