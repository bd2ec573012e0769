// The CUDA launcher of every kernel of block.h's form: operands, a grid and a stream, no PyTorch.
#pragma once

#include <cuda_runtime.h>

#include "block.h"

namespace fed {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::THREADS, Kernel::BLOCKS) block_kernel(const __grid_constant__ Kernel kernel) {
  __shared__ typename Kernel::Scratch scratch;
  DeviceBlock<Kernel::THREADS> block{int(blockIdx.x)};
  kernel.run(block, scratch);
}

template <class Kernel>
int launch(const Kernel& kernel, void* stream) {
  // 4 KB is what every architecture and driver takes as parameters of a kernel.
  static_assert(sizeof(Kernel) <= 4096, "fewer operands");
  block_kernel<<<kernel.grid(), Kernel::THREADS, 0, static_cast<cudaStream_t>(stream)>>>(kernel);
  return cudaGetLastError();
}

}  // namespace fed

#define FED_LAUNCH(...) template int fed::launch(const __VA_ARGS__&, void*);
