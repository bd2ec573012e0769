// halo_conv and halo_data_gradient for CUDA tensors: what the kernels take for granted, outputs, registration. Shapes
// were checked in Python; on a CPU the references serve.
#include "halo_conv.h"

#include "tensors.h"

#ifdef FED_CUDA

namespace fed {
namespace {

using Optional = std::optional<Tensor>;
using Tile = std::vector<int64_t>;  // images, rows and columns of positions, channels

template <class T>
T* pointer_or_null(const Optional& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}

void check(const Optional& tensor, const Tensor& like, ScalarType type) {
  STD_TORCH_CHECK(
      !tensor || (tensor->is_contiguous() && tensor->scalar_type() == type &&
                  tensor->get_device_index() == like.get_device_index()),
      "fastensdistill: halo convolution: expected contiguous tensors on one device, bfloat16 and per channel float32");
}

// The tensor at an address that 16-byte accesses need: itself, or a copy if it is a view at an odd offset.
Optional aligned(const Optional& tensor, const Tensor& like) {
  check(tensor, like, ScalarType::BFloat16);
  if (!tensor || reinterpret_cast<uintptr_t>(tensor->data_ptr()) % 16 == 0) return tensor;
  Tensor copy = torch::stable::empty_like(*tensor);
  torch::stable::copy_(copy, *tensor);
  return copy;
}

Rows rows(const Optional& tensor, const Tensor& like) {
  check(tensor, like, ScalarType::Float);
  return {pointer_or_null<float>(tensor), tensor && tensor->size(0) > 1 ? int(tensor->size(1)) : 0};
}

template <class Epilogue>
HaloArgs<Epilogue> common(
    const Tensor& x, const Tensor& weight, const Tensor& slots, const Optional& residual, int64_t residual_stride,
    const Tile& tile) {
  STD_TORCH_CHECK(tile.size() == 4, "fastensdistill: halo convolution: expected a tile of four numbers");
  HaloArgs<Epilogue> args{};
  args.x = pointer<bf16>(x);
  args.weight = pointer<bf16>(weight);
  STD_TORCH_CHECK(
      slots.is_contiguous() && slots.scalar_type() == ScalarType::Int,
      "fastensdistill: halo convolution: expected contiguous int32 slots");
  args.slots = pointer<int32_t>(slots);
  args.residual = pointer_or_null<bf16>(residual);
  args.x_stride = x.size(0) == 1 ? 0 : x.size(1) * x.size(2) * x.size(3) * x.size(4);
  args.G = int(slots.size(0));
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
  for (int64_t size : tile)
    STD_TORCH_CHECK(size > 0, "fastensdistill: halo convolution: expected a tile of positive sizes");
  args.tile = halo_tile(int(tile[0]), int(tile[1]), int(tile[2]), args.N, args.H, args.W);
  STD_TORCH_CHECK(
      weight.size(1) == 9 && weight.size(2) == args.Ci && args.Ci % 16 == 0 && args.Co % 16 == 0 && args.CR % 8 == 0,
      "fastensdistill: halo convolution: expected weights [slots, 9, Ci, Co], channels in multiples of 16");
  STD_TORCH_CHECK(
      positions(args.tile) <= HALO_POSITIONS && bordered(args.tile) <= HALO_BORDERED,
      "fastensdistill: halo convolution: expected a tile of at most 256 positions, 405 with the border");
  return args;
}

Tensor none(const Tensor& like, ScalarType type) { return new_tensor(like, {0}, type); }

template <class Epilogue>
Tensor new_statistics(HaloArgs<Epilogue>& args, const Tensor& like, bool wanted) {
  if (!wanted) return none(like, ScalarType::Float);
  const Tensor statistics = new_tensor(like, {args.G, args.tile.count, 2, args.Co}, ScalarType::Float);
  args.statistics = pointer<float>(statistics);
  return statistics;
}

template <class Epilogue>
void launch(const HaloArgs<Epilogue>& args, const Tensor& x, int64_t columns) {
  if (args.G == 0 || args.tile.count == 0) return;
  check_launch(launch_halo(args, int(columns), current_stream(x)));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> halo_conv(
    Tensor x, Tensor weight, Tensor slots, Optional inputs, Optional in_scale, Optional in_shift, bool in_relu,
    Optional bias, Optional residual, int64_t residual_stride, bool relu, Optional next_scale, Optional next_shift,
    Optional center, bool mask, Tile tile) {
  const auto guard = on_device(x);
  x = *aligned(x, x);
  weight = *aligned(weight, x);
  residual = aligned(residual, x);
  auto args = common<HaloForward>(x, weight, slots, residual, residual_stride, tile);
  args.inputs = pointer_or_null<int32_t>(inputs);
  args.in_scale = rows(in_scale, x);
  args.in_shift = rows(in_shift, x);
  args.in_relu = in_relu;
  const std::vector<int64_t> shape{args.G, args.N, args.H, args.W, args.Co};
  const Tensor z = new_tensor(x, shape, ScalarType::BFloat16);
  const Tensor activated = next_scale ? new_tensor(x, shape, ScalarType::BFloat16) : none(x, ScalarType::BFloat16);
  const Tensor bits = mask ? new_tensor(x, {args.G, args.N, args.H, args.W, args.Co / 8}, ScalarType::Byte)
                           : none(x, ScalarType::Byte);
  const Tensor statistics = new_statistics(args, x, center.has_value());
  args.epilogue = {rows(bias, x), rows(next_scale, x), rows(next_shift, x), rows(center, x), pointer<bf16>(z),
                   next_scale ? pointer<bf16>(activated) : nullptr, mask ? pointer<uint8_t>(bits) : nullptr, relu};
  launch(args, x, tile[3]);
  return {z, activated, bits, statistics};
}

std::tuple<Tensor, Tensor> halo_data_gradient(
    Tensor d, Tensor weight_flipped, Tensor slots, Optional residual, int64_t residual_stride, bool residual_first,
    Optional mask, Optional scale, Optional z, Optional mean, Optional inv_std, Tile tile) {
  const auto guard = on_device(d);
  d = *aligned(d, d);
  weight_flipped = *aligned(weight_flipped, d);
  residual = aligned(residual, d);
  z = aligned(z, d);
  auto args = common<HaloGradient>(d, weight_flipped, slots, residual, residual_stride, tile);
  const Tensor out = new_tensor(d, {args.G, args.N, args.H, args.W, args.Co}, ScalarType::BFloat16);
  const Tensor statistics = new_statistics(args, d, z.has_value());
  args.epilogue = {pointer_or_null<uint8_t>(mask), rows(scale, d), rows(mean, d), rows(inv_std, d),
                   pointer_or_null<bf16>(z), pointer<bf16>(out), residual_first};
  launch(args, d, tile[3]);
  return {out, statistics};
}

}  // namespace
}  // namespace fed

STABLE_TORCH_LIBRARY_IMPL(fastensdistill, CUDA, library) {
  library.impl("halo_conv", TORCH_BOX(&fed::halo_conv));
  library.impl("halo_data_gradient", TORCH_BOX(&fed::halo_data_gradient));
}

#endif
