"""The results file: JSON lines, one record a line, each on disk before the next thing is done.

Many processes append to one file. A record is one write of one line, so an interrupted file is whole but for its last
line, which :func:`read` leaves out. Every record has ``stage``, ``kind`` and ``at``, seconds since the epoch.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def plain(value: Any) -> Any:
    """``value`` as JSON has it: a number that is not finite as a word, anything unknown as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


class Record:
    """Appends the records of one stage to ``path``; ``shared`` is part of each of them."""

    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage
        self.shared: Row = {}

    def add(self, kind: str, **values: Any) -> Row:
        """Append one record; it is on disk when this returns."""
        row = {"stage": self.stage, "kind": kind, "at": round(time.time(), 3)} | plain(self.shared | values)
        line = json.dumps(row, ensure_ascii=False) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return row

    def earlier(self) -> list[Row]:
        """What this stage has recorded so far, in this process and in those before it."""
        return [row for row in read(self.path) if row["stage"] == self.stage]


def read(path: Path) -> list[Row]:
    """All whole records of a file; none where there is no file."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:  # the line that was being written when the process ended
            continue
    return rows
