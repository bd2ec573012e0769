// In the place of csrc/wgmma_weight_gradient.cu; and how the work is cut, for tests of its Python side.
#include "emulation_wgmma.h"
#include "wgmma_weight_gradient.h"

FED_WEIGHT_GRADIENT_KERNELS(FED_LAUNCH_WGMMA)

#define EXPORTED extern "C" __attribute__((visibility("default")))

// sizes: the fields of WeightGradientSizes and the multiprocessors. cut: blocks of a group, tiles, parts, splits, bytes
// of a stage and stages.
EXPORTED void weight_gradient_cut(const int64_t* sizes, int64_t* cut) {
  const auto at = [&](int i) { return int(sizes[i]); };
  const fed::WeightGradientCut found = fed::weight_gradient_cut(
      {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8) != 0, at(9) != 0}, at(10));
  const int values[] = {fed::blocks(found), found.tile.count, found.parts, found.splits, found.stage_bytes,
                        found.stages};
  for (int i = 0; i < 6; ++i) cut[i] = values[i];
}
