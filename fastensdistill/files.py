"""Atomic file writes, and paths as users write them (``~``)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fastensdistill.errors import InputError

UNFINISHED = ".*.tmp"  # what a write that was killed leaves behind


def expanded(path: str | Path) -> Path:
    """``path`` with ``~`` and ``~user`` standing for the home folder, wherever it was written.

    A shell expands neither in ``--out=~/run`` nor in a file of settings. Raises InputError for what is no path.
    """
    try:
        if not os.fspath(path) or "\0" in os.fspath(path):
            raise InputError(f"{path!r}: expected a path")
        return Path(path).expanduser()
    except TypeError as error:
        raise InputError(f"a {type(path).__name__}: expected a path") from error
    except RuntimeError as error:
        raise InputError(f"{str(path)!r}: there is no home folder of that name") from error


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write ``data`` beside ``path``, flush it to the disk and rename it into place: ``path`` is the old or the new.

    Raises InputError where it cannot be written; what was there stays.
    """
    path = expanded(path)
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"cannot write {path}: {error.strerror or error} ({len(data):,} bytes)") from error
        raise
