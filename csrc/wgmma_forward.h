// The operands of the wgmma convolutions' ops: what is checked, and how one side of a convolution enters a launch.
#pragma once

#include "conv_operands.h"
#include "wgmma_launches.h"

namespace fed {

constexpr auto BF16 = ScalarType::BFloat16;

inline Activation activation(const Optional& tensor, bool may_be_shared = false) {
  if (!tensor) return {};
  return {pointer<bf16>(tensor), int(tensor->size(2)), int(tensor->size(3)), int(tensor->size(4)),
          may_be_shared && tensor->size(0) == 1};
}

inline void check_window(const Operands& operands, int64_t kernel, int64_t stride, int64_t padding) {
  if (!((kernel == 3 && padding == 1) || (kernel == 1 && padding == 0)) || (stride != 1 && stride != 2))
    operands.refuse("window", text_of(Sizes{kernel, stride, padding}),
                    "kernel 3 with padding 1 or 1 with 0, at stride 1 or 2");
}

// An input [G or 1, N, H, W, Ci], and its weights [slots, taps, Ci, channels].
inline void check_source(
    const Operands& operands, const char* x_name, const Tensor& x, const char* weight_name, const Tensor& weight,
    int64_t groups, int64_t taps, int64_t slots, int64_t channels) {
  operands.check(x_name, x, BF16, {ANY, ANY, ANY, ANY, ANY}, true);
  if (x.size(0) != 1) operands.check(x_name, x, BF16, {groups, ANY, ANY, ANY, ANY});
  operands.check(weight_name, weight, BF16, {slots, taps, x.size(4), channels}, true);
  for (int64_t count : {x.size(4), weight.size(3)})
    if (count < 16 || count > 640 || count % 16 != 0)
      operands.refuse(weight_name, text_of(weight), "channels in multiples of 16 up to 640");
  if (x.size(2) < 1 || x.size(3) < 1) operands.refuse(x_name, text_of(x), "positions");
  if (x.size(1) * x.size(2) * x.size(3) > INT_MAX / x.size(4))
    operands.refuse(x_name, text_of(x), "fewer than 2^31 values in a group");
}

// A residual [G, N, ., ., multiple of 8], `fits(own, size of the result)` in both directions.
template <class Fits>
void check_residual(
    const Operands& operands, const Optional& residual, const Sizes& shape, int64_t stride, const Fits& fits) {
  if (stride < 1) operands.refuse("residual_stride", std::to_string(stride), "at least 1");
  operands.check("residual", residual, BF16, {shape[0], shape[1], ANY, ANY, ANY}, true);
  if (residual && (!fits(residual->size(2), shape[2]) || !fits(residual->size(3), shape[3]) ||
                   residual->size(4) % 8 != 0 || residual->size(4) < 8))
    operands.refuse("residual", text_of(*residual), "positions that fit " + text_of(shape) + " at stride " +
                                                        std::to_string(stride) + ", channels in multiples of 8");
}

inline int64_t rounded_up(int64_t size, int64_t by) { return (size + by - 1) / by; }

inline Tensor new_statistics(ConvLaunch& launch, int side, const Tensor& like, bool wanted) {
  if (!wanted) return none(like, ScalarType::Float);
  const Tensor statistics = new_tensor(
      like, {launch.side[side].groups, statistics_rows(launch), 2, launch.at.channels}, ScalarType::Float);
  launch.side[side].statistics = pointer<float>(statistics);
  return statistics;
}

inline void run(const Launches& launches, const ConvLaunch& launch) {
  if (groups_of(launch) > 0 && launch.at.tile.count > 0)
    launches.check(launch_conv(launch, launches.stream), "; the wgmma convolution needs compute capability 9.0");
}

inline void check_covered(const Operands& operands, const ConvLaunch& launch) {
  if (const char* reason = uncovered(launch)) operands.refuse("a launch", reason, "what the kernels cover");
}

// Operands of one side of a convolution as they come, at addresses that boxes need.
struct Forward {
  Tensor x, weight, weight_index;
  Optional in_scale, in_shift, bias, residual;
  int64_t residual_stride;
  bool relu;
  Optional next_scale, next_shift, center;
  bool mask, in_relu;
  Optional second, second_weight, second_bias;
  int64_t second_stride;

  int64_t groups() const { return weight_index.size(0); }

  Sizes shape(int64_t stride) const {
    return {groups(), x.size(1), rounded_up(x.size(2), stride), rounded_up(x.size(3), stride), weight.size(3)};
  }

  void check(const Operands& operands, int64_t kernel, int64_t stride) const {
    operands.check("weight_index", weight_index, ScalarType::Int, {ANY}, true);
    operands.check("weight", weight, BF16, {ANY, kernel * kernel, ANY, ANY}, true);
    const int64_t S = weight.size(0), Ci = weight.size(2), Co = weight.size(3);
    check_source(operands, "x", x, "weight", weight, groups(), kernel * kernel, S, Co);
    const Sizes z = shape(stride);
    check_together(operands, "in_scale", in_scale, in_shift);
    check_together(operands, "next_scale", next_scale, next_shift);
    check_together(operands, "second", second, second_weight);
    check_rows(operands, "in_scale", in_scale, S, Ci);
    check_rows(operands, "in_shift", in_shift, S, Ci);
    check_rows(operands, "bias", bias, S, Co);
    check_rows(operands, "next_scale", next_scale, S, Co);
    check_rows(operands, "next_shift", next_shift, S, Co);
    check_rows(operands, "center", center, S, Co);
    check_rows(operands, "second_bias", second_bias, S, Co);
    check_residual(operands, residual, z, residual_stride,
                   [&](int64_t own, int64_t size) { return rounded_up(own, residual_stride) == size; });
    if (second_stride < 1) operands.refuse("second_stride", std::to_string(second_stride), "at least 1");
    if (second) {
      check_source(operands, "second", *second, "second_weight", *second_weight, groups(), 1, S, Co);
      if (second->size(1) != z[1] || rounded_up(second->size(2), second_stride) != z[2] ||
          rounded_up(second->size(3), second_stride) != z[3])
        operands.refuse("second", text_of(*second), "positions that fit " + text_of(z));
    } else if (second_bias) {
      operands.refuse("second_bias", "given without second", "both");
    }
  }

  ConvGeometry geometry(const ConvWindow& window, bool copies) const {
    const Sizes z = shape(window.stride);
    return conv_geometry(window, false, copies, int(z[1]), int(x.size(2)), int(x.size(3)), int(z[2]), int(z[3]),
                         int(x.size(4)), second ? int(second->size(4)) : 0, int(second_stride), int(z[4]));
  }

  // Puts itself and new results into a launch whose geometry and groups are known.
  std::tuple<Tensor, Tensor, Tensor, Tensor> enter(ConvLaunch& launch, int side) {
    x = aligned(x);
    weight = aligned(weight);
    residual = aligned(residual);
    second = aligned(second);
    second_weight = aligned(second_weight);
    const ConvGeometry& at = launch.at;
    const Sizes sizes{groups(), at.N, at.H, at.W, at.channels}, bytes{groups(), at.N, at.H, at.W, at.channels / 8};
    const Tensor z = new_tensor(x, sizes, BF16);
    const Tensor activated = next_scale ? new_tensor(x, sizes, BF16) : none(x, BF16);
    const Tensor bits = mask ? new_tensor(x, bytes, ScalarType::Byte) : none(x, ScalarType::Byte);
    SideTensors& tensors = launch.tensors[side];
    tensors.in = activation(x, true);
    tensors.second = activation(second, true);
    tensors.residual = activation(residual);
    tensors.second_stride = int(second_stride);
    tensors.residual_stride = int(residual_stride);
    tensors.weight[0] = pointer<bf16>(weight);
    tensors.weight[1] = pointer<bf16>(second_weight);
    tensors.slots = int(weight.size(0));
    tensors.taps = int(weight.size(1));
    tensors.out = pointer<bf16>(z);
    tensors.activated = next_scale ? pointer<bf16>(activated) : nullptr;
    ConvSide& to = launch.side[side];
    to.weight_index = pointer<int32_t>(weight_index);
    to.in_shared = x.size(0) == 1;
    to.second_shared = second && second->size(0) == 1;
    to.has_second = second.has_value();
    to.relu = relu;
    to.in_relu = in_relu;
    to.in_scale = rows(in_scale);
    to.in_shift = rows(in_shift);
    to.bias = rows(bias);
    to.second_bias = rows(second_bias);
    to.next_scale = rows(next_scale);
    to.next_shift = rows(next_shift);
    to.center = rows(center);
    to.mask_out = mask ? pointer<uint8_t>(bits) : nullptr;
    return {z, activated, bits, new_statistics(launch, side, x, center.has_value())};
  }
};

}  // namespace fed
