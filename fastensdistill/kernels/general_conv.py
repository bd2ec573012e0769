"""Convolutions with channel groups, dilation or a rectangular window: PyTorch's own, cuDNN's on a GPU.

    y[g, n, h, w, o]  = Σ_{t,i} x[g, n, h·stride + t·dilation − padding, …, q·Ci + i] · W[g, t, i, o] + b[g, o]
    d_x, dW           = its gradients with respect to x and W

with q = o // (Co / channel_groups), the channel group of the output, and Ci the input channels of one. A network's
images (N, H, W, C) are channels-last memory as PyTorch takes it, so there is a call for each network on what is there.
One call for all, with G times the channel groups, would need (N, H, W, G·C): two more passes over memory, of x on its
way in and of y on its way out, where these calls need one, in which y goes to its place and the bias is added to it.
Calls cost next to nothing inside of a CUDA graph. Sums are float32 inside; a result of bf16 is rounded once, the weight
gradient too, as PyTorch rounds it. How float32 is multiplied is PyTorch's own setting.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as nn_grad

from fastensdistill.errors import InputError
from fastensdistill.kernels.conv_data_gradient import DataGradient
from fastensdistill.kernels.grouped_conv import ConvOutput
from fastensdistill.kernels.operands import (
    Rectangle,
    accumulator,
    check_out,
    check_precision,
    check_rows,
    check_tensor,
    rectangle,
)
from fastensdistill.kernels.reference import leave
from fastensdistill.kernels.vendor_conv import as_images

Pair = tuple[int, int]


class GeneralWindow(NamedTuple):
    """The positions of the input that an output is made of, and channel groups."""

    window: Rectangle
    channel_groups: int

    @property
    def arguments(self) -> tuple[Pair, Pair, Pair, int]:
        """Stride, padding, dilation and groups, in PyTorch's order."""
        return self.window.stride, self.window.padding, self.window.dilation, self.channel_groups

    def check(self, x: tuple[int, ...], d: tuple[int, ...], taps: int, in_channels: int) -> None:
        """Raise InputError unless images of shape ``x`` give some of ``d``, by weights of so many channels a group."""
        size = self.window.sizes(*x[1:3])
        if taps != self.window.taps or x[3] != self.channel_groups * in_channels or d[3] % self.channel_groups:
            raise InputError(
                f"weights of {taps} taps from {in_channels} to {d[3]} channels do not fit {x[3]} channels and {self}"
            )
        if d[0] != x[0] or d[1:3] != size:
            raise InputError(f"images {x[:3]} do not give {d[:3]} by {self}")


def general_window(kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, channel_groups: int) -> GeneralWindow:
    """The window of these pairs, of rows and of columns. Raises InputError for what is none."""
    if channel_groups < 1:
        raise InputError(f"channel_groups is {channel_groups}, expected at least 1")
    return GeneralWindow(rectangle(kernel, stride, padding, dilation), channel_groups)


def _weights(weight: Tensor, weight_index: Tensor, kernel: Pair) -> list[Tensor]:
    """(S, taps, Ci, Co) → for each network (Co, Ci, *kernel), channels-last memory."""
    chosen = weight.index_select(0, weight_index).unflatten(1, kernel).permute(0, 4, 1, 2, 3).contiguous()
    return [as_images(one) for one in chosen]


@torch.no_grad()
def general_conv(
    x: Tensor,
    weight: Tensor,
    weight_index: Tensor,
    *,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    channel_groups: int = 1,
    bias: Tensor | None = None,
    precision: str = "ieee",
) -> ConvOutput:
    """Convolution of G networks' images with their weights.

    Args:
        x: (G or 1, N, H, W, channel_groups · Ci), contiguous; float32 or the weight's dtype.
        weight: (S, taps, Ci, Co), bf16, fp16, float32 or float64.
        weight_index: (G,) int32 on the device, the slot of each network.
        kernel, stride, padding, dilation: of rows and of columns.
        bias: (S or 1, Co) float32, or float64 for such weights.

    Returns:
        ``z`` (G, N, Ho, Wo, Co), contiguous, in the weight's dtype, and nothing else.

    Raises:
        InputError: shapes that do not fit.
    """
    window = general_window(kernel, stride, padding, dilation, channel_groups)
    check_tensor("x", x, 5)
    check_tensor("weight", weight, 4)
    check_rows("bias", bias, weight.shape[0], weight.shape[3])
    check_precision(precision)
    groups, size = len(weight_index), window.window.sizes(*x.shape[2:4])
    shape = x.shape[1], *size, weight.shape[3]
    window.check(tuple(x.shape[1:]), shape, *weight.shape[1:3])
    if x.shape[0] not in (1, groups) or min(size) < 1:
        raise InputError(f"x has shape {tuple(x.shape)}, expected {groups} or 1 groups of images that fit {window}")
    x, z = x.to(weight.dtype), weight.new_empty(groups, *shape)
    b = None if bias is None else bias.expand(weight.shape[0], -1).index_select(0, weight_index)
    for g, w in enumerate(_weights(weight, weight_index, kernel)):
        one = F.conv2d(as_images(x[g % len(x)]), w, None, *window.arguments).permute(0, 2, 3, 1)
        if b is None:
            z[g].copy_(one)
        else:
            torch.add(one, b[g], out=z[g])
    return ConvOutput(z, None, None, None)


@torch.no_grad()
def general_data_gradient(
    d: Tensor,
    weight_flipped: Tensor,
    weight_index: Tensor,
    *,
    in_size: Pair,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    channel_groups: int = 1,
    precision: str = "ieee",
    out_dtype: torch.dtype | None = None,
) -> DataGradient:
    """Gradient of the images (G, N, *in_size, channel_groups · Ci), in ``out_dtype`` (d's), contiguous.

    Args:
        d: (G, N, Ho, Wo, Co), contiguous, the gradient of the result.
        weight_flipped: (S, taps reversed, Co, Ci), see ``flip_weight``.
        in_size: rows and columns of the images.

    The rest is :func:`general_conv`'s. Raises InputError for shapes that do not fit.
    """
    window = general_window(kernel, stride, padding, dilation, channel_groups)
    check_tensor("d", d, 5)
    check_tensor("weight_flipped", weight_flipped, 4)
    check_precision(precision)
    groups, (taps, Ci) = len(weight_index), weight_flipped.shape[1::2]
    shape = d.shape[1], *in_size, channel_groups * Ci
    window.check(shape, tuple(d.shape[1:]), taps, Ci)
    if d.shape[0] != groups or d.shape[4] != weight_flipped.shape[2]:
        raise InputError(
            f"d has shape {tuple(d.shape)}, expected {groups} groups of {weight_flipped.shape[2]} channels"
        )
    out = d.new_empty(groups, *shape, dtype=out_dtype or d.dtype)
    size = (shape[0], shape[3], *in_size)
    forward = weight_flipped.flip(1).transpose(2, 3)
    for g, w in enumerate(_weights(forward, weight_index, kernel)):
        out[g].copy_(nn_grad.conv2d_input(size, w, as_images(d[g]), *window.arguments).permute(0, 2, 3, 1))
    return DataGradient(out, None)


@torch.no_grad()
def general_weight_gradient(
    x: Tensor,
    d: Tensor,
    *,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    channel_groups: int = 1,
    precision: str = "ieee",
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """Gradient (G, taps, Ci, Co) of the weights, float32, or float64 for such operands.

    Args:
        x, d: as in :func:`general_conv` and :func:`general_data_gradient`.
        out, add: memory for the result, and whether it goes on top of what is there.

    Raises InputError for shapes that do not fit.
    """
    window = general_window(kernel, stride, padding, dilation, channel_groups)
    check_tensor("x", x, 5)
    check_tensor("d", d, 5)
    check_precision(precision)
    groups, Ci, Co = d.shape[0], x.shape[4] // max(1, channel_groups), d.shape[4]
    window.check(tuple(x.shape[1:]), tuple(d.shape[1:]), window.window.taps, Ci)
    if x.shape[0] not in (1, groups):
        raise InputError(f"x has shape {tuple(x.shape)}, expected {groups} or 1 groups")
    out = check_out("out", out, (groups, window.window.taps, Ci, Co), d, add)
    x = x.to(d.dtype)
    for g in range(groups):
        images = as_images(x[g % len(x)])
        dw = nn_grad.conv2d_weight(images, (Co, Ci, *kernel), as_images(d[g]), *window.arguments)
        leave(dw.permute(2, 3, 1, 0).flatten(0, 1).to(accumulator(d.dtype)), out[g], add)
    return out
