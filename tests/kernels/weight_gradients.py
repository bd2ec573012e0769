"""What the weight gradient by wgmma is tested on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastensdistill.kernels import wgmma
from fastensdistill.kernels import wgmma_weight_gradient as module
from fastensdistill.kernels.conv_weight_gradient import WeightGradientOperands
from fastensdistill.kernels.operands import Window
from tests.untyped import untyped

BF16 = torch.bfloat16
SQUARE, STRIDED, POINT, SPARSE = wgmma.WINDOWS


class Case(NamedTuple):
    window: Window
    groups: int
    images: int
    height: int
    width: int
    channels: int
    out_channels: int

    def __str__(self) -> str:
        return f"{self.window.kernel}x{self.window.kernel}-s{self.window.stride}-" + "-".join(map(str, self[1:]))


# Widths of windows on both sides, for every window; odd sizes; images that do not fill the last tile
CASES = [
    Case(SQUARE, 2, 3, 7, 5, 16, 16),  # one multiplication for all nine taps, three warpgroups in turn
    Case(SQUARE, 1, 9, 4, 4, 32, 32),  # two: of four windows of x one is nobody's
    Case(SQUARE, 2, 1, 9, 12, 64, 64),  # three; two tiles across
    Case(SQUARE, 1, 1, 40, 3, 16, 64),  # two tiles down
    Case(SQUARE, 1, 2, 6, 9, 64, 16),
    Case(SQUARE, 1, 2, 5, 6, 48, 160),  # chunks that channels do not fill
    Case(SQUARE, 2, 5, 1, 1, 32, 16),  # a pixel: one step for three warpgroups
    Case(SQUARE, 1, 2, 8, 8, 160, 32),
    Case(SQUARE, 1, 1, 4, 160, 32, 64),  # 20 tiles for three blocks: stages are used again
    Case(STRIDED, 2, 3, 7, 9, 16, 32),
    Case(STRIDED, 1, 2, 5, 4, 32, 64),
    Case(STRIDED, 1, 2, 12, 20, 64, 80),  # two tiles across
    Case(STRIDED, 1, 1, 6, 6, 64, 256),  # four chunks of output channels
    Case(STRIDED, 1, 3, 1, 5, 16, 16),  # no rows of odd number
    Case(STRIDED, 1, 1, 1, 1, 48, 48),
    Case(POINT, 2, 3, 5, 7, 16, 64),
    Case(POINT, 1, 2, 4, 4, 160, 160),  # three chunks on both sides
    Case(POINT, 1, 1, 3, 5, 256, 96),  # four chunks of input channels
    Case(SPARSE, 2, 2, 7, 5, 64, 128),
    Case(SPARSE, 1, 5, 9, 3, 32, 48),
    Case(SPARSE, 1, 1, 2, 330, 16, 16),
]
EVERYTHING = ("in_scale", "in_relu", "norm")


def draw(shape: tuple[int, ...], step: float, bound: float, seed: int) -> Tensor:
    """Multiples of ``step`` up to ``bound``, so that what is computed on load is exact before it is rounded."""
    generator = torch.Generator().manual_seed(seed)
    return step * torch.randint(-int(bound / step), int(bound / step) + 1, shape, generator=generator)


def operands(case: Case, fused: tuple[str, ...] = (), shared: bool = False) -> WeightGradientOperands:
    """Of one case: with rows of parameters, a BatchNorm's gradient, and one x for all groups."""
    k, stride, padding = case.window
    height, width = ((size + 2 * padding - k) // stride + 1 for size in (case.height, case.width))
    G, N, Ci, Co = case.groups, case.images, case.channels, case.out_channels
    x = draw((1 if shared else G, N, case.height, case.width, Ci), 1 / 64, 3, 1).to(BF16)
    d = draw((G, N, height, width, Co), 1 / 64, 3, 2).to(BF16)
    rows = {name: draw((G, Ci), 1 / 16, 2, 3 + i) for i, name in enumerate(("in_scale", "in_shift"))}
    options: dict[str, Any] = rows if "in_scale" in fused else {}
    options |= {"in_relu": True} if "in_relu" in fused else {}
    if "norm" in fused:
        options |= {f"norm_{name}": draw((G, Co), 1 / 16, 2, 5 + i) for i, name in enumerate("abc")}
        options["norm_z"] = draw(tuple(d.shape), 1 / 64, 3, 8).to(BF16)
    return WeightGradientOperands(x, d, **{"in_scale": None, "in_shift": None, **options})


def cut_of(o: WeightGradientOperands, window: Window, multiprocessors: int, copies: bool) -> module.GradientCut:
    shape = (len(o.d), tuple(o.x.shape), o.d.shape[4], window, multiprocessors)
    return untyped(module.weight_gradient_cut)(*shape, normed=o.norm_z is not None, copies=copies)


def op_operands(case: Case, fused: tuple[str, ...], multiprocessors: int = 3, copies: bool = False) -> tuple[Any, ...]:
    """All that the op takes, its memory last."""
    o = operands(case, fused)
    count = cut_of(o, case.window, multiprocessors, copies).partials
    partial = torch.full((count, len(o.d), case.window.kernel**2, case.channels, case.out_channels), float("nan"))
    return (*o, *case.window, multiprocessors, copies, partial)
