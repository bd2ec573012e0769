"""The depthwise convolutions that the kernels of them are tested on, odd ones among round ones."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.kernels.both import values

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SLOTS = 3


class Case(NamedTuple):
    name: str
    groups: int
    images: int
    size: tuple[int, int]
    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    dtype: torch.dtype = F32

    @property
    def out(self) -> tuple[int, int]:
        height, width = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in zip(*self[3:4], *self[5:9], strict=True)
        )
        return height, width

    @property
    def window(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("kernel", "stride", "padding", "dilation")}


CASES = [
    Case("round", 2, 3, (8, 6), 16, (3, 3), padding=(1, 1)),
    Case("half", 1, 1, (8, 8), 16, (3, 3), padding=(1, 1), dtype=F16),
    Case("odd", 2, 2, (5, 7), 21, (3, 3), padding=(1, 1), dtype=BF16),  # strips past the image, channels past C
    Case("odd-s2", 2, 1, (5, 7), 9, (3, 3), (2, 2), (1, 1)),
    Case("even-s2", 1, 3, (8, 6), 24, (3, 3), (2, 2), (1, 1), dtype=F16),
    Case("5x5-s2", 1, 1, (9, 8), 16, (5, 5), (2, 2), (2, 2)),
    Case("7x7", 1, 1, (9, 4), 17, (7, 7), padding=(3, 3)),  # taller than wide is tall
    Case("9x9", 1, 1, (6, 5), 16, (9, 9), padding=(4, 4)),  # larger than the image
    Case("tall", 1, 1, (9, 2), 16, (19, 1), padding=(9, 0)),  # three passes over rows of taps
    Case("1x1", 2, 2, (3, 5), 20, (1, 1)),
    Case("1x1-s2", 1, 2, (5, 4), 16, (1, 1), (2, 2)),  # three of four positions have no gradient
    Case("one-pixel", 4, 3, (1, 1), 16, (3, 3), padding=(1, 1)),
    Case("rectangular", 1, 1, (7, 6), 18, (1, 5), (1, 2), (0, 2)),
    Case("tall-s3", 1, 2, (11, 4), 16, (5, 2), (3, 1), (1, 1)),
    Case("dilated", 1, 1, (9, 7), 16, (3, 3), padding=(2, 2), dilation=(2, 2)),
    Case("dilated-s2", 1, 2, (10, 9), 12, (3, 3), (2, 2), (2, 3), (2, 3)),  # rows that no tap reads
    Case("stride-over-window", 1, 2, (8, 9), 16, (2, 2), (3, 4)),
    Case("much-padding", 1, 1, (3, 4), 16, (2, 3), padding=(3, 4)),  # results of nothing but zeros
    Case("unpadded", 1, 1, (6, 7), 33, (3, 3)),
]  # fmt: skip
each_depthwise = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def operands(case: Case, slots: int = SLOTS) -> tuple[Tensor, Tensor, Tensor]:
    """x, weights of ``slots`` slots, and a map from groups to slots that repeats and skips some."""
    taps = case.kernel[0] * case.kernel[1]
    x = values(case.groups, case.images, *case.size, case.channels, dtype=case.dtype)
    weight = values(slots, taps, 1, case.channels, dtype=case.dtype, scale=taps**-0.5)
    return x, weight, torch.tensor([(2 * g + 2) % slots for g in range(case.groups)], dtype=torch.int32)
