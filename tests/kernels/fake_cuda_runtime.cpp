// Stands in for the CUDA runtime under the halo convolution's launcher, for tests/kernels/test_halo_launch.py: keeps
// what each kernel is allowed and launched with, and refuses what a device would. No kernel runs.
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <string>
#include <utility>

#include "halo_conv.h"

namespace {

int device = 0, optin = 227 * 1024, ptx = 90;
std::map<std::pair<int, const void*>, int> limits;
std::string record;
// Kernels are registered before this file's own variables are made.
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> found;
  return found;
}

struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} configuration;

void note(const char* what, const void* kernel, long bytes) {
  const std::string& name = names()[kernel];
  const size_t at = name.find("HaloShapeILi");
  record += std::to_string(device) + " " + what + " " + name.substr(at + 12, name.find('E', at) - at - 12) +
         (name.find("HaloForward") != std::string::npos ? " forward " : " gradient ") + std::to_string(bytes) + "\n";
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(
    void**, const char* kernel, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  names()[kernel] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t shared, cudaStream_t) {
  note("launch", kernel, long(shared));
  const auto limit = limits.find({device, kernel});
  return int(shared) <= (limit == limits.end() ? 48 * 1024 : limit->second) ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaLaunchKernel(  // before CUDA 13
    const void* function, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t stream) {
  const auto kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return __cudaLaunchKernel(kernel, grid, block, args, shared, stream);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  std::memset(attributes, 0, sizeof *attributes);
  attributes->ptxVersion = ptx;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  note("limit", kernel, value);
  if (value > optin) return cudaErrorInvalidValue;
  limits[{device, kernel}] = value;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* current) {
  *current = device;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return ""; }

// ---- what the test calls

void use_device(int number, int shared_memory, int virtual_architecture) {
  device = number;
  optin = shared_memory;
  ptx = virtual_architecture;
}

const char* events() { return record.c_str(); }
void forget() { record.clear(); }

int launch(int columns, int images, int rows, int width, int channels, bool gradient) {
  const auto run = [&](auto args) {
    args.G = 1;
    args.N = images;
    args.H = rows;
    args.W = width;
    args.Ci = channels;
    args.Co = columns;
    args.tile = fed::halo_tile(images, rows, width, images, rows, width);
    return fed::launch_halo(args, columns, nullptr);
  };
  return gradient ? run(fed::HaloArgs<fed::HaloGradient>{}) : run(fed::HaloArgs<fed::HaloForward>{});
}

int most_shared() { return fed::HALO_MOST_SHARED; }
bool has_body(int architecture) { return fed::halo_has_body(architecture); }
}
