// The driver on a device: how it launches, and what it measures.
#include "wgmma_driver.h"
#include "wgmma_launch.cuh"
#include "wgmma_read_operand.h"

FED_READ_OPERAND_KERNELS(FED_LAUNCH_WGMMA)

namespace driver {

int step() { return 1; }

std::string after(int status) {
  if (status == 0) status = cudaDeviceSynchronize();
  return status == 0 ? "" : cudaGetErrorString(cudaError_t(status));
}

namespace {

using namespace fed;
using sanitize::Buffer;

constexpr int SHARED = 200 * 1024, GROUPS = 512, TIMED = 400;

// Cycles that `groups` groups of four products took a warpgroup, of as many as the block has.
template <bool M_INNERMOST, bool N_INNERMOST, int N>
__global__ void __launch_bounds__(256, 1)
    time_products(int start, int leading, int stride, int groups, long long* cycles, float* sink) {
#ifdef FED_WGMMA
  extern __shared__ __align__(1024) char shared[];
  WgmmaBlock block{0, 1, shared, __shfl_sync(0xffffffffu, int(threadIdx.x / 128), 0)};
  for (int at = threadIdx.x * 16; at < SHARED; at += blockDim.x * 16) block.write(0, at, Words{});
  block.publish();
  __syncthreads();
  WgmmaBlock::PerThread<Accumulator<N>> sum;
  FED_UNROLL
  for (int i = 0; i < N / 2; ++i) sum[0].at[i] = 0.0f;
  const uint64_t a = operand(block.address(block.number * 8192), 0, 1024, 128);
  const uint64_t b = operand(block.address(16384 + block.number * 65536 + start), leading, stride, 128);
  const long long begin = clock64();
  FED_ROLLED
  for (int group = 0; group < groups; ++group) {
    block.fence();
    FED_UNROLL
    for (int k = 0; k < 4; ++k)
      block.multiply<M_INNERMOST, N_INNERMOST>(sum, moved(a, M_INNERMOST ? 2048 * k : 32 * k),
                                               moved(b, N_INNERMOST ? 2 * stride * k : 32 * k));
    block.commit();
    block.complete<0>();
  }
  const long long end = clock64();
  if (threadIdx.x % 128 == 0) cycles[block.number] = end - begin;
  float total = 0;
  FED_UNROLL
  for (int i = 0; i < N / 2; ++i) total += sum[0].at[i];
  if (total != 0) *sink = total;
#endif
}

template <bool M_INNERMOST, bool N_INNERMOST, int N>
std::string products(const std::string& name, int start, int leading, int stride) {
  const auto kernel = time_products<M_INNERMOST, N_INNERMOST, N>;
  const int status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED);
  if (const std::string error = after(status); !error.empty()) return error;
  for (int warpgroups : {1, 2}) {
    const Buffer<long long> cycles(2);
    const Buffer<float> sink(1);
    for (int repeat = 0; repeat < 3; ++repeat)  // the last one counts
      kernel<<<1, 128 * warpgroups, SHARED>>>(start, leading, stride, GROUPS, cycles, sink);
    if (const std::string error = after(cudaGetLastError()); !error.empty()) return error;
    long long found[2] = {};
    sanitize::download(found, cycles, sizeof found[0] * warpgroups);
    const double each = double(std::max(found[0], found[1])) / (GROUPS * 4 * warpgroups);
    char line[200];
    std::snprintf(line, sizeof line, "measured %s, %s %.2f cycles", name.c_str(),
                  warpgroups == 1 ? "one warpgroup" : "two warpgroups", each);
    say(line);
  }
  return "";
}

// Sixteen independent products of a warp at a time, or with the loads that a block of 64 x 32 needs for them.
template <bool LOADS>
__global__ void __launch_bounds__(256, 1) time_mma(int repeats, long long* cycles, float* sink) {
  __shared__ __align__(128) char shared[16384];
  TensorBlock<256> block{{int(blockIdx.x)}, shared};
  for (int at = threadIdx.x * 16; at < 16384; at += 256 * 16) store_words(shared + at, {});
  __syncthreads();
  float sum[4][4][4] = {};
  uint32_t a[4][4] = {}, b[2][4] = {};
  const int row = threadIdx.x % 16, chunk = threadIdx.x / 16 % 2;
  const long long begin = clock64();
  FED_ROLLED
  for (int n = 0; n < repeats; ++n) {
    if constexpr (LOADS) {
      FED_UNROLL
      for (int i = 0; i < 6; ++i)
        block.template load_matrices<false>(
            [&](int) { return swizzled<8>(row + 16 * i, (chunk + 2 * n) % 8); },
            [&](int) -> uint32_t(&)[4] { return i < 4 ? a[i] : b[i - 4]; });
    }
    FED_UNROLL
    for (int i = 0; i < 4; ++i)
      FED_UNROLL
      for (int j = 0; j < 4; ++j)
        block.multiply([&](int) -> float(&)[4] { return sum[i][j]; }, [&](int) -> uint32_t(&)[4] { return a[i]; },
                       [&](int) { return b[j / 2] + j % 2 * 2; });
  }
  const long long end = clock64();
  if (threadIdx.x == 0) cycles[0] = end - begin;
  float total = 0;
  FED_UNROLL
  for (int i = 0; i < 64; ++i) total += sum[i / 16][i / 4 % 4][i % 4];
  if (total != 0) *sink = total;
}

template <bool LOADS>
std::string mma() {
  const Buffer<long long> cycles(1);
  const Buffer<float> sink(1);
  for (int repeat = 0; repeat < 3; ++repeat) time_mma<LOADS><<<1, 256>>>(GROUPS, cycles, sink);
  if (const std::string error = after(cudaGetLastError()); !error.empty()) return error;
  const double each = double(cycles.read()[0]) / (GROUPS * 16 * 8);
  char line[200];
  std::snprintf(line, sizeof line, "measured mma.sync m16n8k16 %s ldmatrix, eight warps %.2f cycles",
                LOADS ? "with" : "without", each);
  say(line);
  return "";
}

constexpr int STAGES = 4, BOX = 10 * 34 * 128, STAGE = (BOX + 1023) / 1024 * 1024;

// Every block asks for boxes of a tensor of `images` 32x32 images one after the other, as a convolution does.
__global__ void __launch_bounds__(128, 1) time_boxes(const __grid_constant__ TensorMap map, int images, int boxes) {
#ifdef FED_WGMMA
  extern __shared__ __align__(1024) char shared[];
  WgmmaBlock block{int(blockIdx.x), int(gridDim.x), shared, 0};
  if (threadIdx.x != 0) return;
  const int barriers = STAGES * STAGE;
  for (int stage = 0; stage < STAGES; ++stage) block.init(barriers + 8 * stage, 1);
  block.initialised();
  for (int n = 0; n < boxes + STAGES; ++n) {
    const int stage = n % STAGES, barrier = barriers + 8 * stage;
    if (n >= STAGES) block.wait(barrier, (n / STAGES + 1) % 2);
    if (n >= boxes) continue;
    const int box = n * block.grid + block.index;
    block.expect(barrier, BOX);
    block.load(map, stage * STAGE, barrier, {{0, box % 4 * 8 - 1, box / 4 % images, -1, 0}});
  }
#endif
}

std::string boxes(const std::string& name, int images) {
  const size_t values = size_t(images) * 32 * 32 * 64;
  const Buffer<bf16> tensor(values);
  TensorMap map;
  const int row = 32 * 64 * 2, image = 32 * row;
  int status = make_map({tensor, {64, 32, images, 32, 1}, {128, image, row, int64_t(image) * images}, {64, 10, 1, 34, 1},
                         128}, map);
  if (status == 0)
    status = cudaFuncSetAttribute(time_boxes, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED);
  if (const std::string error = after(status); !error.empty()) return error;
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  float milliseconds = 0;
  const int grid = multiprocessors();
  for (int repeat = 0; repeat < 3; ++repeat) {
    cudaEventRecord(begin);
    time_boxes<<<grid, 128, STAGES * STAGE + 1024>>>(map, images, TIMED);
    cudaEventRecord(end);
    if (const std::string error = after(cudaGetLastError()); !error.empty()) return error;
    cudaEventElapsedTime(&milliseconds, begin, end);
  }
  char line[200];
  std::snprintf(line, sizeof line, "measured %s %.4g bytes/s", name.c_str(),
                double(grid) * TIMED * BOX / (double(milliseconds) * 1e-3));
  say(line);
  return "";
}

}  // namespace

void add_measurements(std::vector<Test>& tests) {
  const auto add = [&](const std::string& name, auto run) {
    tests.push_back({"measure " + name, true, [=] { return run(name); }});
  };
  add("wgmma n256 aligned", [](auto name) { return products<true, false, 256>(name, 0, 0, 1024); });
  add("wgmma n256 shifted", [](auto name) { return products<true, false, 256>(name, 11 * 128, 0, 1280); });
  add("wgmma n192 overlapped", [](auto name) { return products<true, true, 192>(name, 10 * 128, 128, 1280); });
  add("wgmma n64", [](auto name) { return products<true, false, 64>(name, 0, 0, 1024); });
  add("wgmma n32", [](auto name) { return products<true, false, 32>(name, 0, 0, 1024); });
  add("wgmma n16", [](auto name) { return products<true, false, 16>(name, 0, 0, 1024); });
  add("mma.sync", [](auto) { return mma<false>(); });
  add("mma.sync and ldmatrix", [](auto) { return mma<true>(); });
  add("boxes from L2", [](auto name) { return boxes(name, 128); });
  add("boxes from memory", [](auto name) { return boxes(name, 4096); });
}

}  // namespace driver

int main(int count, char** arguments) { return driver::main(count, arguments); }
