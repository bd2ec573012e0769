// How the CUDA kernels are written: as phases over the threads of one block.
//
// A kernel is a struct of its operands with
//   THREADS, BLOCKS   of a block, and the blocks per multiprocessor that registers are kept free for
//   Scratch           its shared memory
//   grid()            its blocks
//   run(block, scratch), a template over the block it runs on, called for every block
// DeviceBlock is a CUDA block. The tests have another, which runs the same kernel on one CPU thread, phase by phase and
// thread by thread, so that grid, block and thread arithmetic and the reductions are tested without a GPU.
#pragma once

#include "numbers.h"

namespace fed {

// Puts a kernel on a stream; 0 or the CUDA error. Defined for the kernels that launch.cuh is asked for.
template <class Kernel>
int launch(const Kernel& kernel, void* stream);

template <int THREADS>
struct DeviceBlock {
  static constexpr int threads = THREADS;

  template <class V>
  struct PerThread {
    V value;
    FED_HD V& operator[](int) { return value; }
  };

  int index;  // of the block in its grid

  // f(thread) for every thread, touching nothing that another thread writes.
  template <class F>
  FED_HD void each(F f) {
#ifdef __CUDA_ARCH__
    f(int(threadIdx.x));
#endif
  }

  // f(thread) for every thread, then a barrier: what one thread writes, all may read afterwards.
  template <class F>
  FED_HD void phase(F f) {
#ifdef __CUDA_ARCH__
    f(int(threadIdx.x));
    __syncthreads();
#endif
  }

  // The value of the thread whose number differs by `mask` < 32.
  template <class V>
  FED_HD PerThread<V> exchange(PerThread<V>& mine, int mask) {
#ifdef __CUDA_ARCH__
    return {__shfl_xor_sync(0xffffffffu, mine.value, mask)};
#else
    return mine;
#endif
  }
};

struct Sum {
  template <class V>
  FED_HD V operator()(V a, V b) const {
    return a + b;
  }
};
struct Max {
  template <class V>
  FED_HD V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};

// Reduces f(thread) over the block in a fixed order; every thread gets the result. `scratch` holds threads/32 values.
template <class V, class Block, class Op, class F>
FED_HD V reduce(Block& block, V* scratch, Op op, F f) {
  typename Block::template PerThread<V> values;
  block.each([&](int thread) { values[thread] = f(thread); });
FED_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    auto other = block.exchange(values, mask);
    block.each([&](int thread) { values[thread] = op(values[thread], other[thread]); });
  }
  block.phase([&](int thread) {
    if (thread % 32 == 0) scratch[thread / 32] = values[thread];
  });
  V total = scratch[0];
  for (int warp = 1; warp < Block::threads / 32; ++warp) total = op(total, scratch[warp]);
  block.phase([](int) {});  // the scratch is free again
  return total;
}

}  // namespace fed
