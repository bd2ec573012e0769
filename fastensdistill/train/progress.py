"""The progress of a long job: one line that fits the terminal, or a log with the same information.

The time left is reckoned from the job's own pace, so it is there whatever a step costs. A thread draws: the line moves,
and a log says something every minute, even within a step that takes longer. Nothing here touches the device.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

HALF_LIFE = 60.0  # seconds after which what was measured counts half: a machine's load changes
EVERY = 60.0  # seconds between a log's lines, at most
BAR = 40  # columns of a bar, at most
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class Pace:
    """Seconds of a step, from those that were made: a mean in which the recent ones count more.

    The first step, which may compile or capture, counts only until there is a second.
    """

    def __init__(self, done: int = 0, clock: Callable[[], float] = time.monotonic):
        self.clock, self.done = clock, done
        self.began = self.at = clock()
        self.steps = self.seconds = 0.0
        self.marks = 0

    def mark(self, done: int) -> None:
        """``done`` steps are made."""
        if done <= self.done:
            return
        now = self.clock()
        elapsed, steps = now - self.at, done - self.done
        if self.marks == 1:
            self.steps = self.seconds = 0.0
        fade = 0.5 ** (elapsed / HALF_LIFE)
        self.steps, self.seconds = fade * self.steps + steps, fade * self.seconds + elapsed
        self.at, self.done = now, done
        self.marks += 1

    def skip(self, seconds: float) -> None:
        """So many ``seconds`` went by with something else than steps."""
        self.at += seconds

    @property
    def per_step(self) -> float | None:
        """Seconds of a step, None before the first."""
        return self.seconds / self.steps if self.steps else None

    def left(self, total: int, besides: float = 0.0) -> float | None:
        """Seconds until ``total`` steps are made and ``besides`` has passed; it goes down within a step too."""
        if self.per_step is None:
            return None
        within = min(self.clock() - self.at, self.per_step)
        return max(0.0, (total - self.done) * self.per_step - within) + besides


@dataclass
class Piece:
    """A part of the line; of those that do not fit, the least ``weight`` goes first."""

    text: str
    weight: int


class Progress:
    """``with Progress("evaluate", 3000, "images") as shown: ... shown.at(500)``.

    Args:
        title: what is going on.
        total: of what ``unit`` counts.
        quiet: show nothing.
        console: where to; unset, stderr. Where that is no terminal, a line is written every minute.
        transient: at the end the line goes away.
    """

    def __init__(self, title: str, total: int, unit: str = "step", *, done: int = 0, quiet: bool = False,
                 console: Console | None = None, transient: bool = False):  # fmt: skip
        self.title, self.total, self.unit = title, total, unit
        self.console = console or Console(stderr=True)
        self.pace = Pace(done)
        self.notes: Sequence[Piece] = ()
        self.besides: Callable[[], float] = lambda: 0.0  # seconds that what is not a step will take
        self.log_line: Callable[[], str] = self._log_line
        # FORCE_COLOR makes a terminal of any file in rich's eyes, but a log is no place for a line that moves
        moving = self.console.is_terminal and not self.console.is_dumb_terminal
        interactive = moving and not quiet and (console is not None or sys.stderr.isatty())
        self.logs = not interactive and not quiet
        self.live = Live(self, console=self.console, refresh_per_second=4, transient=transient) if interactive else None
        self.said = time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        if self.live:
            self.live.start()
        elif self.logs:
            self._thread = threading.Thread(target=self._watch, daemon=True, name="progress")
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        if self.live:
            self.live.stop()
        if self._thread:
            self._thread.join()

    def at(self, done: int) -> None:
        """``done`` units of the whole are done."""
        self.pace.mark(done)

    def advance(self, by: int) -> None:
        """``by`` more units are done."""
        self.pace.mark(self.pace.done + by)

    def log(self) -> None:
        """A line, where there is no terminal."""
        if self.logs:
            self.said = time.monotonic()
            print(self.log_line(), file=sys.stderr, flush=True)

    @property
    def time_left(self) -> float | None:
        """Seconds until the end at the present pace; None while that cannot be told."""
        return self.pace.left(self.total, self.besides())

    def _watch(self) -> None:
        while not self._ended.wait(max(0.05, self.said + EVERY - time.monotonic())):
            if time.monotonic() - self.said >= EVERY:
                self.log()

    def _log_line(self) -> str:
        said = [f"{self.unit} {self.pace.done}/{self.total}", *(note.text for note in self.notes), self.left_in_words()]
        return f"{self.title}: {', '.join(said)}"

    def left_in_words(self) -> str:
        """How long it still takes, took, or has taken so far."""
        left = self.time_left
        if self.pace.done >= self.total:
            return f"took {in_words(self.pace.clock() - self.pace.began)}"
        if left is None:
            return f"{in_words(self.pace.clock() - self.pace.began)} so far"
        return f"{in_words(left)} left"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        done, total = self.pace.done, self.total
        spinner = "|/-\\" if options.ascii_only else SPINNER
        moving = spinner[int(8 * time.monotonic()) % len(spinner)]
        pieces = [
            Piece(self.title, 3), Piece(f"{100 * done // max(total, 1):3d}%", 9), Piece(f"{done}/{total}", 6),
            *self.notes, Piece(self.left_in_words(), 8),
        ]  # fmt: skip
        width = options.max_width - 2
        while len(pieces) > 1 and len(_line(pieces)) > width:
            pieces.remove(min(pieces, key=lambda piece: piece.weight))
        room = min(BAR, width - len(_line(pieces)) - 2)
        if room >= 8:
            full = room * min(done, total) // max(total, 1)
            on, off = ("#", "-") if options.ascii_only else ("━", "╌")
            pieces.insert(1, Piece(on * full + off * (room - full), 0))
        yield Text(f"{moving} {_line(pieces)}", no_wrap=True, overflow="crop", end="")


def _line(pieces: Sequence[Piece]) -> str:
    return "  ".join(piece.text for piece in pieces)


def in_words(seconds: float) -> str:
    """Two units at most.

    >>> [in_words(s) for s in (0.4, 59, 61, 3600, 3660, 200_000)]
    ['0 s', '59 s', '1 min 1 s', '1 h', '1 h 1 min', '2 d 7 h']
    """
    whole = int(seconds)
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    first = next((i for i, (size, _) in enumerate(units) if whole >= size), 3)
    parts: list[str] = []
    for size, name in units[first : first + 2]:
        if whole // size or not parts:
            parts.append(f"{whole // size} {name}")
        whole %= size
    return " ".join(parts[:1] if first == 2 and seconds >= 600 else parts)


def rate_in_words(per_second: float) -> str:
    """Three digits, without an exponent.

    >>> [rate_in_words(r) for r in (0.0123, 8.04, 274.6, 41_234.0)]
    ['0.0123', '8.04', '275', '41234']
    """
    return f"{per_second:.0f}" if per_second >= 100 else f"{per_second:.3g}"


_current: ContextVar[Progress | None] = ContextVar("progress", default=None)


@contextmanager
def shown(progress: Progress) -> Iterator[Progress]:
    """``progress`` is shown inside, and moved by :func:`advance` from wherever the work is done."""
    with progress:
        before = _current.set(progress)
        try:
            yield progress
        finally:
            _current.reset(before)


def advance(by: int) -> None:
    """Move what is shown, if anything is."""
    progress = _current.get()
    if progress is not None:
        progress.advance(by)
