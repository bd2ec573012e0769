"""Grouped convolution, forward: every group g convolves its own input with the weight of its own slot.

    u = in_scale · x + in_shift, then ReLU if in_relu          (zero padding comes after it)
    z = relu?( Σ_taps u[tap] · W[slots[g], tap] + bias + residual )
    activated = relu( next_scale · z + next_shift )
    mask = (activated > 0) or, without next_scale, (z > 0), one bit per value
    statistics = Σ (z − center), Σ (z − center)² per channel, one row per program, no atomics

Layouts: activations (G, N, H, W, C), weights (S, taps, Ci, Co), both contiguous. Accumulation in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastensdistill.kernels.tiles import Tile, conv_tile, device_arch
from fastensdistill.kernels.triton_utils import (
    absent,
    accumulator,
    check_precision,
    check_rows,
    check_tensor,
    pack_mask,
    partial_rows,
    pick,
    present,
    require,
    shortcut,
)


class ConvOutput(NamedTuple):
    z: Tensor  # (G, N, Ho, Wo, Co), the weight's dtype
    activated: Tensor | None  # like z
    mask: Tensor | None  # (G, N, Ho, Wo, ceil(Co/8)) uint8
    statistics: Tensor | None  # (G, P, 2, Co) float32: rows of partial sums


def out_size(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


def _tile(x: Tensor, weight: Tensor) -> Tile:
    return conv_tile(device_arch(x), weight.shape[2], weight.shape[3], weight.element_size())


def grouped_conv_reference(
    x: Tensor,
    weight: Tensor,
    slots: Tensor,
    inputs: Tensor | None,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_relu: bool,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_stride: int,
    relu: bool,
    next_scale: Tensor | None,
    next_shift: Tensor | None,
    center: Tensor | None,
    mask: bool,
    kernel: int,
    stride: int,
    padding: int,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups, (slot_count, _, in_channels, out_channels) = slots.shape[0], weight.shape
    dtype, high = weight.dtype, accumulator(weight.dtype)
    if inputs is not None:
        x = x[inputs.long()]
    u = x.expand(groups, -1, -1, -1, -1).to(high)
    if in_scale is not None and in_shift is not None:
        u = u * pick(in_scale, slots).to(high) + pick(in_shift, slots).to(high)
    if in_relu:
        u = u.relu()
    u = u.to(dtype).to(high).permute(1, 0, 4, 2, 3).flatten(1, 2)
    w = weight.to(high).view(slot_count, kernel, kernel, in_channels, out_channels).permute(0, 4, 3, 1, 2)
    y = F.conv2d(u, w[slots.long()].flatten(0, 1), stride=stride, padding=padding, groups=groups)
    y = y.unflatten(1, (groups, out_channels)).permute(1, 0, 3, 4, 2)
    if bias is not None:
        y = y + pick(bias, slots)
    if residual is not None:
        y = y + shortcut(residual, residual_stride, y.shape[2], y.shape[3], out_channels).to(high)
    z = (y.relu() if relu else y).to(dtype).contiguous()
    activated, bits, statistics = absent(z), z.new_empty(0, dtype=torch.uint8), z.new_empty(0, dtype=high)
    if next_scale is not None and next_shift is not None:
        activated = (z.to(high) * pick(next_scale, slots) + pick(next_shift, slots)).relu().to(dtype)
    if mask:
        bits = pack_mask((activated if next_scale is not None else z) > 0)
    if center is not None:
        rest = (z.to(high) - pick(center, slots)).flatten(1, 3)
        block = _tile(x, weight).BLOCK_M
        statistics = torch.stack([partial_rows(rest, block), partial_rows(rest.square(), block)], 2)
    return z, activated, bits, statistics


@torch.library.custom_op("fastensdistill::grouped_conv", mutates_args=())
def _grouped_conv(
    x: Tensor,
    weight: Tensor,
    slots: Tensor,
    inputs: Tensor | None,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_relu: bool,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_stride: int,
    relu: bool,
    next_scale: Tensor | None,
    next_shift: Tensor | None,
    center: Tensor | None,
    mask: bool,
    kernel: int,
    stride: int,
    padding: int,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (
        x, weight, slots, inputs, in_scale, in_shift, in_relu, bias, residual, residual_stride, relu,
        next_scale, next_shift, center, mask, kernel, stride, padding, precision,
    )  # fmt: skip
    return grouped_conv_reference(*arguments)


@_grouped_conv.register_fake
def _grouped_conv_fake(
    x, weight, slots, inputs, in_scale, in_shift, in_relu, bias, residual, residual_stride, relu,
    next_scale, next_shift, center, mask, kernel, stride, padding, precision,
):  # fmt: skip
    groups, channels = slots.shape[0], weight.shape[3]
    height, width = (out_size(size, kernel, stride, padding) for size in x.shape[2:4])
    z = weight.new_empty(groups, x.shape[1], height, width, channels)
    high = accumulator(weight.dtype)
    rows = -(-x.shape[1] * height * width // _tile(x, weight).BLOCK_M)
    return (
        z,
        torch.empty_like(z) if next_scale is not None else absent(z),
        z.new_empty(*(z.shape[:4] if mask else ()), -(-channels // 8) if mask else 0, dtype=torch.uint8),
        z.new_empty(groups, rows, 2, channels, dtype=high) if center is not None else z.new_empty(0, dtype=high),
    )


def grouped_conv(
    x: Tensor,
    weight: Tensor,
    slots: Tensor,
    *,
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    inputs: Tensor | None = None,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    in_relu: bool = False,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_stride: int = 1,
    relu: bool = False,
    next_scale: Tensor | None = None,
    next_shift: Tensor | None = None,
    center: Tensor | None = None,
    mask: bool = False,
    precision: str = "ieee",
) -> ConvOutput:
    """One convolution per group, with its own weight slot and a fused prologue and epilogue (equations above).

    ``x`` (Gx, N, H, W, Ci) in float32, or in the weight's dtype, which is also the dtype multiplied in and returned;
    ``weight`` (S, kernel², Ci, Co); ``slots`` int32 (G,), read on the device, gives each group's weight slot.
    Group g reads ``x[inputs[g]]`` (int32 (G,)), without ``inputs`` ``x[g]``, or ``x[0]`` where Gx = 1.
    ``in_scale, in_shift`` (S or 1, Ci), ``bias, next_scale, next_shift, center`` (S or 1, Co), float32, by slot.
    ``residual`` (G, N, Hr, Wr, Cr ≤ Co) is read at every ``residual_stride``-th position, missing channels being 0.
    ``center`` asks for ``statistics`` (G, P, 2, Co) about it, of z as stored; ``mask`` for the 1-bit ReLU mask.
    ``precision`` is how float32 is multiplied: "ieee" or "tf32". Raises InputError for shapes that disagree, dtypes
    not among float32, float16 and bfloat16 (float64: reference only), and groups past 2^31 elements.
    """
    check_tensor("x", x, 5)
    check_tensor("weight", weight, 4)
    check_precision(precision)
    groups, slot_count, out_channels = slots.shape[0], weight.shape[0], weight.shape[3]
    require(
        weight.shape[1] == kernel * kernel and weight.shape[2] == x.shape[4],
        f"weight has shape {tuple(weight.shape)}, expected (slots, {kernel * kernel}, {x.shape[4]}, channels)",
    )
    require(slots.dtype == torch.int32 and slots.dim() == 1, f"slots is {slots.dtype} of {slots.dim()} dimensions, "
            "expected int32 (groups,)")  # fmt: skip
    require(
        inputs is not None or x.shape[0] in (1, groups),
        f"x has {x.shape[0]} groups, expected {groups} or 1, or a map `inputs`",
    )
    require(
        x.dtype in (weight.dtype, torch.float32), f"x is {x.dtype}, expected float32 or the weight's {weight.dtype}"
    )
    require((in_scale is None) == (in_shift is None), "in_scale and in_shift must be given together")
    require((next_scale is None) == (next_shift is None), "next_scale and next_shift must be given together")
    check_rows("in_scale", in_scale, slot_count, x.shape[4])
    check_rows("in_shift", in_shift, slot_count, x.shape[4])
    for name, rows in (("bias", bias), ("next_scale", next_scale), ("next_shift", next_shift), ("center", center)):
        check_rows(name, rows, slot_count, out_channels)
    height, width = (out_size(size, kernel, stride, padding) for size in x.shape[2:4])
    check_tensor("the result", torch.empty(groups, x.shape[1], height, width, out_channels, device="meta"), 5)
    if residual is not None:
        check_tensor("residual", residual, 5)
        expected = (groups, x.shape[1], *(-(-s // residual_stride) for s in residual.shape[2:4]))
        require(
            expected == (groups, x.shape[1], height, width)
            and residual.shape[:2] == expected[:2]
            and residual.shape[4] <= out_channels,
            f"residual has shape {tuple(residual.shape)}, expected every {residual_stride}-th position of it to be "
            f"({groups}, {x.shape[1]}, {height}, {width}, at most {out_channels})",
        )
    z, activated, bits, statistics = _grouped_conv(
        x, weight, slots, inputs, in_scale, in_shift, in_relu, bias, residual, residual_stride, relu,
        next_scale, next_shift, center, mask, kernel, stride, padding, precision,
    )  # fmt: skip
    return ConvOutput(z, present(activated), present(bits), present(statistics))
