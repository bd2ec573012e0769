// The driver's memory on a CUDA device.
#include <cuda_runtime_api.h>

#include <cstdlib>

#include "sanitize_driver.h"

namespace sanitize {
namespace {

void must(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("WRONG  %s: %s\n", what, cudaGetErrorString(status));
  std::fflush(stdout);
  std::exit(1);  // the context is lost: nothing after it could run
}

}  // namespace

int devices() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

void* allocate(size_t bytes) {
  void* memory = nullptr;
  must(cudaMalloc(&memory, bytes), "cudaMalloc");
  return memory;
}

void release(void* memory) { cudaFree(memory); }

void fill(void* memory, int byte, size_t bytes) { must(cudaMemset(memory, byte, bytes), "cudaMemset"); }

void upload(void* to, const void* from, size_t bytes) {
  must(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy to the device");
}

void download(void* to, const void* from, size_t bytes) {
  must(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy to the host");
}

std::string synchronise() {
  const cudaError_t status = cudaDeviceSynchronize();
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
}

}  // namespace sanitize
