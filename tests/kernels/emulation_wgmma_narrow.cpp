// In the place of csrc/wgmma_narrow.cu.
#include "emulation_wgmma.h"
#include "wgmma_narrow.h"

FED_NARROW_KERNELS(FED_LAUNCH_WGMMA)
