"""TrivialAugment (Müller & Hutter, ICCV 2021; the wide ranges): its changes as rows of one table, all equally likely.

A row is one of 14 operations, 31 strengths and 2 signs; operations without a strength or a sign have equal rows. It
holds what a kernel needs of it, computed in float64 and rounded where torchvision rounds:

    shear, translate, rotate                    the inverse map of positions, to nearest pixels; black outside
    brightness, color, contrast, sharpness      f and 1 − f, with f = 1 ± strength:   f · x + (1 − f) · other, truncated
    posterize, solarize                         the bits that stay; the threshold from which on x becomes 255 − x

``other`` is 0, the grey image, the grey image's mean, or the image smoothed by a 3x3 window. Sums of two float32
products are computed in float64, where they are exact, and rounded once: the fused multiply-add of torchvision's CPU
kernels, and the same bits on every device and under every compiler.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from fastensdistill.kernels.launch import tl, triton

OPERATIONS = (
    "identity", "shear-x", "shear-y", "translate-x", "translate-y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
_KINDS = {name: kind for kind, name in enumerate(OPERATIONS)}
BINS = 31
ROWS = len(OPERATIONS) * BINS * 2  # row = (operation · BINS + bin) · 2 + (1 if the sign is negative)
COLUMNS = 6
ROW_CONSTANTS = {"N_ROWS": ROWS, "N_BINS": BINS, "N_COLUMNS": COLUMNS}  # of a kernel that reads a row
_MOST = {"shear-x": 0.99, "shear-y": 0.99, "translate-x": 32.0, "translate-y": 32.0, "rotate": 135.0,
         "brightness": 0.99, "color": 0.99, "contrast": 0.99, "sharpness": 0.99}  # fmt: skip
# Shares of grey, rounded to float32
_SHARES = {color: float(np.float32(share)) for color, share in (("red", 0.2989), ("green", 0.587), ("blue", 0.114))}


def magnitude(operation: str, bin_: int, negative: bool) -> float:
    """torchvision's strength of that row: shear, pixels, degrees, f − 1, bits or threshold; 0 where there is none."""
    if operation == "posterize":
        return float((8 - (torch.arange(BINS) / ((BINS - 1) / 6))).round()[bin_])
    if operation == "solarize":
        return float(torch.linspace(1.0, 0.0, BINS)[bin_])
    if operation not in _MOST:
        return 0.0
    return float(torch.linspace(0.0, _MOST[operation], BINS)[bin_]) * (-1 if negative else 1)


@functools.lru_cache(8)
def trivial_rows(height: int, width: int) -> Tensor:
    """The table for images of that size, float32 (868, 6)."""
    rows = [
        _row(operation, magnitude(operation, bin_, negative), height, width)
        for operation in OPERATIONS
        for bin_ in range(BINS)
        for negative in (False, True)
    ]
    return torch.stack(rows)


def _row(operation: str, strength: float, height: int, width: int) -> Tensor:
    row = torch.zeros(COLUMNS)
    if operation in ("shear-x", "shear-y", "translate-x", "translate-y", "rotate"):
        # (x, y, 1) of the result, from the image's centre, to x and y of the source in half widths and half heights
        inverse = torch.tensor(_inverse(operation, strength, height, width), dtype=torch.float64).float().view(2, 3)
        row = (inverse / torch.tensor([0.5 * width, 0.5 * height])[:, None]).flatten()
    elif operation in ("brightness", "color", "contrast", "sharpness"):
        row[0], row[1] = 1 + strength, 1.0 - (1 + strength)
    elif operation == "posterize":
        row[0] = 256 - (1 << (8 - int(strength)))
    elif operation == "solarize":
        row[0] = 255.0 * strength
    return row


def _inverse(operation: str, strength: float, height: int, width: int) -> list[float]:
    """Where a position comes from, relative to the image's centre: x' = a·x + b·y + c, y' = d·x + e·y + f."""
    if operation == "shear-x":  # about the image's upper left corner
        tangent = math.tan(math.radians(math.degrees(math.atan(strength))))
        return [1.0, tangent, tangent * height * 0.5, 0.0, 1.0, 0.0]
    if operation == "shear-y":
        angle = math.radians(math.degrees(math.atan(strength)))
        slope, one = -math.sin(-angle) / math.cos(angle), math.cos(-angle) / math.cos(angle)
        return [1.0, 0.0, 0.0, slope, one, -0.5 * height + slope * 0.5 * width + one * 0.5 * height]
    if operation == "translate-x":
        return [1.0, 0.0, -float(int(strength)), 0.0, 1.0, 0.0]
    if operation == "translate-y":
        return [1.0, 0.0, 0.0, 0.0, 1.0, -float(int(strength))]
    if height == width and abs(strength) == 90:  # whole pixels: without the cosine's 6e-17
        turn = math.copysign(1.0, strength)
        return [0.0, -turn, 0.0, turn, 0.0, 0.0]
    angle = -math.radians(strength % 360)
    return [math.cos(angle), math.sin(angle), 0.0, -math.sin(angle), math.cos(angle), 0.0]


@triton.constexpr_function
def operation(name):
    """The number of an operation."""
    return _KINDS[name]


@triton.constexpr_function
def share(color):
    """A colour's share of grey."""
    return _SHARES[color]


def grey_reference(red: Tensor, green: Tensor, blue: Tensor) -> Tensor:
    """Whole numbers of 0 to 255, float32."""
    grey = red.float() * share("red")
    grey = (grey.double() + green.double() * share("green")).float()
    return (grey.double() + blue.double() * share("blue")).float().floor()


def blend_reference(x: Tensor, other: Tensor, factor: Tensor, rest: Tensor) -> Tensor:
    """Bytes: factor · x + rest · other, truncated into 0 to 255."""
    scaled = x.float() * factor
    return (scaled.double() + rest.double() * other.double()).float().clamp(0, 255).to(torch.uint8)


@triton.jit
def grey(red, green, blue):
    """``grey_reference``, in float32."""
    b_grey = red.to(tl.float32) * share("red")
    b_grey = (b_grey.to(tl.float64) + green.to(tl.float64) * share("green")).to(tl.float32)
    return tl.floor((b_grey.to(tl.float64) + blue.to(tl.float64) * share("blue")).to(tl.float32))


@triton.jit
def blend(x, other, factor, rest):
    """``blend_reference``, in int32."""
    scaled = x.to(tl.float32) * factor
    total = (scaled.to(tl.float64) + rest.to(tl.float64) * other.to(tl.float64)).to(tl.float32)
    return tl.minimum(tl.maximum(total, 0.0), 255.0).to(tl.int32)
