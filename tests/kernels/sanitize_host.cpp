// The driver's memory on the host, and kernels that run blocks one thread after the other. SANITIZE_SKIP names a kernel
// that does nothing.
#include "emulation.h"
#include "host_device.h"

namespace sanitize {

static const bool told = (fed::skip = std::getenv("SANITIZE_SKIP"), true);

}  // namespace sanitize
