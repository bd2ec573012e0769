// CUDA launcher of the perturbation step: pointers, sizes and a stream, no PyTorch.
#include "perturb_step.h"

#include <cuda_runtime.h>

namespace fed {
namespace {

using StepBlock = DeviceBlock<STEP_THREADS>;

template <class T, class G>
__global__ void __launch_bounds__(STEP_THREADS) step_kernel(const __grid_constant__ StepArgs<T, G> args) {
  __shared__ StepScratch<typename Arithmetic<T>::type> scratch;
  StepBlock block{int(blockIdx.x)};
  step_body<StepBlock, T, G>(block, scratch, args);
}

}  // namespace

template <class T, class G>
int launch_step(const StepArgs<T, G>& args, void* stream) {
  step_kernel<T, G><<<unsigned(args.B), STEP_THREADS, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

#define FED_INSTANTIATE(T, G) template int launch_step<T, G>(const StepArgs<T, G>&, void*);
FED_INSTANTIATE(double, double)
FED_INSTANTIATE(float, float)
FED_INSTANTIATE(float, bf16)
FED_INSTANTIATE(float, half)
FED_INSTANTIATE(bf16, float)
FED_INSTANTIATE(bf16, bf16)
FED_INSTANTIATE(bf16, half)
FED_INSTANTIATE(half, float)
FED_INSTANTIATE(half, bf16)
FED_INSTANTIATE(half, half)

}  // namespace fed
