// Runs every CUDA kernel of csrc on small odd sizes and compares with plain loops; a line each. Exits with 0 if all
// are right, 1 if one is wrong, 77 without a device. Needs no PyTorch, so that compute-sanitizer takes seconds over it.
// Arguments: the parts to run (rows, steps, packing, halo), by default all.
#include "sanitize_driver.h"

namespace sanitize {
bool poisoned = false;
}

int main(int count, char** arguments) {
  if (sanitize::devices() < 1) {
    std::puts("no CUDA device: nothing was run");
    return 77;
  }
  const struct {
    const char* name;
    bool (*run)();
  } parts[] = {{"rows", sanitize::rows}, {"steps", sanitize::steps}, {"packing", sanitize::packing},
               {"halo", sanitize::halo}};
  bool good = true;
  int ran = 0;
  for (const auto& part : parts) {
    bool wanted = count == 1;
    for (int n = 1; n < count; ++n) wanted = wanted || part.name == std::string(arguments[n]);
    if (!wanted) continue;
    good = part.run() && good;
    ++ran;
  }
  if (ran < count - 1) std::puts("WRONG  a part of another name than rows, steps, packing, halo");
  if (!good || ran < count - 1) return 1;
  std::puts("all right");
  return 0;
}
