"""The halo convolution's blocks on the CPU, instruction by instruction, against the references; the ops around them.

``halo_driver.cpp`` runs what a GPU would: blocks, threads, shared memory (NaN before a block starts), ldmatrix, mma and
asynchronous copies. Every case runs twice, forwards with copies as late as allowed and backwards with copies at once.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastensdistill.kernels import halo_conv as halo
from fastensdistill.kernels.conv_data_gradient import flip_weight
from fastensdistill.kernels.triton_utils import pack_mask, row_stride
from tests.compare import check_close
from tests.kernels.both import values
from tests.kernels.test_cuda_blocks import both_ways, call

ROOT = Path(__file__).parents[2]
BF16 = torch.bfloat16
SLOTS = 3


class Case(NamedTuple):
    name: str
    groups: int
    images: int
    height: int
    width: int
    channels: int
    out_channels: int


CASES = [
    Case("16", 2, 1, 6, 8, 16, 16),
    Case("two-chunks-of-16", 1, 2, 5, 7, 32, 16),  # odd size; the ring is two stages deep: one step per chunk
    Case("16-to-64", 2, 1, 4, 5, 16, 64),  # a quarter of a block's input channels
    Case("32", 3, 2, 3, 3, 32, 32),
    Case("32-two-chunks", 1, 1, 4, 4, 64, 32),
    Case("48-channels", 1, 1, 5, 5, 48, 48),  # a partial chunk after a whole one; three blocks of 16 channels
    Case("64", 2, 1, 9, 32, 64, 64),  # two tiles of 8 rows down, the second with one row
    Case("64-eight-rounds", 2, 5, 8, 8, 64, 64),  # whole images: four in a tile, one in the next
    Case("80-to-64", 1, 1, 6, 5, 80, 64),  # a whole and a quarter chunk
    Case("128", 1, 2, 8, 8, 128, 128),
    Case("160-to-160", 1, 1, 4, 4, 160, 160),
    Case("wide", 1, 1, 3, 40, 16, 16),  # two tiles of 20 columns across
    Case("one-pixel", 2, 50, 1, 1, 16, 16),  # 44 images a tile: the border bounds it
    Case("one-row", 1, 2, 1, 9, 16, 32),
    Case("three-blocks-of-64", 1, 1, 3, 4, 16, 192),
]
each = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    assert compiler, "the halo driver needs a C++ compiler"
    library = tmp_path_factory.mktemp("driver") / "halo.so"
    source = ROOT / "tests/kernels/halo_driver.cpp"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def operands(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """x, weights of SLOTS slots, and a map from groups to slots that permutes, repeats and skips some."""
    x = values(case.groups, case.images, case.height, case.width, case.channels, dtype=BF16)
    weight = values(SLOTS, 9, case.channels, case.out_channels, dtype=BF16, scale=(9 * case.channels) ** -0.5)
    return x, weight, torch.tensor([(2 * g + 2) % SLOTS for g in range(case.groups)], dtype=torch.int32)


def sizes_of(x: Tensor, slots: Tensor, out_channels: int, residual: Tensor | None, stride: int) -> Tensor:
    N, H, W, Ci = x.shape[1:]
    tile = halo.halo_tile(N, H, W, out_channels)
    of_residual = residual.shape[2:] if residual is not None else (0, 0, 0)
    step = 0 if x.shape[0] == 1 else N * H * W * Ci
    return torch.tensor([len(slots), N, H, W, Ci, out_channels, *of_residual, stride, *tile, step])


def emulated_conv(
    driver, x, weight, slots, *, inputs=None, in_scale=None, in_shift=None, in_relu=False, bias=None, residual=None,
    residual_stride=1, relu=False, next_scale=None, next_shift=None, center=None, mask=False,
):  # fmt: skip
    sizes = sizes_of(x, slots, weight.shape[3], residual, residual_stride)
    empty = halo._fake(x, weight, slots, inputs, in_scale, in_shift, in_relu, bias, residual, residual_stride, relu,
                       next_scale, next_shift, center, mask, sizes[10:14].tolist())  # fmt: skip
    strides = torch.tensor([row_stride(rows) for rows in (in_scale, bias, next_scale, center)])
    outputs = [t if t.numel() else None for t in empty]
    results = iter(both_ways(
        lambda backwards: call(
            driver.halo_forward, x, weight, slots, inputs, in_scale, in_shift, bias, residual, next_scale, next_shift,
            center, *outputs, sizes, strides, in_relu, relu, backwards
        ),
        [t for t in outputs if t is not None],
    ))  # fmt: skip
    return [None if t is None else next(results) for t in outputs]


def emulated_gradient(
    driver, d, weight, slots, *, residual=None, residual_stride=1, residual_first=False, mask=None, scale=None,
    z=None, mean=None, inv_std=None,
):  # fmt: skip
    sizes = sizes_of(d, slots, weight.shape[3], residual, residual_stride)
    out, statistics = halo._fake_gradient(d, weight, slots, residual, residual_stride, residual_first, mask, scale, z,
                                          mean, inv_std, sizes[10:14].tolist())  # fmt: skip
    strides = torch.tensor([row_stride(scale), row_stride(mean)])
    outputs = [out, statistics if z is not None else None]
    results = both_ways(
        lambda backwards: call(
            driver.halo_gradient, d, weight, slots, residual, mask, scale, z, mean, inv_std, *outputs, sizes, strides,
            residual_first, backwards
        ),
        [t for t in outputs if t is not None],
    )  # fmt: skip
    return [results[0], results[1] if z is not None else None]


SHAPE = {"kernel": 3, "stride": 1, "padding": 1}


def check_results(expected, actual) -> None:
    """One rounding to bf16 apart; sums of values so rounded; bits wherever the value is not that close to 0."""
    for name, e, a in zip(expected._fields, expected, actual, strict=True):
        assert (e is None) == (a is None), name
        if e is None:
            continue
        if e.dtype == torch.uint8:
            differ = (e ^ a).int()
            assert sum(((differ >> i) & 1).sum().item() for i in range(8)) <= 1e-3 * 8 * e.numel(), name
        else:
            check_close(name, a, e, 4e-2 if e.dtype == BF16 else 2e-2)


@each
def test_forward(driver, case):
    x, weight, slots = operands(case)
    actual = emulated_conv(driver, x, weight, slots)
    check_results(halo.halo_conv(x, weight, slots, **SHAPE), actual)
