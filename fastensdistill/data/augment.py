"""Random crop and flip of a whole batch on the device, per image random.

For the image at ``index[b]`` with offsets ``dy, dx`` in ``0..2·pad`` and a flip bit, and ``w' = W-1-w`` where flipped::

    out[b, c, h, w] = images[index[b], c, h + dy - pad, w' + dx - pad] / 255      (0 outside the image)

which is: zero-pad by ``pad``, crop back to ``(H, W)`` at ``(dy, dx)``, flip (the recipe of the CIFAR experiments in Nam
et al., ICML 2022). One gather reads the unpadded uint8 set; the padding is a mask (``kernels.augment``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastensdistill.data.sources import Dataset
from fastensdistill.errors import InputError
from fastensdistill.kernels import augment as kernels


@dataclass(frozen=True)
class Augment:
    """Random crop out of an image zero-padded by ``pad`` pixels on each side, and a horizontal flip with p = 1/2.

    ``mixup`` and ``cutmix`` are α of the Beta(α, α) that says how much of an image is left where it is blended with
    another of its batch; 0 for none.
    """

    pad: int = 4
    flip: bool = True
    mixup: float = 0.0
    cutmix: float = 0.0

    def check(self, image_size: tuple[int, int]) -> None:
        """Raise ``InputError`` unless ``0 <= pad < min(image_size)``: beyond that, a crop may miss the image."""
        if isinstance(self.pad, bool) or not isinstance(self.pad, int) or not 0 <= self.pad < min(image_size):
            raise InputError(
                f"pad is {self.pad!r}; expected a whole number from 0 to {min(image_size) - 1} "
                f"for images of {image_size[0]}x{image_size[1]}"
            )
        for name in ("mixup", "cutmix"):
            alpha = getattr(self, name)
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha < math.inf:
                raise InputError(f"{name} is {alpha!r}; expected a number of at least 0")

    @property
    def mixes(self) -> bool:
        """Whether images are blended, which makes their labels probabilities."""
        return self.mixup > 0 or self.cutmix > 0


def choose_augment(
    data: Dataset, flip: bool | None = None, pad: int | None = None, given: Augment | None = None
) -> Augment:
    """The augmentation of a run: ``given``, or what is set, and else what is safe for the data.

    Flips are on only where an image and its mirror image are known to be of one class (``Dataset.mirrors``: CIFAR,
    ImageNet and its parts); a mirrored digit, hand or arrow is another symbol. The crop moves an image by an eighth of
    its size at most (4 pixels at 32x32), with zeros around it.
    Raises ``InputError`` for a pad that does not fit the images, and where ``given`` is not what is set.
    """
    if given is not None and (flip not in (None, given.flip) or pad not in (None, given.pad)):
        raise InputError(f"augment is {given}, and the config says flip={flip}, pad={pad}; expected one of them")
    chosen = given or Augment(min(data.image_size) // 8 if pad is None else pad, data.mirrors if flip is None else flip)
    chosen.check(data.image_size)
    return chosen


def draw(
    count: int, augment: Augment, generator: torch.Generator
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The draws for ``count`` images, in this order: row offsets, column offsets (both ``0..2·pad``), flips (0 or 1).

    int64 ``(count,)`` each, on the generator's device; None, with nothing drawn, where ``pad`` is 0 or ``flip`` is off.
    """
    dy = dx = flips = None
    if augment.pad > 0:
        dy = torch.randint(0, 2 * augment.pad + 1, (count,), generator=generator, device=generator.device)
        dx = torch.randint(0, 2 * augment.pad + 1, (count,), generator=generator, device=generator.device)
    if augment.flip:
        flips = torch.randint(0, 2, (count,), generator=generator, device=generator.device)
    return dy, dx, flips


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
    setting.check((images.shape[2], images.shape[3]))
    return crop_and_flip(images, index, *draw(len(index), setting, generator), pad, dtype)


def crop_and_flip(
    images: Tensor,
    index: Tensor,
    dy: Tensor | None,
    dx: Tensor | None,
    flips: Tensor | None,
    pad: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The images at ``index`` under the draws of :func:`draw`; arguments and result as :func:`augment`'s."""
    pixels = images.permute(0, 2, 3, 1)
    if dy is None and flips is None:
        return to_float(pixels[index], dtype)
    still = index.new_zeros(len(index))
    shifts = torch.stack([still if d is None else d - pad for d in (dy, dx)], 1).int()
    mirrored = (still if flips is None else flips).to(torch.uint8)
    return kernels.augment(pixels.contiguous(), index, shifts, mirrored, dtype=dtype).permute(0, 3, 1, 2)
