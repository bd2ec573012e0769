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
# channels, because a block must stay inside one tap. The KB are stages x (rows + columns) x BLOCK_K x 2 bytes.
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
        64: Tile(128, 64, 64, 4, 3, "3 programs a multiprocessor hide the gather's latency, 74 KB"),
        128: Tile(128, 128, 64, 8, 3, "4 warps or 256 columns spill in the BatchNorm epilogue, 98 KB"),
    },
    100: {
        16: Tile(128, 16, 64, 4, 3, "one 128-row tcgen05 per step, 55 KB"),
        32: Tile(128, 32, 64, 4, 3, "32 channels: all of them in one program, 61 KB"),
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


def weight_gradient_tile(arch: int, channels: int, out_channels: int, itemsize: int = 2) -> Tile:
    """Tile of a weight gradient: taps x ``channels`` rows, ``out_channels`` columns, BLOCK_K positions deep."""
    columns = _columns(out_channels)
    if arch == 0:
        tile = Tile(32, 32, 32, 4, 1, "interpreter: small, so that tests cross tile borders")
    elif itemsize == 4:
        tile = Tile(32, 32, 32, 4, 2, "float32: for comparison, not for speed")
    elif channels <= 4:
        tile = Tile(64, columns, 32, 4, 2, "stem: the normalisation holds registers, and every tap fits 64 rows")
    elif columns == 128 and channels % 128 == 0:
        tile = Tile(128, 128, 32 if _generation(arch) == 80 else 64, 8, 3, "both sides read once per 128 channels")
    elif _generation(arch) == 80:
        stages = 4 if columns == 64 else 3
        tile = Tile(64, columns, 32, 4, stages, "64 columns spill at 3 stages (16 → 160 channels), the others at 4")
    else:
        warps = 8 if columns == 128 and _generation(arch) == 100 else 4
        tile = Tile(
            64, columns, 64, warps, 3, "64 rows: the least a wgmma takes; on sm_100 128 columns spill at 4 warps"
        )
    return _chosen("weight gradient", arch, (channels, out_channels, itemsize), tile)


def split_steps(arch: int, blocks: int, steps: int) -> int:
    """How many of all ``steps`` one program of a weight gradient takes, given the ``blocks`` it has anyway.

    About two waves of 132 multiprocessors, and at least 8 steps so that the partial results stay small beside the
    operands. It depends on shapes alone, never on the device's load: the order of a sum is fixed.
    """
    wanted = 3 if arch == 0 else max(1, 264 // blocks)
    least = 1 if arch == 0 else 8
    return max(least, -(-steps // wanted))


SUM_TILE = Tile(0, 1024, 0, 4, 1, "one pass over memory; 8 values a thread")


def rows_tile(channels: int) -> Tile:
    """Tile of an elementwise pass over (positions, channels): 16-byte accesses along the channels."""
    width = min(64, max(8, _power(channels)))
    return Tile(4096 // width, width, 0, 4, 1, "32 values a thread")
