// CUDA launcher of the packing: pointers, sizes and a stream, no PyTorch.
#include "pack.h"

#include <cuda_runtime.h>

namespace fed {
namespace {

using TileBlock = DeviceBlock<TILE_THREADS>;

// 4 KB is what every architecture and driver takes as parameters of a kernel.
static_assert(sizeof(PackArgs<double>) <= 4096, "fewer layers per launch");

template <class A>
__global__ void __launch_bounds__(TILE_THREADS) pack_kernel(const __grid_constant__ PackArgs<A> args) {
  __shared__ TileScratch<A> scratch;
  TileBlock block{int(blockIdx.x)};
  pack_body<TileBlock, A>(block, scratch, args);
}

}  // namespace

template <class A>
int launch_pack(const PackArgs<A>& args, void* stream) {
  pack_kernel<A><<<args.table.tiles, TILE_THREADS, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

template int launch_pack<float>(const PackArgs<float>&, void*);
template int launch_pack<double>(const PackArgs<double>&, void*);

const char* launch_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // namespace fed
