"""Weight gradient of a grouped convolution in bf16 by the extension's wgmma kernel, for compute capability 9.0.

Equations and operands are those of ``conv_weight_gradient``, whose reference serves here too; either can replace the
other in a launch. The kernel computes all taps of some channels from tiles that lie in shared memory
(``csrc/wgmma_weight_gradient.h``), by blocks that share the tiles: it leaves partial results, which add up to the
gradient in a fixed order. How the work is cut is csrc/weight_gradient_cut.h, of which :func:`weight_gradient_cut` has
what decides about the number of partial results.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels import wgmma
from fastensdistill.kernels.conv_weight_gradient import (
    WeightGradientOperands,
    WeightGradientShape,
    conv_weight_gradient_reference,
    weight_gradient_operands,
)
from fastensdistill.kernels.launch import runs_kernel
from fastensdistill.kernels.operands import Window
from fastensdistill.kernels.ops import define
from fastensdistill.kernels.reference import leave
from fastensdistill.kernels.sums import add_rows

COLUMNS, LINES, STEP_LINES = 8, 32, 4  # of a tile: positions in a line, lines at most, of which it has a multiple
WINDOWS = 3  # of each operand in a block
LEAST_STAGES = 3
SHARED = 227 * 1024 - 256  # bytes of a block's stages
OVERHEAD = 6  # of a block, in tiles: filling its stages; results that are written, and summed again


class GradientCut(NamedTuple):
    """How the work is cut: see csrc/weight_gradient_cut.h."""

    blocks: int  # of one group: by channels, and of strided 3x3 convolutions by the row of taps
    tiles: int  # of one group's positions
    parts: int  # warpgroups of a block that leave results of their own
    splits: int  # blocks that share the tiles

    @property
    def partials(self) -> int:
        """Partial results of every gradient."""
        return self.splits * self.parts


def _pieces(size: int, piece: int) -> int:
    return -(-size // piece)


def _aligned(count: int) -> int:
    return _pieces(count, 1024) * 1024


def gradient_tile(images: int, height: int, width: int, lines: int, border: int, bordered: int) -> tuple[int, int, int]:
    """Images and rows of a tile, and how many tiles there are."""
    found = []
    for together in range(1, min(images, lines) + 1):
        rows = height if together > 1 else _pieces(height, _pieces(height, min(height, lines, bordered - border)))
        rows = next(n for n in range(rows, rows + STEP_LINES) if n * together % STEP_LINES == 0)
        if together == 1 or (rows * together <= lines and (rows + border) * together <= bordered):
            stacks = _pieces(height, rows) * _pieces(images, together)
            found.append((stacks * rows * together, -together, rows, stacks))
    _, together, rows, stacks = min(found)
    return -together, rows, _pieces(width, COLUMNS) * stacks


def splits(blocks: int, tiles: int, multiprocessors: int) -> int:
    """Blocks that share the tiles: waves of blocks, times the tiles of one, take the least time."""

    def time(count: int) -> int:
        return _pieces(blocks * count, multiprocessors) * (_pieces(tiles, count) + OVERHEAD)

    return min(range(1, min(tiles, multiprocessors) + 1), key=time)


@functools.cache
def weight_gradient_cut(
    groups: int,
    x_shape: tuple[int, ...],
    out_channels: int,
    window: Window,
    multiprocessors: int,
    *,
    normed: bool = False,
    copies: bool = False,
) -> GradientCut:
    """How a launch is cut: a pure function of shapes and the device's multiprocessors.

    ``normed``: d is changed on load by a second tensor. ``copies``: as within ``wgmma.in_copies``.
    """
    images, height, width, channels = x_shape[1:]
    square = window.kernel == 3
    shifted = square and window.stride == 1
    overlapped = shifted and not copies
    in_width = channels if channels <= 32 else 64
    chunk = 16 if out_channels <= 48 else 32 if out_channels <= 96 else 64
    out_width = chunk if not shifted else out_channels if out_channels <= 32 else 64
    in_blocks, out_blocks = _pieces(channels, in_width), _pieces(out_channels, out_width)
    in_windows = out_windows = WINDOWS
    if not square:
        in_windows = _pieces(in_blocks, _pieces(in_blocks, WINDOWS))
        in_blocks = _pieces(in_blocks, WINDOWS)
    if not shifted:
        out_windows = _pieces(out_blocks, _pieces(out_blocks, WINDOWS))
        out_blocks = _pieces(out_blocks, WINDOWS)
    products = _pieces(in_windows, 64 // in_width)
    blocks = in_blocks * out_blocks * (3 if square and not shifted else 1)
    columns, in_boxes = (COLUMNS + 2, 1) if overlapped else (COLUMNS, in_windows)
    out_boxes, border = (1, 2) if shifted else (out_windows, 0)
    out_height, out_positions = _pieces(height, window.stride), _pieces(width, window.stride)
    tiles = steps = 0
    for lines in range(LINES, 0, -STEP_LINES):
        bordered = lines + lines // 4 if shifted else lines
        together, rows, tiles = gradient_tile(images, out_height, out_positions, lines, border, bordered)
        steps = rows * together // STEP_LINES
        in_box = _aligned(rows * together * columns * 2 * in_width)
        out_box = _aligned((rows + border) * together * COLUMNS * 2 * out_width)
        leading = 2 * in_width if overlapped else in_box if in_windows > 1 else 0
        in_end = (products * (64 // in_width) - 1) * leading + in_box
        first = in_boxes * in_box
        out_end = first + out_box * (WINDOWS if not shifted and out_windows > 1 else 1)
        loaded = first + out_boxes * out_box * (2 if normed else 1)
        if SHARED // _aligned(max(in_end, out_end, loaded)) >= LEAST_STAGES:
            break
    parts = min(3, steps) if products == 1 else 1
    return GradientCut(blocks, tiles, parts, splits(groups * blocks, tiles, multiprocessors))


def unsupported(o: WeightGradientOperands, window: Window, arch: int = 0) -> str:
    """What of a weight gradient the kernel does not cover, in a few words; "" where it covers it."""
    if o.x.dtype != o.d.dtype:
        return f"x in {o.x.dtype} with d in {o.d.dtype}"
    return wgmma.unsupported(o.x.shape[4], o.d.shape[4], window, o.d.dtype, arch)


def wgmma_weight_gradient_reference(
    o: WeightGradientOperands, window: Window, multiprocessors: int, copies: bool, partial: Tensor
) -> None:
    conv_weight_gradient_reference(o, window, "ieee", partial[0], False)
    partial[1:] = 0


# The CUDA kernel is the extension's
_wgmma_weight_gradient = define("wgmma_weight_gradient", wgmma_weight_gradient_reference, mutates=("partial",))


def cut_of(o: WeightGradientOperands, window: Window) -> GradientCut:
    """How the launch for these operands is cut."""
    return weight_gradient_cut(
        len(o.d), tuple(o.x.shape), o.d.shape[4], window, wgmma.multiprocessors(o.x),
        normed=o.norm_z is not None, copies=wgmma.copies(),
    )  # fmt: skip


def partial_count(shape: WeightGradientShape) -> int:
    """How many partial results the kernel has of such operands."""
    return weight_gradient_cut(
        shape.groups, shape.x, shape.out_channels, shape.window,
        wgmma.multiprocessors(torch.empty(0, device=shape.device)),
        normed=shape.normed, copies=wgmma.copies(),
    ).partials  # fmt: skip


def weight_gradient_partials(o: WeightGradientOperands, window: Window, partial: Tensor | None = None) -> Tensor:
    """The partial results (``cut_of(o, window).partials``, G, taps, Ci, Co), float32, whose sum is the gradient.

    Args:
        o: bf16, checked as by ``weight_gradient_operands``.
        window: 3x3 with padding 1 or 1x1 without, at stride 1 or 2.
        partial: memory for the results.

    Raises:
        InputError: for what :func:`unsupported` says, and for memory of another shape.
    """
    if reason := unsupported(o, window):
        raise InputError(f"wgmma_weight_gradient does not cover {reason}")
    shape = (cut_of(o, window).partials, len(o.d), window.kernel**2, o.x.shape[4], o.d.shape[4])
    if partial is None:
        partial = o.d.new_empty(shape, dtype=torch.float32)
    elif not (tuple(partial.shape) == shape and partial.dtype == torch.float32 and partial.is_contiguous()):
        raise InputError(f"partial is {partial.dtype} of shape {tuple(partial.shape)}, expected torch.float32 {shape}")
    _wgmma_weight_gradient(*o, *window, wgmma.multiprocessors(o.x), wgmma.copies(), partial)
    return partial


def wgmma_weight_gradient(x: Tensor, d: Tensor, *, kernel: int, **options: Any) -> Tensor:
    """``conv_weight_gradient`` with the same arguments and result, for what :func:`unsupported` says.

    ``x`` and ``d`` are bf16, Ci and Co multiples of 16. Raises InputError for anything else, and for what
    ``conv_weight_gradient`` refuses. Without the extension, and off CUDA, the reference computes it. Memory for as many
    partial results as :func:`partial_count` says saves a launch.
    """
    o, window, _, out, add = weight_gradient_operands(x, d, kernel=kernel, several=True, **options)
    memory = out if out.dim() == 5 else out[None]
    if not add and not unsupported(o, window) and cut_of(o, window).partials == len(memory):
        weight_gradient_partials(o, window, memory)
        return out
    partial, (whole, *others) = weight_gradient_partials(o, window), memory
    if others and not add:
        memory[1:].zero_()
    if runs_kernel(out.device.type, out.dtype):
        add_rows(partial.view(1, len(partial), -1), 1, whole.view(1, 1, -1), add)
    else:
        leave(partial.sum(0), whole, add)
    return out
