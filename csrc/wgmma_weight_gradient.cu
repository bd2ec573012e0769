// Kernels of the weight gradient by wgmma.
#include "wgmma_weight_gradient.h"

#include "wgmma_launch.cuh"

FED_WEIGHT_GRADIENT_KERNELS(FED_LAUNCH_WGMMA)
