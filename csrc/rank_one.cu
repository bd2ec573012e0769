// CUDA launchers of fold, un-fold, step and packing: pointers, sizes and a stream, no PyTorch.
#include "rank_one.h"

#include <cuda_runtime.h>

namespace fed {
namespace {

using TileBlock = DeviceBlock<TILE_THREADS>;

// 4 KB is what every architecture and driver takes as parameters of a kernel.
static_assert(sizeof(RankOneArgs<double>) <= 4096, "fewer layers per launch");

// Two blocks per processor: left to itself the compiler spills to reach five.
template <class A>
__global__ void __launch_bounds__(TILE_THREADS, 2) fold_kernel(const __grid_constant__ RankOneArgs<A> args) {
  TileBlock block{int(blockIdx.x)};
  fold_body<TileBlock, A>(block, args);
}

template <class A, bool UPDATE>
__global__ void __launch_bounds__(TILE_THREADS) unfold_kernel(const __grid_constant__ RankOneArgs<A> args) {
  __shared__ TileScratch<A> scratch;
  TileBlock block{int(blockIdx.x)};
  unfold_body<TileBlock, A, UPDATE>(block, scratch, args);
}

template <class A, bool UPDATE>
__global__ void __launch_bounds__(TILE_THREADS) factor_kernel(const __grid_constant__ RankOneArgs<A> args) {
  TileBlock block{int(blockIdx.x)};
  factor_body<TileBlock, A, UPDATE>(block, args);
}

template <class A>
__global__ void __launch_bounds__(TILE_THREADS) pack_kernel(const __grid_constant__ RankOneArgs<A> args) {
  __shared__ TileScratch<A> scratch;
  TileBlock block{int(blockIdx.x)};
  pack_body<TileBlock, A>(block, scratch, args);
}

}  // namespace

template <class A>
int launch_fold(const RankOneArgs<A>& args, void* stream) {
  fold_kernel<A><<<args.table.tiles, TILE_THREADS, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

template <class A>
int launch_unfold(const RankOneArgs<A>& args, bool update, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (update) {
    unfold_kernel<A, true><<<args.table.tiles, TILE_THREADS, 0, s>>>(args);
    factor_kernel<A, true><<<factor_grid(args), TILE_THREADS, 0, s>>>(args);
  } else {
    unfold_kernel<A, false><<<args.table.tiles, TILE_THREADS, 0, s>>>(args);
    factor_kernel<A, false><<<factor_grid(args), TILE_THREADS, 0, s>>>(args);
  }
  return cudaGetLastError();
}

template <class A>
int launch_pack(const RankOneArgs<A>& args, void* stream) {
  pack_kernel<A><<<args.table.tiles, TILE_THREADS, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

#define FED_INSTANTIATE(A)                                       \
  template int launch_fold<A>(const RankOneArgs<A>&, void*);         \
  template int launch_unfold<A>(const RankOneArgs<A>&, bool, void*); \
  template int launch_pack<A>(const RankOneArgs<A>&, void*);
FED_INSTANTIATE(float)
FED_INSTANTIATE(double)

const char* launch_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // namespace fed
