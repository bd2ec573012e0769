"""``.npz`` files: arrays named after split and content, as MedMNIST, Keras and people who name them by hand do."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastensdistill.data.arrays import read_images, read_labels
from fastensdistill.data.memory import check_memory
from fastensdistill.data.parts import Source, array_part
from fastensdistill.data.splits import WORDS, assign
from fastensdistill.errors import InputError

KINDS = {
    "images": {"images", "image", "imgs", "img", "x", "data", "inputs", "pixels", "samples"},
    "labels": {"labels", "label", "lbls", "y", "targets", "target"},
}
NAMES = ("classes", "class_names", "label_names", "target_names")
ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst"}
EXPECTED = "train_images, train_labels, test_images, test_labels"


class Key(NamedTuple):
    """What the name of an array says."""

    split: str  # the word for it, as ``val``; empty where the name has none
    kind: str  # images or labels


def read_key(name: str) -> Key | None:
    """``train_images``, ``x_train``, ``X-val``, ``trainX``, ``ytest``, ``data``; None for names of anything else."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)  # trainImages
    words = [word for word in re.split(r"[\s_./-]+", spaced.lower()) if word]
    if len(words) == 1 and words[0][0] in "xy" and words[0][1:] in WORDS:  # xtrain
        words = [words[0][0], words[0][1:]]
    splits = [word for word in words if word in WORDS]
    kinds = [kind for word in words for kind, known in KINDS.items() if word in known]
    if len(kinds) != 1 or len(splits) > 1 or len(splits) + len(kinds) != len(words):
        return None
    return Key("".join(splits), kinds[0])


def open_npz(path: Path) -> Source:
    """The parts of an ``.npz`` file, described in :func:`fastensdistill.data.load_dataset`. Nothing is unpickled."""
    arrays, names, found, notes = _read(path)
    words = {key.split for key in arrays if key.split}
    splits = assign(words, str(path)) or {"train": ""}
    if words and any(not key.split for key in arrays):
        bare = next(name for key, (name, _) in arrays.items() if not key.split)
        raise InputError(f"{path} holds {bare} beside splits; expected a split in every name, as in {EXPECTED}")
    given = {role: {key.kind: array for key, (_, array) in arrays.items() if key.split == word}
             for role, word in splits.items()}  # fmt: skip
    lacking = [f"{splits[role]}_{kind}".lstrip("_") for role in ("train", "test", "validation") if role in splits
               for kind in KINDS if kind not in given[role]]  # fmt: skip
    if not arrays or "train" not in splits:
        lacking = EXPECTED.split(", ") if not arrays else ["train_images", "train_labels"]
    if lacking:
        raise InputError(f"{path} lacks {', '.join(lacking)}; expected {EXPECTED}; found {', '.join(found)}")
    where = path.name
    images = read_images({role: content["images"] for role, content in given.items()}, where, notes)
    labels = {role: content["labels"] for role, content in given.items()}
    numbers, classes = read_labels(labels, _class_names(names, where), where, notes)
    parts = {role: array_part(images[role], numbers[role], f"{where}: {role}") for role in images}
    return Source(
        train=parts["train"], test=parts.get("test"), validation=parts.get("validation"), classes=classes, notes=notes,
        validation_name=splits.get("validation", ""),
    )  # fmt: skip


def _read(path: Path) -> tuple[dict[Key, tuple[str, np.ndarray]], list[np.ndarray], list[str], list[str]]:
    """The arrays by what their names say, those that name the classes, all names, and what is worth a note."""
    if path.suffix.lower() in ARCHIVES:
        raise InputError(f"{path} is an archive; expected the folder that it unpacks to, or an .npz file")
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise InputError(f"{path} is a single array; expected an .npz file")
        with file:
            if file.zip is not None and not any(name.endswith(".npy") for name in file.zip.namelist()):
                raise InputError(f"{path} is an archive without arrays; expected the folder that it unpacks to")
            keys = {name: read_key(name) for name in file.files}
            wanted = [name for name, key in keys.items() if key is not None]
            names = [name for name in file.files if name.lower() in NAMES]
            sizes = {} if file.zip is None else {info.filename: info.file_size for info in file.zip.infolist()}
            check_memory(sum(sizes.get(f"{name}.npy", 0) for name in wanted), f"the arrays in {path}")
            arrays: dict[Key, tuple[str, np.ndarray]] = {}
            for name in wanted:
                key = keys[name]
                assert key is not None
                if key in arrays:
                    raise InputError(f"{path} holds both {arrays[key][0]} and {name}; expected one of them")
                arrays[key] = (name, file[name])
            classes = [file[name] for name in names]
            others = [name for name in file.files if name not in wanted and name not in names]
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{path} does not fit into memory ({error})") from error
    except Exception as error:  # whatever a damaged archive makes zipfile, its decoders and NumPy raise
        # NumPy takes whatever it does not know for a pickle, and advises to load it as one
        why = " ".join(str(error).split()) if zipfile.is_zipfile(path) else "it is no archive, or not whole"
        raise InputError(f"{path} cannot be read as an .npz file without pickled objects ({why})") from error
    notes = [f"not read in {path.name}: {', '.join(others)}"] if others and arrays else []
    return arrays, classes, [*keys], notes


def _class_names(found: list[np.ndarray], where: str) -> tuple[str, ...] | None:
    if not found:
        return None
    if len(found) > 1:
        raise InputError(f"{where} names its classes {len(found)} times; expected one of {', '.join(NAMES)}")
    (classes,) = found
    if classes.ndim != 1 or classes.dtype.kind not in "US" or not len(classes):
        raise InputError(f"{where}: classes are {classes.dtype} of shape {classes.shape}; expected names (C,)")
    if classes.dtype.kind == "S":
        classes = np.char.decode(classes, "utf-8", "replace")
    return tuple(str(text) for text in classes)
