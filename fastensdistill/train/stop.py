"""SIGINT and SIGTERM end a run after the step in progress, with a checkpoint; a second one ends it at once.

Of several processes, a signal to any one ends all of them after the same step.
"""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from fastensdistill.engine import parallel

ASK_EVERY = 1.0  # seconds, about; asking costs well under a millisecond


class Interrupted(Exception):
    """A run stopped by a signal, after saving: by which, where in the run, and the folder to resume, if any."""

    def __init__(self, signum: int, where: str, folder: Path | None = None):
        super().__init__(f"stopped {where}" + (f"; resume {folder}" if folder else ""))
        self.signum, self.where = signum, where


class Stopper:
    """``with Stopper(step) as stop:``, then ask :meth:`agreed` after every step. Only the main thread can.

    ``step`` is the one that the run starts from; ``signum`` the signal that came to this process, or 0.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, step: int = 0) -> None:
        self.signum = 0
        self.previous: dict[int, Any] = {}
        self.asked_step, self.asked_at, self.next_step = step, time.perf_counter(), step

    def agreed(self, step: int, ask: bool) -> int:
        """The signal that came to any process, or 0; every process is told the same at the same ``step``.

        Several processes ask one another where ``ask`` is set, and about once a second: the slowest one's pace since
        the last time says at which step.
        """
        if parallel.processes() == 1:
            return self.signum
        if not ask and step < self.next_step:
            return 0
        told = parallel.exchange((self.signum, time.perf_counter() - self.asked_at))
        steps, seconds = step - self.asked_step, max(seconds for _, seconds in told)
        self.next_step = step + max(1, int(steps * ASK_EVERY / max(seconds, 1e-9)))
        self.asked_step, self.asked_at = step, time.perf_counter()
        return next((signum for signum, _ in told if signum), 0)

    def __enter__(self) -> Stopper:
        if threading.current_thread() is threading.main_thread():
            self.previous = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for s, handler in self.previous.items():
            signal.signal(s, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            raise KeyboardInterrupt
        self.signum = signum
