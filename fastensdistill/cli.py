"""The command line: ``fastensdistill demo | teach | distill | evaluate | export | plan | doctor``.

Settings come from the dataclasses of :mod:`fastensdistill.config`; ``--config FILE`` reads some from YAML, and flags
override it. Whatever goes wrong ends in one line and exit code 2. ``teach`` and ``distill`` also run under
``torchrun -m fastensdistill``; the first process alone reports.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import Any

import fastensdistill
from fastensdistill.commands import COMMANDS, TRAINING
from fastensdistill.config import OF_PRESETS, RunConfig
from fastensdistill.engine import parallel
from fastensdistill.errors import InputError, one_line, unknown
from fastensdistill.flags import OTHER_DASHES, help_page, read_flags
from fastensdistill.settings import about, settings_of
from fastensdistill.settings_file import read_settings
from fastensdistill.train.stop import Interrupted

TRACEBACK = "FASTENSDISTILL_TRACEBACK"  # set: errors print where they come from, too


def parse(name: str, argv: Sequence[str]) -> Any:
    """The settings of a command: its defaults, then those of the run that is resumed, ``--config``, and flags.

    Raises InputError for any that does not fit.
    """
    cls, _ = COMMANDS[name]
    known = settings_of(cls)
    given = flags = read_flags(name, cls, argv)
    file = given.pop("config", None)
    if file is not None:
        read = read_settings(file, known)
        if "augment" in flags and all(read.get(name) is not None for name in OF_PRESETS):
            raise InputError(f"--augment {flags['augment']} changes nothing, as {file} sets {', '.join(OF_PRESETS)}: "
                             "expected flags for these, or a file without them")  # fmt: skip
        given = read | given
    if issubclass(cls, RunConfig) and given.get("resume"):
        saved = given.get("out", known["out"].default) / "config.yaml"
        if saved.is_file():
            given = read_settings(saved, known) | given
            file = file or saved
    if "seed" in flags and given.get("seeds"):
        raise InputError("--seed and --seeds: expected one of the two")
    try:
        return cls(**given)
    except InputError as error:  # settings that do not fit each other
        raise InputError(f"{file}: {error}") if file else error from None


def usage() -> str:
    """The page that ``--help`` prints: every command in a line, as wide as the terminal."""
    width = min(shutil.get_terminal_size().columns, 120)
    lines = ["usage: fastensdistill COMMAND [--config FILE] [--FLAG VALUE ...]", ""]
    for name, (cls, _) in COMMANDS.items():
        lines += textwrap.wrap(f"  {name:9} {about(cls)}", max(width, 40), subsequent_indent=" " * 12)
    return "\n".join([*lines, "", "fastensdistill COMMAND --help lists the flags of a command."])


def run(argv: Sequence[str]) -> int:
    """Run a command line and return its exit code; errors are raised, ``main`` says them."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    name, *rest = argv
    if name == "--version":
        print(fastensdistill.__version__)
        return 0
    if name not in COMMANDS:
        if name[:1] in "-" + OTHER_DASHES:
            raise InputError(f"{name!r} before a command: expected one of {', '.join(COMMANDS)} first")
        raise unknown("command", name, COMMANDS)
    flags = rest[: rest.index("--")] if "--" in rest else rest
    if "-h" in flags or "--help" in flags:
        print(help_page(name, COMMANDS[name][0]))
        return 0
    if parallel.launched() > 1 and name not in TRAINING:
        raise InputError(f"{name} in {parallel.launched()} processes: expected one; teach and distill can share")
    parallel.join()
    with parallel.together():
        COMMANDS[name][1](parse(name, rest))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for what cannot be done, 128 + n after signal n."""
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except Interrupted as stop:
        if parallel.rank() == 0:
            print(stop, file=sys.stderr)
        return 128 + stop.signum
    except BrokenPipeError:  # a reader that has seen enough, as in ``plan | head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing fails again at the exit
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        if not parallel.raised_elsewhere(error):
            if os.environ.get(TRACEBACK):
                traceback.print_exc()
            print(f"error: {one_line(described(error))}", file=sys.stderr)
        return 2


def described(error: Exception) -> str:
    """What went wrong, for the user: of his input and his machine in their terms, of our own faults where to look."""
    if isinstance(error, InputError):
        return str(error)
    said = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in said:
        return f"not enough memory: {said.split('. GPU ')[0]}; expected less at a time, as by a smaller --batch-size"
    if isinstance(error, OSError):
        return f"{error.strerror or said}: {error.filename or 'input or output'}"
    if isinstance(error, UnicodeError):
        return f"text in another encoding: {said}"
    return f"internal error: {type(error).__name__}: {said} ({TRACEBACK}=1 shows where; please report it)"


if __name__ == "__main__":
    sys.exit(main())
