// halo_conv and halo_data_gradient for CUDA tensors: operands, outputs, registration.
#include "halo_conv.h"

#include "conv_operands.h"

namespace fed {
namespace {

using Tile = Sizes;  // images, rows and columns of positions, channels

// x (or d), the weights and what else both ops have. A residual whose every residual_stride-th position is added, or
// with `spread` one that is added at every residual_stride-th.
void check_common(
    const Operands& operands, const char* x_name, const Tensor& x, const char* weight_name, const Tensor& weight,
    const Tensor& weight_index, const Optional& residual, int64_t stride, bool spread, const Tile& tile) {
  const auto kind = ScalarType::BFloat16;
  operands.check(x_name, x, kind, {ANY, ANY, ANY, ANY, ANY}, true);
  const int64_t N = x.size(1), H = x.size(2), W = x.size(3), Ci = x.size(4);
  operands.check(weight_name, weight, kind, {ANY, 9, Ci, ANY}, true);
  const int64_t Co = weight.size(3);
  if (Ci < 16 || Ci % 16 != 0) operands.refuse(x_name, text_of(x), "channels in multiples of 16");
  if (Co < 16 || Co % 16 != 0) operands.refuse(weight_name, text_of(weight), "channels in multiples of 16");
  if (N * H * W > INT_MAX / std::max(Ci, Co) || 9 * Ci > INT_MAX / Co)
    operands.refuse(x_name, text_of(x), "fewer than 2^31 values in a group");
  operands.check("weight_index", weight_index, ScalarType::Int, {ANY}, true);
  if (stride < 1) operands.refuse("residual_stride", std::to_string(stride), "at least 1");
  if (residual) {
    operands.check("residual", residual, kind, {weight_index.size(0), N, ANY, ANY, ANY}, true);
    const auto fits = [&](int64_t own, int64_t size) {
      return spread ? own == (size + stride - 1) / stride : (own + stride - 1) / stride == size;
    };
    if (!fits(residual->size(2), H) || !fits(residual->size(3), W) || residual->size(4) % 8 != 0)
      operands.refuse("residual", text_of(*residual), "positions that fit " + text_of(x) + " at stride " +
                                                          std::to_string(stride) + ", channels in multiples of 8");
  }
  bool good = tile.size() == 4 && (tile[3] == 16 || tile[3] == 32 || tile[3] == 64 || tile[3] == 128);
  for (size_t i = 0; good && i < 3; ++i) good = tile[i] >= 1 && tile[i] <= HALO_POSITIONS;
  good = good && tile[0] * tile[1] * tile[2] <= HALO_POSITIONS &&
         tile[0] * (tile[1] + 2) * (tile[2] + 2) <= HALO_BORDERED;
  if (!good)
    operands.refuse("tile", text_of(tile), "images, rows and columns of at most 256 positions, 405 with the border, "
                                           "and 16, 32, 64 or 128 channels");
}

template <class Epilogue>
HaloArgs<Epilogue> common(
    const Tensor& x, const Tensor& weight, const Tensor& weight_index, const Optional& residual,
    int64_t residual_stride, const Tile& tile) {
  HaloArgs<Epilogue> args{};
  args.x = pointer<bf16>(x);
  args.weight = pointer<bf16>(weight);
  args.weight_index = pointer<int32_t>(weight_index);
  args.residual = pointer<bf16>(residual);
  args.x_stride = x.size(0) == 1 ? 0 : x.size(1) * x.size(2) * x.size(3) * x.size(4);
  args.G = int(weight_index.size(0));
  args.N = int(x.size(1));
  args.H = int(x.size(2));
  args.W = int(x.size(3));
  args.Ci = int(x.size(4));
  args.Co = int(weight.size(3));
  args.residual_stride = int(residual_stride);
  if (residual) {
    args.HR = int(residual->size(2));
    args.WR = int(residual->size(3));
    args.CR = int(residual->size(4));
  }
  args.tile = halo_tile(int(tile[0]), int(tile[1]), int(tile[2]), args.N, args.H, args.W);
  return args;
}

template <class Epilogue>
Tensor new_statistics(HaloArgs<Epilogue>& args, const Tensor& like, bool wanted) {
  if (!wanted) return none(like, ScalarType::Float);
  const Tensor statistics = new_tensor(like, {args.G, args.tile.count, 2, args.Co}, ScalarType::Float);
  args.statistics = pointer<float>(statistics);
  return statistics;
}

template <class Epilogue>
void run(const Launches& launches, const HaloArgs<Epilogue>& args, int64_t columns) {
  if (args.G > 0 && args.tile.count > 0)
    launches.check(launch_halo(args, int(columns), launches.stream),
                   "; the halo convolution needs compute capability 8.0, 8.7, 9.0 or 10.x");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> halo_conv(
    Tensor x, Tensor weight, Tensor weight_index, Optional in_scale, Optional in_shift, Optional bias,
    Optional residual, int64_t residual_stride, bool relu, Optional next_scale, Optional next_shift, Optional center,
    bool mask, Tile tile) {
  const Operands operands{"halo_conv", x};
  check_common(operands, "x", x, "weight", weight, weight_index, residual, residual_stride, false, tile);
  const int64_t G = weight_index.size(0), S = weight.size(0), Ci = weight.size(2), Co = weight.size(3);
  if (x.size(0) != 1) operands.check("x", x, ScalarType::BFloat16, {G, ANY, ANY, ANY, Ci});
  check_together(operands, "in_scale", in_scale, in_shift);
  check_together(operands, "next_scale", next_scale, next_shift);
  check_rows(operands, "in_scale", in_scale, S, Ci);
  check_rows(operands, "in_shift", in_shift, S, Ci);
  check_rows(operands, "bias", bias, S, Co);
  check_rows(operands, "next_scale", next_scale, S, Co);
  check_rows(operands, "next_shift", next_shift, S, Co);
  check_rows(operands, "center", center, S, Co);
  operands.check_device("x");
  const Launches launches(x);
  x = aligned(x);
  weight = aligned(weight);
  residual = aligned(residual);
  auto args = common<HaloForward>(x, weight, weight_index, residual, residual_stride, tile);
  args.in_scale = rows(in_scale);
  args.in_shift = rows(in_shift);
  const std::vector<int64_t> shape{args.G, args.N, args.H, args.W, args.Co};
  const Tensor z = new_tensor(x, shape, ScalarType::BFloat16);
  const Tensor activated = next_scale ? new_tensor(x, shape, ScalarType::BFloat16) : none(x, ScalarType::BFloat16);
  const Tensor bits = mask ? new_tensor(x, {args.G, args.N, args.H, args.W, args.Co / 8}, ScalarType::Byte)
                           : none(x, ScalarType::Byte);
  const Tensor statistics = new_statistics(args, x, center.has_value());
  args.epilogue = {rows(bias), rows(next_scale), rows(next_shift), rows(center), pointer<bf16>(z),
                   next_scale ? pointer<bf16>(activated) : nullptr, mask ? pointer<uint8_t>(bits) : nullptr, relu};
  run(launches, args, tile[3]);
  return {z, activated, bits, statistics};
}

std::tuple<Tensor, Tensor> halo_data_gradient(
    Tensor d, Tensor weight_flipped, Tensor weight_index, Optional residual, int64_t residual_stride,
    bool residual_first, Optional mask, Optional scale, Optional z, Optional mean, Optional inv_std, Tile tile) {
  const Operands operands{"halo_data_gradient", d};
  check_common(operands, "d", d, "weight_flipped", weight_flipped, weight_index, residual, residual_stride, true, tile);
  const int64_t G = weight_index.size(0), S = weight_flipped.size(0);
  const int64_t Co = weight_flipped.size(2), Ci = weight_flipped.size(3);
  const int64_t N = d.size(1), H = d.size(2), W = d.size(3);
  operands.check("d", d, ScalarType::BFloat16, {G, N, H, W, Co});
  operands.check("mask", mask, ScalarType::Byte, {G, N, H, W, Ci / 8}, true);
  operands.check("z", z, ScalarType::BFloat16, {G, N, H, W, Ci}, true);
  check_together(operands, "mean", mean, z);
  check_together(operands, "inv_std", inv_std, z);
  check_rows(operands, "scale", scale, S, Ci);
  check_rows(operands, "mean", mean, S, Ci);
  check_rows(operands, "inv_std", inv_std, S, Ci);
  operands.check_device("d");
  const Launches launches(d);
  d = aligned(d);
  weight_flipped = aligned(weight_flipped);
  residual = aligned(residual);
  z = aligned(z);
  auto args = common<HaloGradient>(d, weight_flipped, weight_index, residual, residual_stride, tile);
  const Tensor out = new_tensor(d, {args.G, args.N, args.H, args.W, args.Co}, ScalarType::BFloat16);
  const Tensor statistics = new_statistics(args, d, z.has_value());
  args.epilogue = {pointer<uint8_t>(mask), rows(scale), rows(mean), rows(inv_std),
                   pointer<bf16>(z), pointer<bf16>(out), residual_first};
  run(launches, args, tile[3]);
  return {out, statistics};
}

}  // namespace
}  // namespace fed

STABLE_TORCH_LIBRARY_IMPL(fastensdistill, FED_KEY, library) {
  library.impl("halo_conv", TORCH_BOX(&fed::halo_conv));
  library.impl("halo_data_gradient", TORCH_BOX(&fed::halo_data_gradient));
}
