"""What is applied to a box in shared memory before wgmma reads it: BatchNorm-ReLU, or BatchNorm's gradient."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.kernels.emulation import compiler

ROOT = Path(__file__).parents[2]
NAN = float("nan")


class Box(NamedTuple):
    row: int  # bytes
    rows: int
    images: int
    columns: int
    first: tuple[int, int, int]  # column, row, image
    end: tuple[int, int, int]
    channels: int  # of the tensor, the box holding those from `channel` on
    channel: int = 0


BOXES = {
    "32-bytes": Box(32, 34, 1, 10, (-1, -1, 0), (32, 32, 4), 16),
    "64-bytes": Box(64, 18, 2, 10, (7, -1, 2), (16, 16, 4), 32),
    "128-bytes": Box(128, 10, 4, 10, (-1, -1, 4), (8, 8, 5), 64),  # three of its images are past the last
    "odd-past-every-edge": Box(128, 5, 3, 9, (-2, -1, 1), (5, 3, 3), 64),
    "one-by-one": Box(64, 32, 1, 8, (8, 32, 1), (11, 61, 2), 32),
    "48-of-64-channels": Box(128, 6, 2, 10, (-1, -1, 0), (8, 4, 2), 48),
    "the-second-64-of-80": Box(128, 6, 1, 10, (0, 0, 0), (30, 6, 1), 80, 64),
    "one-position": Box(32, 3, 2, 10, (-1, -1, 0), (1, 1, 1), 16),
}


@pytest.fixture(scope="module")
def transform_box(tmp_path_factory):
    library = tmp_path_factory.mktemp("transforms") / "transforms.so"
    source = ROOT / "tests/kernels/wgmma_transforms.cpp"
    command = [compiler(), "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", source, "-o", library]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library)).transform_box


def inside(box: Box) -> Tensor:
    """(rows, images, columns), whether a position is one of the tensor's."""
    column, row, image = (torch.arange(n) + first for n, first in zip(
        (box.columns, box.rows, box.images), box.first, strict=True
    ))  # fmt: skip
    within = [(x >= 0) & (x < end) for x, end in zip((column, row, image), box.end, strict=True)]
    return within[1][:, None, None] & within[2][None, :, None] & within[0][None, None, :]


def loaded(box: Box, seed: int) -> Tensor:
    """(rows, images, columns, channels of a row) as the copy engine brings them: zero outside, and past the last."""
    values = torch.randn(box.rows, box.images, box.columns, box.row // 2, generator=torch.Generator().manual_seed(seed))
    values = torch.where(inside(box)[..., None], values, 0.0)
    values[..., max(0, box.channels - box.channel) :] = 0.0
    return values.to(torch.bfloat16)


def addresses(box: Box, offset: int) -> Tensor:
    """Of every value, in units of two bytes: bits 7 to 9 of an address are added to its bits 4 to 6, as far as a row
    has such pieces."""
    byte = offset + 2 * torch.arange(box.rows * box.images * box.columns * (box.row // 2))
    return (byte ^ ((byte >> 7) % (box.row // 16) << 4)) // 2


def run(function, box: Box, tiles: list[Tensor], rows: list[Tensor], relu: bool = False) -> Tensor:
    """The first of ``tiles`` after the function; everything else in memory stays as it was, which is NaN or a tile."""
    size = -(-int(addresses(box, 0).max() + 1) // 512) * 1024
    offsets = [1024, 1024 + size + 1024]
    memory = torch.full(((2 * size + 4096) // 2 + 512,), NAN, dtype=torch.bfloat16)
    memory = memory[(-memory.data_ptr() % 1024) // 2 :]
    places = [addresses(box, offset) for offset in offsets]
    for tile, place in zip(tiles, places, strict=False):
        memory[place] = tile.flatten()
    before = memory.clone()
    numbers = [*offsets, *box.first, *box.end, 1, box.channel, box.channels, int(relu)]
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in rows] + [None] * (3 - len(rows))
    published = function(
        box.row, ctypes.c_void_p(memory.data_ptr()), box.rows * box.images, box.columns, box.images,
        (ctypes.c_int * 12)(*numbers), (ctypes.c_void_p * 3)(*pointers),
    )  # fmt: skip
    assert published == 1
    after = memory.clone()
    memory[places[0]] = before[places[0]]
    assert torch.equal(memory.view(torch.int16), before.view(torch.int16)), "memory beside the box was written"
    return after[places[0]].view(tiles[0].shape)


def channels(box: Box, count: int) -> list[Tensor]:
    """Rows of two slots, the first of which is NaN and not the one that is read."""
    rows = torch.randn(count, 2, box.channels, generator=torch.Generator().manual_seed(9))
    rows[:, 0] = NAN
    return list(rows)


def of_box(box: Box, row: Tensor) -> Tensor:
    """A row's numbers of the box's channels, 0 past the last."""
    mine = row[1, box.channel : box.channel + box.row // 2]
    return torch.cat([mine, mine.new_zeros(box.row // 2 - len(mine))])


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", BOXES)
def test_normalises(transform_box, name, relu):
    box = BOXES[name]
    scale, shift = channels(box, 2)
    tile = loaded(box, 0)
    tile[inside(box).nonzero()[0].unbind()] = NAN
    u = tile.float() * of_box(box, scale) + of_box(box, shift)
    expected = torch.where(inside(box)[..., None], u.relu() if relu else u, 0.0).to(torch.bfloat16)
    actual = run(transform_box, box, [tile], [scale, shift], relu)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert actual.isnan().any()


@pytest.mark.parametrize("name", BOXES)
def test_gradient_of_batch_norm(transform_box, name):
    box = BOXES[name]
    rows = channels(box, 3)
    d, z = loaded(box, 1), loaded(box, 2)
    a, b, c = (of_box(box, row) for row in rows)
    expected = torch.where(inside(box)[..., None], a * d.float() + (b * z.float() + c), 0.0).to(torch.bfloat16)
    actual = run(transform_box, box, [d, z], rows)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
