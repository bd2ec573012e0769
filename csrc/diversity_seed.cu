// CUDA launchers of the diversity seeds: pointers, sizes and a stream, no PyTorch.
#include "diversity_seed.h"

#include <cuda_runtime.h>

namespace fed {
namespace {

using RowBlock = DeviceBlock<ROW_THREADS>;

template <class T>
__global__ void __launch_bounds__(ROW_THREADS, ROW_BLOCKS<T>) pairs_kernel(const __grid_constant__ PairsArgs<T> args) {
  __shared__ RowScratch<typename Arithmetic<T>::type> scratch;
  RowBlock block{int(blockIdx.x)};
  pairs_body<RowBlock, T>(block, scratch, args);
}

template <class A>
__global__ void __launch_bounds__(ROW_THREADS) mean_kernel(const __grid_constant__ MeanArgs<A> args) {
  __shared__ RowScratch<A> scratch;
  RowBlock block{0};
  mean_body<RowBlock, A>(block, scratch, args);
}

template <class T>
__global__ void __launch_bounds__(ROW_THREADS, ROW_BLOCKS<T>) ods_kernel(const __grid_constant__ OdsArgs<T> args) {
  __shared__ RowScratch<typename Arithmetic<T>::type> scratch;
  RowBlock block{int(blockIdx.x)};
  ods_body<RowBlock, T>(block, scratch, args);
}

}  // namespace

template <class T>
int launch_pairs(const PairsArgs<T>& args, const MeanArgs<typename Arithmetic<T>::type>& means, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  pairs_kernel<T><<<pairs_grid(args), ROW_THREADS, 0, s>>>(args);
  mean_kernel<<<1, ROW_THREADS, 0, s>>>(means);
  return cudaGetLastError();
}

template <class T>
int launch_ods(const OdsArgs<T>& args, void* stream) {
  ods_kernel<T><<<unsigned(args.B), ROW_THREADS, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

#define FED_INSTANTIATE(T)                                                                        \
  template int launch_pairs<T>(const PairsArgs<T>&, const MeanArgs<Arithmetic<T>::type>&, void*); \
  template int launch_ods<T>(const OdsArgs<T>&, void*);
FED_INSTANTIATE(float)
FED_INSTANTIATE(double)
FED_INSTANTIATE(bf16)
FED_INSTANTIATE(half)

}  // namespace fed
