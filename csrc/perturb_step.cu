// CUDA launchers of the perturbation step.
#include "launch.cuh"
#include "perturb_step.h"

FED_STEP_KERNELS(FED_LAUNCH)
