// CUDA launcher of the halo convolution: pointers, sizes and a stream, no PyTorch.
#include "halo_conv.h"

#include <cuda_runtime.h>

#include <mutex>
#include <vector>

namespace fed {
namespace {

template <class Shape, class Epilogue>
__global__ void __launch_bounds__(Shape::THREADS, Shape::BLOCKS)
    halo_kernel(const __grid_constant__ HaloArgs<Epilogue> args) {
#ifdef __CUDA_ARCH__
  if constexpr (halo_has_body(__CUDA_ARCH__)) {
    extern __shared__ __align__(128) char shared[];
    using Block = TensorBlock<Shape::THREADS>;
    Block block{{int(blockIdx.x)}, shared};
    HaloBlock<Block, Shape, Epilogue>(block, args).run();
  }
#endif
}

// Once per device and kernel, before its first launch there: a limit of shared memory set for each launch would be
// lowered by a small one under a large one that a graph holds. An error is met again by the next launch.
template <class Shape, class Epilogue>
cudaError_t prepare() {
  static std::mutex mutex;
  static std::vector<bool> prepared;
  const auto kernel = halo_kernel<Shape, Epilogue>;
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  if (size_t(device) < prepared.size() && prepared[device]) return cudaSuccess;
  cudaFuncAttributes compiled;
  status = cudaFuncGetAttributes(&compiled, kernel);
  if (status != cudaSuccess) return status;
  if (!halo_has_body(10 * compiled.ptxVersion)) return cudaErrorNotSupported;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, HALO_SHARED<Shape>);
  if (status != cudaSuccess) return status;
  // All that the multiprocessor has, so that as many blocks fit as the registers allow.
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (status != cudaSuccess) return status;
  if (prepared.size() <= size_t(device)) prepared.resize(device + 1);
  prepared[device] = true;
  return cudaSuccess;
}

template <class Shape, class Epilogue>
int launch_shape(const HaloArgs<Epilogue>& args, cudaStream_t stream) {
  const cudaError_t status = prepare<Shape, Epilogue>();
  if (status != cudaSuccess) {
    cudaGetLastError();  // told here: not to whoever asks next
    return status;
  }
  const int shared = halo_layout<Shape>(args.tile, args.Ci).total;
  halo_kernel<Shape, Epilogue><<<unsigned(halo_grid<Shape>(args)), Shape::THREADS, shared, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

template <class Epilogue>
int launch_halo(const HaloArgs<Epilogue>& args, int columns, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (columns) {
    case 16:
      return launch_shape<Halo16>(args, s);
    case 32:
      return launch_shape<Halo32>(args, s);
    case 64:
      return launch_shape<Halo64>(args, s);
    case 128:
      return launch_shape<Halo128>(args, s);
    default:
      return cudaErrorInvalidValue;
  }
}

template int launch_halo<HaloForward>(const HaloArgs<HaloForward>&, int, void*);
template int launch_halo<HaloGradient>(const HaloArgs<HaloGradient>&, int, void*);

const char* launch_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // namespace fed
