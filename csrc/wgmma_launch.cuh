// The CUDA launcher of every kernel of wgmma_block.h's form: operands, a grid and a stream, no PyTorch. Only code for
// sm_90a has the kernels' bodies.
#pragma once

#include <cuda_runtime.h>

#include <mutex>
#include <vector>

#include "wgmma_block.h"

namespace fed {

template <class Kernel>
__global__ void __launch_bounds__(128 * (1 + Kernel::CONSUMERS), 1)
    wgmma_kernel(const __grid_constant__ Kernel kernel) {
#ifdef FED_WGMMA
  extern __shared__ __align__(1024) char shared[];
  // From one lane, so that the compiler knows it to be the same for the warp
  const int role = __shfl_sync(0xffffffffu, int(threadIdx.x / 128), 0);
  WgmmaBlock block{int(blockIdx.x), int(gridDim.x), shared, role - 1};
  if (threadIdx.x == 0) kernel.begin(block);
  __syncthreads();
  if (role == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Kernel::PRODUCER_REGISTERS));
    if constexpr (Prepares<Kernel>::value) {
      kernel.prepare(block);
    } else {
      if (threadIdx.x == 0) kernel.produce(block);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Kernel::CONSUMER_REGISTERS));
    kernel.consume(block);
  }
#endif
}

constexpr int WGMMA_MOST_SHARED = 227 * 1024;

// Once per device and kernel, before its first launch there; an error is met again by the next launch.
template <class Kernel>
cudaError_t prepare_wgmma() {
  static std::mutex mutex;
  static std::vector<bool> prepared;
  const auto kernel = wgmma_kernel<Kernel>;
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  if (size_t(device) < prepared.size() && prepared[device]) return cudaSuccess;
  cudaFuncAttributes compiled;
  status = cudaFuncGetAttributes(&compiled, kernel);
  if (status != cudaSuccess) return status;
  // Without a body it has hardly any, and would leave its results as they were.
  if (compiled.numRegs < Kernel::PRODUCER_REGISTERS) return cudaErrorNotSupported;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, WGMMA_MOST_SHARED);
  if (status != cudaSuccess) return status;
  if (prepared.size() <= size_t(device)) prepared.resize(device + 1);
  prepared[device] = true;
  return cudaSuccess;
}

template <class Kernel>
int launch_wgmma(const Kernel& kernel, void* stream) {
  static_assert(registers_suffice<Kernel>(), "registers");
  static_assert(sizeof(Kernel) <= 32764, "what a kernel of compute capability 7.0 and later takes as parameters");
  const cudaError_t status = prepare_wgmma<Kernel>();
  if (status != cudaSuccess) {
    cudaGetLastError();  // told here: not to whoever asks next
    return status;
  }
  wgmma_kernel<Kernel><<<unsigned(kernel.blocks()), 128 * (1 + Kernel::CONSUMERS), kernel.shared_bytes(),
                         static_cast<cudaStream_t>(stream)>>>(kernel);
  return cudaGetLastError();
}

}  // namespace fed

#define FED_LAUNCH_WGMMA(...) template int fed::launch_wgmma(const __VA_ARGS__&, void*);
