// In the place of csrc/tensor_map.cu.
#include "emulation_wgmma.h"

namespace fed {

static int told_multiprocessors = 3;
int multiprocessors() { return told_multiprocessors; }

int make_map(const Boxes& boxes, TensorMap& map) {
  wgmma_misuse = wrong_boxes(boxes);
  if (!wgmma_misuse.empty()) return 1;
  set_boxes(boxes, map);
  return 0;
}

}  // namespace fed

#define EXPORTED extern "C" __attribute__((visibility("default")))

// That operands of wgmma are swizzled by their own offsets instead of by addresses.
EXPORTED void swizzle_offsets(bool offsets) {
  fed::swizzle_of = offsets ? fed::SwizzleOf::OFFSET : fed::SwizzleOf::ADDRESS;
}
EXPORTED void use_multiprocessors(int count) { fed::told_multiprocessors = count; }
