// In the place of csrc/wgmma_conv.cu.
#include "emulation_wgmma.h"
#include "wgmma_conv.h"

FED_WIDE_KERNELS(FED_LAUNCH_WGMMA)

// of a geometry: rows of statistics of a group, bytes of a box, whether it fits
extern "C" __attribute__((visibility("default"))) void wide_plan_of(const int64_t* n, int64_t* found) {
  const fed::ConvWindow window{int(n[0]), int(n[1]), int(n[0]) / 2};
  const bool gradient = n[2];
  const int stride = window.stride, N = int(n[4]), H = int(n[5]), W = int(n[6]);  // of the result
  const int h = gradient ? (H + stride - 1) / stride : H * stride, w = gradient ? (W + stride - 1) / stride : W * stride;
  const fed::ConvGeometry at = fed::conv_geometry(
      window, gradient, n[3] != 0, N, h, w, H, W, int(n[7]), int(n[8]), stride, int(n[9]));
  const fed::WidePlan plan = fed::wide_plan(at, gradient, n[10] != 0, int(n[11]), int(n[12]));
  found[0] = plan.pair ? plan.parts : 2 * plan.parts;
  found[1] = plan.box_bytes;
  found[2] = plan.total > 0;
}
