// Runs the sample kernels on the CPU and compares with plain loops: a line per case, its fault, what was found.
// Arguments are faults; `races` runs few cases, for the sanitizers.
#include "wgmma_samples.h"

#include <cstdio>

#include "host_wgmma.h"

using namespace fed;
using namespace samples;

namespace {

constexpr int C = 64;

std::vector<bf16> quarters(size_t count, int seed) {
  std::vector<bf16> values(count);
  uint32_t state = seed;
  for (bf16& value : values) {
    state = state * 1664525u + 1013904223u;
    value = narrow<bf16>((int(state >> 24) % 9 - 4) / 4.0f);
  }
  return values;
}

// [N, H, W, C] in boxes of `columns` x `rows` positions of `images`.
TensorMap positions(const std::vector<bf16>& tensor, int N, int H, int W, int columns, int images, int rows) {
  TensorMap map;
  const Boxes boxes{tensor.data(), {C, W, N, H, 1}, {C * 2, H * W * C * 2, W * C * 2, N * H * W * C * 2},
                    {C, columns, images, rows, 1}, 128};
  set_boxes(boxes, map);
  boxes_of(map);
  return map;
}

struct Size {
  int N, H, W;
};

// Wrong elements, or -1 where the emulation found a misuse.
int convolve(Size size, int fault, bool copies, bool transform, int grid) {
  const auto [N, H, W] = size;
  const auto x = quarters(N * H * W * C, 1), w = quarters(9 * C * C, 2);
  std::vector<bf16> z(N * H * W * C, bf16{0xffff});
  const ConvSource source{3, 1, 1};
  SampleConv kernel{};
  kernel.tile = conv_tile(N, H, W);
  kernel.steps = conv_steps(&source, 1, false, copies);
  kernel.fault = fault;
  kernel.grid = grid;
  kernel.transform = transform;
  const ConvTile& tile = kernel.tile;
  kernel.x = positions(x, N, H, W, kernel.steps.columns, tile.images, tile.rows + kernel.steps.border);
  kernel.z = positions(z, N, H, W, TILE_COLUMNS, tile.images, tile.rows);
  set_boxes({w.data(), {C, C, 9, 1, 1}, {C * 2, C * C * 2, 9 * C * C * 2, 9 * C * C * 2}, {C, 64, 1, 1, 1}, 128},
            kernel.weight);
  if (run_wgmma(kernel) != 0) return -1;
  int wrong = 0;
  for (int n = 0; n < N; ++n)
    for (int h = 0; h < H; ++h)
      for (int v = 0; v < W; ++v)
        for (int o = 0; o < C; ++o) {
          float sum = 0;  // exact
          for (int tap = 0; tap < 9; ++tap) {
            const int y = h + tap / 3 - 1, u = v + tap % 3 - 1;
            if (y < 0 || y >= H || u < 0 || u >= W) continue;
            for (int i = 0; i < C; ++i)
              sum += widen(x[((n * H + y) * W + u) * C + i]) * widen(w[(tap * C + i) * C + o]);
          }
          const float expected = widen(narrow<bf16>(transform ? 2 * sum : sum));
          wrong += !(widen(z[((n * H + h) * W + v) * C + o]) == expected);
        }
  return wrong;
}

void run(int fault, bool few = false) {
  for (bool backwards : {false, true})
    for (bool offsets : {false, true})
      for (bool copies : {false, true})
        for (bool transform : {false, true})
          for (const Size& size : {Size{3, 5, 9}, Size{17, 8, 8}, Size{1, 3, 2}}) {
            if (fault != NONE && (offsets || size.N != 17)) continue;
            if (few && (offsets || size.N != 3)) continue;
            reversed = backwards;
            swizzle_of = offsets ? SwizzleOf::OFFSET : SwizzleOf::ADDRESS;
            const int wrong = convolve(size, fault, copies, transform, fault == NONE ? 2 : 1);
            std::printf("%d %d %d %d %d %d %dx%dx%d %s\n", fault, wrong, backwards, offsets, copies, transform, size.N,
                        size.H, size.W, wrong < 0 ? wgmma_misuse.c_str() : "");
          }
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 2 && arguments[1] == std::string("races")) return run(NONE, true), 0;
  for (int i = 1; i < count; ++i) run(std::atoi(arguments[i]));
}
