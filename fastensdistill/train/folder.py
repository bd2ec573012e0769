"""A run's folder: locked by one run at a time before anything in it changes, and removed again if unused.

The lock is ``flock``'s on ``.lock`` in the folder, so the kernel releases it however the process ends. Where the file
system has no such locks, or the platform (Windows), runs go on without.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path
from typing import Any

from fastensdistill.errors import InputError
from fastensdistill.files import UNFINISHED, write_atomically
from fastensdistill.settings_file import to_yaml
from fastensdistill.train.checkpoint import CHECKPOINT, finished
from fastensdistill.train.record import METRICS

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK, CONFIG, EVENTS = ".lock", "config.yaml", "tensorboard"
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


class RunFolder:
    """``path`` for the time of one run; None, for a run without files, is held by anyone.

    Call :meth:`claim` or :meth:`go_on` first, and :meth:`release` whatever happened then.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.made = False  # the folder itself
        self.fresh = False  # what is in it is of this run alone
        self._lock: int | None = None

    def claim(self, config: Any, resume: bool) -> bool:
        """Make the folder this run's; whether there is a checkpoint to continue from.

        A run killed before its first checkpoint is resumed from its first step. Raises InputError where another run
        holds the folder, and where it has something else in it, another run, or nothing to resume; it then is as it
        was.
        """
        path = self.path
        if path is None:
            return False
        if resume and not (path / CONFIG).is_file():
            raise InputError(f"nothing to resume in {path}: no {CONFIG} there")
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file: expected a folder for the run")
        hint = ", or --resume the run in it" if (path / CONFIG).is_file() else ""
        occupied = InputError(f"{path} exists and is not empty: choose another --out{hint}")
        if not resume and path.exists() and _contents(path):
            # Not even a lock is left in a folder of someone else's
            raise self._in_use() if self._held_elsewhere() else occupied
        self._hold()
        if not resume and _contents(path):  # it came while we were waiting
            raise occupied
        for file in path.glob(UNFINISHED):
            file.unlink(missing_ok=True)
        if resume and (path / CHECKPOINT).is_file():
            return True
        self.fresh = not resume
        write_atomically(path / CONFIG, to_yaml(config).encode())  # it starts anew, with these settings
        return False

    def go_on(self, step: int) -> None:
        """Hold the folder again for a run that stopped after ``step`` and is still in memory.

        Raises InputError where the folder is in use, or its checkpoint is not of that step any more.
        """
        if self.path is None:
            return
        self._hold()
        _, found, _ = finished(self.path)
        if found != step:
            there = f"a checkpoint of step {found}" if found else "no checkpoint"
            raise InputError(f"this run stopped after step {step}, but {self.path} holds {there}: make a new trainer, "
                             "with resume=True")  # fmt: skip

    def release(self, unused: bool = False) -> None:
        """Let others have the folder. ``unused``: not a step was made, so a claim is taken back, and what it wrote."""
        if self.path is None or (self._lock is None and not self.fresh and not self.made):
            return
        with contextlib.suppress(OSError):
            if unused and self.fresh:
                for name in (CONFIG, METRICS):
                    (self.path / name).unlink(missing_ok=True)
                for file in (self.path / EVENTS).glob("events.out.tfevents.*"):
                    file.unlink()
                if (self.path / EVENTS).is_dir():
                    (self.path / EVENTS).rmdir()
        with contextlib.suppress(OSError):
            (self.path / LOCK).unlink(missing_ok=True)  # while it is held: whoever opened it looks again
        with contextlib.suppress(OSError):
            if self.made and not _contents(self.path):
                self.path.rmdir()
        if self._lock is not None:
            os.close(self._lock)
        self._lock, self.fresh, self.made = None, False, False

    def _hold(self) -> None:
        assert self.path is not None
        try:
            existed = self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self.made = not existed
            if fcntl is None:
                return
            while self._lock is None:
                descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
                if _taken(descriptor):
                    os.close(descriptor)
                    self.made = False
                    raise self._in_use()
                if _still_there(descriptor, self.path / LOCK):
                    self._lock = descriptor
                else:  # whoever had it has just removed it
                    os.close(descriptor)
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except OSError as error:
            raise InputError(f"cannot use {self.path} as a run's folder: {error.strerror or error}") from error

    def _held_elsewhere(self) -> bool:
        assert self.path is not None
        if fcntl is None or not (self.path / LOCK).is_file():
            return False
        try:
            descriptor = os.open(self.path / LOCK, os.O_RDWR)
        except OSError:
            return False
        try:
            return _taken(descriptor)
        finally:
            os.close(descriptor)

    def _in_use(self) -> InputError:
        assert self.path is not None
        by = "another run"
        with contextlib.suppress(OSError, UnicodeDecodeError):
            by = (self.path / LOCK).read_text().strip()[:200] or by
        return InputError(f"{self.path} is in use by {by}: choose another --out, or wait until it has ended")


def _contents(folder: Path) -> list[Path]:
    """What is in a folder besides what runs leave that never came to a step."""
    leftovers = {folder / LOCK, *folder.glob(UNFINISHED)}
    return [path for path in folder.iterdir() if path not in leftovers]


def _taken(descriptor: int) -> bool:
    """Whether somebody else has the lock; otherwise it is ours, if the file system knows such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in UNSUPPORTED
    return False


def _still_there(descriptor: int, path: Path) -> bool:
    """Whether ``path`` is still the file that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
