"""The convolutions every kernel of them is tested on, odd ones among round ones."""

from typing import NamedTuple

import pytest
import torch

from tests.kernels.both import values


class Case(NamedTuple):
    name: str
    groups: int
    images: int
    height: int
    width: int
    channels: int
    out_channels: int
    kernel: int
    stride: int
    padding: int
    dtype: torch.dtype

    @property
    def out(self) -> tuple[int, int]:
        height, width = ((s + 2 * self.padding - self.kernel) // self.stride + 1 for s in (self.height, self.width))
        return height, width

    @property
    def shape(self) -> dict[str, int]:
        return {"kernel": self.kernel, "stride": self.stride, "padding": self.padding}


SLOTS = 3
F32, F16 = torch.float32, torch.float16
CASES = [
    Case("round", 2, 2, 8, 8, 16, 16, 3, 1, 1, F32),
    Case("half", 2, 2, 8, 8, 32, 16, 3, 1, 1, F16),  # two channel blocks to a tap: the carried counters wrap
    Case("odd-size-s2", 3, 1, 5, 7, 16, 32, 3, 2, 1, F32),  # residue classes of unequal size, N = 1
    Case("even-size-s2", 1, 2, 8, 6, 16, 16, 3, 2, 1, F16),
    Case("odd-channels", 2, 3, 3, 5, 10, 21, 3, 1, 1, F32),  # masks in channels, results and bits
    Case("odd-channels-s2", 1, 1, 6, 5, 24, 12, 3, 2, 1, F32),
    Case("shortcut", 2, 1, 6, 6, 16, 40, 1, 1, 0, F16),
    Case("shortcut-s2", 2, 2, 5, 6, 16, 24, 1, 2, 0, F32),  # three of four residue classes have no tap at all
    Case("many-groups", 16, 1, 2, 3, 16, 16, 3, 1, 1, F32),
    Case("one-pixel", 1, 2, 1, 1, 16, 16, 3, 1, 1, F32),
    Case("wide-kernel-s2", 1, 1, 9, 8, 8, 16, 7, 2, 3, F32),
    Case("small-maps", 2, 5, 4, 4, 16, 16, 3, 1, 1, F32),  # two images to a step of the weight gradient
    Case("round-s2", 1, 3, 8, 8, 16, 16, 3, 2, 1, F16),  # its columns never wrap, and x is larger than d
    Case("unpadded", 1, 2, 6, 7, 16, 16, 3, 1, 0, F32),
]
STEMS = [
    Case("stem-3", 2, 2, 7, 6, 3, 16, 3, 1, 1, F32),
    Case("stem-3-half", 2, 1, 6, 6, 3, 20, 3, 1, 1, F16),  # float32 pixels, float16 products
    Case("stem-1", 3, 1, 5, 8, 1, 16, 3, 1, 1, F32),
    Case("stem-7x7", 1, 2, 12, 9, 3, 16, 7, 2, 3, F32),
    Case("stem-4-s2", 1, 1, 5, 5, 4, 8, 3, 2, 1, F32),
]
each_conv = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
each_stem = pytest.mark.parametrize("case", STEMS, ids=lambda c: c.name)


def operands(case: Case, slots: int = SLOTS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weights of ``slots`` slots, and a map from groups to slots that repeats and skips some."""
    x = values(case.groups, case.images, case.height, case.width, case.channels, dtype=case.dtype)
    scale = (case.kernel**2 * case.channels) ** -0.5
    weight = values(slots, case.kernel**2, case.channels, case.out_channels, dtype=case.dtype, scale=scale)
    return x, weight, torch.tensor([(2 * g + 2) % slots for g in range(case.groups)], dtype=torch.int32)
