// CUDA launchers of the loss and the seeds.
#include "distillation_loss.h"
#include "launch.cuh"

FED_LOSS_KERNELS(FED_LAUNCH)
FED_SEED_KERNELS(FED_LAUNCH)
