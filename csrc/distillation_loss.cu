// CUDA launcher of the distillation loss and of the combined op: pointers, sizes and a stream, no PyTorch.
#include "distillation_loss.h"

#include <cuda_runtime.h>

namespace fed {
namespace {

using RowBlock = DeviceBlock<ROW_THREADS>;

template <class T>
__global__ void __launch_bounds__(ROW_THREADS, ROW_BLOCKS<T>) both_kernel(const __grid_constant__ BothArgs<T> args) {
  __shared__ LossScratch<typename Arithmetic<T>::type> scratch;
  RowBlock block{int(blockIdx.x)};
  both_body<RowBlock, T>(block, scratch, args);
}

template <class A>
__global__ void __launch_bounds__(ROW_THREADS) scalar_kernel(const __grid_constant__ ScalarArgs<A> args) {
  __shared__ RowScratch<A> scratch;
  RowBlock block{0};
  scalar_body<RowBlock, A>(block, scratch, args);
}

}  // namespace

template <class T>
int launch_both(const BothArgs<T>& args, const ScalarArgs<typename Arithmetic<T>::type>& scalars, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  both_kernel<T><<<both_grid(args), ROW_THREADS, 0, s>>>(args);
  scalar_kernel<<<1, ROW_THREADS, 0, s>>>(scalars);
  return cudaGetLastError();
}

#define FED_INSTANTIATE(T) \
  template int launch_both<T>(const BothArgs<T>&, const ScalarArgs<Arithmetic<T>::type>&, void*);
FED_INSTANTIATE(float)
FED_INSTANTIATE(double)
FED_INSTANTIATE(bf16)
FED_INSTANTIATE(half)

}  // namespace fed
