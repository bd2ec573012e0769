"""Data sets as three uint8 splits: scikit-learn's digits, torchvision's CIFAR, ``.npz`` files and folders of images.

Every loader returns a :class:`~fastensdistill.data.parts.Source`; :func:`load_dataset` checks it, cuts off the
validation split and the limit, reads what is left and measures mean and standard deviation.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastensdistill.data.folders import open_folder
from fastensdistill.data.parts import MOST_CLASSES, Source, Statistics, array_part, check_count, check_range
from fastensdistill.errors import InputError, unknown

# A small training split, so that digit teachers disagree: with 300 images they err on different scans.
# What is left of the 1,797 scans, 1,197, is the test split.
DIGITS_TRAIN = 300
DIGITS_VALIDATION = 300
DIGITS_SEED = 20220617  # of the one order of the scans; not an option, so that results can be compared

CIFAR_VALIDATION = 5000
VALIDATION_SHARE = 0.1  # of the training images, elsewhere

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

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise InputError(f"{self.name} has the classes {self.classes}; expected the names of at least 2")
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
        return len(self.classes)

    @property
    def channels(self) -> int:
        return self.train.images.shape[3]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.train.images.shape[1], self.train.images.shape[2]


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
    - an ``.npz`` file with ``train_images`` uint8 ``(N, H, W, C)``, ``train_labels``, ``test_images``, ``test_labels``,
      and optionally ``validation_images``, ``validation_labels`` and ``classes`` (names); pickled objects are refused;
    - a folder of images: ``train/<class>/*`` with ``test/<class>/*`` or ``val/<class>/*`` (with both, ``val`` is the
      validation split); Tiny-ImageNet as it is unpacked, its ``val`` being the test split; or only class folders, of
      which a ``seed``-ed 20 % of every class (rounded, at least one image) becomes the test split.

    The validation split is the last ``validation`` training images (5,000 for CIFAR, 300 for digits, otherwise 10 %, at
    least one). Training images stored class by class, as folders are, are put in a ``seed``-ed random order first.
    ``limit`` then keeps the first training images; validation and test stay whole.

    Images in a folder must agree in size; with ``image_size`` the largest centred square of each is resized to that
    height and width. CIFAR and Tiny-ImageNet come with the known mean and std; others are measured on the training
    split that is returned, to four decimals.

    Raises ``InputError`` for anything that cannot be used.
    """
    for what, value in (("limit", limit), ("validation", validation), ("image_size", image_size)):
        check_count(what, value)
    folder = Path(root).expanduser() if root is not None else None
    label, source = open_source(str(name), folder, seed, image_size)
    for part_name, part in (("train", source.train), ("test", source.test), ("validation", source.validation)):
        if part is not None and len(part.labels) == 0:
            raise InputError(f"{label}: the {part_name} split is empty; expected at least one image")
    classes = source.classes
    if classes is None:
        check_range(source.train.labels, MOST_CLASSES, f"{label}: train")
        classes = tuple(str(i) for i in range(int(source.train.labels.max()) + 1))
    if len(classes) < 2:
        raise InputError(f"{label} has the one class {classes[0]!r}; expected at least 2")

    kept, held_out = cut_off_validation(source, validation, seed, label)
    if limit is not None and limit > len(kept):
        raise InputError(f"{label}: limit is {limit}; expected at most the {len(kept)} training images")
    parts = {
        "train": (source.train, kept[:limit]),
        "validation": (source.validation or source.train, held_out),
        "test": (source.test, np.arange(len(source.test.labels))),
    }
    splits: dict[str, Split] = {}
    for part_name, (part, index) in parts.items():
        check_range(part.labels, len(classes), f"{label}: {part_name}")
        splits[part_name] = Split(part.read(index), part.labels[index])
    mean, std = source.statistics or measure(splits["train"].images)
    return Dataset(label, splits["train"], splits["validation"], splits["test"], classes, mean, std)


def open_source(name: str, root: Path | None, seed: int, image_size: int | None) -> tuple[str, Source]:
    """The data set's short name and its parts: from the registry, else a path, else a path under ``root``."""
    path = Path(name).expanduser()
    if root is not None and name not in DATASETS and not path.exists():
        path = root / path
    if image_size is not None and (name in DATASETS or not path.is_dir()):
        raise InputError(f"image_size is {image_size} for {name!r}; expected it only for a folder of images")
    if name in DATASETS:
        return name, DATASETS[name](root)
    if path.is_dir():
        return path.resolve().name, open_folder(path, seed, image_size)
    if path.is_file():
        return path.name, open_npz(path)
    if path.suffix or len(path.parts) > 1:
        raise InputError(f"there is no {str(path)!r}; expected an .npz file, a folder, or one of {', '.join(DATASETS)}")
    raise unknown("dataset", name, DATASETS)


def cut_off_validation(
    source: Source, validation: int | None, seed: int, label: str
) -> tuple[np.ndarray, np.ndarray]:
    """Indices into the training part of what stays for training, and of the validation split (or into its own part)."""
    labels = source.train.labels
    order = np.arange(len(labels))
    if np.all(labels[1:] >= labels[:-1]):
        # stored class by class: the last images would all be of the last classes, the first ``limit`` of the first
        order = np.random.default_rng(seed).permutation(len(labels))
    if source.validation is not None:
        if validation is not None:
            raise InputError(f"validation is {validation}, but {label} has its own validation split; expected none")
        return order, np.arange(len(source.validation.labels))
    count = validation or source.default_validation or max(1, round(VALIDATION_SHARE * len(labels)))
    if count >= len(labels):
        raise InputError(f"{label}: validation is {count}; expected less than the {len(labels)} training images")
    return order[:-count], order[-count:]


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
        default_validation=DIGITS_VALIDATION,
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
        default_validation=CIFAR_VALIDATION,
    )


def open_npz(path: Path) -> Source:
    """An ``.npz`` file; nothing in it is unpickled."""
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise InputError(f"{path} is a single array; expected an .npz file")
        with file:
            known = {f"{part}_{kind}" for part in ("train", "test", "validation") for kind in ("images", "labels")}
            found = file.files
            arrays = {key: file[key] for key in file.files if key in known | {"classes"}}
    except InputError:
        raise
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        # NumPy takes whatever it does not know for a pickle, and advises to load it as one
        why = " ".join(str(error).split()) if zipfile.is_zipfile(path) else "it is no archive, or not whole"
        raise InputError(f"{path} cannot be read as an .npz file without pickled objects ({why})") from error
    wanted = ["train_images", "train_labels", "test_images", "test_labels"]
    if any(key.startswith("validation_") for key in arrays):
        wanted += ["validation_images", "validation_labels"]
    missing = [key for key in wanted if key not in arrays]
    if missing:
        raise InputError(
            f"{path} lacks {', '.join(missing)}; expected the keys {', '.join(wanted)}, found {', '.join(found)}"
        )
    parts = {
        part: array_part(arrays[f"{part}_images"], arrays[f"{part}_labels"], f"{path.name}: {part}")
        for part in ("train", "test", "validation")
        if f"{part}_images" in arrays
    }
    classes = arrays.get("classes")
    if classes is not None and (classes.ndim != 1 or classes.dtype.kind not in "US" or not len(classes)):
        raise InputError(f"{path.name}: classes are {classes.dtype} of shape {classes.shape}; expected names (C,)")
    if classes is not None and classes.dtype.kind == "S":
        classes = np.char.decode(classes, "utf-8", "replace")
    return Source(
        train=parts["train"],
        test=parts["test"],
        validation=parts.get("validation"),
        classes=None if classes is None else tuple(str(text) for text in classes),
    )


DATASETS: dict[str, Callable[[Path | None], Source]] = {
    "digits": open_digits,
    "cifar10": lambda root: open_cifar(root, "CIFAR10", CIFAR10),
    "cifar100": lambda root: open_cifar(root, "CIFAR100", CIFAR100),
}
