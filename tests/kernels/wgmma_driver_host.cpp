// The driver's memory and launches on the CPU, for the test of its checks.
#include "emulation_wgmma.h"
#include "host_device.h"
#include "wgmma_driver.h"
#include "wgmma_read_operand.h"

FED_READ_OPERAND_KERNELS(FED_LAUNCH_WGMMA)

namespace driver {

std::string after(int status) { return status == 0 ? "" : "not launched: " + fed::wgmma_misuse; }
int step() { return 9; }
void add_measurements(std::vector<Test>&) {}

}  // namespace driver

// The command line, in the process of the test; `skip` is part of the name of kernels that do nothing, or null.
extern "C" __attribute__((visibility("default"))) int wgmma_driver(int count, char** arguments, const char* skip) {
  fed::skip = skip;
  const int status = driver::main(count, arguments);
  fed::skip = nullptr;
  return status;
}
