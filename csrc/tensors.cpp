#include "tensors.h"

#ifdef FED_CUDA

#include "loaded_symbol.h"

namespace fed {

void* current_stream(const Tensor& tensor) {
  using Lookup = AOTITorchError (*)(int32_t, void**);
  static LoadedSymbol symbol{"libtorch_cuda.so", "aoti_torch_get_current_cuda_stream"};
  const auto lookup = reinterpret_cast<Lookup>(symbol.get());
  STD_TORCH_CHECK(
      lookup != nullptr, "fastensdistill: no ", symbol.name, " in a loaded ", symbol.library,
      ": expected a PyTorch with CUDA, 2.10 or later");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(lookup(tensor.get_device_index(), &stream));
  return stream;
}

void check_launch(int status) {
  STD_TORCH_CHECK(status == 0, "fastensdistill: CUDA kernel not launched: ", launch_error(status));
}

}  // namespace fed

#endif
