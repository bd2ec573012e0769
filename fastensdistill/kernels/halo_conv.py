"""3x3 convolutions at stride 1 in bf16 by the extension's CUDA kernels, forward and data gradient.

Equations, layouts and results are those of ``grouped_conv`` and ``conv_data_gradient``, whose references serve here
too; either can replace the other in a launch. The kernels hold a tile of the input with its border in shared memory,
normalised once, and read the nine taps out of it (``csrc/halo_conv.h``), where the Triton kernels load every tap anew.
Rows of partial statistics are one per tile of positions.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastensdistill.errors import InputError
from fastensdistill.kernels import extension
from fastensdistill.kernels.conv_data_gradient import (
    DataGradient,
    DataGradientOperands,
    conv_data_gradient,
    conv_data_gradient_reference,
    data_gradient_operands,
    gradient_results,
)
from fastensdistill.kernels.elementwise_gradient import GradientEpilogue, gradient_sums
from fastensdistill.kernels.grouped_conv import (
    ConvOperands,
    ConvOutput,
    Results,
    conv_operands,
    conv_output,
    conv_results,
    grouped_conv,
    grouped_conv_reference,
)
from fastensdistill.kernels.operands import Window, refuse_operands
from fastensdistill.kernels.ops import define, present
from fastensdistill.kernels.reference import pick

WINDOW = Window(3, 1, 1)  # the only one covered
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


def tile_of(x: Tensor, channels: int) -> list[int]:
    """How ``x`` (G, N, H, W, C) is cut for results of so many channels."""
    return list(halo_tile(x.shape[1], x.shape[2], x.shape[3], channels))


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


def unsupported(channels: int, out_channels: int, window: Window, dtype: torch.dtype, arch: int = 0) -> str:
    """What of a convolution the kernels do not cover, in a few words; "" where they cover it. ``arch`` 0: any device"""
    if without_body(arch):
        return f"compute capability {arch // 10}.{arch % 10}, expected 8.0, 9.0 or 10.x"
    if window != WINDOW:
        return f"kernel {window.kernel}, stride {window.stride}, padding {window.padding}, expected 3, 1, 1"
    if channels % 16 or out_channels % 16:
        return f"{channels} to {out_channels} channels, expected multiples of 16"
    if dtype != torch.bfloat16:
        return f"{dtype}, expected torch.bfloat16"
    return ""


def supports(channels: int, out_channels: int, window: Window, dtype: torch.dtype, arch: int = 0) -> bool:
    """Whether the kernels cover a convolution from ``channels`` to ``out_channels``; for a data gradient both swap."""
    return not unsupported(channels, out_channels, window, dtype, arch)


def _refuse(name: str, *reasons: str) -> None:
    """Raise for the first of ``reasons`` that is none of "" (nothing to refuse)."""
    for reason in filter(None, reasons):
        raise InputError(f"{name} does not cover {reason}")


def short_of_memory(x: Tensor) -> str:
    """What of the device of ``x`` refuses the kernels' shared memory; "" where nothing does."""
    if not x.is_cuda:
        return ""
    properties: Any = torch.cuda.get_device_properties(x.device)
    limit = properties.shared_memory_per_block_optin  # PyTorch's annotations lack it
    return "" if limit >= SHARED else f"a device with {limit} bytes of shared memory, expected {SHARED}"


def _other_residual(residual: Tensor | None) -> str:
    if residual is None or (residual.shape[4] % 8 == 0 and residual.dtype == torch.bfloat16):
        return ""
    return f"a residual of {residual.shape[4]} channels in {residual.dtype}, expected bf16 and multiples of 8"


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
    return extension.serves("halo_conv", "cuda") and not without_body(arch)


class HaloOperands(NamedTuple):
    """The fields of :class:`ConvOperands` that the extension's op has."""

    x: Tensor
    weight: Tensor
    weight_index: Tensor
    in_scale: Tensor | None = None
    in_shift: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    residual_stride: int = 1
    relu: bool = False
    next_scale: Tensor | None = None
    next_shift: Tensor | None = None
    center: Tensor | None = None
    mask: bool = False


class HaloEpilogue(NamedTuple):
    """The fields of :class:`GradientEpilogue` that the extension's op has."""

    residual: Tensor | None = None
    residual_stride: int = 1
    residual_first: bool = False
    mask: Tensor | None = None
    scale: Tensor | None = None
    z: Tensor | None = None
    mean: Tensor | None = None
    inv_std: Tensor | None = None


def halo_conv_reference(o: HaloOperands, tile: list[int]) -> Results:
    z, activated, bits, statistics = grouped_conv_reference(ConvOperands(*o._replace(center=None)), WINDOW, "ieee")
    if o.center is not None:
        rest = z.to(statistics.dtype) - pick(o.center, o.weight_index)
        statistics = torch.stack([_tile_sums(rest, tile), _tile_sums(rest.square(), tile)], 2)
    return z, activated, bits, statistics


def halo_data_gradient_reference(
    d: Tensor, weight_flipped: Tensor, weight_index: Tensor, halo: HaloEpilogue, tile: list[int]
) -> tuple[Tensor, Tensor]:
    epilogue = GradientEpilogue(*halo)
    height, width, dtype = d.shape[2], d.shape[3], str(d.dtype).removeprefix("torch.")
    o = DataGradientOperands(d, weight_flipped, weight_index, height, width, dtype)
    out, _ = conv_data_gradient_reference(o, epilogue._replace(z=None), WINDOW, "ieee")
    return out, gradient_sums(out, weight_index, epilogue, lambda values: _tile_sums(values, tile))


def empty_conv(o: HaloOperands, tile: list[int]) -> Results:
    """The results of ``halo_conv`` unwritten."""
    return conv_results(ConvOperands(*o), WINDOW, _tiles(o.x, tile))


def empty_gradient(
    d: Tensor, weight_flipped: Tensor, weight_index: Tensor, halo: HaloEpilogue, tile: list[int]
) -> tuple[Tensor, Tensor]:
    """The results of ``halo_data_gradient`` unwritten."""
    shape = (len(weight_index), *d.shape[1:4], weight_flipped.shape[3])
    return gradient_results(d, shape, _tiles(d, tile), GradientEpilogue(*halo))


# The CUDA kernels are the extension's
_halo_conv = define("halo_conv", halo_conv_reference, empty_conv)
_halo_data_gradient = define("halo_data_gradient", halo_data_gradient_reference, empty_gradient)


def halo_conv(*operands: Any, **options: Any) -> ConvOutput:
    """``grouped_conv`` with the same arguments and results, for what ``supports`` says.

    ``x`` (G or 1, N, H, W, Ci) and ``weight`` (S, 9, Ci, Co) are bf16, Ci and Co multiples of 16, a residual's channels
    of 8; ``statistics`` has a row for every tile. Raises InputError for anything else, and for what ``grouped_conv``
    refuses. Without the extension, and off CUDA, the reference computes it.
    """
    o, window, _ = conv_operands(*operands, **options)
    channels, out_channels = o.weight.shape[2:]
    refuse_operands("halo_conv", in_relu=o.in_relu, second=o.second)
    _refuse(
        "halo_conv",
        unsupported(channels, out_channels, window, o.x.dtype),
        _other_residual(o.residual),
        short_of_memory(o.x),
    )
    return conv_output(*_halo_conv(*o[: len(HaloOperands._fields)], tile_of(o.x, out_channels)))


def halo_data_gradient(*operands: Any, **options: Any) -> DataGradient:
    """``conv_data_gradient`` with the same arguments and results, for what ``supports`` says.

    ``d`` (G, N, H, W, Co), ``weight_flipped`` (S, 9 reversed, Co, Ci) and the result are bf16, Ci and Co multiples of
    16, a residual's channels of 8; ``statistics`` has a row for every tile. Raises InputError for anything else, and
    for what ``conv_data_gradient`` refuses. Without the extension, and off CUDA, the reference computes it.
    """
    o, epilogue, window, _ = data_gradient_operands(*operands, **options)
    channels, out_channels = o.weight_flipped.shape[2:]
    refuse_operands("halo_data_gradient", second=o.second, norm_z=o.norm_z, mask_scale=epilogue.mask_scale)
    _refuse(
        "halo_data_gradient",
        unsupported(channels, out_channels, window, o.d.dtype),
        "" if o.out_dtype == "bfloat16" else f"a result in torch.{o.out_dtype}",
        _other_residual(epilogue.residual),
        short_of_memory(o.d),
    )
    tile = tile_of(o.d, out_channels)
    own = epilogue[: len(HaloEpilogue._fields)]
    result, statistics = _halo_data_gradient(o.d, o.weight_flipped, o.weight_index, *own, tile)
    return DataGradient(result, present(statistics))


HALO: dict[Callable[..., Any], Callable[..., Any]] = {
    grouped_conv: halo_conv,
    conv_data_gradient: halo_data_gradient,
}
