// CUDA launcher of the halo convolution: pointers, sizes and a stream, no PyTorch.
#include "halo_conv.h"

#include <cuda_runtime.h>

namespace fed {
namespace {

template <class Shape, class Epilogue>
__global__ void __launch_bounds__(Shape::THREADS, Shape::BLOCKS)
    halo_kernel(const __grid_constant__ HaloArgs<Epilogue> args) {
#if __CUDA_ARCH__ != 860 && __CUDA_ARCH__ != 890 && __CUDA_ARCH__ < 1200  // too little shared memory: never launched
  extern __shared__ __align__(128) char shared[];
  using Block = TensorBlock<Shape::THREADS>;
  Block block{{int(blockIdx.x)}, shared};
  HaloBlock<Block, Shape, Epilogue>(block, args).run();
#endif
}

template <class Shape, class Epilogue>
int launch_shape(const HaloArgs<Epilogue>& args, cudaStream_t stream) {
  const int shared = halo_layout<Shape>(args.tile, args.Ci).total;
  const auto kernel = halo_kernel<Shape, Epilogue>;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (status != cudaSuccess) return status;
  // All that the multiprocessor has, so that as many blocks fit as the registers allow.
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (status != cudaSuccess) return status;
  kernel<<<unsigned(halo_grid<Shape>(args)), Shape::THREADS, shared, stream>>>(args);
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

}  // namespace fed
