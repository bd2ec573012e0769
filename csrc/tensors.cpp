#include "tensors.h"

#ifdef FED_CUDA

#include <dlfcn.h>

namespace fed {

const char* launch_error(int status);

void* current_stream(const Tensor& tensor) {
  using Lookup = AOTITorchError (*)(int32_t, void**);
  static const Lookup lookup = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library != nullptr ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Lookup>(symbol);
  }();
  STD_TORCH_CHECK(
      lookup != nullptr, "fastensdistill: this PyTorch has no aoti_torch_get_current_cuda_stream in libtorch_cuda.so");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(lookup(tensor.get_device_index(), &stream));
  return stream;
}

void check_launch(int status) {
  STD_TORCH_CHECK(status == 0, "fastensdistill: CUDA kernel not launched: ", launch_error(status));
}

}  // namespace fed

#endif
