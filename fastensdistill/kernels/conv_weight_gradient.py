"""Grouped convolution, gradient of the weights.

    u = in_scale · x + in_shift, then ReLU if in_relu          (zero padding comes after it)
    dW[g, tap, i, o] = Σ over images and positions  u[position · stride − padding + tap, i] · d[position, o]

Positions are split over programs; their float32 partial results are added in a fixed order (no atomics).
"""

import torch
from torch import Tensor
from torch.nn import grad as nn_grad

from fastensdistill.kernels.triton_utils import (
    accumulator,
    check_precision,
    check_pair,
    check_tensor,
    require,
)


def conv_weight_gradient_reference(
    x: Tensor,
    d: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_relu: bool,
    kernel: int,
    stride: int,
    padding: int,
    precision: str,
) -> Tensor:
    groups, out_channels, in_channels = d.shape[0], d.shape[4], x.shape[4]
    high = accumulator(d.dtype)
    u = x.expand(groups, -1, -1, -1, -1).to(high)
    if in_scale is not None and in_shift is not None:
        u = u * in_scale[:, None, None, None, :].to(high) + in_shift[:, None, None, None, :].to(high)
    if in_relu:
        u = u.relu()
    u = u.to(d.dtype).to(high).permute(1, 0, 4, 2, 3).flatten(1, 2)
    dw = nn_grad.conv2d_weight(
        u,
        [groups * out_channels, in_channels, kernel, kernel],
        d.to(high).permute(1, 0, 4, 2, 3).flatten(1, 2),
        stride=stride,
        padding=padding,
        groups=groups,
    )
    dw = dw.view(groups, out_channels, in_channels, kernel * kernel)
    return dw.permute(0, 3, 2, 1).contiguous()


@torch.library.custom_op("fastensdistill::conv_weight_gradient", mutates_args=())
def _conv_weight_gradient(
    x: Tensor,
    d: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_relu: bool,
    kernel: int,
    stride: int,
    padding: int,
    precision: str,
) -> Tensor:
    return conv_weight_gradient_reference(x, d, in_scale, in_shift, in_relu, kernel, stride, padding, precision)


@_conv_weight_gradient.register_fake
def _conv_weight_gradient_fake(x, d, in_scale, in_shift, in_relu, kernel, stride, padding, precision):
    return d.new_empty(d.shape[0], kernel * kernel, x.shape[4], d.shape[4], dtype=accumulator(d.dtype))


def conv_weight_gradient(
    x: Tensor,
    d: Tensor,
    *,
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    in_relu: bool = False,
    precision: str = "ieee",
) -> Tensor:
    """Weight gradient (G, taps, Ci, Co), float32, of a grouped convolution.

    ``x`` (G or 1, N, H, W, Ci), float32 or d's dtype: the forward pass's input, with its prologue ``in_scale,
    in_shift`` (G or 1, Ci) float32, here **by group**; ``d`` (G, N, Ho, Wo, Co): gradient of its output.
    ``precision`` is how float32 is multiplied: "ieee" or "tf32". Raises InputError for shapes that disagree.
    """
    check_tensor("x", x, 5)
    check_tensor("d", d, 5)
    check_precision(precision)
    groups = d.shape[0]
    out = tuple((size + 2 * padding - kernel) // stride + 1 for size in x.shape[2:4])
    require(
        x.shape[0] in (1, groups) and x.shape[1] == d.shape[1],
        f"x has shape {tuple(x.shape)}, expected {groups} or 1 groups of {d.shape[1]} images",
    )
    require(out == tuple(d.shape[2:4]), f"d has size {tuple(d.shape[2:4])}, expected {out} for this x")
    require(x.dtype in (d.dtype, torch.float32), f"x is {x.dtype}, expected float32 or d's {d.dtype}")
    check_pair("in_scale and in_shift", in_scale, in_shift, groups, x.shape[4])
    return _conv_weight_gradient(x, d, in_scale, in_shift, in_relu, kernel, stride, padding, precision)
