"""Several seeds of one recipe: an ordinary run in a folder of its own for each, and all of them resumed as a whole.

    out/config.yaml             the settings, with all seeds
    out/seed-0, out/seed-1, ... the runs, each with its own seed in its config.yaml

They are trained one after another. A seed that has come to its end is not touched again. A step of several students
(``engine/seeds.py``) would take the place of :func:`train_seeds`' loop, for seeds that begin together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fastensdistill.config import DistillRun, TeachRun
from fastensdistill.engine import parallel
from fastensdistill.errors import InputError
from fastensdistill.evaluate.origin import seed_folder
from fastensdistill.settings import settings_of
from fastensdistill.settings_file import read_settings
from fastensdistill.train import checkpoint
from fastensdistill.train.folder import CONFIG, RunFolder
from fastensdistill.train.record import DivergedError
from fastensdistill.train.stop import Interrupted
from fastensdistill.train.trainer import Trainer

Run = TypeVar("Run", TeachRun, DistillRun)


def train_seeds(run: Run, make: Callable[[Run], Trainer]) -> tuple[list[Path], list[str]]:
    """Train each of ``run.seeds``: the folders of those that came to their end, and a line for each that diverged.

    ``make`` gives the trainer for the settings of one seed. A seed that diverges does not keep the others from being
    trained. What else goes wrong, as a full disk, would happen to all of them: it is raised, and so is Interrupted.
    Raises InputError where ``run.out`` holds something else than these runs.
    """
    folder = RunFolder(run.out if parallel.rank() == 0 else None)
    ended, failed = [], []
    with parallel.together():
        if folder.path is not None:
            check_whole(run)
            folder.claim(run, run.resume)
    try:
        for number, seed in enumerate(run.seeds, 1):
            own = replace(run, seed=seed, seeds=(), out=seed_folder(run.out, seed))
            with parallel.together():
                state = "" if folder.path is None else state_of(own)
            state = parallel.from_first(state)
            say(f"seed {seed}, {number} of {len(run.seeds)}{': done' if state == 'ended' else ''}")
            try:
                if state != "ended":
                    make(replace(own, resume=state == "begun")).fit()
                ended.append(own.out)
            except DivergedError as error:
                failed.append(f"seed {seed}: {error}")
                say(f"warning: seed {seed}: {error}")
            except Interrupted as stop:
                raise Interrupted(stop.signum, f"{stop.where} of seed {seed}", run.out) from None
    finally:
        folder.release(unused=not any(seed_folder(run.out, seed).exists() for seed in run.seeds))
    return ended, failed


def check_whole(run: Run) -> None:
    """Raise InputError unless the folder of a ``run`` that is resumed holds seeds of the same settings, no others."""
    file = run.out / CONFIG
    if not run.resume or not file.is_file():
        return
    kind: Any = type(run)
    saved = read_settings(file, settings_of(kind))
    seeds = saved.get("seeds") or ()
    if not seeds:
        raise InputError(f"{run.out} holds one run, of seed {saved.get('seed', 0)}: expected a folder of several seeds")
    if not set(seeds) <= set(run.seeds):
        numbers = (" ".join(map(str, some)) for some in (seeds, run.seeds))
        raise InputError("{} holds runs of the seeds {}: expected these, and more if need be, not {}".format(
            run.out, *numbers))  # fmt: skip
    before, now = ({k: v for k, v in s.items() if k not in checkpoint.FREE} for s in (saved, vars(run)))
    checkpoint.check_continuation(run.out, before, now)


def state_of(run: TeachRun | DistillRun) -> str:
    """Whether the run of one seed is "new", "begun" or has "ended", with everything written that it ends with."""
    if not (run.out / CONFIG).is_file():
        return "new"
    if isinstance(run, TeachRun):
        last = [f"last-{run.members - 1}"]
    else:
        last = ["last", "network"] if run.student in ("single", "latent-be") else ["last"]
    written = all((run.out / f"{name}.safetensors").is_file() for name in last)
    return "ended" if written and checkpoint.finished(run.out)[0] else "begun"


def say(line: str) -> None:
    """``line`` on stderr, once of all processes."""
    if parallel.rank() == 0:
        print(line, file=sys.stderr, flush=True)
