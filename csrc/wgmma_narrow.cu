// The narrow wgmma convolution's kernels.
#include "wgmma_narrow.h"
#include "wgmma_launch.cuh"

FED_NARROW_KERNELS(FED_LAUNCH_WGMMA)
