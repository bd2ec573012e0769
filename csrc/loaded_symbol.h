// A function of a library that the process has loaded already.
#pragma once

#include <dlfcn.h>

#include <atomic>

namespace fed {

// Null where the library is not loaded or has no such symbol. Only what was found is kept: a library may come later.
struct LoadedSymbol {
  const char* library;
  const char* name;
  std::atomic<void*> found{nullptr};

  void* get() {
    if (void* before = found.load(std::memory_order_acquire)) return before;
    void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = handle != nullptr ? dlsym(handle, name) : nullptr;
    found.store(symbol, std::memory_order_release);
    return symbol;
  }
};

}  // namespace fed
