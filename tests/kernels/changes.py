"""Batches for the ops that augment, with chosen operations of TrivialAugment."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode, TrivialAugmentWide

from fastensdistill.kernels.crop import NUMBER_BITS, NUMBERS, CropOperands
from fastensdistill.kernels.trivial_augment import BINS, OPERATIONS, ROWS
from tests.kernels.both import DEVICE

_SPACE = TrivialAugmentWide._AUGMENTATION_SPACE
NAMES = dict(zip(OPERATIONS, _SPACE, strict=True))  # ours → torchvision's, which are in the same order


def on_device(o, device=DEVICE):
    """Operands with their tensors elsewhere: where kernels run."""
    return type(o)(*(x.to(device) if isinstance(x, Tensor) else x for x in o))


def pictures(count: int, height: int, width: int, channels: int, seed: int = 0) -> Tensor:
    """Bytes (count, H, W, C): noise, smooth ones with a part of the values, and one of nearly one value."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8, generator=generator)
    coarse = torch.rand(count, channels, 3, 3, generator=generator)
    smooth = (F.interpolate(coarse, size=(height, width), mode="bilinear") * 180 + 30).permute(0, 2, 3, 1)
    images[1::2] = smooth[1::2].to(torch.uint8)
    images[-1] = 77
    images[-1, 0, 0] = 9
    return images


def row_of(operation: str, bin_: int, negative: bool) -> int:
    return (OPERATIONS.index(operation) * BINS + bin_) * 2 + negative


def numbers_for(rows: Tensor, seed: int = 0) -> Tensor:
    """Random numbers of images, of which those of TrivialAugment choose these rows."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(rows), len(NUMBERS)
    numbers = torch.randint(0, 1 << NUMBER_BITS, shape, dtype=torch.int32, generator=generator)
    numbers[:, NUMBERS.index("change")] = ((rows.long() * (1 << NUMBER_BITS) + ROWS - 1) // ROWS).int()
    return numbers


def batch_of(images: Tensor, rows: Tensor, crops: Tensor | None = None, still: bool = False) -> CropOperands:
    """A batch with one image for each row; ``still`` leaves them where they are."""
    generator, count = torch.Generator().manual_seed(1), len(rows)
    picks = torch.arange(count) % len(images)
    shifts = torch.randint(-2, 3, (count, 2), dtype=torch.int32, generator=generator)
    flips = torch.randint(0, 2, (count,), dtype=torch.uint8, generator=generator)
    if still:
        shifts, flips = torch.zeros_like(shifts), torch.zeros_like(flips)
    return CropOperands(images, picks, shifts, flips, numbers_for(rows), crops)


def torchvision_change(image: Tensor, row: int) -> Tensor:
    """What torchvision makes of an image (H, W, C) by the operation, strength and sign of a row."""
    name = NAMES[OPERATIONS[row // (2 * BINS)]]
    strengths, signed = _SPACE[name]
    made = strengths(BINS, *image.shape[:2])
    strength = 0.0 if made is None else float(made[row // 2 % BINS])
    if signed and row % 2:
        strength = -strength
    transform = TrivialAugmentWide()
    changed = transform._apply_image_or_video_transform(
        image.permute(2, 0, 1).contiguous(), name, strength, InterpolationMode.NEAREST, transform._fill
    )
    return changed.permute(1, 2, 0)
