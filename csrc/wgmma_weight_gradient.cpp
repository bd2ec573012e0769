// wgmma_weight_gradient for CUDA tensors: operands, registration.
#include "wgmma_weight_gradient.h"

#include "conv_operands.h"

namespace fed {
namespace {

// Channels of the groups: a row each, or one for all. Given where `with` is, and only there.
void check_rows_with(const Operands& operands, const char* name, const Optional& rows, int64_t groups, int64_t channels,
                     const Optional& with) {
  check_together(operands, name, rows, with);
  check_rows(operands, name, rows, groups, channels);
}

void wgmma_weight_gradient(
    Tensor x, Tensor d, Optional in_scale, Optional in_shift, bool in_relu, Optional norm_z, Optional norm_a,
    Optional norm_b, Optional norm_c, int64_t kernel, int64_t stride, int64_t padding, int64_t multiprocessors,
    bool copies, Tensor partial) {
  const Operands operands{"wgmma_weight_gradient", x};
  const auto kind = ScalarType::BFloat16;
  operands.check("x", x, kind, {ANY, ANY, ANY, ANY, ANY}, true);
  if ((kernel != 3 && kernel != 1) || padding != kernel / 2 || (stride != 1 && stride != 2))
    operands.refuse("the window", text_of(Sizes{kernel, stride, padding}),
                    "kernel 3 and padding 1 or 1 and 0, stride 1 or 2");
  const int64_t N = x.size(1), H = x.size(2), W = x.size(3), Ci = x.size(4);
  operands.check("d", d, kind, {ANY, N, (H + stride - 1) / stride, (W + stride - 1) / stride, ANY}, true);
  const int64_t G = d.size(0), Co = d.size(4);
  operands.check("x", x, kind, {x.size(0) == 1 ? 1 : G, N, H, W, Ci});
  if (G < 1 || N < 1 || H < 1 || W < 1) operands.refuse("x", text_of(x), "groups, images and positions");
  if (Ci < 16 || Ci % 16 != 0) operands.refuse("x", text_of(x), "channels in multiples of 16");
  if (Co < 16 || Co % 16 != 0) operands.refuse("d", text_of(d), "channels in multiples of 16");
  if (N * H * W > INT_MAX / std::max(Ci, Co) || kernel * kernel * Ci > INT_MAX / Co)
    operands.refuse("x", text_of(x), "fewer than 2^31 values in a group");
  if (multiprocessors < 1 || multiprocessors > 1024)
    operands.refuse("multiprocessors", std::to_string(multiprocessors), "1 to 1024");
  check_rows(operands, "in_scale", in_scale, G, Ci);
  check_rows_with(operands, "in_shift", in_shift, G, Ci, in_scale);
  operands.check("norm_z", norm_z, kind, {G, N, d.size(2), d.size(3), Co}, true);
  check_rows_with(operands, "norm_a", norm_a, G, Co, norm_z);
  check_rows_with(operands, "norm_b", norm_b, G, Co, norm_z);
  check_rows_with(operands, "norm_c", norm_c, G, Co, norm_z);
  WeightGradientArgs args{};
  args.sizes = {int(G), int(N), int(H), int(W), int(Ci), int(Co), int(kernel), int(stride), norm_z.has_value(), copies};
  args.multiprocessors = int(multiprocessors);
  const int64_t count = partials(weight_gradient_cut(args.sizes, args.multiprocessors));
  operands.check("partial", partial, ScalarType::Float, {count, G, kernel * kernel, Ci, Co}, true);
  operands.check_device("x");
  const Launches launches(x);
  x = aligned(x);
  d = aligned(d);
  norm_z = aligned(norm_z);
  args.x = pointer<bf16>(x);
  args.d = pointer<bf16>(d);
  args.norm_z = pointer<bf16>(norm_z);
  args.x_groups = int(x.size(0));
  args.in_scale = rows(in_scale);
  args.in_shift = rows(in_shift);
  args.in_relu = in_relu;
  args.norm_a = rows(norm_a);
  args.norm_b = rows(norm_b);
  args.norm_c = rows(norm_c);
  const bool in_place = reinterpret_cast<uintptr_t>(partial.data_ptr()) % 8 == 0;  // pairs are stored
  const Tensor to = in_place ? partial : torch::stable::empty_like(partial);
  args.partial = pointer<float>(to);
  launches.check(launch_weight_gradient(args, launches.stream), "; the wgmma kernels need compute capability 9.0");
  if (!in_place) torch::stable::copy_(partial, to);
}

}  // namespace
}  // namespace fed

STABLE_TORCH_LIBRARY_IMPL(fastensdistill, FED_KEY, library) {
  library.impl("wgmma_weight_gradient", TORCH_BOX(&fed::wgmma_weight_gradient));
}
