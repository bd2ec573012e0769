"""The report's pictures of images: rows of them, what is done to them from one row to the next."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.evaluate.drawing import empty_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 8


class Augmented(NamedTuple):
    """Training images, and what an augmentation makes of them."""

    images: Tensor  # (n, 1 or 3, H, W) in [0, 1]
    versions: Sequence[Tensor]  # one or more, each of the same shape
    titles: Sequence[str]  # n short texts
    about: str  # the augmentation in words


@styled
def perturbation_strip(
    images: Tensor, perturbed: Tensor, titles: Sequence[str], amplification: float | None = None
) -> Figure:
    """Images, the same images perturbed, and their difference about grey; eight in a row.

    Args:
        images: (n, 1 or 3, H, W) in [0, 1].
        perturbed: the same shape.
        titles: n short texts, one above each image.
        amplification: factor on the difference; None chooses it so that the largest difference fills the range.

    Raises:
        InputError: shapes that disagree, nothing to show, values outside [0, 1], or an amplification not above zero.
    """
    x, y = _as_images(images, "images"), _as_images(perturbed, "perturbed images")
    if x.shape != y.shape or len(titles) != len(x):
        raise InputError(
            f"perturbation strip: expected as many perturbed images and titles as images, "
            f"found {tuple(images.shape)}, {tuple(perturbed.shape)} and {len(titles)} titles"
        )
    difference = y - x
    most = float(np.abs(difference).max())
    if amplification is None:
        amplification = 0.5 / most if most > 0 else 1.0
    elif not (math.isfinite(amplification) and amplification > 0):
        raise InputError(f"perturbation strip: expected an amplification above zero, found {amplification}")
    rms = 255 * float(np.sqrt(np.square(difference).mean()))
    factor = f"×{amplification:.3g}"
    change = f"difference {factor}, root mean square change {rms:.2f}/255" if most > 0 else "no difference"
    rows = [("image", x), ("perturbed", y), (f"difference\n{factor}", 0.5 + amplification * difference)]
    return _rows_of_images(rows, titles, f"Images before and after perturbation\n{change}")


@styled
def augmentation_strip(given: Augmented) -> Figure:
    """Training images, and below each some of the images that a network may see in its place; eight in a row.

    Raises:
        InputError: shapes that disagree, nothing to show, or values outside [0, 1].
    """
    images, augmented, titles, about = given
    x = _as_images(images, "images")
    drawn = [_as_images(one, "augmented images") for one in augmented]
    if not drawn or any(one.shape != x.shape for one in drawn) or len(titles) != len(x):
        shapes = ", ".join(str(tuple(one.shape)) for one in augmented) or "none"
        raise InputError(
            f"augmentation strip: expected as many augmented images and titles as images, "
            f"found {tuple(images.shape)}, {shapes} and {len(titles)} titles"
        )
    rows = [("image", x), *(("augmented" if i == 0 else "", one) for i, one in enumerate(drawn))]
    told = textwrap.fill(about, 14 * min(len(x), COLUMNS))
    return _rows_of_images(rows, titles, f"Training images before and after augmentation\n{told}")


def _rows_of_images(rows: Sequence[tuple[str, np.ndarray]], titles: Sequence[str], heading: str) -> Figure:
    """Named ``rows`` of images (n, H, W, C), below one another; where there are more than eight, in several blocks."""
    count, each = len(titles), len(rows)
    columns = min(count, COLUMNS)
    blocks = math.ceil(count / columns)
    wrapped = [textwrap.fill(title, 14, max_lines=3, placeholder=" …") for title in titles]
    lines = max(title.count("\n") + 1 for title in wrapped)
    size, left = min(1.9, max(1.22, 6 / columns)), 0.95
    height = blocks * (each * size + 0.17 * lines + 0.1) + 0.35 + 0.2 * (heading.count("\n") + 1)
    figure = empty_figure(max(size * columns + left, 4.6), height, hspace=0.01, wspace=0.01, h_pad=0.03, w_pad=0.03)
    figure.suptitle(heading)
    all_axes = figure.subplots(each * blocks, columns, squeeze=False)
    for axes in all_axes.ravel():
        axes.axis("off")
    for i in range(count):
        for row, (_, stack) in enumerate(rows):
            image = np.clip(stack[i], 0, 1)
            all_axes[each * (i // columns) + row, i % columns].imshow(
                image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1,
                interpolation="nearest",
            )  # fmt: skip
        all_axes[each * (i // columns), i % columns].set_title(wrapped[i], fontsize=9, loc="center")
    for row, axes in enumerate(all_axes[:, 0]):
        axes.text(-0.08, 0.5, rows[row % each][0], transform=axes.transAxes, ha="right", va="center", fontsize=9)
    return figure


def _as_images(images: Tensor, name: str) -> np.ndarray:
    """(n, H, W, C) float64 array of checked images."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        raise InputError(f"{name}: expected shape (n, 1 or 3, H, W), found {tuple(images.shape)}")
    array = images.detach().to("cpu", torch.float64).permute(0, 2, 3, 1).numpy()
    if not (array.min() >= 0 and array.max() <= 1):
        raise InputError(f"{name}: expected values in [0, 1], found {array.min():.4g} to {array.max():.4g}")
    return array
