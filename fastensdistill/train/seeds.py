"""Several seeds of one recipe: an ordinary run in a folder of its own for each, and all of them resumed as a whole.

    out/config.yaml             the settings, with all seeds
    out/seed-0, out/seed-1, ... the runs, each with its own seed in its config.yaml

They are trained one after another, or small students at once (``train.together``) where that is predicted to pay and
they have come equally far. A seed that has come to its end is not touched again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
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
from fastensdistill.train.distill import DistillTrainer
from fastensdistill.train.folder import CONFIG, RunFolder
from fastensdistill.train.record import DivergedError
from fastensdistill.train.setup import choose_device
from fastensdistill.train.stop import Interrupted
from fastensdistill.train.together import chosen, one_step, train_together
from fastensdistill.train.trainer import Trainer

Run = TypeVar("Run", TeachRun, DistillRun)


def train_seeds(run: Run, make: Callable[[Run], Trainer], together: bool | None = None) -> tuple[list[Path], list[str]]:
    """Train each of ``run.seeds``: the folders of those that came to their end, and a line for each that diverged.

    ``make`` gives the trainer for the settings of one seed. A seed that diverges does not keep the others from being
    trained. What else goes wrong, as a full disk, would happen to all of them: it is raised, and so is Interrupted.
    ``together``: whether students are trained at once where they can be; None where that is predicted to pay.
    Raises InputError where ``run.out`` holds something else than these runs.
    """
    folder = RunFolder(run.out if parallel.rank() == 0 else None)
    errors: dict[int, str] = {}
    with parallel.together():
        if folder.path is not None:
            check_whole(run)
            folder.claim(run, run.resume)
    try:
        runs = [replace(run, seed=seed, seeds=(), out=seed_folder(run.out, seed)) for seed in run.seeds]
        with parallel.together():
            states = [("", 0) if folder.path is None else state_of(own) for own in runs]
        states = parallel.from_first(states)
        done = {own.seed for own, (state, _) in zip(runs, states, strict=True) if state == "ended"}
        runs = [replace(own, resume=state == "begun") for own, (state, _) in zip(runs, states, strict=True)]
        made: dict[int, Trainer] = {}
        if len({step for state, step in states if state != "ended"}) == 1:  # equally far
            trained = train_at_once([own for own in runs if own.seed not in done], make, together, made, run.out)
            done |= set() if trained is None else {own.seed for own in runs}
            errors |= trained or {}
        for number, own in enumerate(runs, 1):
            if own.seed in errors:
                continue
            say(f"seed {own.seed}, {number} of {len(runs)}{': done' if own.seed in done else ''}")
            try:
                if own.seed not in done:
                    (made.pop(own.seed, None) or make(own)).fit()
            except DivergedError as error:
                errors[own.seed] = str(error)
                say(f"warning: seed {own.seed}: {error}")
            except Interrupted as stop:
                raise Interrupted(stop.signum, f"{stop.where} of seed {own.seed}", run.out) from None
    finally:
        folder.release(unused=not any(seed_folder(run.out, seed).exists() for seed in run.seeds))
    ended = [own.out for own in runs if own.seed not in errors]
    return ended, [f"seed {seed}: {errors[seed]}" for seed in run.seeds if seed in errors]


def train_at_once(
    runs: Sequence[Run], make: Callable[[Run], Trainer], together: bool | None, made: dict[int, Trainer], out: Path
) -> dict[int, str] | None:
    """Train students of several seeds, that have come equally far, in one step: what those said that diverged.

    None where they are to be trained one after another; trainers that have been ``made`` then are there by their seed.
    """
    if len(runs) < 2 or isinstance(runs[0], TeachRun) or parallel.processes() > 1 or together is False:
        return None
    if together is None and choose_device(runs[0].device).type != "cuda":
        return None
    students: list[DistillTrainer] = []
    why = ""
    for own in runs:
        made[own.seed] = trainer = make(own)
        assert isinstance(trainer, DistillTrainer)
        students.append(trainer)
        if together is None and trainer is students[0]:
            worth_it, why = chosen(trainer, len(runs))
            if not worth_it:
                say(f"seeds one after another: {why}")
                return None
    try:
        step = one_step(students)
    except InputError as error:
        say(f"seeds one after another: {error}")
        return None
    made.clear()
    say(f"seeds {' '.join(str(own.seed) for own in runs)} at once{f': {why}' if why else ''}")
    try:
        failed = train_together(students, step)
    except Interrupted as stop:
        raise Interrupted(stop.signum, stop.where, out) from None
    return {runs[number].seed: str(error) for number, error in failed.items()}


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
    if run.seeds[: len(seeds)] != seeds:  # in their order, as the i-th learns from the i-th teachers
        numbers = (" ".join(map(str, some)) for some in (seeds, run.seeds))
        raise InputError("{} holds runs of the seeds {}: expected these, and more after them if need be, not {}".format(
            run.out, *numbers))  # fmt: skip
    before, now = ({k: v for k, v in s.items() if k not in checkpoint.FREE} for s in (saved, vars(run)))
    checkpoint.check_continuation(run.out, before, now)


def state_of(run: TeachRun | DistillRun) -> tuple[str, int]:
    """Whether the run of one seed is "new", "begun" or has "ended", with everything written that it ends with; and the
    steps of its checkpoint."""
    if not (run.out / CONFIG).is_file():
        return "new", 0
    if isinstance(run, TeachRun):
        last = [f"last-{run.members - 1}"]
    else:
        last = ["last", "network"] if run.student in ("single", "latent-be") else ["last"]
    written = all((run.out / f"{name}.safetensors").is_file() for name in last)
    whole, step, _ = checkpoint.finished(run.out)
    return "ended" if written and whole else "begun", step


def say(line: str) -> None:
    """``line`` on stderr, once of all processes."""
    if parallel.rank() == 0:
        print(line, file=sys.stderr, flush=True)
