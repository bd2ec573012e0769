"""Tiny-ImageNet's own files: the classes of the images in ``val``, and the names of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastensdistill.errors import InputError


def annotated(folder: Path, names: Sequence[str]) -> list[tuple[str, int]]:
    """Files and labels that ``val_annotations.txt`` lists: file name, class and a box, separated by tabs.

    The files are in ``images``, or beside it. Empty where there is no such file, or its images were put into class
    folders.
    """
    annotations = folder / "val_annotations.txt"
    if not annotations.is_file():
        return []
    images = folder / "images" if (folder / "images").is_dir() else folder
    numbers = {name: label for label, name in enumerate(names)}
    files: list[tuple[str, int]] = []
    for number, line in enumerate(read_lines(annotations), start=1):
        name, wnid = [*line.split("\t"), ""][:2]
        path = images / Path(name).name
        if number == 1 and not path.is_file():
            return []
        if wnid not in numbers:
            raise InputError(f"{annotations}, line {number}, has the class {wnid!r}; expected one of train/'s folders")
        files.append((str(path), numbers[wnid]))
    return files


def class_words(folder: Path, names: Sequence[str]) -> list[str]:
    """The classes' names: the first word of ``words.txt`` (wnid, tab, words), or the folder's name where it has none.

    Two classes of one word have their folder's name behind it.
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
        raise InputError(f"{path} cannot be read as UTF-8 text ({' '.join(str(error).split())})") from error
