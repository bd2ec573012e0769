"""Mixup and cutmix of a batch on the device, every image with the one before it (``kernels.mix``)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.mix import GAMMAS, UNIFORMS, MixDraws, mix
from fastensdistill.kernels.operands import accumulator


class Mixing:
    """Mixes batches of images of ``classes`` classes; ``mixup`` and ``cutmix`` are α of their Beta(α, α), 0 for none.

    With both, each image gets one of them at random; λ is drawn for each image. The image before the first is the last.
    """

    def __init__(
        self, mixup: float, cutmix: float, classes: int | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        """For batches of ``dtype``. Raises InputError where it is not said how many classes there are."""
        if classes is None:
            raise InputError(f"mixup={mixup:g} and cutmix={cutmix:g} need classes=, the width of the labels")
        self.mixup, self.cutmix, self.classes = mixup, cutmix, classes
        shapes = [mixup + 1, mixup + 1, cutmix + 1, cutmix + 1]
        self._shapes = torch.tensor(shapes, dtype=accumulator(dtype), device=device)  # once: a captured read cannot

    def draw(self, count: int, generator: torch.Generator) -> MixDraws:
        """The draws for ``count`` images: the gammas first, then the uniform ones."""
        shapes = self._shapes.expand(count, GAMMAS)
        gammas = torch._standard_gamma(shapes, generator=generator)  # what torch.distributions draws Beta from
        uniforms = torch.rand(count, UNIFORMS, generator=generator, dtype=shapes.dtype, device=shapes.device)
        return MixDraws(gammas, uniforms)

    def __call__(self, images: Tensor, labels: Tensor, draws: MixDraws) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) mixed, channels_last, and the probabilities (B, classes) of their classes."""
        pixels = images.permute(0, 2, 3, 1).contiguous()
        mixed = mix(pixels, labels, draws, classes=self.classes, mixup=self.mixup, cutmix=self.cutmix)
        return mixed.images.permute(0, 3, 1, 2), mixed.labels
