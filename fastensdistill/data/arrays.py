"""Convert arrays in the layouts that people store: images to uint8 ``(N, H, W, C)``, labels to class numbers ``(N,)``.

All splits of a set are read in one way, which the splits together decide. What can be meant in two ways is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fastensdistill.data.parts import MOST_CLASSES
from fastensdistill.errors import InputError

DARKEST = 64  # the largest value of an array that is not uint8 must reach it, or its scale is anybody's guess
CHANNELS = (1, 3)


def read_images(images: Mapping[str, np.ndarray], where: str, notes: list[str]) -> dict[str, np.ndarray]:
    """The images of every split as uint8 ``(N, H, W, C)``.

    Grey ``(N, H, W)`` and channels-first ``(N, C, H, W)`` are understood, and so are booleans, fractions of one and
    whole numbers up to 255 of any type; ``notes`` gets what was done. Raises ``InputError`` for everything else.
    """
    shaped = {part: _channels_last(array, f"{where}: {part}_images") for part, array in images.items()}
    if any(array.ndim == 4 and shaped[part].shape != array.shape for part, array in images.items()):
        notes.append("images are stored channels first, (N, C, H, W)")
    kinds = {array.dtype for array in shaped.values() if len(array)}
    if kinds <= {np.dtype(np.uint8)}:
        if kinds and max(int(array.max()) for array in shaped.values() if array.size) < DARKEST:
            notes.append(f"no pixel is brighter than {max(int(a.max()) for a in shaped.values() if a.size)} of 255")
        return shaped
    for part, array in shaped.items():
        if array.dtype.kind not in "buif":
            raise InputError(f"{where}: {part}_images are {array.dtype}; expected uint8 values 0 to 255")
    if all(kind.kind == "b" for kind in kinds):
        notes.append("images are black and white: False is read as 0, True as 255")
        return {part: array.astype(np.uint8) * np.uint8(255) for part, array in shaped.items()}
    top = 0.0
    for part, array in shaped.items():
        if array.size and not (np.isfinite(array).all() if array.dtype.kind == "f" else True):
            raise InputError(f"{where}: {part}_images hold values that are not finite; expected pixels 0 to 255")
        least, most = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
        if least < 0 or most > 255:
            raise InputError(
                f"{where}: {part}_images are {array.dtype} from {least:.6g} to {most:.6g}; expected pixels 0 to 255, "
                "or fractions of one, before any normalisation"
            )
        top = max(top, most)
    named = ", ".join(sorted(str(kind) for kind in kinds))
    if top <= 1 and all(kind.kind == "f" for kind in kinds):
        notes.append(f"images are {named} from 0 to 1, and are read as 0 to 255")
        return {part: np.rint(array * 255).astype(np.uint8) for part, array in shaped.items()}
    whole = all(array.dtype.kind != "f" or bool((array == np.rint(array)).all()) for array in shaped.values())
    if top < DARKEST or not whole:
        problem = f"reach {top:.6g}" if top < DARKEST else "hold fractions beyond 1"
        raise InputError(f"{where}: images are {named} and {problem}; expected uint8 values 0 to 255")
    return {part: array.astype(np.uint8) for part, array in shaped.items()}


def _channels_last(array: np.ndarray, where: str) -> np.ndarray:
    shape = array.shape
    if array.ndim == 3 and min(shape[1:]) > max(CHANNELS):
        return array[..., None]
    if array.ndim == 4 and 0 not in shape[1:]:
        if shape[3] in CHANNELS:
            return array
        if shape[1] in CHANNELS:
            return array.transpose(0, 2, 3, 1)
    meant = "expected (N, H, W, C) with 1 or 3 channels, (N, C, H, W) or grey (N, H, W)"
    if array.ndim == 5 or (array.ndim == 4 and min(shape[1:]) > 4):
        raise InputError(f"{where} have shape {shape}, volumes; {meant}")
    if array.ndim == 2:
        raise InputError(f"{where} have shape {shape}, images laid out as rows; {meant}")
    raise InputError(f"{where} have shape {shape}; {meant}")


def read_labels(
    labels: Mapping[str, np.ndarray], classes: tuple[str, ...] | None, where: str, notes: list[str]
) -> tuple[dict[str, np.ndarray], tuple[str, ...] | None]:
    """The labels of every split as whole numbers ``(N,)``, and the names of the classes where the labels say them.

    ``(N, 1)``, whole floats, one-hot rows and names are understood, and so are numbers from 1 to the number of
    classes. Raises ``InputError`` for everything else. Ranges are not checked here.
    """
    flat = {part: _flat(array, f"{where}: {part}_labels") for part, array in labels.items()}
    if any(array.ndim == 2 for array in flat.values()):
        flat = _from_one_hot(flat, where)
        notes.append("labels are one-hot rows")
    if all(array.dtype.kind in "US" for array in flat.values()):
        return _from_names(flat, classes, where)
    numbers = {part: _whole(array, f"{where}: {part}_labels") for part, array in flat.items()}
    given = [array for array in numbers.values() if len(array)]
    if given and min(int(array.min()) for array in given) == 1:
        most = max(int(array.max()) for array in given)
        if most < MOST_CLASSES and (classes is None or most == len(classes)):
            notes.append(f"labels run from 1 to {most}: label 1 is class 0")
            names = classes or tuple(str(number) for number in range(1, most + 1))
            return {part: array - 1 for part, array in numbers.items()}, names
    return numbers, classes


def _flat(array: np.ndarray, where: str) -> np.ndarray:
    """``(N,)`` or, for one-hot rows, ``(N, C)``."""
    if array.ndim == 2 and 1 in array.shape:
        return array.reshape(-1)
    if array.ndim not in (1, 2):
        raise InputError(f"{where} are {array.dtype} of shape {array.shape}; expected whole numbers of shape (N,)")
    return array


def _from_one_hot(labels: dict[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    for part, array in labels.items():
        if array.ndim != 2 or array.dtype.kind not in "buif":
            raise InputError(
                f"{where}: {part}_labels are {array.dtype} of shape {array.shape}, other labels one-hot rows; "
                "expected whole numbers of shape (N,)"
            )
        if not np.isin(array, (0, 1)).all() or not (array.astype(np.int64).sum(1) == 1).all():
            raise InputError(
                f"{where}: {part}_labels have shape {array.shape} and are not one-hot; expected one class for each "
                "image, whole numbers of shape (N,): several labels for an image cannot be learned"
            )
    return {part: array.argmax(1) for part, array in labels.items()}


def _from_names(
    labels: dict[str, np.ndarray], classes: tuple[str, ...] | None, where: str
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    decoded = {p: np.char.decode(a, "utf-8", "replace") if a.dtype.kind == "S" else a for p, a in labels.items()}
    names = classes or tuple(str(name) for name in np.unique(decoded["train"]))
    numbers = {name: number for number, name in enumerate(names)}
    found = {}
    for part, array in decoded.items():
        unknown = sorted(set(array.tolist()) - set(names))
        if unknown:
            among = "the names in classes" if classes else "names that train_labels have too"
            raise InputError(f"{where}: {part}_labels hold {unknown[0]!r}; expected {among}")
        found[part] = np.array([numbers[name] for name in array.tolist()], dtype=np.int64)
    return found, names


def _whole(array: np.ndarray, where: str) -> np.ndarray:
    if array.dtype.kind == "b":
        return array.astype(np.int64)
    if array.dtype.kind == "f" and (array == np.rint(array)).all() and (np.abs(array) < MOST_CLASSES).all():
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise InputError(f"{where} are {array.dtype} of shape {array.shape}; expected whole numbers of shape (N,)")
    return array
