"""Convolutions in bf16 by wgmma on tiles that the copy engine brings (compute capability 9.0): forward, data gradient.

Equations, layouts and results are those of ``grouped_conv`` and ``conv_data_gradient``, whose references serve here
too; either can replace the other in a launch. The kernels (``csrc/wgmma_conv.h``, of 32 channels or fewer
``csrc/wgmma_narrow.h``) hold a tile of the input with its border in shared memory and read its taps out of it. A block
works for one group and one block of channels and takes every so many-th tile: rows of partial statistics are one per
block or two.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastensdistill.errors import InputError
from fastensdistill.kernels import wgmma
from fastensdistill.kernels.conv_data_gradient import (
    DataGradient,
    DataGradientOperands,
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
    grouped_conv_reference,
)
from fastensdistill.kernels.operands import Window
from fastensdistill.kernels.ops import define, present
from fastensdistill.kernels.reference import pick

CHUNK = 64  # channels of a piece of weights, either side
COLUMNS, LINES, BORDERED, MOST_IMAGES = 8, 32, 40, 8  # of a tile, as in csrc/conv_steps.h
NARROW, NARROW_IN = 32, 128  # the most channels of results, and of inputs, that the narrow kernel takes
PIECE = CHUNK * CHUNK * 2  # bytes of weights
MANY = 1024  # images: a tile has no more of them than of fewer
SHARED = (227 - 1 - 64 - 4) * 1024  # of a data gradient's block, for boxes and weights: as in csrc/wgmma_wide_plan.h


class ConvTile(NamedTuple):
    """Positions of a tile, eight columns x rows x images, and the tiles in a row, in a column, over the images."""

    images: int
    rows: int
    across: int
    down: int
    along: int

    @property
    def total(self) -> int:
        """Tiles in all."""
        return self.across * self.down * self.along


def conv_tile(images: int, height: int, width: int) -> ConvTile:
    """How results of so many images are cut: ``conv_tile`` of csrc/conv_steps.h."""
    rows = min(height, LINES, BORDERED - 2)
    rows = -(-height // -(-height // rows))
    together = 1
    if rows == height:
        together = max(1, min(images + images % 2, LINES // rows, BORDERED // (rows + 2), MOST_IMAGES))
    if rows * together % 2 and together > 1:
        together -= 1
    if rows * together % 2:
        rows += 1
    return ConvTile(together, rows, -(-width // COLUMNS), -(-height // rows), -(-images // together))


def box_bytes(window: Window, tile: ConvTile, copies: bool) -> int:
    """Shared memory of a tile with its border, and of what an operand of 32 lines reads past it."""
    reach = (window.kernel - 1) // window.stride if window.kernel > window.stride else 0
    columns = COLUMNS + (0 if copies else reach)
    last = reach * tile.images * columns + columns - COLUMNS  # where the farthest tap begins
    positions = max((tile.rows + reach) * tile.images * columns, last + (LINES - 1) * columns + COLUMNS)
    return -(-positions * 2 * CHUNK // 1024) * 1024


def norm_fits(window: Window, shape: tuple[int, int, int], copies: bool) -> bool:
    """Whether shared memory has room for z's tile beside those of d: results of ``shape`` (N, H, W)."""
    tile = conv_tile(shape[0], *(-(-size // window.stride) for size in shape[1:]))
    return 3 * box_bytes(window, tile, copies) + 2 * PIECE <= SHARED


def takes_norm(channels: int, out_channels: int, window: Window, height: int, width: int) -> bool:
    """Whether a data gradient from ``channels`` can load them through a BatchNorm's, whatever the number of images.

    Its result has ``out_channels`` of ``height`` x ``width`` positions.
    """
    return is_narrow(channels, out_channels) or norm_fits(window, (MANY, height, width), wgmma.copies())


class Rows(NamedTuple):
    """Rows of partial sums: those of tile t are row ``(t // together % parts) · together + t % together``."""

    tile: ConvTile
    stride: int  # of the result's phases: every tile is one of each
    together: int  # tiles of an item, which the ``parts`` blocks of a group and block of channels take in turn
    parts: int

    @property
    def total(self) -> int:
        """Rows of a group."""
        return self.together * self.parts

    def sums(self, values: Tensor) -> Tensor:
        """(G, N, H, W, C) → (G, total, C)."""
        phases = [(i, j) for i in range(self.stride) for j in range(self.stride)]
        tiles = torch.stack([self._tile_sums(values[:, :, i :: self.stride, j :: self.stride]) for i, j in phases])
        t = torch.arange(self.tile.total, device=values.device)
        row = t // self.together % self.parts * self.together + t % self.together
        out = values.new_zeros(len(values), self.total, values.shape[4])
        return out.index_add(1, row, tiles.sum(0))

    def _tile_sums(self, values: Tensor) -> Tensor:
        """(G, N, H, W, C) → (G, tiles, C): neighbours in a row first, then down, then images."""
        tile = self.tile
        sides = ((3, COLUMNS, tile.across), (2, tile.rows, tile.down), (1, tile.images, tile.along))
        for dim, size, count in sides:
            padding = [0, 0] * (values.dim() - 1 - dim) + [0, size * count - values.shape[dim]]
            values = F.pad(values, padding).unflatten(dim, (count, size)).sum(dim + 1)
        return values.flatten(1, 3)


def is_narrow(in_channels: int, channels: int) -> bool:
    """Whether the narrow kernel makes results of ``channels`` from sources of at most ``in_channels``."""
    return channels <= NARROW and in_channels <= NARROW_IN


def statistics_rows(
    groups: int,
    shape: tuple[int, int, int],
    in_channels: int,
    channels: int,
    stride: int,
    gradient: bool,
    norm: bool,
    multiprocessors: int,
) -> Rows:
    """Which rows of partial sums the kernels make of ``shape`` (N, H, W) positions of ``channels``.

    ``in_channels`` are the most of its sources, ``stride`` is 1 forward. ``norm``: d goes through a BatchNorm's
    gradient on load.
    """
    tile = conv_tile(shape[0], -(-shape[1] // stride), -(-shape[2] // stride))
    if is_narrow(in_channels, channels):
        consumers = 4 - gradient - (channels == 32)  # warpgroups that take a tile each
        parts = max(1, min(multiprocessors // groups, -(-tile.total // consumers)))
        return Rows(tile, stride, consumers, parts)
    blocks = -(-channels // CHUNK)
    pair = blocks % 2 == 0 and not norm  # two blocks of channels at a time, else two tiles
    items = tile.total if pair else -(-tile.total // 2)
    parts = max(1, min(multiprocessors // (groups * (blocks // 2 if pair else blocks)), items))
    return Rows(tile, stride, 1 if pair else 2, parts)


class WgmmaGradientOperands(NamedTuple):
    """The fields of :class:`DataGradientOperands` that the extension's op has: its result is in bf16."""

    d: Tensor
    weight_flipped: Tensor
    weight_index: Tensor
    height: int
    width: int
    second: Tensor | None = None
    second_weight: Tensor | None = None
    second_stride: int = 1
    norm_z: Tensor | None = None
    norm_a: Tensor | None = None
    norm_b: Tensor | None = None
    norm_c: Tensor | None = None


def most_channels(x: Tensor, second: Tensor | None) -> int:
    """The most channels of a convolution's sources."""
    return max(x.shape[4], second.shape[4] if second is not None else 0)


def conv_rows(o: ConvOperands, window: Window, multiprocessors: int) -> Rows:
    """Rows of the sums of a convolution."""
    shape = (o.x.shape[1], *window.sizes(o.x))
    channels = most_channels(o.x, o.second)
    return statistics_rows(len(o.weight_index), shape, channels, o.weight.shape[3], 1, False, False, multiprocessors)


def gradient_rows(o: WgmmaGradientOperands, window: Window, multiprocessors: int) -> Rows:
    """Rows of the sums of a data gradient."""
    shape = (o.d.shape[1], o.height, o.width)
    channels, norm = o.weight_flipped.shape[3], o.norm_z is not None
    sources = most_channels(o.d, o.second)
    return statistics_rows(len(o.weight_index), shape, sources, channels, window.stride, True, norm, multiprocessors)


def reference_in_rows(o: ConvOperands, window: Window, rows: Rows) -> Results:
    """What ``grouped_conv_reference`` gives, its sums in these rows."""
    z, activated, bits, statistics = grouped_conv_reference(o._replace(center=None), window, "ieee")
    if o.center is not None:
        rest = z.to(statistics.dtype) - pick(o.center, o.weight_index)
        statistics = torch.stack([rows.sums(rest), rows.sums(rest.square())], 2)
    return z, activated, bits, statistics


def wgmma_conv_reference(o: ConvOperands, window: Window, multiprocessors: int, copies: bool) -> Results:
    return reference_in_rows(o, window, conv_rows(o, window, multiprocessors))


def wgmma_data_gradient_reference(
    o: WgmmaGradientOperands, epilogue: GradientEpilogue, window: Window, multiprocessors: int, copies: bool
) -> tuple[Tensor, Tensor]:
    dtype = str(o.d.dtype).removeprefix("torch.")
    operands = DataGradientOperands(out_dtype=dtype, **o._asdict())
    # z stays for the mask; the sums are made again in the kernels' rows
    out, _ = conv_data_gradient_reference(operands, epilogue, window, "ieee")
    rows = gradient_rows(o, window, multiprocessors)
    return out, gradient_sums(out, o.weight_index, epilogue, rows.sums)


def _empty_conv(o: ConvOperands, window: Window, multiprocessors: int, copies: bool) -> Results:
    return conv_results(o, window, conv_rows(o, window, multiprocessors).total)


def _empty_gradient(
    o: WgmmaGradientOperands, epilogue: GradientEpilogue, window: Window, multiprocessors: int, copies: bool
) -> tuple[Tensor, Tensor]:
    shape = (len(o.weight_index), o.d.shape[1], o.height, o.width, o.weight_flipped.shape[3])
    return gradient_results(o.d, shape, gradient_rows(o, window, multiprocessors).total, epilogue)


# The CUDA kernels are the extension's
_wgmma_conv = define("wgmma_conv", wgmma_conv_reference, _empty_conv)
_wgmma_data_gradient = define("wgmma_data_gradient", wgmma_data_gradient_reference, _empty_gradient)


def _other_residual(residual: Tensor | None) -> str:
    if residual is None or (residual.shape[4] % 8 == 0 and residual.dtype == torch.bfloat16):
        return ""
    return f"a residual of {residual.shape[4]} channels in {residual.dtype}, expected bf16 and multiples of 8"


def _other_second(second: Tensor | None) -> str:
    if second is None or second.shape[4] in wgmma.CHANNELS:
        return ""
    return f"a second source of {second.shape[4]} channels, expected a multiple of 16"


def unsupported_conv(o: ConvOperands, window: Window) -> str:
    """What of a convolution the kernels do not cover, in a few words; "" where they cover it."""
    channels, out_channels = o.weight.shape[2:]
    reasons = (
        wgmma.unsupported(channels, out_channels, window, o.x.dtype),
        _other_residual(o.residual),
        _other_second(o.second),
    )
    return next(filter(None, reasons), "")


def unsupported_gradient(o: DataGradientOperands, epilogue: GradientEpilogue, window: Window) -> str:
    """What of a data gradient the kernels do not cover, in a few words; "" where they cover it."""
    channels, out_channels = o.weight_flipped.shape[2:]
    residual_stride = epilogue.residual_stride if epilogue.residual is not None else 1
    reasons = (
        wgmma.unsupported(channels, out_channels, window, o.d.dtype),
        "" if o.out_dtype == "bfloat16" else f"a result in torch.{o.out_dtype}",
        _other_residual(epilogue.residual),
        _other_second(o.second),
        ""
        if residual_stride in (1, window.stride)
        else f"residual_stride {residual_stride}, expected 1 or the convolution's, {window.stride}",
        ""
        if o.second is None or o.second_stride == window.stride
        else f"second_stride {o.second_stride}, expected the convolution's, {window.stride}",
        ""
        if o.norm_z is None
        or is_narrow(most_channels(o.d, o.second), out_channels)
        or norm_fits(window, (o.d.shape[1], o.height, o.width), wgmma.copies())
        else f"a BatchNorm's gradient on load of {o.height} x {o.width} positions: more shared memory than there is",
        "a mask from z with a residual after it"
        if epilogue.mask_scale is not None and epilogue.residual is not None and not epilogue.residual_first
        else "",
    )
    return next(filter(None, reasons), "")


def _refuse(name: str, reason: str) -> None:
    if reason:
        raise InputError(f"{name} does not cover {reason}")


def wgmma_conv(*operands: Any, **options: Any) -> ConvOutput:
    """``grouped_conv`` with the same arguments and results, for what ``unsupported_conv`` says nothing of.

    ``x`` (G or 1, N, H, W, Ci) and ``weight`` (S, taps, Ci, Co) are bf16, Ci and Co multiples of 16 up to 640, as a
    second source's are, a residual's channels of 8; 3x3 with padding 1 or 1x1, at stride 1 or 2. Raises InputError for
    anything else, and for what ``grouped_conv`` refuses. Without the extension, and off CUDA, the reference computes.
    """
    o, window, _ = conv_operands(*operands, **options)
    _refuse("wgmma_conv", unsupported_conv(o, window))
    return conv_output(*_wgmma_conv(*o, *window, wgmma.multiprocessors(o.x), wgmma.copies()))


def wgmma_data_gradient(*operands: Any, **options: Any) -> DataGradient:
    """``conv_data_gradient`` with the same arguments and results, for what ``unsupported_gradient`` says nothing of.

    ``d`` (G, N, Ho, Wo, Co), ``weight_flipped`` (S, taps reversed, Co, Ci) and the result are bf16, Ci and Co multiples
    of 16 up to 640, as a second source's are, a residual's channels of 8; 3x3 with padding 1 or 1x1, at stride 1 or 2.
    Raises InputError for anything else, and for what ``conv_data_gradient`` refuses. Without the extension, and off
    CUDA, the reference computes it.
    """
    o, epilogue, window, _ = data_gradient_operands(*operands, **options)
    _refuse("wgmma_data_gradient", unsupported_gradient(o, epilogue, window))
    mine = WgmmaGradientOperands(**{name: getattr(o, name) for name in WgmmaGradientOperands._fields})
    result, statistics = _wgmma_data_gradient(*mine, *epilogue, *window, wgmma.multiprocessors(o.d), wgmma.copies())
    return DataGradient(result, present(statistics))
