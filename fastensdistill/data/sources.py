"""Data sets as three uint8 splits: scikit-learn's digits, torchvision's CIFAR, ``.npz`` files and folders of images.

Every loader returns a :class:`~fastensdistill.data.parts.Source`; :func:`load_dataset` checks it, cuts off the
validation split and the limit, reads what is left and measures mean and standard deviation.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastensdistill.data.draws import draw_test, draw_validation, stratified_order
from fastensdistill.data.folders import open_folder
from fastensdistill.data.listing import readable
from fastensdistill.data.memory import check_memory
from fastensdistill.data.npz import open_npz
from fastensdistill.data.parts import MOST_CLASSES, Part, Source, Statistics, array_part, check_count, check_range
from fastensdistill.errors import InputError, unknown
from fastensdistill.files import expanded

# A small training split, so that digit teachers disagree: with 300 images they err on different scans.
# What is left of the 1,797 scans, 1,197, is the test split.
DIGITS_TRAIN = 300
DIGITS_VALIDATION = 300
DIGITS_SEED = 20220617  # of the one order of the scans; not an option, so that results can be compared

CIFAR_VALIDATION = 5000
IMAGE_SIZES = (4, 4096)  # that images can be resized to

# Per channel, of pixels in [0, 1]: the constants of the experiments in Nam et al., ICML 2022.
CIFAR10 = ((0.4915, 0.4821, 0.4464), (0.2472, 0.2437, 0.2617))
CIFAR100 = ((0.5072, 0.4866, 0.4410), (0.2673, 0.2564, 0.2760))


@dataclass(frozen=True)
class Split:
    """``images`` uint8 ``(N, H, W, C)`` and ``labels`` int64 ``(N,)``."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """Three splits, the names of the classes, and per channel mean and standard deviation of pixels in [0, 1].

    Raises ``InputError`` for splits that are empty or not as :class:`Split` says, images of differing shapes, labels
    that are not below the number of classes, and statistics that are not one for each channel.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()
    """Lines worth saying about how the data was read."""
    mirrors: bool = False
    """Whether an image and its mirror image are known to be of one class, so that training may flip images."""

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise InputError(f"{self.name} has the classes {self.classes}; expected the names of at least 2")
        if len(set(self.classes)) < len(self.classes):
            twice = next(name for name in self.classes if list(self.classes).count(name) > 1)
            raise InputError(f"{self.name} has two classes {twice!r}; expected a name of its own for each")
        for part, split in (("train", self.train), ("validation", self.validation), ("test", self.test)):
            where = f"{self.name}: {part}"
            for kind, values in (("images", split.images), ("labels", split.labels)):
                if not isinstance(values, np.ndarray):
                    raise InputError(f"{where}_{kind} are a {type(values).__name__}; expected a NumPy array")
            check_range(array_part(split.images, split.labels, where).labels, len(self.classes), where)
            if not len(split.labels):
                raise InputError(f"{self.name}: the {part} split is empty; expected at least one image")
            shape, expected = split.images.shape[1:], self.train.images.shape[1:]
            if shape != expected:
                raise InputError(f"{where} images are {shape}; expected {expected} as in train")
        if not len(self.mean) == len(self.std) == self.channels or not all(s > 0 for s in self.std):
            raise InputError(
                f"{self.name}: mean={self.mean}, std={self.std}; expected one of each for {self.channels} channels, "
                "std above 0"
            )

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """Channels of an image: 1 for grey, 3 for colour."""
        return self.train.images.shape[3]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.train.images.shape[1], self.train.images.shape[2]

    def repeated(self, channels: int = 3) -> Dataset:
        """Grey images with their channel repeated ``channels`` times, mean and std too, for colour networks.

        Raises ``InputError`` for images that are not grey and for numbers of channels other than 1 and 3.
        """
        if self.channels != 1 or channels not in (1, 3):
            raise InputError(f"{self.name} has images of {self.channels} channels; expected 1 to repeat to 3")
        if channels == 1:
            return self
        splits = (self.train, self.validation, self.test)
        check_memory(sum(split.images.nbytes for split in splits) * channels, f"{self.name} in {channels} channels")
        train, validation, test = (Split(np.repeat(s.images, channels, axis=3), s.labels) for s in splits)
        return replace(
            self, train=train, validation=validation, test=test, mean=self.mean * channels, std=self.std * channels,
            notes=(*self.notes, f"grey images, their channel repeated {channels} times for the network"),
        )  # fmt: skip


def load_dataset(
    name: str | Path,
    *,
    root: str | Path | None = None,
    limit: int | None = None,
    validation: int | None = None,
    seed: int = 0,
    image_size: int | None = None,
) -> Dataset:
    """Load a data set by name, ``.npz`` file or folder.

    ``name`` is one of ``DATASETS`` or a path (a relative one may also lie under ``root``):

    - ``digits``: scikit-learn's 1,797 scans, 8x8, one channel, 0..16 scaled to 0..255, in one fixed order: 300 train,
      300 validation, 1,197 test;
    - ``cifar10``, ``cifar100``: torchvision's files in ``root``; nothing is ever downloaded;
    - an ``.npz`` file with ``train_images``, ``train_labels``, ``test_images``, ``test_labels`` and, if it likes,
      ``val_images``, ``val_labels`` and ``classes`` (names); other common names (``x_train``) and MedMNIST's files are
      understood, images as :func:`fastensdistill.data.arrays.read_images` says; pickled objects are refused;
    - a folder of images: ``train/<class>/*`` with ``test/<class>/*`` or ``val/<class>/*`` or both, under any of the
      common names; Tiny-ImageNet as it is unpacked or as people rearrange it; or only class folders.

    A split is never drawn where the data has one. With ``val`` alone, that is the test split. Without either, a
    ``seed``-ed 20 % of every class (rounded, at least one image) becomes the test split.

    The validation split is, where it is not given, the last training images of CIFAR (5,000) and digits (300), and else
    ``validation`` images (10 %) drawn class by class, the same in every run. ``limit`` then keeps so many training
    images, of CIFAR and digits the first, else drawn class by class too; validation and test stay whole.

    Images in a folder must agree in size; with ``image_size`` the largest centred square of each is resized to that
    height and width. CIFAR and Tiny-ImageNet come with the known mean and std; others are measured on the training
    split that is returned, to four decimals.

    ``notes`` of the data set say what was decided on the way. Raises ``InputError`` for anything that cannot be used,
    data that does not fit into memory among it.
    """
    for what, value in (("limit", limit), ("validation", validation), ("image_size", image_size)):
        check_count(what, value)
    if image_size is not None and not IMAGE_SIZES[0] <= image_size <= IMAGE_SIZES[1]:
        raise InputError(f"image_size is {image_size}; expected {IMAGE_SIZES[0]} to {IMAGE_SIZES[1]} pixels")
    folder = expanded(root) if root is not None else None
    try:
        label, source = open_source(str(name), folder, image_size)
        return read_source(label, source, limit, validation, seed)
    except MemoryError as error:
        raise InputError(f"{str(name)!r} does not fit into memory; expected fewer or smaller images") from error


def open_source(name: str, root: Path | None, image_size: int | None) -> tuple[str, Source]:
    """The data set's short name and its parts: from the registry, else a path, else a path under ``root``."""
    path = expanded(name)
    if any(len(os.fsencode(part)) > 255 for part in path.parts):  # which the system refuses to look for
        raise InputError(f"there is no {name[:60]!r}...; expected a shorter name of a file or folder")
    if root is not None and name not in DATASETS and not path.exists():
        path = root / path
    if image_size is not None and (name in DATASETS or not path.is_dir()):
        raise InputError(f"image_size is {image_size} for {name!r}; expected it only for a folder of images")
    if name in DATASETS:
        return name, DATASETS[name](root)
    if path.is_dir():
        return readable(path.resolve().name), open_folder(path, image_size)
    if path.is_file():
        return readable(path.name), open_npz(path)
    if path.suffix or len(path.parts) > 1:
        raise InputError(f"there is no {str(path)!r}; expected an .npz file, a folder, or one of {', '.join(DATASETS)}")
    raise unknown("dataset", name, DATASETS)


def read_source(label: str, source: Source, limit: int | None, validation: int | None, seed: int) -> Dataset:
    """The data set made of what its source has: splits drawn where they are lacking, images read."""
    given = {"train": source.train, "test": source.test, "validation": source.validation}
    for part_name, part in given.items():
        if part is not None and len(part.labels) == 0:
            raise InputError(f"{label}: the {part_name} split is empty; expected at least one image")
    classes = source.classes
    if classes is None:
        check_range(source.train.labels, MOST_CLASSES, f"{label}: train")
        classes = tuple(str(i) for i in range(int(source.train.labels.max()) + 1))
    if len(classes) < 2:
        raise InputError(f"{label} has the one class {classes[0]!r}; expected at least 2")
    for part_name, part in given.items():
        if part is not None:
            check_range(part.labels, len(classes), f"{label}: {part_name}")
    notes = source.notes
    absent = np.flatnonzero(np.bincount(source.train.labels, minlength=len(classes)) == 0)
    if len(absent):
        few = ", ".join(classes[i] for i in absent[:5]) + (", ..." if len(absent) > 5 else "")
        notes.append(f"no training images of {len(absent)} of {len(classes)} classes: {few}")

    parts = draw_splits(label, source, classes, validation, seed, notes)
    part, kept = parts["train"]
    if limit is not None:
        if limit > len(kept):
            raise InputError(f"{label}: limit is {limit}; expected at most the {len(kept)} training images")
        order = np.arange(len(kept)) if source.last is not None else stratified_order(part.labels[kept])
        parts["train"] = (part, kept[np.sort(order[:limit])])
    check_memory(sum(part.image_bytes * len(index) for part, index in parts.values()), f"the images of {label}")
    splits = {name: Split(part.read(index), part.labels[index]) for name, (part, index) in parts.items()}
    mean, std = source.statistics or measure(splits["train"].images)
    return Dataset(
        label, splits["train"], splits["validation"], splits["test"], classes, mean, std, tuple(notes), source.mirrors
    )


def draw_splits(
    label: str, source: Source, classes: tuple[str, ...], validation: int | None, seed: int, notes: list[str]
) -> dict[str, tuple[Part, np.ndarray]]:
    """Train, validation and test: the part that each is in, and the indices of its images there."""
    train, test, held_out = source.train, source.test, source.validation
    kept = np.arange(len(train.labels))
    if test is None and held_out is not None:
        test, held_out = held_out, None
        notes.append(f"{source.validation_name} is the test split: there is no other that has labels")
    if test is not None:
        tested = (test, np.arange(len(test.labels)))
    else:
        kept, drawn = draw_test(train.labels, classes, seed, label)
        tested = (train, drawn)
        notes.append(f"no test split: {len(drawn):,} images, a fifth of every class, held out as one")
    if held_out is not None:
        if validation is not None:
            raise InputError(f"validation is {validation}, but {label} has its own validation split; expected none")
        chosen = (held_out, np.arange(len(held_out.labels)))
    elif source.last is not None:
        count = validation or source.last
        if count >= len(kept):
            raise InputError(f"{label}: validation is {count}; expected less than the {len(kept)} training images")
        chosen, kept = (train, kept[-count:]), kept[:-count]
    else:
        rest, drawn = draw_validation(train.labels[kept], validation, label)
        chosen, kept = (train, kept[drawn]), kept[rest]
        notes.append(f"validation: {len(drawn):,} training images drawn class by class, always the same")
    return {"train": (train, kept), "validation": chosen, "test": tested}


def measure(images: np.ndarray) -> Statistics:
    """Mean and standard deviation per channel of pixels / 255, in float64, to four decimals.

    A channel of one value only gets 1 as its deviation: there is nothing to scale, and 0 would divide.
    """
    values = np.arange(256) / 255
    mean, std = [], []
    for channel in range(images.shape[3]):
        counts = np.zeros(256, dtype=np.int64)
        for start in range(0, len(images), 4096):  # bincount casts to int64: eight times the memory of its piece
            counts += np.bincount(images[start : start + 4096, ..., channel].ravel(), minlength=256)
        centre = float(counts @ values / counts.sum())
        mean.append(round(centre, 4))
        std.append(round(float(np.sqrt(counts @ (values - centre) ** 2 / counts.sum())), 4) or 1.0)
    return tuple(mean), tuple(std)


def open_digits(root: Path | None) -> Source:
    """scikit-learn's digits (it carries the scans itself; ``root`` is not used)."""
    from sklearn.datasets import load_digits  # here, not above: importing scikit-learn takes a second

    scans = load_digits()
    order = np.random.default_rng(DIGITS_SEED).permutation(len(scans.target))
    images = np.rint(scans.images[order] * (255 / 16)).astype(np.uint8)[..., None]
    labels = scans.target[order].astype(np.int64)
    cut = DIGITS_TRAIN + DIGITS_VALIDATION
    return Source(
        train=array_part(images[:cut], labels[:cut], "digits: train"),
        test=array_part(images[cut:], labels[cut:], "digits: test"),
        classes=tuple(str(digit) for digit in range(10)),
        last=DIGITS_VALIDATION,
    )


def open_cifar(root: Path | None, class_name: str, statistics: Statistics) -> Source:
    """CIFAR as torchvision keeps it. Its files are pickles; torchvision compares their MD5 before it opens one."""
    name = class_name.lower()
    if root is None:
        raise InputError(f"{name} needs root; expected the folder that torchvision keeps its files in")
    from torchvision import datasets

    try:
        train, test = (getattr(datasets, class_name)(str(root), train=train, download=False) for train in (True, False))
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"{name} is not in {str(root)!r}, or not whole; get it with: python -c "
            f"\"import torchvision; torchvision.datasets.{class_name}('{root}', download=True)\""
        ) from error
    return Source(
        train=array_part(np.asarray(train.data), np.asarray(train.targets), f"{name}: train"),
        test=array_part(np.asarray(test.data), np.asarray(test.targets), f"{name}: test"),
        classes=tuple(train.classes),
        statistics=statistics,
        last=CIFAR_VALIDATION,
        mirrors=True,
    )


DATASETS: dict[str, Callable[[Path | None], Source]] = {
    "digits": open_digits,
    "cifar10": lambda root: open_cifar(root, "CIFAR10", CIFAR10),
    "cifar100": lambda root: open_cifar(root, "CIFAR100", CIFAR100),
}
