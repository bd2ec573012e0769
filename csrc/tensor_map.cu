// Maps by the driver, which is asked for when the first is made: the extension does not link it.
#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>

#include "wgmma_block.h"

namespace fed {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

cudaError_t find(Encode& encode) {
  static std::atomic<Encode> found{nullptr};
  encode = found.load(std::memory_order_acquire);
  if (encode != nullptr) return cudaSuccess;
  void* symbol = nullptr;
  cudaDriverEntryPointQueryResult query = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &query);
#else
  const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &symbol, cudaEnableDefault, &query);
#endif
  if (status != cudaSuccess) return status;
  if (query != cudaDriverEntryPointSuccess || symbol == nullptr) return cudaErrorNotSupported;
  encode = reinterpret_cast<Encode>(symbol);
  found.store(encode, std::memory_order_release);
  return cudaSuccess;
}

}  // namespace

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) % alignof(CUtensorMap) == 0, "one fits");

int make_map(const Boxes& boxes, TensorMap& map) {
  Encode encode;
  const cudaError_t status = find(encode);
  if (status != cudaSuccess) {
    cudaGetLastError();  // told here: not to whoever asks next
    return status;
  }
  cuuint64_t size[5], stride[4];
  cuuint32_t extent[5], step[5];
  for (int i = 0; i < 5; ++i) {
    size[i] = cuuint64_t(boxes.size[i]);
    extent[i] = cuuint32_t(boxes.extent[i]);
    step[i] = 1;
    if (i < 4) stride[i] = cuuint64_t(boxes.stride[i]);
  }
  const CUtensorMapSwizzle swizzle = boxes.swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : boxes.swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                           : CU_TENSOR_MAP_SWIZZLE_32B;
  const CUresult result =
      encode(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5, const_cast<void*>(boxes.base),
             size, stride, extent, step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return int(result);  // the runtime's errors have the driver's numbers
}

int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 0;
  return count;
}

}  // namespace fed
