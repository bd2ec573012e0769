"""What is changed at random of every image of a batch, on the device: drawn and computed for the whole batch at once.

In the order of torchvision's recipes: a padded crop (or a resized one in its place), a flip, TrivialAugment on bytes, a
cutout or random erasing, and the division by 255. Without the other changes, for the image at ``index[b]`` with offsets
``dy, dx`` in ``0..2·pad`` and a flip bit, and ``w' = W-1-w`` where flipped::

    out[b, c, h, w] = images[index[b], c, h + dy - pad, w' + dx - pad] / 255      (0 outside the image)

which is: zero-pad by ``pad``, crop back to ``(H, W)`` at ``(dy, dx)``, flip (the recipe of the CIFAR experiments in Nam
et al., ICML 2022). One gather reads the unpadded uint8 set (``kernels.augment``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.data.boxes import crop_sizes, erased_sizes
from fastensdistill.errors import InputError
from fastensdistill.kernels import augment as kernels
from fastensdistill.kernels.crop import NUMBER_BITS, NUMBERS, CropOperands
from fastensdistill.kernels.lookup_tables import lookup_tables
from fastensdistill.kernels.trivial_augment import trivial_rows


@dataclass(frozen=True)
class Augment:
    """What is changed at random of each training image; the defaults are the recipe of the CIFAR experiments.

    Attributes:
        pad: the image is zero-padded by so many pixels on each side and cropped back, with ``resized_crop`` not at all.
        flip: it is mirrored left to right with p = 1/2.
        resized_crop: the least and largest share of its area, such as (0.08, 1.0), of a box with an aspect ratio of
            3/4 to 4/3 that is enlarged to the image's size; None for none. torchvision's RandomResizedCrop.
        trivial_augment: one of 14 operations at one of 31 strengths, as in torchvision's TrivialAugmentWide (Müller &
            Hutter, ICCV 2021); of images with 1 or 3 channels.
        cutout: side in pixels of a black square around a random pixel, 0 for none (DeVries & Taylor, 2017).
        erasing: the chance of a black box of 2 to 33% of the area, as in torchvision's RandomErasing (Zhong et al.,
            AAAI 2020).
        mixup, cutmix: α of the Beta(α, α) that says how much of an image is left where it is blended with another of
            its batch; 0 for none.
    """

    pad: int = 4
    flip: bool = True
    resized_crop: tuple[float, float] | None = None
    trivial_augment: bool = False
    cutout: int = 0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @property
    def drawn(self) -> bool:
        """Whether images need more random numbers than the offsets of a padded crop and the flip."""
        return self.resized_crop is not None or self.trivial_augment or self.cutout > 0 or self.erasing > 0

    def check(self, image_size: tuple[int, int], channels: int = 3) -> None:
        """Raise ``InputError`` for a value out of range, for images of that (height, width) and number of channels.

        With a pad or cutout of ``min(image_size)`` or more, nothing of an image might be left.
        """
        for name in ("flip", "trivial_augment"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} is {getattr(self, name)!r}; expected True or False")
        smallest, of_size = min(image_size), f"for images of {image_size[0]}x{image_size[1]}"
        if not (_is_whole(self.pad) and 0 <= self.pad < smallest):
            raise InputError(f"pad is {self.pad!r}; expected a whole number from 0 to {smallest - 1} {of_size}")
        if self.resized_crop is not None and not _is_range(self.resized_crop):
            raise InputError(
                f"resized_crop is {self.resized_crop!r}; expected (least, largest) share of an image's area, "
                "0 < least <= largest <= 1, or None"
            )
        if self.trivial_augment and channels not in (1, 3):
            raise InputError(f"trivial_augment is for images of 1 or 3 channels; these have {channels}")
        if not (_is_whole(self.cutout) and 0 <= self.cutout < smallest):
            raise InputError(f"cutout is {self.cutout!r}; expected a whole number from 0 to {smallest - 1} {of_size}")
        if not (_is_number(self.erasing) and 0 <= self.erasing <= 1):
            raise InputError(f"erasing is {self.erasing!r}; expected a probability from 0 to 1")
        for name in ("mixup", "cutmix"):
            alpha = getattr(self, name)
            if not (_is_number(alpha) and 0 <= alpha < math.inf):
                raise InputError(f"{name} is {alpha!r}; expected a number of at least 0")

    @property
    def mixes(self) -> bool:
        """Whether images are blended, which makes their labels probabilities."""
        return self.mixup > 0 or self.cutmix > 0


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_whole(value) or isinstance(value, float)


def _is_range(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(_is_number(share) for share in value)
        and 0 < value[0] <= value[1] <= 1
    )


class Draws(NamedTuple):
    """What was drawn for a batch: a row for each image, on the generator's device; None for what is off."""

    dy: Tensor | None = None  # int64 (B,), 0 to 2·pad
    dx: Tensor | None = None
    flips: Tensor | None = None  # int64 (B,), 0 or 1
    numbers: Tensor | None = None  # int32 (B, 10), 31 random bits each: ``kernels.crop.NUMBERS`` says what for

    def of(self, images: slice) -> Draws:
        """Those of a part of the batch."""
        return Draws(*(None if drawn is None else drawn[images] for drawn in self))


def draw(count: int, augment: Augment, generator: torch.Generator) -> Draws:
    """The draws for ``count`` images, in this order: row offsets, column offsets, flips, all other random numbers.

    Nothing is drawn for what is off; the numbers of all other changes are drawn together where one of them is on.
    """
    device = generator.device
    dy = dx = flips = numbers = None
    if augment.pad > 0 and augment.resized_crop is None:
        dy = torch.randint(0, 2 * augment.pad + 1, (count,), generator=generator, device=device)
        dx = torch.randint(0, 2 * augment.pad + 1, (count,), generator=generator, device=device)
    if augment.flip:
        flips = torch.randint(0, 2, (count,), generator=generator, device=device)
    if augment.drawn:
        numbers = torch.randint(
            0, 1 << NUMBER_BITS, (count, len(NUMBERS)), dtype=torch.int32, generator=generator, device=device
        )
    return Draws(dy, dx, flips, numbers)


class Tables(NamedTuple):
    """What random numbers choose among, on the images' device; None for what is off."""

    crops: Tensor | None = None  # int32 (n, 2): heights and widths of boxes to enlarge
    rows: Tensor | None = None  # float32 (868, 6): TrivialAugment's operations
    erased: Tensor | None = None  # int32 (n, 2): heights and widths of boxes to erase

    @property
    def nbytes(self) -> int:
        """Their memory."""
        return sum(table.nbytes for table in self if table is not None)


def make_tables(augment: Augment, image_size: tuple[int, int], device: torch.device | str) -> Tables:
    """The tables of an augmentation, for images of that (height, width). Made once: work for the host."""
    made = (
        crop_sizes(*image_size, augment.resized_crop) if augment.resized_crop is not None else None,
        trivial_rows(*image_size) if augment.trivial_augment else None,
        erased_sizes(*image_size) if augment.erasing > 0 else None,
    )
    return Tables(*(None if table is None else table.to(device) for table in made))


def to_float(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 values ``(B, H, W, C)`` to ``(B, C, H, W)`` in [0, 1], channels_last."""
    return pixels.contiguous().to(dtype).div_(255).permute(0, 3, 1, 2)


def augment(
    images: Tensor,
    index: Tensor,
    generator: torch.Generator,
    pad: int = 4,
    flip: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The images at ``index``, each cropped and flipped at random.

    ``images`` is the whole set, uint8 ``(N, C, H, W)`` in any memory layout (channels_last is fastest); ``index`` is
    int64 ``(B,)`` on the same device as the images and the generator. Returns ``(B, C, H, W)`` in [0, 1],
    channels_last. The draws are those of :func:`draw`. Nothing waits for the device. Raises ``InputError`` for images
    that are not 4-dimensional uint8 and for a pad outside ``0..min(H, W) - 1``.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise InputError(f"images are {images.dtype} {tuple(images.shape)}; expected torch.uint8 (N, C, H, W)")
    setting = Augment(pad, flip)
    setting.check((images.shape[2], images.shape[3]), images.shape[1])
    return augment_images(images, index, draw(len(index), setting, generator), setting, Tables(), dtype)


def augment_images(
    images: Tensor,
    index: Tensor,
    draws: Draws,
    augment: Augment,
    tables: Tables,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The images at ``index`` under the ``draws`` of :func:`draw`, with the tables of :func:`make_tables`.

    Images and result as :func:`augment`'s. Work for the device alone, in :func:`augment_cost`'s launches.
    """
    pixels = images.permute(0, 2, 3, 1)
    if all(drawn is None for drawn in draws):
        return to_float(pixels[index], dtype)
    if draws.dy is not None and draws.dx is not None:
        shifts = torch.stack([draws.dy, draws.dx], 1).int().sub_(augment.pad)
    else:
        shifts = torch.zeros(len(index), 2, dtype=torch.int32, device=images.device)
    flips = torch.zeros_like(index, dtype=torch.uint8) if draws.flips is None else draws.flips.to(torch.uint8)
    crop = CropOperands(pixels.contiguous(), index, shifts, flips, draws.numbers, tables.crops)
    change = kernels.ChangeOperands(
        tables.rows,
        None if tables.rows is None else lookup_tables(crop, tables.rows),
        augment.cutout,
        tables.erased,
        round(augment.erasing * (1 << NUMBER_BITS)),
    )
    return kernels.augment(*crop[:5], crops=tables.crops, change=change, dtype=dtype).permute(0, 3, 1, 2)


class AugmentCost(NamedTuple):
    """What an augmentation is predicted to cost a batch; the choice of the images is not in it, nor are labels."""

    launches: int  # draws and kernels
    moved: int  # bytes read from and written to the device's memory for a batch
    held: int  # bytes of the tables, for the whole run


def augment_cost(augment: Augment, batch_shape: tuple[int, ...], itemsize: int = 4) -> AugmentCost:
    """The cost of drawing, :func:`augment_images` and mixing for batches (B, C, H, W) of ``itemsize`` bytes a value."""
    batch, channels, height, width = batch_shape
    values = math.prod(batch_shape)
    moved, mixing = values * (1 + itemsize), 0
    if augment.mixes:  # two kinds of draws, and one kernel that reads two images for each that it writes
        mixing, moved = 3, moved + 3 * values * itemsize
    padded = augment.pad > 0 and augment.resized_crop is None
    if not (padded or augment.flip or augment.drawn):
        return AugmentCost(
            3 + mixing, moved + 2 * values + 2 * values * itemsize, 0
        )  # gathered, made floating, divided
    # dy and dx: drawn, and three launches that make them shifts; flips are always made bytes; and the last kernel
    launches = (5 if padded else 1) + augment.flip + augment.drawn + 1 + 1 + mixing
    if augment.trivial_augment:
        launches += 1
        # of 14 operations three need to see the image before; tables are written and read
        moved += values * 3 // 14 + 2 * 256 * batch * channels
    return AugmentCost(launches, moved, make_tables(augment, (height, width), "cpu").nbytes)
