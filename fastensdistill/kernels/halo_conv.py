"""3x3 convolutions at stride 1 in bf16 by the extension's CUDA kernels, forward and data gradient.

Equations, layouts and results are those of ``grouped_conv`` and ``conv_data_gradient``, whose references serve here
too; either can replace the other in a launch. The kernels hold a tile of the input with its border in shared memory,
normalised once, and read the nine taps out of it (``csrc/halo_conv.h``), where the Triton kernels load every tap anew.
Rows of partial statistics are one per tile of positions.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastensdistill.errors import InputError
from fastensdistill.kernels.conv_data_gradient import DataGradient, conv_data_gradient, conv_data_gradient_reference
from fastensdistill.kernels.elementwise_gradient import gradient_sums
from fastensdistill.kernels.grouped_conv import ConvOutput, grouped_conv, grouped_conv_reference
from fastensdistill.kernels.ops import absent, define, present
from fastensdistill.kernels.reference import pick

POSITIONS, BORDERED = 256, 405  # of a tile, without and with its border: as in csrc/halo_shape.h
SHARED = 160 * 1024  # bytes a block may ask for: compute capability 8.0, 9.0 and 10.0 have it


class HaloTile(NamedTuple):
    """Positions of a block (images x rows x columns, at most 256) and the channels it computes for them."""

    images: int
    rows: int
    columns: int
    channels: int


# Channels of a block → why. None is measured yet; registers and shared memory of each are in csrc/halo_shape.h.
CHANNELS = {
    16: "16 channels: all nine taps' weights in one stage, 4.6 KB, so that there is one barrier per 16 input channels",
    32: "32 channels, or 160 = 5 x 32 without waste: three taps a stage; 192 bytes of shared memory per mma",
    64: "64, 192, 320 channels: 64x64 per warp, 128 bytes per mma; two blocks, one multiplies while the other stores",
    128: "128, 256, 640 channels: eight warps share the input's tile, a quarter less through L2 than two blocks of 64",
}


_most = 128


@contextlib.contextmanager
def at_most(channels: int) -> Iterator[None]:
    """Within, blocks take at most so many channels: to measure one choice against another."""
    global _most
    before, _most = _most, channels
    try:
        yield
    finally:
        _most = before


def block_channels(channels: int, most: int | None = None) -> int:
    """The most channels a block can take without waste: the largest of 16 … 128 that divides them."""
    return max(width for width in CHANNELS if channels % width == 0 and width <= (most or _most))


def halo_tile(images: int, height: int, width: int, channels: int) -> HaloTile:
    """How ``images`` of ``height`` x ``width`` positions are cut: columns, then rows, then whole images, as fit."""
    columns = -(-width // -(-width // 32))
    rows = min(height, POSITIONS // columns, BORDERED // (columns + 2) - 2)
    rows = -(-height // -(-height // rows))
    together = 1
    if rows == height and columns == width:
        together = min(max(1, images), POSITIONS // (rows * columns), BORDERED // ((rows + 2) * (columns + 2)))
    return HaloTile(together, rows, columns, block_channels(channels))


def without_body(arch: int) -> bool:
    """Whether the kernels are left out on compute capability ``arch`` (86 for 8.6): ``halo_has_body`` in the C++."""
    return arch in (86, 89) or arch >= 120


def unsupported(
    channels: int, out_channels: int, *, kernel: int, stride: int, padding: int, dtype: torch.dtype, arch: int = 0
) -> str:
    """What of a convolution the kernels do not cover, in a few words; "" where they cover it. ``arch`` 0: any device"""
    if without_body(arch):
        return f"compute capability {arch // 10}.{arch % 10}, expected 8.0, 9.0 or 10.x"
    if (kernel, stride, padding) != (3, 1, 1):
        return f"kernel {kernel}, stride {stride}, padding {padding}, expected 3, 1, 1"
    if channels % 16 or out_channels % 16:
        return f"{channels} to {out_channels} channels, expected multiples of 16"
    if dtype != torch.bfloat16:
        return f"{dtype}, expected torch.bfloat16"
    return ""


def supports(channels: int, out_channels: int, **sizes: Any) -> bool:
    """Whether the kernels cover a convolution from ``channels`` to ``out_channels``; for a data gradient both swap.

    ``sizes`` are the keywords of :func:`unsupported`.
    """
    return not unsupported(channels, out_channels, **sizes)


def _require(name: str, reason: str) -> None:
    if reason:
        raise InputError(f"{name} does not cover {reason}")


def _check_device(name: str, x: Tensor) -> None:
    if x.is_cuda:
        properties: Any = torch.cuda.get_device_properties(x.device)
        limit = properties.shared_memory_per_block_optin  # PyTorch's annotations lack it
        _require(name, "" if limit >= SHARED else f"a device with {limit} bytes of shared memory, expected {SHARED}")


def _tile_sums(values: Tensor, tile: list[int]) -> Tensor:
    """(G, N, H, W, C) → (G, tiles, C): sums over the tiles, neighbours in a row first, then down, then images."""
    for dim, size in ((3, tile[2]), (2, tile[1]), (1, tile[0])):
        padding = [0, 0] * (values.dim() - 1 - dim) + [0, -values.shape[dim] % size]
        values = F.pad(values, padding).unflatten(dim, (-1, size)).sum(dim + 1)
    return values.flatten(1, 3)


def _tiles(x: Tensor, tile: list[int]) -> int:
    images, height, width = x.shape[1:4]
    return -(-images // tile[0]) * -(-height // tile[1]) * -(-width // tile[2])


def built(arch: int = 0) -> bool:
    """Whether the extension has the CUDA kernels, with ``arch`` (86 for 8.6) on such a device; without, the references
    compute on every device."""
    found = torch._C._dispatch_has_kernel_for_dispatch_key("fastensdistill::halo_conv", "CUDA")
    return bool(found) and not without_body(arch)


# ---- references


def halo_conv_reference(
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
    tile: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z, activated, bits, statistics = grouped_conv_reference(
        x, weight, slots, inputs, in_scale, in_shift, in_relu, bias, residual, residual_stride, relu,
        next_scale, next_shift, None, mask, 3, 1, 1, "ieee",
    )  # fmt: skip
    if center is not None:
        rest = z.to(statistics.dtype) - pick(center, slots)
        statistics = torch.stack([_tile_sums(rest, tile), _tile_sums(rest.square(), tile)], 2)
    return z, activated, bits, statistics


def halo_data_gradient_reference(
    d: Tensor,
    weight_flipped: Tensor,
    slots: Tensor,
    residual: Tensor | None,
    residual_stride: int,
    residual_first: bool,
    mask: Tensor | None,
    scale: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    inv_std: Tensor | None,
    tile: list[int],
) -> tuple[Tensor, Tensor]:
    out, _ = conv_data_gradient_reference(
        d, weight_flipped, slots, d.shape[2], d.shape[3], residual, residual_stride, residual_first, mask, scale,
        None, None, None, 3, 1, 1, str(d.dtype).removeprefix("torch."), "ieee",
    )  # fmt: skip
    return out, gradient_sums(out, slots, z, mean, inv_std, lambda values: _tile_sums(values, tile))


# ---- registration: CUDA kernels are the extension's


def _fake(
    x, weight, slots, inputs, in_scale, in_shift, in_relu, bias, residual, residual_stride, relu,
    next_scale, next_shift, center, mask, tile,
):  # fmt: skip
    groups, channels = slots.shape[0], weight.shape[3]
    z = weight.new_empty(groups, *x.shape[1:4], channels)
    rows = (groups, _tiles(x, tile), 2, channels) if center is not None else (0,)
    return (
        z,
        torch.empty_like(z) if next_scale is not None else absent(z),
        z.new_empty((*z.shape[:4], channels // 8) if mask else (0,), dtype=torch.uint8),
        z.new_empty(rows, dtype=torch.float32),
    )


def _fake_gradient(
    d, weight_flipped, slots, residual, residual_stride, residual_first, mask, scale, z, mean, inv_std, tile
):
    groups, channels = slots.shape[0], weight_flipped.shape[3]
    rows = (groups, _tiles(d, tile), 2, channels) if z is not None else (0,)
    return d.new_empty(groups, *d.shape[1:4], channels), d.new_empty(rows, dtype=torch.float32)


define("halo_conv", halo_conv_reference, _fake)
define("halo_data_gradient", halo_data_gradient_reference, _fake_gradient)


# ---- public functions


def _without_values(value):
    return value.to("meta") if isinstance(value, Tensor) else value


def halo_conv(
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
    """``grouped_conv`` with the same arguments and results, for what ``supports`` says.

    ``x`` (Gx, N, H, W, Ci) and ``weight`` (S, 9, Ci, Co) are bf16, Ci and Co multiples of 16, a residual's channels of
    8; ``statistics`` has a row for every tile. Raises InputError for anything else, and for what ``grouped_conv``
    refuses. Without the extension, and off CUDA, the reference computes it.
    """
    options = {
        "inputs": inputs, "in_scale": in_scale, "in_shift": in_shift, "bias": bias, "residual": residual,
        "next_scale": next_scale, "next_shift": next_shift, "center": center,
    }  # fmt: skip
    # the checks of grouped_conv, on tensors without values
    grouped_conv(
        *map(_without_values, (x, weight, slots)), kernel=kernel, stride=stride, padding=padding,
        residual_stride=residual_stride, precision=precision,
        **{name: _without_values(value) for name, value in options.items()},
    )  # fmt: skip
    sizes = {"kernel": kernel, "stride": stride, "padding": padding}
    _require("halo_conv", unsupported(weight.shape[2], weight.shape[3], **sizes, dtype=x.dtype))
    _check_residual("halo_conv", residual)
    _check_device("halo_conv", x)
    if inputs is not None:
        _require("halo_conv", "" if inputs.dtype == torch.int32 else f"inputs in {inputs.dtype}, expected torch.int32")
    tile = halo_tile(x.shape[1], x.shape[2], x.shape[3], weight.shape[3])
    z, activated, bits, statistics = torch.ops.fastensdistill.halo_conv(
        x, weight, slots, inputs, in_scale, in_shift, in_relu, bias, residual, residual_stride, relu,
        next_scale, next_shift, center, mask, list(tile),
    )  # fmt: skip
    return ConvOutput(z, present(activated), present(bits), present(statistics))


def _check_residual(name: str, residual: Tensor | None) -> None:
    if residual is not None and (residual.shape[4] % 8 or residual.dtype != torch.bfloat16):
        _require(name, f"a residual of {residual.shape[4]} channels in {residual.dtype}, expected bf16 and multiples "
                 "of 8")  # fmt: skip


def halo_data_gradient(
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
    """``conv_data_gradient`` with the same arguments and results, for what ``supports`` says.

    ``d`` (G, N, H, W, Co), ``weight_flipped`` (S, 9 reversed, Co, Ci) and the result are bf16, Ci and Co multiples of
    16, a residual's channels of 8; ``statistics`` has a row for every tile. Raises InputError for anything else, and
    for what ``conv_data_gradient`` refuses. Without the extension, and off CUDA, the reference computes it.
    """
    options = {"residual": residual, "mask": mask, "scale": scale, "z": z, "mean": mean, "inv_std": inv_std}
    # the checks of conv_data_gradient, on tensors without values
    conv_data_gradient(
        *map(_without_values, (d, weight_flipped, slots)), in_size=in_size, kernel=kernel, stride=stride,
        padding=padding, residual_stride=residual_stride, out_dtype=out_dtype, precision=precision,
        **{name: _without_values(value) for name, value in options.items()},
    )  # fmt: skip
    sizes = {"kernel": kernel, "stride": stride, "padding": padding}
    _require("halo_data_gradient", unsupported(*weight_flipped.shape[2:], **sizes, dtype=d.dtype))
    _require("halo_data_gradient", f"a result in {out_dtype}" if out_dtype not in (None, torch.bfloat16) else "")
    _check_residual("halo_data_gradient", residual)
    _check_device("halo_data_gradient", d)
    tile = halo_tile(d.shape[1], d.shape[2], d.shape[3], weight_flipped.shape[3])
    result, statistics = torch.ops.fastensdistill.halo_data_gradient(
        d, weight_flipped, slots, residual, residual_stride, residual_first, mask, scale, z, mean, inv_std, list(tile)
    )
    return DataGradient(result, present(statistics))
