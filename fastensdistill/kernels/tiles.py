"""Tile choice of the matrix-product kernels: a table per device generation, each row with its reason.

``FASTENSDISTILL_PRINT_TILES=1`` prints every choice once. Nothing here is tuned at run time.
"""

import functools
import os
import sys
from typing import NamedTuple

import torch
from torch import Tensor


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


def _chosen(kernel: str, arch: int, shape: tuple[int, ...], tile: Tile) -> Tile:
    if os.environ.get("FASTENSDISTILL_PRINT_TILES") == "1":
        _announce(kernel, arch, shape, tile)
    return tile


def device_arch(x: Tensor) -> int:
    """Compute capability as one number (90 for an H100), 0 for a CPU tensor (Triton's interpreter)."""
    if x.device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def conv_tile(arch: int, depth: int, channels: int, itemsize: int = 2) -> Tile:
    """Tile of a forward or data-gradient convolution: ``depth`` channels summed per tap, ``channels`` results."""
    if arch == 0:
        tile = Tile(32, 16, 16, 4, 1, "interpreter: small, so that tests cross tile borders")
    else:
        tile = Tile(128, min(128, max(16, _power(channels))), 32 if depth % 64 else 64, 4, 3, "start")
    return _chosen("conv", arch, (depth, channels, itemsize), tile)


def weight_gradient_tile(arch: int, channels: int, out_channels: int, itemsize: int = 2) -> Tile:
    """Tile of a weight gradient: taps x ``channels`` rows, ``out_channels`` columns, BLOCK_K positions deep."""
    if arch == 0:
        tile = Tile(32, 32, 32, 4, 1, "interpreter: small, so that tests cross tile borders")
    else:
        tile = Tile(64, min(128, max(16, _power(out_channels))), 64, 4, 3, "start")
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
