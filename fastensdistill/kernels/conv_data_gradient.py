"""Grouped convolution, gradient of the input, with what the backward pass does next.

    u = Σ_taps d[(position + padding − tap) / stride] · W[slots[g], tap]ᵀ          (only where it divides)
    u += residual (residual_first);   u = mask · u;   u = scale · u;   u += residual (otherwise)
    statistics = Σ u, Σ u · (z − mean) · inv_std per channel, one row per program, no atomics

``mask`` is the 1-bit ReLU mask of the forward pass. ``scale`` belongs to an eval BatchNorm in front of that ReLU;
in training mode ``z, mean, inv_std`` ask for the two sums which ``batch_norm_backward`` needs instead.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as nn_grad

from fastensdistill.errors import unknown
from fastensdistill.kernels.tiles import Tile, conv_tile, device_arch
from fastensdistill.kernels.triton_utils import (
    DTYPE_NAMES,
    absent,
    accumulator,
    check_precision,
    check_rows,
    check_tensor,
    partial_rows,
    pick,
    present,
    require,
    unpack_mask,
)


class DataGradient(NamedTuple):
    d: Tensor  # (G, N, H, W, Ci)
    statistics: Tensor | None  # (G, P, 2, Ci) float32: rows of partial sums


def _tile(d: Tensor, weight: Tensor) -> Tile:
    return conv_tile(device_arch(d), weight.shape[2], weight.shape[3], weight.element_size())


def flip_weight(weight: Tensor) -> Tensor:
    """(S, taps, Ci, Co) → (S, taps reversed, Co, Ci): the packing that the data gradient reads."""
    return weight.flip(1).transpose(2, 3).contiguous()


def conv_data_gradient_reference(
    d: Tensor,
    weight_flipped: Tensor,
    slots: Tensor,
    height: int,
    width: int,
    residual: Tensor | None,
    residual_stride: int,
    residual_first: bool,
    mask: Tensor | None,
    scale: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    inv_std: Tensor | None,
    kernel: int,
    stride: int,
    padding: int,
    out_dtype: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    groups, images = d.shape[:2]
    slot_count, _, out_channels, in_channels = weight_flipped.shape
    high, dtype = accumulator(weight_flipped.dtype), DTYPE_NAMES[out_dtype]
    w = weight_flipped.to(high).flip(1).view(slot_count, kernel, kernel, out_channels, in_channels)
    w = w.permute(0, 3, 4, 1, 2)[slots.long()].flatten(0, 1)
    u = nn_grad.conv2d_input(
        [images, groups * in_channels, height, width],
        w,
        d.to(high).permute(1, 0, 4, 2, 3).flatten(1, 2),
        stride=stride,
        padding=padding,
        groups=groups,
    )
    u = u.unflatten(1, (groups, in_channels)).permute(1, 0, 3, 4, 2)
    added = torch.zeros_like(u)
    if residual is not None:
        r = residual[..., :in_channels].to(high)
        added[:, :, ::residual_stride, ::residual_stride] = F.pad(r, (0, in_channels - r.shape[-1]))
    if residual_first:
        u = u + added
    if mask is not None:
        u = u * unpack_mask(mask, in_channels)
    if scale is not None:
        u = u * pick(scale, slots)
    if not residual_first:
        u = u + added
    out, statistics = u.to(dtype).contiguous(), absent(d.new_empty(0, dtype=high))
    if z is not None and mean is not None and inv_std is not None:
        stored = out.to(high)
        product = stored * ((z.to(high) - pick(mean, slots)) * pick(inv_std, slots))
        block = _tile(d, weight_flipped).BLOCK_M
        statistics = torch.stack([class_rows(v, stride, block) for v in (stored, product)], 2)
    return out, statistics


def class_rows(values: Tensor, stride: int, block: int) -> Tensor:
    """Partial sums of (G, N, H, W, C) as the kernel makes them: per parity class, over runs of ``block`` positions."""
    classes = [values[:, :, i::stride, j::stride].flatten(1, 3) for i in range(stride) for j in range(stride)]
    most = classes[0].shape[1]
    return torch.cat([partial_rows(F.pad(c, (0, 0, 0, most - c.shape[1])), block) for c in classes], 1)


@torch.library.custom_op("fastensdistill::conv_data_gradient", mutates_args=())
def _conv_data_gradient(
    d: Tensor,
    weight_flipped: Tensor,
    slots: Tensor,
    height: int,
    width: int,
    residual: Tensor | None,
    residual_stride: int,
    residual_first: bool,
    mask: Tensor | None,
    scale: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    inv_std: Tensor | None,
    kernel: int,
    stride: int,
    padding: int,
    out_dtype: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    arguments = (
        d, weight_flipped, slots, height, width, residual, residual_stride, residual_first, mask, scale,
        z, mean, inv_std, kernel, stride, padding, out_dtype, precision,
    )  # fmt: skip
    return conv_data_gradient_reference(*arguments)


@_conv_data_gradient.register_fake
def _conv_data_gradient_fake(
    d, weight_flipped, slots, height, width, residual, residual_stride, residual_first, mask, scale,
    z, mean, inv_std, kernel, stride, padding, out_dtype, precision,
):  # fmt: skip
    channels = weight_flipped.shape[3]
    out = d.new_empty(slots.shape[0], d.shape[1], height, width, channels, dtype=DTYPE_NAMES[out_dtype])
    positions = d.shape[1] * -(-height // stride) * -(-width // stride)
    rows = stride * stride * -(-positions // _tile(d, weight_flipped).BLOCK_M)
    high = accumulator(weight_flipped.dtype)
    shape = (slots.shape[0], rows, 2, channels) if z is not None else (0,)
    return out, d.new_empty(shape, dtype=high)


def conv_data_gradient(
    d: Tensor,
    weight_flipped: Tensor,
    slots: Tensor,
    *,
    in_size: tuple[int, int],
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    residual: Tensor | None = None,
    residual_stride: int = 1,
    residual_first: bool = False,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    z: Tensor | None = None,
    mean: Tensor | None = None,
    inv_std: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    precision: str = "ieee",
) -> DataGradient:
    """Gradient of a grouped convolution's input, with mask, scale, residual gradient and BatchNorm sums.

    ``d`` (G, N, Ho, Wo, Co); ``weight_flipped`` (S, taps reversed, Co, Ci) as ``flip_weight`` packs it, in d's dtype;
    ``slots`` int32 (G,); ``in_size`` = (H, W) of the input. ``residual`` (G, N, ceil(H/s), ceil(W/s), Cr) is added
    at every ``residual_stride``-th position, to the first min(Cr, Ci) channels, before the mask if ``residual_first``.
    ``mask`` uint8 (G, N, H, W, ceil(Ci/8)); ``scale, mean, inv_std`` (S or 1, Ci) float32, by slot; ``z`` like the
    result. ``out_dtype`` defaults to d's. Raises InputError for shapes or dtypes that disagree and oversized groups.
    """
    check_tensor("d", d, 5)
    check_tensor("weight_flipped", weight_flipped, 4)
    check_precision(precision)
    slot_count, channels = weight_flipped.shape[0], weight_flipped.shape[3]
    height, width = in_size
    shape = (slots.shape[0], d.shape[1], height, width, channels)
    check_tensor("the result", torch.empty(shape, device="meta"), 5)
    require(
        weight_flipped.shape[1] == kernel * kernel and weight_flipped.shape[2] == d.shape[4],
        f"weight_flipped has shape {tuple(weight_flipped.shape)}, expected "
        f"(slots, {kernel * kernel}, {d.shape[4]}, channels)",
    )
    require(d.shape[0] == slots.shape[0], f"d has {d.shape[0]} groups, expected {slots.shape[0]} as slots has")
    require(d.dtype == weight_flipped.dtype, f"d is {d.dtype}, expected the weight's {weight_flipped.dtype}")
    out = tuple((size + 2 * padding - kernel) // stride + 1 for size in in_size)
    require(out == tuple(d.shape[2:4]), f"d has size {tuple(d.shape[2:4])}, expected {out} for input {in_size}")
    require((z is None) == (mean is None) == (inv_std is None), "z, mean and inv_std must be given together")
    for name, rows in (("scale", scale), ("mean", mean), ("inv_std", inv_std)):
        check_rows(name, rows, slot_count, channels)
    if z is not None:
        require(z.shape == shape and z.is_contiguous(), f"z has shape {tuple(z.shape)}, expected {shape}, contiguous")
    if mask is not None:
        wanted = (*shape[:4], -(-channels // 8))
        require(
            mask.shape == wanted and mask.is_contiguous() and mask.dtype == torch.uint8,
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}, expected uint8 {wanted}, contiguous",
        )
    if residual is not None:
        check_tensor("residual", residual, 5)
        small = (*shape[:2], -(-height // residual_stride), -(-width // residual_stride))
        require(
            residual.shape[:4] == small, f"residual has shape {tuple(residual.shape)}, expected {small} and channels"
        )
    name = str(out_dtype or d.dtype).removeprefix("torch.")
    if name not in DTYPE_NAMES:
        raise unknown("out_dtype", name, DTYPE_NAMES)
    result, statistics = _conv_data_gradient(
        d, weight_flipped, slots, height, width, residual, residual_stride, residual_first, mask, scale,
        z, mean, inv_std, kernel, stride, padding, name, precision,
    )  # fmt: skip
    return DataGradient(result, present(statistics))
