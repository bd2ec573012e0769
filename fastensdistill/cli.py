"""The command line: ``fastensdistill demo | teach | distill | evaluate | export | plan | doctor``.

Settings come from the dataclasses of :mod:`fastensdistill.config`; ``--config FILE`` reads some from YAML, and flags
override it. Bad input prints one line and exits with code 2. ``teach`` and ``distill`` also run under
``torchrun -m fastensdistill``; the first process alone reports.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import tyro

from fastensdistill.commands import COMMANDS, TRAINING
from fastensdistill.config import RunConfig, read_yaml
from fastensdistill.errors import InputError, unknown


def parse(name: str, argv: Sequence[str]) -> Any:
    """The settings of a command: its defaults, then ``--config`` (or the run that is resumed), then flags."""
    cls, _ = COMMANDS[name]
    argv = [part for a in argv for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    prog = f"fastensdistill {name}"
    lead: list[str] = []
    if "--config" in argv:
        i = argv.index("--config")
        if i + 1 == len(argv):
            raise InputError("--config: expected the path of a YAML file after it")
        lead = yaml_flags(read_yaml(argv[i + 1], cls))
        argv = argv[:i] + argv[i + 2 :]
    about = f"{cls.__doc__}\n\nSettings can also stand in a YAML file: --config FILE; flags win."
    run: Any = tyro.cli(cls, args=lead + argv, prog=prog, description=about if fields(cls) else None)
    if isinstance(run, RunConfig) and run.resume and (run.out / "config.yaml").is_file():
        run = tyro.cli(cls, args=yaml_flags(read_yaml(run.out / "config.yaml", cls)) + lead + argv, prog=prog)
    return run


def yaml_flags(settings: dict[str, Any]) -> list[str]:
    """The settings of a YAML file as flags, so that there is one parser and one set of error messages."""
    flags: list[str] = []
    for key, value in settings.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            flags += [f"--{flag}", *map(str, value)] if value else []
        elif value is not None:
            flags += [f"--{flag}", str(value)]
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for bad input, 128 + n after signal n."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: fastensdistill COMMAND [--config FILE.yaml] [--help] ...\n")
        for name, (cls, _) in COMMANDS.items():
            print(f"  {name:9} {(cls.__doc__ or '').splitlines()[0]}")
        return 0 if argv else 2
    if argv[0] == "--version":
        from fastensdistill.doctor import version

        print(version("fastensdistill") or "not installed (running from its source folder)")
        return 0
    from fastensdistill.engine import parallel
    from fastensdistill.train.stop import Interrupted

    try:
        if argv[0] not in COMMANDS:
            raise unknown("command", argv[0], COMMANDS)
        if parallel.launched() > 1 and argv[0] not in TRAINING:
            raise InputError(f"{argv[0]} in {parallel.launched()} processes: expected one; teach and distill can share")
        parallel.join()
        with parallel.together():
            COMMANDS[argv[0]][1](parse(argv[0], argv[1:]))
        return 0
    except InputError as error:
        if not parallel.raised_elsewhere(error):
            print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        if parallel.rank() == 0:
            print(stop, file=sys.stderr)
        return 128 + stop.signum
    except BrokenPipeError:  # a reader that has seen enough, as in ``plan | head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing fails again at the exit
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename or 'input or output'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        print(f"error: {str(error).splitlines()[0]} Try a smaller --batch-size.", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
