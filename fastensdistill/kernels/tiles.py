"""Tile choice of the matrix-product kernels: a table per device generation, each row with its reason.

``FASTENSDISTILL_PRINT_TILES=1`` prints every choice once. Nothing here is tuned at run time.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_assumed: int | None = None
_changes: list["Change"] = []


class Tile(NamedTuple):
    """Rows x columns x depth of one program's matrix product, its warps, and how many loads are in flight."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    reason: str
    programs: int = 0  # that a multiprocessor holds, read off the compiled kernels; 0 where nothing depends on it
    maxnreg: int | None = None  # registers a thread may have; None leaves it to the compiler


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@functools.cache
def _announce(kernel: str, arch: int, shape: tuple[int, ...], tile: Tile) -> None:
    print(f"tile {kernel} sm_{arch} {shape}: {tuple(tile[:5])}  {tile.reason}", file=sys.stderr)


Change = Callable[[str, tuple[int, ...], Tile], Tile]


@contextlib.contextmanager
def changed_tiles(change: Change) -> Iterator[None]:
    """Within, a matrix product's tile is ``change(kernel, shape, tile)``, for a diagnosis on a device."""
    _changes.append(change)
    try:
        yield
    finally:
        _changes.remove(change)


def _chosen(kernel: str, arch: int, shape: tuple[int, ...], tile: Tile) -> Tile:
    for change in _changes:
        tile = change(kernel, shape, tile)
    if os.environ.get("FASTENSDISTILL_PRINT_TILES") == "1":
        _announce(kernel, arch, shape, tile)
    return tile


@contextlib.contextmanager
def assume_arch(arch: int) -> Iterator[None]:
    """Choose tiles as for a device of compute capability ``arch`` (80, 90, 100), for compilation without one."""
    global _assumed
    before, _assumed = _assumed, arch
    try:
        yield
    finally:
        _assumed = before


def device_arch(x: Tensor) -> int:
    """Compute capability as one number (90 for an H100), 0 for a CPU tensor (Triton's interpreter)."""
    if _assumed is not None:
        return _assumed
    if x.device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


# Columns (output channels) of a program → its tile. BLOCK_K is the most that is used: it shrinks to divide the
# channels, because a block must stay inside one tap. The KB are stages x (rows + columns) x BLOCK_K x 2 bytes. The
# last two figures are the programs that a multiprocessor holds, and the registers a thread may have for that: left
# alone, the compiler took 130 to 176 in some epilogues, and a third or half of the programs with them. Elsewhere 128
# registers spill in the forward convolutions' sums.
_CONV_TILES = {
    80: {
        16: Tile(128, 16, 64, 4, 3, "16 channels: all of them in one program, 55 KB"),
        32: Tile(128, 32, 64, 4, 3, "32 channels: all of them in one program, 61 KB"),
        64: Tile(128, 64, 32, 4, 4, "fits the 99 KB of sm_86 and sm_89 twice, 49 KB"),
        128: Tile(128, 128, 32, 8, 3, "8 warps: at 4 the accumulators leave no registers for the epilogue, 49 KB"),
    },
    90: {
        16: Tile(128, 16, 64, 4, 3, "16 channels: two 64-row wgmma per step, 55 KB"),
        32: Tile(128, 32, 64, 4, 3, "32 channels: all of them in one program, 61 KB"),
        64: Tile(128, 64, 64, 4, 3, "3 programs a multiprocessor hide the gather's latency, 74 KB", 3, 168),
        128: Tile(128, 128, 64, 8, 3, "4 warps or 256 columns spill in the BatchNorm epilogue, 98 KB", 2, 128),
    },
    100: {
        16: Tile(128, 16, 64, 4, 3, "one 128-row tcgen05 per step, 55 KB; with 72 registers a 7x7 stem spills", 0, 96),
        32: Tile(128, 32, 64, 4, 3, "32 channels in one program, 61 KB; with 72 registers it spills", 0, 96),
        64: Tile(128, 64, 64, 4, 3, "3 programs a multiprocessor hide the gather's latency, 74 KB"),
        128: Tile(128, 128, 64, 8, 3, "accumulators are in tensor memory; 8 warps for the epilogue, 98 KB"),
    },
}
# Both sides multiply through CUDA cores ("ieee") or tf32: half the columns, so that nothing spills
_FLOAT32_TILE = Tile(64, 32, 32, 4, 2, "float32: for comparison, not for speed")
_INTERPRETER_TILE = Tile(32, 16, 16, 4, 1, "interpreter: small, so that tests cross tile borders")


def _generation(arch: int) -> int:
    """The row of the table: consumer Blackwell (sm_120) has neither wgmma nor tcgen05 and goes with sm_80."""
    return 80 if arch < 90 or arch >= 120 else 90 if arch < 100 else 100


def _columns(channels: int) -> int:
    """The wider of 128 and 64 columns that wastes less: 160 channels are 3 x 64, 640 are 5 x 128."""
    if channels <= 64:
        return max(16, _power(channels))
    return min((128, 64), key=lambda width: -(-channels // width) * width)


def _block_k(most: int, depth: int) -> int:
    """The largest power of two up to ``most`` that divides ``depth``; for odd depths one that covers it with a mask."""
    for block in (64, 32, 16):
        if block <= most and depth % block == 0:
            return block
    return min(most, max(16, _power(depth)))


def conv_tile(arch: int, depth: int, channels: int, itemsize: int = 2) -> Tile:
    """Tile of a forward or data-gradient convolution: ``depth`` channels summed per tap, ``channels`` results."""
    depth, channels = int(depth), int(channels)  # symbolic sizes, when a compiler traces, are settled here
    columns = _columns(channels)
    if arch == 0:
        tile = _INTERPRETER_TILE
    elif itemsize == 4:
        tile = _FLOAT32_TILE._replace(BLOCK_N=min(_FLOAT32_TILE.BLOCK_N, columns))
    else:
        tile = _CONV_TILES[_generation(arch)][columns]
    tile = tile._replace(BLOCK_K=_block_k(tile.BLOCK_K, depth))
    return _chosen("conv", arch, (depth, channels, itemsize), tile)


# Weight gradients: rows and columns of the tile → programs that a multiprocessor holds, the fewest of all layers of
# our networks. What a stem holds depends on its columns alone.
_PROGRAMS = {
    80: {(64, 16): 8, (64, 32): 8, (64, 64): 4, (64, 128): 3, (128, 128): 2},
    90: {(64, 16): 7, (64, 32): 6, (64, 64): 4, (64, 128): 3, (128, 64): 3, (128, 128): 2},
    100: {(64, 16): 7, (64, 32): 6, (64, 64): 4, (64, 128): 3, (128, 64): 3, (128, 128): 2},
}
_STEM_PROGRAMS = {16: 3, 32: 3, 64: 2, 128: 2}


def weight_gradient_tile(arch: int, taps: int, channels: int, out_channels: int, itemsize: int = 2) -> Tile:
    """Tile of a weight gradient: ``taps`` x ``channels`` rows, ``out_channels`` columns, BLOCK_K positions deep."""
    columns, generation = _columns(out_channels), _generation(arch)
    two_taps = channels == 64 and taps > 1
    if arch == 0:
        tile = Tile(32, 32, 32, 4, 1, "interpreter: small, so that tests cross tile borders")
    elif itemsize == 4:
        tile = Tile(32, 32, 32, 4, 2, "float32: for comparison, not for speed")
    elif channels <= 4:
        tile = Tile(64, columns, 32, 4, 2, "stem: the normalisation holds registers, and every tap fits 64 rows")
    elif columns == 128 and (channels % 128 == 0 or two_taps):
        reason = "both sides read once per 128 channels, or per two taps of 64"
        tile = Tile(128, 128, 32 if generation == 80 else 64, 8, 3, reason)
    elif generation == 80:
        stages = 4 if columns == 64 else 3
        tile = Tile(64, columns, 32, 4, stages, "64 columns spill at 3 stages (16 → 160 channels), the others at 4")
    elif columns == 64 and two_taps:
        tile = Tile(128, 64, 64, 4, 3, "two taps: d is read 5 times instead of 9, 74 KB")
    else:
        warps = 8 if columns == 128 and generation == 100 else 4
        reason = "64 rows: the least a wgmma takes; on sm_100 128 columns spill at 4 warps"
        tile = Tile(64, columns, 64, warps, 3, reason)
    held = _STEM_PROGRAMS[columns] if channels <= 4 else _PROGRAMS[generation].get(tile[:2], 2)
    tile = tile._replace(programs=held)
    return _chosen("weight gradient", arch, (taps, channels, out_channels, itemsize), tile)


class Split(NamedTuple):
    """How a weight gradient is shared out: ``blocks`` of rows and columns, times ``splits`` runs of ``steps`` steps."""

    tile: Tile
    blocks: int
    steps: int
    splits: int


# generation → multiprocessors, FLOP/s that one of them reaches (a third of the tensor cores' peak, an estimate), and
# bytes/s of memory: what a weight gradient's splits are weighed with
_DEVICES = {80: (108, 1e12, 1.5e12), 90: (132, 2e12, 3e12), 100: (148, 5e12, 6e12)}
_FILL = 4  # steps' time that a program spends on filling its pipeline and storing its sums
_LEAST_STEPS = 8


def weight_gradient_split(
    arch: int, groups: int, positions: int, taps: int, channels: int, out_channels: int, itemsize: int = 2
) -> Split:
    """The number of splits with the least estimated time: waves of programs, and the traffic of the partial sums.

    A wave is what all multiprocessors hold at once; 144 programs for 264 places leave nearly half of them empty. It
    depends on shapes and the architecture alone, never on the device's load: the order of a sum is fixed.
    """
    # the tile is not cached: ``changed_tiles`` may have another for it, and for a while only
    return _split(weight_gradient_tile(arch, taps, channels, out_channels, itemsize), arch, groups, positions, taps,
                  channels, out_channels)  # fmt: skip


@functools.cache
def _split(tile: Tile, arch: int, groups: int, positions: int, taps: int, channels: int, out_channels: int) -> Split:
    rows = -(-taps * channels // tile.BLOCK_M) if channels < tile.BLOCK_M else taps * -(-channels // tile.BLOCK_M)
    blocks, total = rows * -(-out_channels // tile.BLOCK_N), -(-positions // tile.BLOCK_K)
    multiprocessors, rate, bandwidth = _DEVICES[_generation(arch)]
    places = multiprocessors * tile.programs
    step = 2 * tile.BLOCK_M * tile.BLOCK_N * tile.BLOCK_K * tile.programs / rate
    partial = 2 * 4 * groups * taps * channels * out_channels / bandwidth  # written, and read to be added

    def time(splits: int) -> float:
        waves = -(-blocks * groups * splits // places)
        return waves * (-(-total // splits) + _FILL) * step + (splits * partial if splits > 1 else 0.0)

    wanted = 3 if arch == 0 else min(range(1, max(1, total // _LEAST_STEPS) + 1), key=time)
    steps = -(-total // wanted)
    return Split(tile, blocks, steps, -(-total // steps))


def rows_tile(channels: int) -> Tile:
    """Tile of an elementwise pass over (positions, channels): 16-byte accesses along the channels."""
    width = min(64, max(8, _power(channels)))
    return Tile(4096 // width, width, 0, 4, 1, "32 values a thread")


# Channels of a depthwise program → what its position arithmetic adds to its work, beside 64 channels: the addresses
# and masks of a position serve 8, 4 or 2 threads of 8 channels
_DEPTHWISE_WIDTHS = {64: 1.0, 32: 1.05, 16: 1.15}
_STRIP_VALUES = 1024  # columns x channels of a strip: 8 channels a thread, 16 bytes a load, times up to 8 rows of sums


def depthwise_width(channels: int) -> int:
    """Channels of a program: of 64, 32 and 16 what wastes least of its lanes and addresses; 72 channels are 5 x 16."""
    return min(_DEPTHWISE_WIDTHS, key=lambda width: -(-channels // width) * width * _DEPTHWISE_WIDTHS[width])


def strip_height(height: int, step: int, halo: int, most: int = 8) -> int:
    """Rows of results that one program computes of a column: with so many, the fewest rows are read in all.

    A strip reads ``step`` rows for each of its own and ``halo`` more: a 3x3 window 10 rows for 8 instead of 24.
    """
    powers = [rows for rows in (8, 4, 2, 1) if rows <= most]
    return min(powers, key=lambda rows: -(-height // rows) * (rows * step + max(0, halo)))


def depthwise_tile(
    arch: int, channels: int, height: int, step: int, halo: int, itemsize: int = 2, most: int = 8
) -> Tile:
    """Tile of a depthwise convolution or its data gradient: columns x channels x rows (BLOCK_K) of a strip."""
    channels, height = int(channels), int(height)
    if arch == 0:
        rows = strip_height(height, step, halo, 4)
        tile = Tile(32, 16, rows, 4, 1, "interpreter: small, so that tests cross tile borders")
    else:
        width = depthwise_width(channels)
        reason = "8 values a thread of a row, 64 sums at most: neighbouring taps come out of registers and L1"
        tile = Tile(_STRIP_VALUES // width, width, strip_height(height, step, halo, most), 4, 1, reason)
    return _chosen("depthwise", arch, (channels, height, step, halo, itemsize), tile)


class DepthwiseSplit(NamedTuple):
    """A depthwise weight gradient: ``taps`` (rows, columns) of a pass, and how positions are shared out (``Split``)."""

    tile: Tile
    taps: tuple[int, int]
    blocks: int
    steps: int
    splits: int


_PASS_TAPS = 49  # sums of a pass that a thread holds, for 2 channels each: those of 81 taps spilled
_PASS_COLUMNS = 27
_WAVES = 8  # programs that each multiprocessor shall have, in all; 3 to 5 fit it at once
_MOST_SPLITS = 256


def depthwise_split(
    arch: int,
    groups: int,
    images: int,
    size: tuple[int, int],
    channels: int,
    kernel: tuple[int, int],
    step: int,
    halo: int,
    itemsize: int = 2,
) -> DepthwiseSplit:
    """Tile (strips' columns x channels x rows), passes and splits of a result of ``size``, a window of ``kernel`` taps.

    As many programs as keep every multiprocessor busy, of at least 16 steps each, so that the sums at a program's end
    stay a small part. It depends on shapes and the architecture alone: the order of a sum is fixed.
    """
    columns = -(-kernel[1] // -(-kernel[1] // _PASS_COLUMNS))
    most = min(kernel[0], max(1, _PASS_TAPS // columns))
    rows = -(-kernel[0] // -(-kernel[0] // most))
    if arch == 0:
        height = strip_height(size[0], step, halo, 4)
        tile = Tile(16, 16, height, 4, 1, "interpreter: small, so that tests cross tile borders")
    else:
        width, values = depthwise_width(channels), 4 if rows * columns <= 25 else 2
        height = strip_height(size[0], step, halo, 4)  # of 8 rows Triton 3.8 spills
        reason = f"{values} channels a thread: the sums of {rows * columns} taps stay in registers"
        tile = Tile(128 * values // width, width, height, 4, 1, reason)
    tile = _chosen("depthwise weight gradient", arch, (channels, *kernel, *size, itemsize), tile)
    blocks = -(-kernel[0] // rows) * -(-kernel[1] // columns) * -(-channels // tile.BLOCK_N)
    total = -(-images * -(-size[0] // tile.BLOCK_K) * size[1] // tile.BLOCK_M)
    wanted = 3 if arch == 0 else -(-_WAVES * _DEVICES[_generation(arch)][0] // (blocks * groups))
    steps = -(-total // max(1, min(wanted, _MOST_SPLITS, total if arch == 0 else total // 16)))
    return DepthwiseSplit(tile, (rows, columns), blocks, steps, -(-total // steps))
