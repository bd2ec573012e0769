// The wide wgmma convolution's kernels.
#include "wgmma_conv.h"
#include "wgmma_launch.cuh"

FED_WIDE_KERNELS(FED_LAUNCH_WGMMA)
