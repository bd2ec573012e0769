// The drivers' memory on the host, where kernels run as they are launched: once per program.
#pragma once

#include <cstdlib>
#include <cstring>

#include "sanitize_driver.h"

namespace sanitize {

int devices() { return 1; }
void* allocate(size_t bytes) { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); }
void release(void* memory) { std::free(memory); }
void fill(void* memory, int byte, size_t bytes) { std::memset(memory, byte, bytes); }
void upload(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void download(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
std::string synchronise() { return ""; }

}  // namespace sanitize
