// In the place of csrc/wgmma_conv.cu.
#include "emulation_wgmma.h"
#include "wgmma_conv.h"

FED_WIDE_KERNELS(FED_LAUNCH_WGMMA)
