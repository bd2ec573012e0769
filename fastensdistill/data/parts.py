"""What a loader hands to :func:`fastensdistill.data.load_dataset`: labels, and images that are read on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fastensdistill.errors import InputError

Statistics = tuple[tuple[float, ...], tuple[float, ...]]

MOST_CLASSES = 100_000  # a larger label is a mistake, and a classifier for it would not fit anywhere


@dataclass(frozen=True)
class Part:
    """A split not read yet: labels int64 ``(N,)``; ``read(index)`` gives images uint8 ``(len(index), H, W, C)``."""

    labels: np.ndarray
    read: Callable[[np.ndarray], np.ndarray]
    image_bytes: int = 0  # that reading an image takes; 0 where it lies in memory


@dataclass(frozen=True)
class Source:
    """The parts of a data set as far as it has them; what it lacks is held out of ``train``."""

    train: Part
    test: Part | None
    validation: Part | None = None
    classes: tuple[str, ...] | None = None  # None: the numbers 0..largest training label
    statistics: Statistics | None = None  # mean and std; None: measured on the training split
    last: int | None = None  # the published validation split: so many of the last training images
    mirrors: bool = False  # whether an image and its mirror image are known to be of one class
    notes: list[str] = field(default_factory=list)
    validation_name: str = ""  # as the user has it


def array_part(images: np.ndarray, labels: np.ndarray, where: str) -> Part:
    """A part in memory; ``where`` names it in errors. Raises ``InputError`` unless uint8 NHWC with one label each."""
    if images.dtype != np.uint8:
        raise InputError(f"{where}_images are {images.dtype}; expected uint8 values 0 to 255")
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape[1:3]:
        raise InputError(f"{where}_images have shape {images.shape}; expected (N, H, W, C) with 1 or 3 channels")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InputError(
            f"{where}_labels are {labels.dtype} of shape {labels.shape}; expected whole numbers of shape (N,)"
        )
    if len(labels) != len(images):
        raise InputError(f"{where}_labels are {len(labels)}; expected {len(images)}, one per image")
    # before the cast: a uint64 label beyond int64 would come out negative
    if len(labels) and int(labels.max()) >= MOST_CLASSES:
        raise InputError(f"{where}_labels reach {labels.max()}; expected class numbers from 0, below {MOST_CLASSES}")
    return Part(labels.astype(np.int64), lambda index: images[index])


def check_range(labels: np.ndarray, num_classes: int, where: str) -> None:
    """Raise ``InputError`` unless all labels are in ``0..num_classes - 1``."""
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        place = int(wrong.argmax())
        raise InputError(f"{where}_labels[{place}] is {labels[place]}; expected 0 to {num_classes - 1}")


def check_count(what: str, value: int | None) -> None:
    """Raise ``InputError`` unless ``value`` is None or a whole number of at least 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1):
        raise InputError(f"{what} is {value!r}; expected a whole number of at least 1")
