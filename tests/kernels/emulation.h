// Launchers in the place of those in csrc's .cu files: they run all blocks of a kernel on the CPU, one after the other.
// Shared memory starts as NaN in every block.
#pragma once

#include <cstdlib>

#include "distillation_loss.h"
#include "halo_conv.h"
#include "host_blocks.h"
#include "pack.h"
#include "perturb_step.h"

namespace fed {

// f(block) for every block of a grid.
template <class F>
void for_blocks(int grid, F f) {
  for (int n = 0; n < grid; ++n) f(reversed ? grid - 1 - n : n);
}

template <class Kernel>
int launch(const Kernel& kernel, void*) {
  if (skipped(__PRETTY_FUNCTION__)) return 0;
  for_blocks(int(kernel.grid()), [&](int index) {
    HostBlock<Kernel::THREADS> block{index};
    typename Kernel::Scratch scratch;
    std::memset(static_cast<void*>(&scratch), 0xff, sizeof scratch);
    kernel.run(block, scratch);
  });
  return 0;
}

// f(Halo16()) and so on, of the shape with these columns.
template <class F>
void with_halo_shape(int64_t columns, F f) {
  columns == 16 ? f(Halo16()) : columns == 32 ? f(Halo32()) : columns == 64 ? f(Halo64()) : f(Halo128());
}

template <class Epilogue>
int launch_halo(const HaloArgs<Epilogue>& args, int columns, void*) {
  if (skipped(__PRETTY_FUNCTION__)) return 0;
  with_halo_shape(columns, [&](auto shape) {
    using Shape = decltype(shape);
    using Block = HostTensorBlock<Shape::THREADS>;
    const int bytes = (halo_layout<Shape>(args.tile, args.Ci).total + 127) / 128 * 128;
    char* shared = static_cast<char*>(std::aligned_alloc(128, bytes));
    for_blocks(halo_grid<Shape>(args), [&](int index) {
      std::memset(shared, 0xff, bytes);
      Block block(index, shared);
      HaloBlock<Block, Shape, Epilogue>(block, args).run();
    });
    std::free(shared);
  });
  return 0;
}

#define FED_LAUNCH(...) template int launch(const __VA_ARGS__&, void*);
FED_LOSS_KERNELS(FED_LAUNCH)
FED_SEED_KERNELS(FED_LAUNCH)
FED_STEP_KERNELS(FED_LAUNCH)
FED_PACK_KERNELS(FED_LAUNCH)
template int launch_halo(const HaloArgs<HaloForward>&, int, void*);
template int launch_halo(const HaloArgs<HaloGradient>&, int, void*);

}  // namespace fed
