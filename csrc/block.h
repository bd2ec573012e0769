// How the CUDA kernels are written: as phases over the threads of one block.
//
// A kernel's body is a function template over the block it runs on. DeviceBlock is a CUDA block; HostBlock runs the
// same body on one CPU thread, phase by phase, thread by thread, so that grid, block and thread arithmetic and the
// reductions are tested without a GPU. `reversed` walks the threads backwards: a result that changes has a race.
#pragma once

#include "numbers.h"

namespace fed {

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

template <int THREADS>
struct HostBlock {
  static constexpr int threads = THREADS;

  template <class V>
  struct PerThread {
    V value[THREADS];
    V& operator[](int thread) { return value[thread]; }
  };

  int index;
  bool reversed;

  template <class F>
  void each(F f) {
    for (int thread = 0; thread < THREADS; ++thread) f(reversed ? THREADS - 1 - thread : thread);
  }

  template <class F>
  void phase(F f) {
    each(f);
  }

  template <class V>
  PerThread<V> exchange(PerThread<V>& mine, int mask) {
    PerThread<V> other;
    for (int thread = 0; thread < THREADS; ++thread) other[thread] = mine[thread ^ mask];
    return other;
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

// Reduces `values` over WIDTH neighbouring threads (a power of two up to 32): every one of them gets the result.
template <int WIDTH, class Block, class V, class Op>
FED_HD void reduce_neighbours(Block& block, typename Block::template PerThread<V>& values, Op op) {
FED_UNROLL
  for (int mask = WIDTH / 2; mask > 0; mask /= 2) {
    auto other = block.exchange(values, mask);
    block.each([&](int thread) { values[thread] = op(values[thread], other[thread]); });
  }
}

// Reduces `values` over the block in a fixed order; every thread gets the result. `scratch` holds threads/32 values.
template <class Block, class V, class Op>
FED_HD V reduce(Block& block, typename Block::template PerThread<V>& values, V* scratch, Op op) {
  reduce_neighbours<32, Block, V>(block, values, op);
  block.phase([&](int thread) {
    if (thread % 32 == 0) scratch[thread / 32] = values[thread];
  });
  V total = scratch[0];
  for (int warp = 1; warp < Block::threads / 32; ++warp) total = op(total, scratch[warp]);
  block.phase([](int) {});  // the scratch is free again
  return total;
}

}  // namespace fed
