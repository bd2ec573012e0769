"""List the class folders and images in a folder; links are followed, hidden entries left out."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from fastensdistill.data.images import BESIDE, FOREIGN, is_image, suffixes
from fastensdistill.errors import InputError

LEFTOVERS = {"__macosx", "__pycache__", "lost+found", "@eadir", "$recycle.bin", "system volume information"}


@dataclass
class Seen:
    """What was left out while listing, for a note."""

    files: Counter[str] = field(default_factory=Counter)  # by suffix

    def note(self) -> list[str]:
        """A line about the files that were left out; none where there were none."""
        if not self.files:
            return []
        kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(self.files.items()))
        return [f"files left out, which are no images: {kinds}"]


def readable(name: str) -> str:
    """A file's name that every terminal, file and report takes: bytes that are no UTF-8 and control characters are
    replaced, and what looks the same is the same (NFC)."""
    text = unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "replace"))
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What is in a folder, by name, without hidden entries and what systems leave behind."""
    try:
        with os.scandir(folder) as found:
            kept = [e for e in found if not e.name.startswith(".") and e.name.lower() not in LEFTOVERS]
    except OSError as error:
        raise InputError(f"{folder} cannot be listed: {error.strerror}") from error
    return sorted(kept, key=lambda entry: entry.name)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one; a link that leads to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def folders(folder: str | Path) -> dict[str, str]:
    """The folders in a folder, links among them: their paths by readable names, in the order of names.

    Raises ``InputError`` for two of one readable name.
    """
    found: dict[str, str] = {}
    for entry in entries(folder):
        if is_folder(entry):
            name = readable(entry.name)
            if name in found:
                raise InputError(f"{readable(str(folder))} has two folders that read {name!r}; expected other names")
            found[name] = entry.path
    return found


def check_links(folder: str) -> None:
    """Raise ``InputError`` for a link in a folder whose class or split is not there any more."""
    for entry in entries(folder):
        if not os.path.exists(entry.path) and not os.path.splitext(entry.name)[1]:
            raise InputError(f"{readable(entry.path)} is a link to what is not there; expected it mended, or removed")


def images_in(folder: str, seen: Seen | None = None) -> list[str]:
    """The images in a folder, at any depth, sorted by path. ``seen`` counts the other files.

    A file whose suffix is unknown is an image if Pillow opens it. A folder that links lead to again is read once, and
    one that ``folder`` lies in is not entered: it holds other classes.
    Raises ``InputError`` for an image that only other programs read (.heic, .dng, ...).
    """
    found: list[str] = []
    above = (parent.stat() for parent in (*Path(folder).absolute().parents, *Path(folder).resolve().parents))
    _walk(folder, found, {(status.st_dev, status.st_ino) for status in above}, seen)
    return sorted(found)


def _walk(folder: str, found: list[str], visited: set[tuple[int, int]], seen: Seen | None) -> None:
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in visited:
        return
    visited.add((status.st_dev, status.st_ino))
    for entry in entries(folder):
        if is_folder(entry):
            _walk(entry.path, found, visited, seen)
        elif _image(entry, seen):
            found.append(entry.path)


def has_images(folder: str, depth: int = 8) -> bool:
    """Whether there is an image in a folder, or ``depth`` folders below; it stops at the first."""
    content = entries(folder)
    if any(not is_folder(entry) and _image(entry, None) for entry in content):
        return True
    return depth > 0 and any(has_images(entry.path, depth - 1) for entry in content if is_folder(entry))


def own_images(folder: str | Path) -> list[str]:
    """The images that lie in a folder itself."""
    return [entry.path for entry in entries(folder) if not is_folder(entry) and _image(entry, None)]


def _image(entry: os.DirEntry[str], seen: Seen | None) -> bool:
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix in suffixes():
        return True
    if suffix in BESIDE or entry.name == "Thumbs.db":
        return False
    if os.path.isfile(entry.path) and is_image(entry.path):  # to open a pipe is to wait for its other end
        return True
    if suffix in FOREIGN:
        raise InputError(f"{entry.path} is an image that Pillow does not read; expected it converted, or moved away")
    if seen is not None:
        seen.files[suffix] += 1
    return False
