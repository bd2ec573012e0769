// In the place of csrc's .cu files and tensors.cpp: the ops as they are for CUDA tensors, with kernels that run on the
// CPU, for tests/kernels/emulation.py.
#include "emulation.h"

#include "host_memory.h"
#include "tensors.h"

namespace fed {

bool on_cuda(const Tensor& tensor) { return tensor.is_cpu(); }
Launches::Launches(const Tensor&) {}
void Launches::check(int status, const char*) {
  STD_TORCH_CHECK(status == 0, "fastensdistill: the emulation found: ", wgmma_misuse);
}

}  // namespace fed

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void walk_backwards(bool backwards) { fed::reversed = backwards; }

// Bytes of shared memory of a block of the halo convolution, its threads, and the blocks registers are kept free for.
EXPORTED void halo_needs(const int64_t* tile, int64_t channels, int64_t* needs) {
  const fed::HaloTile of = fed::halo_tile(int(tile[0]), int(tile[1]), int(tile[2]), 1, 1, 1);
  fed::with_halo_shape(tile[3], [&](auto shape) {
    needs[0] = fed::halo_layout<decltype(shape)>(of, int(channels)).total;
    needs[1] = shape.THREADS;
    needs[2] = shape.BLOCKS;
  });
}
