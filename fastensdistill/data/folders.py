"""Folders of images: splits under any of their common names, Tiny-ImageNet, or class folders without splits."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from fastensdistill.data.images import COLOUR, read_image, read_mode, read_size
from fastensdistill.data.listing import Seen, check_links, entries, folders, has_images, images_in, own_images, readable
from fastensdistill.data.parts import Part, Source
from fastensdistill.data.splits import assign, split_words
from fastensdistill.data.tiny import annotated, class_words
from fastensdistill.errors import InputError

# Per channel, of pixels in [0, 1]: the constants of the experiments in Nam et al., ICML 2022.
TINY_IMAGENET = ((0.4802, 0.4481, 0.3976), (0.2770, 0.2691, 0.2822))

PICTURES = {"images", "image", "imgs", "img", "jpegimages"}
SETS = PICTURES | {"data", "dataset"}
ANSWERS = {"labels", "label", "annotations", "annotation", "masks", "mask", "bboxes", "segmentation"}

COMMON = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".webp")
TRANSPARENT = "transparent pixels are read as they are seen on white"

Files = list[tuple[str, int]]  # an image file and its label
Item = TypeVar("Item")
Result = TypeVar("Result")


def open_folder(folder: Path, image_size: int | None) -> Source:
    """The parts of a folder of images, described in :func:`fastensdistill.data.load_dataset`.

    Classes and files are in the order of their names. Colour images are read as RGB; a folder of grey images only has
    one channel. Raises ``InputError`` for a layout that is none of these, and, on reading, for images of 16 or 32 bits,
    of differing sizes without ``image_size``, or that cannot be decoded.
    """
    notes: list[str] = []
    root = unpacked(str(folder), notes=notes)
    check_links(root)
    inside = folders(root)
    splits = find_splits(root, inside)
    seen = Seen()
    files: dict[str, Files] = {}
    if splits:
        others = [name for name in inside if name not in splits.values() and has_images(inside[name])]
        notes += [f"left out, as they are no splits: {', '.join(others)}"] if others else []
    train = unpacked(inside[splits["train"]]) if splits else root
    classes = class_folders(train, root)
    names = list(classes)
    files["train"] = list_classes(classes, seen)
    note_stray(train, root, notes)
    for role in ("validation", "test"):
        if role in splits:
            where = unpacked(inside[splits[role]], names)
            files[role] = list_split(where, names, role, root, seen, notes)
    notes += seen.note()

    paths = [path for part in files.values() for path, _ in part]
    shape = common_shape(paths, image_size)
    photographs = all(re.fullmatch(r"n\d{3,8}", name) for name in names)  # WordNet's numbers: ImageNet and its parts
    tiny = photographs and len(names) == 200 and shape == (64, 64, 3)
    parts = {role: folder_part(part, shape, image_size, notes) for role, part in files.items() if part}
    return Source(
        train=parts["train"], test=parts.get("test"), validation=parts.get("validation"), notes=notes,
        classes=tuple(class_words(Path(root), names)), statistics=TINY_IMAGENET if tiny else None, mirrors=photographs,
        validation_name=f"{splits['validation']}/" if "validation" in splits else "",
    )  # fmt: skip


def unpacked(folder: str, known: Collection[str] = (), notes: list[str] | None = None) -> str:
    """The folder in which the splits or classes lie: archives unpack to folders in folders, ``set/set/train``, and
    images may have a folder of their own beside documents. Folders with ``known`` names, the classes, are not entered.
    ``notes`` gets what lies beside and holds images too.
    """
    for _ in range(4):
        if own_images(folder):
            break
        filled = {name: path for name, path in folders(folder).items() if has_images(path)}
        chosen = filled if len(filled) == 1 or known else {n: p for n, p in filled.items() if _is_set(n, p)}
        if len(chosen) != 1:
            break
        ((name, inner),) = chosen.items()
        role = split_words(name)[0]
        again = role is not None and role == split_words(os.path.basename(folder))[0]  # seg_train/seg_train
        if name in known or own_images(inner) or (role is not None and not again):
            break
        folder = inner
        if notes is not None and len(filled) > 1:
            notes.append(f"left out, as they lie beside {name}/: {', '.join(n for n in filled if n != name)}")
    return folder


def _is_set(name: str, folder: str) -> bool:
    """Whether a folder beside others is the data set itself: it has splits, or is called ``images`` and has classes."""
    inside = [inner for inner, path in folders(folder).items() if has_images(path)]
    if own_images(folder) or split_words(name)[0] is not None:
        return False
    return "train" in (split_words(inner)[0] for inner in inside) or (name.lower() in SETS and len(inside) > 1)


def find_splits(root: str, inside: dict[str, str]) -> dict[str, str]:
    """The name of the folder of each split among those ``inside`` the ``root``; {} where these are classes.

    Raises ``InputError`` where splits hold images without class folders, or there are splits and none to train on.
    """
    filled = {name: path for name, path in inside.items() if has_images(path)}
    words = [split_words(name)[0] for name in filled]
    if "train" not in words:
        if words and all(words):
            raise InputError(f"{readable(root)} has {', '.join(filled)} but no train; expected train/ beside it")
        return {}
    splits = assign(filled, readable(root))
    if "train" not in splits:
        return {}
    train = unpacked(filled[splits["train"]])
    if any(has_images(path) for path in folders(train).values()):
        return splits
    if len(splits) == 1 and len(filled) > 1:
        return {}  # a class of trains, say, beside cars and ships
    raise flat(train, root)


def flat(folder: str, root: str) -> InputError:
    """The error for images that lie in a split itself, whose classes a table may say."""
    tables = sorted(e.name for at in (root, folder) for e in entries(at) if e.name.endswith((".csv", ".json", ".tsv")))
    why = f"; tables such as {readable(tables[0])} are not read" if tables else ""
    return InputError(
        f"{readable(folder)} holds images but no class folders; expected one folder of images for each class{why}"
    )


def class_folders(folder: str, root: str) -> dict[str, str]:
    """The class folders in ``folder``: their paths by their names, in order.

    Raises ``InputError`` where there is none, and for the layouts of detection and segmentation.
    """
    check_links(folder)
    found = folders(folder)
    answers = [name for name in found if name.lower() in ANSWERS]
    pictures = [name for name in found if name.lower() in PICTURES]
    if answers and len(answers) + len(pictures) == len(found):
        raise InputError(
            f"{readable(folder)} has {', '.join(found)}, the layout of detection or segmentation; "
            "expected one folder of images for each class"
        )
    for name in answers:
        if not has_images(found[name]):
            del found[name]
    if not found and own_images(folder):
        raise flat(folder, root)
    if not found:
        cifar = {"data_batch_1", "batches.meta", "meta"} & {entry.name for entry in entries(folder)}
        hint = "; CIFAR's own files are read as cifar10 or cifar100, with the folder above as root" if cifar else ""
        raise InputError(f"{readable(folder)} holds no folders; expected one folder of images for each class{hint}")
    inner = [{name for name, path in folders(at).items() if has_images(path)} for at in found.values()]
    shared = sorted(set.intersection(*inner)) if len(inner) > 1 else []
    if len(shared) > 1:  # classes inside something else, or splits inside classes
        raise InputError(
            f"{readable(folder)} has the folders {', '.join(shared[:3])} in each of {', '.join([*found][:3])}; "
            "expected folders of classes, or train/ and test/ with folders of classes"
        )
    return found


def list_classes(found: dict[str, str], seen: Seen) -> Files:
    """The images of every class, at any depth. Raises ``InputError`` for a class without any."""
    files: Files = []
    for label, path in enumerate(found.values()):
        images = images_in(path, seen)
        if not images:
            raise InputError(f"{readable(path)} holds no images; expected files ending in {', '.join(COMMON)}, ...")
        files += [(image, label) for image in images]
    return files


def list_split(folder: str, names: Sequence[str], role: str, root: str, seen: Seen, notes: list[str]) -> Files:
    """The images of a split beside ``train``, whose classes are ``names``; none where a test split has no labels.

    A class may be without images here. Raises ``InputError`` for classes that training has not.
    """
    listed = annotated(Path(folder), names)
    if listed:
        return listed
    found = {name: path for name, path in folders(folder).items() if has_images(path)}
    others = [name for name in found if name not in names]
    stray = own_images(folder)
    if role == "test" and len(others) == len(found) and (len(others) == 1 or (stray and not others)):
        notes.append(f"{readable(os.path.relpath(folder, root))}/ has no labels and is not read")
        return []
    if others:
        raise InputError(
            f"{readable(folder)} has the class folder {others[0]!r}; expected only classes that train/ has too"
        )
    if not found:
        raise flat(folder, root)
    note_stray(folder, root, notes)
    numbers = {name: label for label, name in enumerate(names)}
    return [(image, numbers[name]) for name, path in found.items() for image in images_in(path, seen)]


def note_stray(folder: str, root: str, notes: list[str]) -> None:
    """Note images that lie beside the class folders."""
    stray = own_images(folder)
    if stray:
        where = readable(os.path.relpath(folder, root)) if folder != root else "the folder itself"
        notes.append(f"left out, as they are in no class folder: {len(stray)} images in {where}")


def folder_part(files: Files, shape: tuple[int, int, int], image_size: int | None, notes: list[str]) -> Part:
    """A part whose images are decoded by a pool of threads (Pillow's decoders release the interpreter lock)."""

    def read(index: np.ndarray) -> np.ndarray:
        images = np.empty((len(index), *shape), dtype=np.uint8)

        def decode(place: int) -> bool:
            images[place], transparent = read_image(files[int(index[place])][0], shape, image_size)
            return transparent

        if any(list(in_threads(decode, range(len(index))))) and TRANSPARENT not in notes:
            notes.append(TRANSPARENT)
        return images

    labels = np.array([label for _, label in files], dtype=np.int64)
    return Part(labels, read, image_bytes=int(np.prod(shape)))


def common_shape(files: Sequence[str], image_size: int | None) -> tuple[int, int, int]:
    """``(H, W, C)`` of the images: the first one's size, or ``image_size``; one channel if no image has colour."""
    H, W = (image_size, image_size) if image_size is not None else read_size(files[0])
    colour = any(mode in COLOUR for mode in in_threads(read_mode, files))
    return H, W, 3 if colour else 1


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """The results in order, computed piece by piece, so that an early end does not wait for a hundred thousand."""
    piece = 256
    with ThreadPoolExecutor(max_workers=min(32, os.cpu_count() or 1)) as pool:
        for start in range(0, len(items), piece):
            yield from pool.map(function, items[start : start + piece])
