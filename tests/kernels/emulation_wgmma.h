// The launcher of kernels of wgmma_block.h's form in the place of csrc's wgmma_*.cu files. Each of those has an
// emulation_wgmma_*.cpp beside this one, with the same kernels.
#pragma once

#include "host_wgmma.h"

namespace fed {

template <class Kernel>
int launch_wgmma(const Kernel& kernel, void*) {
  return skipped(__PRETTY_FUNCTION__) ? 0 : run_wgmma(kernel);
}

}  // namespace fed

#define FED_LAUNCH_WGMMA(...) template int fed::launch_wgmma(const __VA_ARGS__&, void*);
