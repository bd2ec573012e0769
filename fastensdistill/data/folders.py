"""Folders of images: train and test folders of class folders, Tiny-ImageNet's layout, or only class folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastensdistill.data.parts import Part, Source
from fastensdistill.errors import InputError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
TEST_SHARE = 0.2  # of every class, where the folder has no test split of its own

# Per channel, of pixels in [0, 1]: the constants of the experiments in Nam et al., ICML 2022.
TINY_IMAGENET = ((0.4802, 0.4481, 0.3976), (0.2770, 0.2691, 0.2822))

GREY, COLOUR = {"1", "L", "LA"}, {"RGB", "RGBA", "P", "PA", "CMYK", "YCbCr"}
UNREADABLE = (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError)

Files = list[tuple[Path, int]]  # an image file and its label


def open_folder(folder: Path, seed: int, image_size: int | None) -> Source:
    """The parts of a folder of images, described in :func:`fastensdistill.data.load_dataset`.

    Files are listed in the order of their names. Colour images are read as RGB; a folder of grey images only has one
    channel. Raises ``InputError`` for a layout that is none of the three, and, on reading, for images of 16 or 32 bits,
    of differing sizes without ``image_size``, or that cannot be decoded.
    """
    held_out: Files | None = None
    tiny = (folder / "val" / "val_annotations.txt").is_file() and (folder / "train").is_dir()
    if tiny:
        names = class_names(folder / "train")
        train = list_classes(folder / "train", names)
        test = list_annotated(folder / "val", names)
        classes = tiny_words(folder, names)
    elif (folder / "train").is_dir():
        names = classes = class_names(folder / "train")
        train = list_classes(folder / "train", names)
        given = [name for name in ("test", "val") if (folder / name).is_dir()]
        if not given:
            raise InputError(f"{folder} has train/ but neither test/ nor val/; expected one of them, of class folders")
        test = list_classes(folder / given[0], names, optional=True)
        if len(given) == 2:
            held_out = list_classes(folder / "val", names, optional=True)
    else:
        names = classes = class_names(folder)
        train, test = split_stratified(list_classes(folder, names), names, seed)

    files = [path for path, _ in train + test + (held_out or [])]
    if not files:
        raise InputError(f"{folder} holds no images in its class folders; expected {', '.join(sorted(SUFFIXES))}")
    shape = common_shape(files, image_size)
    known = tiny and len(names) == 200 and shape == (64, 64, 3)
    return Source(
        train=folder_part(train, shape, image_size),
        test=folder_part(test, shape, image_size),
        validation=None if held_out is None else folder_part(held_out, shape, image_size),
        classes=tuple(classes),
        statistics=TINY_IMAGENET if known else None,
    )


def class_names(folder: Path) -> list[str]:
    """The class folders in ``folder``, sorted; hidden ones are left out."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(f"{folder} holds no folders; expected one folder of images for each class")
    return names


def list_classes(folder: Path, names: Sequence[str], optional: bool = False) -> Files:
    """The images of every class, at any depth. Only with ``optional`` may a class have none."""
    others = sorted(set(class_names(folder)) - set(names))
    if others:
        raise InputError(f"{folder} has the class folder {others[0]!r}; expected only classes that train/ has too")
    files: Files = []
    for label, name in enumerate(names):
        found = sorted(
            Path(at, file)
            for at, _, entries in os.walk(folder / name)
            for file in entries
            if Path(file).suffix.lower() in SUFFIXES and not file.startswith(".")
        )
        if not found and not optional:
            raise InputError(f"{folder / name} holds no images; expected files ending in {', '.join(sorted(SUFFIXES))}")
        files += [(path, label) for path in found]
    return files


def list_annotated(folder: Path, names: Sequence[str]) -> Files:
    """Tiny-ImageNet's ``val``: a line of ``val_annotations.txt`` is file name, class and a box, separated by tabs."""
    annotations = folder / "val_annotations.txt"
    numbers = {name: label for label, name in enumerate(names)}
    files: Files = []
    for number, line in enumerate(read_lines(annotations), start=1):
        name, wnid = [*line.split("\t"), ""][:2]
        if wnid not in numbers:
            raise InputError(f"{annotations}, line {number}, has the class {wnid!r}; expected one of train/'s folders")
        files.append((folder / "images" / Path(name).name, numbers[wnid]))
    return files


def tiny_words(folder: Path, names: Sequence[str]) -> list[str]:
    """Tiny-ImageNet's class names: the first word of ``words.txt`` (wnid, tab, words), or the wnid where it is absent.

    Two classes of one word have their wnid behind it.
    """
    words = dict(zip(names, names, strict=True))
    if (folder / "words.txt").is_file():
        pairs = (line.partition("\t") for line in read_lines(folder / "words.txt"))
        words |= {wnid: text.split(",")[0].strip() for wnid, _, text in pairs if wnid in words and text.strip()}
    counted = list(words.values())
    return [word if counted.count(word) == 1 else f"{word} ({wnid})" for wnid, word in words.items()]


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({reason(error)})") from error


def split_stratified(files: Files, names: Sequence[str], seed: int) -> tuple[Files, Files]:
    """Train and test: of every class, a random fifth (rounded, at least one image) is for testing."""
    generator = np.random.default_rng(seed)
    labels = np.array([label for _, label in files])
    chosen = np.zeros(len(files), dtype=bool)
    for label, name in enumerate(names):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise InputError(f"class folder {name!r} holds 1 image; expected at least 2, to train and to test")
        chosen[generator.permutation(members)[: max(1, round(TEST_SHARE * len(members)))]] = True
    train = [entry for entry, test in zip(files, chosen, strict=True) if not test]
    return train, [entry for entry, test in zip(files, chosen, strict=True) if test]


def folder_part(files: Files, shape: tuple[int, int, int], image_size: int | None) -> Part:
    """A part whose images are decoded by a pool of threads (Pillow's decoders release the interpreter lock)."""

    def read(index: np.ndarray) -> np.ndarray:
        images = np.empty((len(index), *shape), dtype=np.uint8)

        def decode(place: int) -> None:
            images[place] = read_image(files[int(index[place])][0], shape, image_size)

        with ThreadPoolExecutor(max_workers=min(32, os.cpu_count() or 1)) as pool:
            chunk = 256  # so that an early error does not wait for a hundred thousand other files
            for start in range(0, len(index), chunk):
                list(pool.map(decode, range(start, min(start + chunk, len(index)))))
        return images

    return Part(np.array([label for _, label in files], dtype=np.int64), read)


def common_shape(files: Sequence[Path], image_size: int | None) -> tuple[int, int, int]:
    """``(H, W, C)`` of the images: the first one's size, or ``image_size``; one channel if no image has colour."""
    width, height = read_header(files[0])[0]
    H, W = (image_size, image_size) if image_size is not None else (height, width)
    colour = any(read_header(path)[1] in COLOUR for path in files)
    return H, W, 3 if colour else 1


def read_header(path: Path) -> tuple[tuple[int, int], str]:
    """Width and height, and Pillow's mode, without decoding the pixels."""
    try:
        with Image.open(path) as image:
            return image.size, image.mode
    except UNREADABLE as error:
        raise InputError(f"{path} is not a readable image ({reason(error)})") from error


def read_image(path: Path, shape: tuple[int, int, int], image_size: int | None) -> np.ndarray:
    """One image as uint8 ``shape``."""
    H, W, C = shape
    try:
        with Image.open(path) as opened:
            if opened.mode not in GREY | COLOUR:
                raise InputError(f"{path} has pixels of mode {opened.mode!r}; expected 8-bit grey or colour")
            image = opened.convert("RGB" if C == 3 else "L")
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"{path} is not a readable image ({reason(error)})") from error
    width, height = image.size
    if image_size is not None and (height, width) != (H, W):
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        # cropped before, because resize's own box lets the filter reach across the square's edge
        square = image.crop((left, top, left + side, top + side))
        image = square.resize((W, H), Image.Resampling.BICUBIC)
    elif (height, width) != (H, W):
        raise InputError(
            f"{path} is {height}x{width} pixels, another image is {H}x{W}; "
            "expected one size, or the option image_size to resize all to"
        )
    return np.asarray(image).reshape(shape)


def reason(error: Exception) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
