"""What a training step checks of a batch: shapes and dtypes always, values at the first batch.

Values are on the device, and looking at them waits for it; a step does not, but for its first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fastensdistill.errors import InputError

SLACK = 1e-3  # beyond [0, 1] that rounding may leave
CHANNELS = (1, 3, 4)  # that a batch stored as (B, H, W, channels) would have


def check_images(images: Any, dtype: torch.dtype | None = None) -> None:
    """Raise InputError for what is no batch of images (B, channels, H, W) of floating type, or of another ``dtype``."""
    if not isinstance(images, Tensor):
        raise InputError(f"images are a {type(images).__name__}; expected a tensor (B, channels, H, W)")
    what, wanted = f"{images.dtype} of shape {tuple(images.shape)}", "floating values in [0, 1], (B, channels, H, W)"
    if not images.is_floating_point() or images.ndim != 4:
        hint = ": images / 255" if images.dtype == torch.uint8 else ""
        hint = ": one image is images[None]" if images.ndim == 3 and images.is_floating_point() else hint
        raise InputError(f"images are {what}; expected {wanted}{hint}")
    _, channels, height, width = images.shape
    if width in CHANNELS and channels not in CHANNELS and height > width:
        raise InputError(f"images are {what}; expected {wanted}: images.permute(0, 3, 1, 2)")
    if dtype is not None and images.dtype != dtype:
        raise InputError(f"images are {what}; expected {dtype}, as the network is")


def check_pixels(images: Tensor) -> None:
    """Raise InputError for values outside [0, 1]. Waits for the device."""
    low, high = (float(value) for value in images.detach().float().aminmax())
    if low >= -SLACK and high <= 1 + SLACK:
        return
    if low != low or abs(low) == float("inf") or abs(high) == float("inf"):
        raise InputError("images hold values that are NaN or infinite; expected pixels in [0, 1]")
    hint = "the network normalises them itself" if low < -SLACK else "divide them by 255" if high > 2 else "clamp them"
    raise InputError(f"images hold values from {low:.4g} to {high:.4g}; expected pixels in [0, 1]: {hint}")


def check_labels(labels: Any, images: int) -> None:
    """Raise InputError for what is neither a label, int64, nor probabilities (B, classes) for so many images."""
    if not isinstance(labels, Tensor):
        raise InputError(f"labels are a {type(labels).__name__}; expected a tensor of int64, or of probabilities")
    soft = labels.is_floating_point()
    good = labels.ndim == 2 and len(labels) == images if soft else labels.shape == (images,)
    if good and (soft or labels.dtype == torch.int64):
        return
    hint = ": labels.argmax(1)" if labels.ndim == 2 and labels.shape[0] == images and labels.shape[1] > 1 else ""
    hint = ": labels.long()" if labels.shape == (images,) and not soft else hint
    expected = f"probabilities ({images}, classes), or torch.int64" if soft else "torch.int64"
    raise InputError(f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected {expected} ({images},){hint}")


def check_kind(labels: Tensor, own: Tensor) -> None:
    """Raise InputError for ``labels`` that are not of the kind and shape of those that a step was built for."""
    if labels.shape != own.shape:
        raise InputError(f"labels are {labels.dtype} of shape {tuple(labels.shape)}; this step was built for "
                         f"{own.dtype} {tuple(own.shape)}")  # fmt: skip


def check_classes(labels: Tensor, classes: int) -> None:
    """Raise InputError for labels outside 0..``classes`` − 1, or no probabilities of these. Waits for the device."""
    if labels.is_floating_point():
        check_probabilities(labels, classes)
        return
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= classes:
        raise InputError(f"labels hold {low if low < 0 else high}; expected classes from 0 to {classes - 1}")


def check_columns(labels: Tensor, classes: int) -> None:
    """Raise InputError for probabilities of other than so many classes."""
    if labels.ndim == 2 and labels.shape[1] != classes:
        raise InputError(f"labels have shape {tuple(labels.shape)}; expected ({len(labels)}, {classes}), a probability "
                         "for each class")  # fmt: skip


def check_probabilities(labels: Tensor, classes: int) -> None:
    """Raise InputError unless every row of ``labels`` is a distribution over so many classes. Waits for the device."""
    check_columns(labels, classes)
    wide = labels.detach().double()
    low, high = (float(value) for value in wide.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError("labels hold values that are NaN or infinite; expected probabilities")
    if low < 0:
        raise InputError(f"labels hold {low:.4g}; expected probabilities: logits go through softmax first")
    sums = wide.sum(1)
    worst = float(sums[(sums - 1).abs().argmax()])
    if abs(worst - 1) > SLACK + torch.finfo(labels.dtype).eps:  # more than rounding all of them adds up to
        raise InputError(f"labels of an image add up to {worst:.4g}; expected probabilities, which add up to 1")


def check_micro_batches(images: int, micro_batches: int) -> None:
    """Raise InputError for a batch of so many images that do not fall into so many equal micro-batches."""
    if images % micro_batches:
        raise InputError(f"{images} images in micro_batches={micro_batches}: expected equal parts")
    if not images:
        raise InputError("a batch of no images; expected at least one")


def check_class_count(classes: Any) -> None:
    """Raise InputError unless ``num_classes`` is an integer of at least 1."""
    if not isinstance(classes, Integral) or isinstance(classes, bool) or classes < 1:
        raise InputError(f"num_classes={classes!r}: expected an integer of at least 1")


class FirstBatch:
    """Looks at values until a step sets ``over``, which each does once its first batch has passed."""

    over = False

    def see(self, images: Tensor | None = None, labels: Tensor | None = None, classes: int = 0) -> None:
        """Raise InputError for ``images`` outside [0, 1] and for ``labels`` that are not of so many ``classes``."""
        if not self.over and images is not None and not images.is_meta:
            check_pixels(images)
        if not self.over and labels is not None and not labels.is_meta:
            check_classes(labels, classes)

    def see_logits(self, logits: Mapping[str, Tensor], classes: int) -> None:
        """Raise InputError unless all ``logits`` (..., C) are of so many ``classes``; keys say whose they are."""
        for name, values in () if self.over else logits.items():
            if values.shape[-1] != classes:
                raise InputError(f"{name}: {values.shape[-1]} logits per image; expected num_classes={classes!r}")
