// wgmma_joint_conv for CUDA tensors: a layer of networks in evaluation mode and of networks in training as one launch.
#include "wgmma_forward.h"

namespace fed {
namespace {

using Both = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Both wgmma_joint_conv(
    Tensor x, Tensor weight, Tensor weight_index, Optional in_scale, Optional in_shift, Optional bias,
    Optional residual, int64_t residual_stride, bool relu, Optional next_scale, Optional next_shift, Optional center,
    bool mask, bool in_relu, Optional second, Optional second_weight, Optional second_bias, int64_t second_stride,
    Tensor x_2, Tensor weight_2, Tensor weight_index_2, Optional in_scale_2, Optional in_shift_2, Optional bias_2,
    Optional residual_2, int64_t residual_stride_2, bool relu_2, Optional next_scale_2, Optional next_shift_2,
    Optional center_2, bool mask_2, bool in_relu_2, Optional second_2, Optional second_weight_2,
    Optional second_bias_2, int64_t second_stride_2, int64_t kernel, int64_t stride, int64_t padding,
    int64_t multiprocessors, bool copies) {
  const Operands operands{"wgmma_joint_conv", x};
  Forward evaluation{x, weight, weight_index, in_scale, in_shift, bias, residual, residual_stride, relu, next_scale,
                     next_shift, center, mask, in_relu, second, second_weight, second_bias, second_stride};
  Forward training{x_2, weight_2, weight_index_2, in_scale_2, in_shift_2, bias_2, residual_2, residual_stride_2, relu_2,
                   next_scale_2, next_shift_2, center_2, mask_2, in_relu_2, second_2, second_weight_2, second_bias_2,
                   second_stride_2};
  check_window(operands, kernel, stride, padding);
  evaluation.check(operands, kernel, stride);
  training.check(operands, kernel, stride);
  operands.check("the second x", x_2, BF16, {ANY, x.size(1), x.size(2), x.size(3), x.size(4)});
  operands.check("the second weight", weight_2, BF16, {ANY, weight.size(1), weight.size(2), weight.size(3)});
  if (second && second_2 && second->size(4) != second_2->size(4))
    operands.refuse("the second side's second", text_of(*second_2), "as many channels as the first's has");
  ConvLaunch launch{};
  const Forward& with_second = second ? evaluation : training;
  launch.at = with_second.geometry({int(kernel), int(stride), int(padding)}, copies);
  launch.multiprocessors = int(multiprocessors);
  launch.side[0].groups = int(evaluation.groups());
  launch.side[1].groups = int(training.groups());
  operands.check_device("x");
  const Launches launches(x);
  const auto one = evaluation.enter(launch, 0), other = training.enter(launch, 1);
  check_covered(operands, launch);
  run(launches, launch);
  return std::tuple_cat(one, other);
}

}  // namespace
}  // namespace fed

STABLE_TORCH_LIBRARY_IMPL(fastensdistill, FED_KEY, library) {
  library.impl("wgmma_joint_conv", TORCH_BOX(&fed::wgmma_joint_conv));
}
