// wgmma_conv and wgmma_data_gradient for CUDA tensors: operands, outputs, registration.
#include "wgmma_forward.h"

namespace fed {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> wgmma_conv(
    Tensor x, Tensor weight, Tensor weight_index, Optional in_scale, Optional in_shift, Optional bias,
    Optional residual, int64_t residual_stride, bool relu, Optional next_scale, Optional next_shift, Optional center,
    bool mask, bool in_relu, Optional second, Optional second_weight, Optional second_bias, int64_t second_stride,
    int64_t kernel, int64_t stride, int64_t padding, int64_t multiprocessors, bool copies) {
  const Operands operands{"wgmma_conv", x};
  Forward forward{x, weight, weight_index, in_scale, in_shift, bias, residual, residual_stride, relu, next_scale,
                  next_shift, center, mask, in_relu, second, second_weight, second_bias, second_stride};
  check_window(operands, kernel, stride, padding);
  forward.check(operands, kernel, stride);
  ConvLaunch launch{};
  launch.at = forward.geometry({int(kernel), int(stride), int(padding)}, copies);
  launch.multiprocessors = int(multiprocessors);
  launch.side[0].groups = int(forward.groups());
  operands.check_device("x");
  const Launches launches(x);
  const auto results = forward.enter(launch, 0);
  check_covered(operands, launch);
  run(launches, launch);
  return results;
}

std::tuple<Tensor, Tensor> wgmma_data_gradient(
    Tensor d, Tensor weight_flipped, Tensor weight_index, int64_t height, int64_t width, Optional second,
    Optional second_weight, int64_t second_stride, Optional norm_z, Optional norm_a, Optional norm_b, Optional norm_c,
    Optional residual, int64_t residual_stride, bool residual_first, Optional mask, Optional scale, Optional z,
    Optional mean, Optional inv_std, Optional mask_scale, Optional mask_shift, int64_t kernel, int64_t stride,
    int64_t padding, int64_t multiprocessors, bool copies) {
  const Operands operands{"wgmma_data_gradient", d};
  check_window(operands, kernel, stride, padding);
  operands.check("weight_index", weight_index, ScalarType::Int, {ANY}, true);
  operands.check("weight_flipped", weight_flipped, BF16, {ANY, kernel * kernel, ANY, ANY}, true);
  const int64_t G = weight_index.size(0), S = weight_flipped.size(0), Ci = weight_flipped.size(3);
  check_source(operands, "d", d, "weight_flipped", weight_flipped, G, kernel * kernel, S, Ci);
  if (height < 1 || width < 1) operands.refuse("the result", text_of(Sizes{height, width}), "positions");
  const int64_t N = d.size(1), Co = d.size(4);
  operands.check("d", d, BF16, {G, N, rounded_up(height, stride), rounded_up(width, stride), Co});
  const Sizes shape{G, N, height, width, Ci};
  if (N * height * width > INT_MAX / Ci) operands.refuse("the result", text_of(shape), "fewer than 2^31 values");
  const auto spread = [](int64_t by) {
    return [by](int64_t own, int64_t size) { return own == rounded_up(size, by); };
  };
  check_residual(operands, residual, shape, residual_stride, spread(residual_stride));
  check_together(operands, "second", second, second_weight);
  if (second) {
    check_source(operands, "second", *second, "second_weight", *second_weight, G, 1, S, Ci);
    if (second_stride < 1) operands.refuse("second_stride", std::to_string(second_stride), "at least 1");
    operands.check("second", second, BF16,
                   {G, N, rounded_up(height, second_stride), rounded_up(width, second_stride), ANY});
  }
  if (const char* reason = uncovered_strides(int(stride), residual ? int(residual_stride) : 1, second.has_value(),
                                             int(second_stride)))
    operands.refuse("a stride", reason, "such a one");
  for (const auto& [name, rows] : {std::pair{"norm_a", &norm_a}, {"norm_b", &norm_b}, {"norm_c", &norm_c}}) {
    check_together(operands, name, *rows, norm_z);
    check_rows(operands, name, *rows, G, Co);
  }
  operands.check("norm_z", norm_z, BF16, d.sizes().vec(), true);
  operands.check("mask", mask, ScalarType::Byte, {G, N, height, width, Ci / 8}, true);
  operands.check("z", z, BF16, shape, true);
  check_together(operands, "mean", mean, z);
  check_together(operands, "inv_std", inv_std, z);
  check_together(operands, "mask_scale", mask_scale, mask_shift);
  if (mask_scale && !z) operands.refuse("mask_scale", "given without z", "both");
  check_rows(operands, "scale", scale, S, Ci);
  check_rows(operands, "mean", mean, S, Ci);
  check_rows(operands, "inv_std", inv_std, S, Ci);
  check_rows(operands, "mask_scale", mask_scale, S, Ci);
  check_rows(operands, "mask_shift", mask_shift, S, Ci);
  operands.check_device("d");
  const Launches launches(d);
  d = aligned(d);
  weight_flipped = aligned(weight_flipped);
  residual = aligned(residual);
  second = aligned(second);
  second_weight = aligned(second_weight);
  norm_z = aligned(norm_z);
  z = aligned(z);
  mask = aligned(mask);  // two bytes at a time

  ConvLaunch launch{};
  launch.gradient = true;
  launch.multiprocessors = int(multiprocessors);
  launch.at = conv_geometry({int(kernel), int(stride), int(padding)}, true, copies, int(N), int(d.size(2)),
                            int(d.size(3)), int(height), int(width), int(Co), second ? int(second->size(4)) : 0,
                            int(second_stride), int(Ci));
  const Tensor out = new_tensor(d, shape, BF16);
  SideTensors& tensors = launch.tensors[0];
  tensors.in = activation(d);
  tensors.second = activation(second);
  tensors.norm_z = activation(norm_z);
  tensors.residual = activation(residual);
  tensors.z = activation(z);
  tensors.second_stride = 1;
  tensors.residual_stride = int(residual_stride);
  tensors.weight[0] = pointer<bf16>(weight_flipped);
  tensors.weight[1] = pointer<bf16>(second_weight);
  tensors.slots = int(S);
  tensors.taps = int(kernel * kernel);
  tensors.out = pointer<bf16>(out);
  ConvSide& side = launch.side[0];
  side.weight_index = pointer<int32_t>(weight_index);
  side.groups = int(G);
  side.residual_first = residual_first;
  side.has_second = second.has_value();
  side.norm_a = rows(norm_a);
  side.norm_b = rows(norm_b);
  side.norm_c = rows(norm_c);
  side.scale = rows(scale);
  side.mean = rows(mean);
  side.inv_std = rows(inv_std);
  side.mask_scale = rows(mask_scale);
  side.mask_shift = rows(mask_shift);
  side.mask_in = pointer<uint8_t>(mask);
  const Tensor statistics = new_statistics(launch, 0, d, z.has_value());
  check_covered(operands, launch);
  run(launches, launch);
  return {out, statistics};
}

}  // namespace
}  // namespace fed

STABLE_TORCH_LIBRARY_IMPL(fastensdistill, FED_KEY, library) {
  library.impl("wgmma_conv", TORCH_BOX(&fed::wgmma_conv));
  library.impl("wgmma_data_gradient", TORCH_BOX(&fed::wgmma_data_gradient));
}
