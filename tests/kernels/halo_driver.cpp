// Runs the halo convolution's blocks on the CPU, for tests/kernels/test_halo_blocks.py. Shared memory starts as NaN in
// every block; `reversed` walks blocks and threads backwards and lets asynchronous copies happen at once.
#include <cstdlib>
#include <cstring>

#include "halo_conv.h"

using namespace fed;

namespace {

template <class Shape, class Epilogue>
void launch(const HaloArgs<Epilogue>& args, bool reversed) {
  using Block = HostTensorBlock<Shape::THREADS>;
  const int bytes = halo_layout<Shape>(args.tile, args.Ci).total, grid = halo_grid<Shape>(args);
  char* shared = static_cast<char*>(std::aligned_alloc(128, (bytes + 127) / 128 * 128));
  for (int n = 0; n < grid; ++n) {
    std::memset(shared, 0xff, bytes);
    Block block(reversed ? grid - 1 - n : n, reversed, shared);
    HaloBlock<Block, Shape, Epilogue>(block, args).run();
  }
  std::free(shared);
}

template <class Epilogue>
void launch(const HaloArgs<Epilogue>& args, int64_t columns, bool reversed) {
  switch (columns) {
    case 16:
      return launch<Halo16>(args, reversed);
    case 32:
      return launch<Halo32>(args, reversed);
    case 64:
      return launch<Halo64>(args, reversed);
    case 128:
      return launch<Halo128>(args, reversed);
  }
}

// sizes: G N H W Ci Co HR WR CR, the residual's stride, the tile, columns of a block, elements of a group of x (or 0)
template <class Epilogue>
HaloArgs<Epilogue> arguments(const int64_t* sizes) {
  HaloArgs<Epilogue> args{};
  int* const fields[] = {&args.G,  &args.N,  &args.H,  &args.W,  &args.Ci,
                         &args.Co, &args.HR, &args.WR, &args.CR, &args.residual_stride};
  for (int* field : fields) *field = int(*sizes++);
  args.tile = halo_tile(int(sizes[0]), int(sizes[1]), int(sizes[2]), args.N, args.H, args.W);
  args.x_stride = sizes[4];
  return args;
}

}  // namespace

extern "C" {

// Bytes of shared memory of a block, and its threads.
void halo_needs(const int64_t* tile, int64_t channels, int64_t* needs) {
  const HaloTile of = halo_tile(int(tile[0]), int(tile[1]), int(tile[2]), 1, 1, 1);
  const auto fill = [&](auto shape) {
    needs[0] = halo_layout<decltype(shape)>(of, int(channels)).total;
    needs[1] = shape.THREADS;
    needs[2] = shape.BLOCKS;
  };
  switch (tile[3]) {
    case 16:
      return fill(Halo16());
    case 32:
      return fill(Halo32());
    case 64:
      return fill(Halo64());
    case 128:
      return fill(Halo128());
  }
}

// strides: from one slot's row to the next of the prologue, bias, next and center
void halo_forward(
    const bf16* x, const bf16* weight, const int32_t* slots, const int32_t* inputs, const float* in_scale,
    const float* in_shift, const float* bias, const bf16* residual, const float* next_scale, const float* next_shift,
    const float* center, bf16* z, bf16* activated, uint8_t* mask, float* statistics, const int64_t* sizes,
    const int64_t* strides, bool in_relu, bool relu, bool reversed) {
  auto args = arguments<HaloForward>(sizes);
  const auto rows = [&](const float* values, int i) { return Rows{values, int(strides[i])}; };
  args.x = x;
  args.weight = weight;
  args.slots = slots;
  args.inputs = inputs;
  args.in_scale = rows(in_scale, 0);
  args.in_shift = rows(in_shift, 0);
  args.in_relu = in_relu;
  args.residual = residual;
  args.statistics = statistics;
  args.epilogue = {rows(bias, 1), rows(next_scale, 2), rows(next_shift, 2), rows(center, 3), z, activated, mask, relu};
  launch(args, sizes[13], reversed);
}

// strides: of scale and of mean
void halo_gradient(
    const bf16* d, const bf16* weight, const int32_t* slots, const bf16* residual, const uint8_t* mask,
    const float* scale, const bf16* z, const float* mean, const float* inv_std, bf16* out, float* statistics,
    const int64_t* sizes, const int64_t* strides, bool residual_first, bool reversed) {
  auto args = arguments<HaloGradient>(sizes);
  const auto rows = [&](const float* values, int i) { return Rows{values, int(strides[i])}; };
  args.x = d;
  args.weight = weight;
  args.slots = slots;
  args.residual = residual;
  args.statistics = statistics;
  args.epilogue = {mask, rows(scale, 0), rows(mean, 1), rows(inv_std, 1), z, out, residual_first};
  launch(args, sizes[13], reversed);
}
}
