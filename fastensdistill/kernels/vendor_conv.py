"""The convolutions by PyTorch's own (cuDNN on a GPU), one call per group on channels-last memory.

Operands, equations and results are those of ``grouped_conv``, ``conv_data_gradient`` and ``conv_weight_gradient``; the
epilogue is separate operations, partial sums are one row, and how float32 is multiplied is PyTorch's own setting.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as nn_grad

from fastensdistill.kernels.conv_data_gradient import DataGradient, conv_data_gradient, data_gradient_operands
from fastensdistill.kernels.conv_weight_gradient import conv_weight_gradient, weight_gradient_operands
from fastensdistill.kernels.elementwise_gradient import gradient_epilogue, gradient_sums
from fastensdistill.kernels.grouped_conv import (
    ConvOutput,
    conv_epilogue,
    conv_input,
    conv_operands,
    conv_output,
    grouped_conv,
)
from fastensdistill.kernels.operands import DTYPE_NAMES, accumulator, refuse_operands
from fastensdistill.kernels.ops import present
from fastensdistill.kernels.reference import leave


def as_images(x: Tensor) -> Tensor:
    """(N, H, W, C) as the (N, C, H, W) that PyTorch's convolutions take, without a copy: channels-last memory."""
    return x.permute(0, 3, 1, 2)


def weights_of_groups(weight: Tensor, kernel: int) -> list[Tensor]:
    """(G, kernel², Cin, Cout) → G times (Cout, Cin, kernel, kernel), channels-last down to the strides of a 1x1.

    cuDNN's data gradient takes its memory format from the weight: the input, which it has not, stands there without
    one. With a weight in no format it copies ``d`` to channels-first and computes there.
    """
    weight = weight.unflatten(1, (kernel, kernel)).permute(0, 4, 1, 2, 3).contiguous()
    return [as_images(one) for one in weight]


def one_row(values: Tensor) -> Tensor:
    """(G, N, H, W, C) → (G, 1, C): the sums over all positions as the one row of partials."""
    return values.sum((1, 2, 3))[:, None]


def vendor_conv(*operands: Any, **options: Any) -> ConvOutput:
    """``grouped_conv``, same arguments and results."""
    o, (kernel, stride, padding), _ = conv_operands(*operands, **options)
    refuse_operands("cuDNN", second=o.second)
    groups, dtype = len(o.weight_index), o.weight.dtype
    u = conv_input(o.x, groups, o.weight_index, o.in_scale, o.in_shift, o.in_relu, dtype)
    w = weights_of_groups(o.weight.index_select(0, o.weight_index), kernel)
    y = [F.conv2d(as_images(u[g]), w[g], stride=stride, padding=padding).permute(0, 2, 3, 1) for g in range(groups)]
    return conv_output(*conv_epilogue(torch.stack(y).to(accumulator(dtype)), o, one_row))


def vendor_data_gradient(*operands: Any, **options: Any) -> DataGradient:
    """``conv_data_gradient``, same arguments and results."""
    o, epilogue, (kernel, stride, padding), _ = data_gradient_operands(*operands, **options)
    refuse_operands("cuDNN", second=o.second, norm_z=o.norm_z)
    w = weights_of_groups(o.weight_flipped.index_select(0, o.weight_index).flip(1).transpose(2, 3), kernel)
    size = (o.d.shape[1], o.weight_flipped.shape[3], o.height, o.width)
    u = [nn_grad.conv2d_input(size, w[g], as_images(d), stride, padding).permute(0, 2, 3, 1) for g, d in enumerate(o.d)]
    out = gradient_epilogue(torch.stack(u).to(accumulator(o.d.dtype)), o.weight_index, epilogue)
    out = out.to(DTYPE_NAMES[o.out_dtype]).contiguous()
    return DataGradient(out, present(gradient_sums(out, o.weight_index, epilogue, one_row)))


def vendor_weight_gradient(*operands: Any, **options: Any) -> Tensor:
    """``conv_weight_gradient``, same arguments and results."""
    o, (kernel, stride, padding), _, out, add = weight_gradient_operands(*operands, several=True, **options)
    refuse_operands("cuDNN", norm_z=o.norm_z)
    u = conv_input(o.x, len(o.d), None, o.in_scale, o.in_shift, o.in_relu, o.d.dtype)
    size = (o.d.shape[4], o.x.shape[4], kernel, kernel)
    dw = [
        nn_grad.conv2d_weight(as_images(u[g]), size, as_images(d), stride, padding).permute(2, 3, 1, 0)
        for g, d in enumerate(o.d)
    ]
    leave(torch.stack(dw).flatten(1, 2).to(out.dtype), out, add)
    return out


VENDOR: dict[Callable[..., Any], Callable[..., Any]] = {
    grouped_conv: vendor_conv,
    conv_data_gradient: vendor_data_gradient,
    conv_weight_gradient: vendor_weight_gradient,
}
