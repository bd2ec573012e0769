"""Files that are always whole."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fastensdistill.errors import InputError

UNFINISHED = ".*.tmp"  # what a write that was killed leaves behind


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write ``data`` beside ``path``, flush it to the disk and rename it into place: ``path`` is the old or the new.

    Raises InputError where it cannot be written; what was there stays.
    """
    path = Path(path)
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
