"""Sizes of random boxes: tables of equally likely ones, made once, so that a captured step draws an index into them.

A box has a share of the image's area and an aspect ratio, one uniform within its bounds and one log-uniform. 256
equally likely values of each are combined, and the sizes that do not fit are left out: torchvision draws again, up to
ten times in all. What it takes after ten is here as often as that happens.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_STEPS = 256
_TRIES = 10
CROP_RATIO = (3 / 4, 4 / 3)  # width over height
ERASED_AREA = (0.02, 0.33)
ERASED_RATIO = (0.3, 3.3)  # height over width


def crop_sizes(height: int, width: int, area: tuple[float, float]) -> Tensor:
    """Equally likely (height, width), int32 (n, 2), of the boxes that torchvision's RandomResizedCrop cuts out.

    ``area`` is the least and largest share of the image. If ten boxes do not fit, it is the largest one whose ratio is
    within bounds (which torchvision puts into the middle, and we at random, as any other).
    """
    across, along = _sides(height * width, area, CROP_RATIO)
    fit = (across > 0) & (across <= width) & (along > 0) & (along <= height)
    last = min(height, round(width / CROP_RATIO[0])), min(width, round(height * CROP_RATIO[1]))
    return _table(along, across, fit, last)


def erased_sizes(height: int, width: int) -> Tensor:
    """Equally likely (height, width), int32 (n, 2), of torchvision's RandomErasing; (0, 0) if ten boxes do not fit."""
    along, across = _sides(height * width, ERASED_AREA, ERASED_RATIO)
    return _table(along, across, (along < height) & (across < width), (0, 0))


def _sides(pixels: int, area: tuple[float, float], ratio: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """The longer side at a ratio above 1 and the other one, in whole pixels, of all combinations."""
    share = (np.arange(_STEPS) + 0.5) / _STEPS
    areas = pixels * (area[0] + (area[1] - area[0]) * share)[:, None]
    ratios = np.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * share)[None]
    return np.rint(np.sqrt(areas * ratios)).ravel(), np.rint(np.sqrt(areas / ratios)).ravel()


def _table(height: np.ndarray, width: np.ndarray, fit: np.ndarray, last: tuple[int, int]) -> Tensor:
    sizes = np.stack([height[fit], width[fit]], 1)
    never = float(1 - fit.mean()) ** _TRIES
    repeats = round(len(sizes) * never / (1 - never)) if len(sizes) else 1
    sizes = np.concatenate([sizes, np.full((repeats, 2), last)])
    return torch.from_numpy(np.ascontiguousarray(sizes.astype(np.int32)))
