// The driver's memory on the host, and kernels that run blocks one thread after the other. SANITIZE_SKIP names a kernel
// that does nothing.
#include "emulation.h"
#include "sanitize_driver.h"

namespace sanitize {

int devices() { return 1; }
void* allocate(size_t bytes) { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); }
void release(void* memory) { std::free(memory); }
void fill(void* memory, int byte, size_t bytes) { std::memset(memory, byte, bytes); }
void upload(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void download(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
std::string synchronise() { return ""; }

static const bool told = (fed::skip = std::getenv("SANITIZE_SKIP"), true);

}  // namespace sanitize
