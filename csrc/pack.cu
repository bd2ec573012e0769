// CUDA launchers of the packing.
#include "launch.cuh"
#include "pack.h"

FED_PACK_KERNELS(FED_LAUNCH)
