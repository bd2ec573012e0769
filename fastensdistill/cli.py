"""The command line: ``fastensdistill demo | teach | distill | evaluate | export | plan | doctor``.

Settings come from the dataclasses of :mod:`fastensdistill.config`; ``--config FILE`` reads some from YAML, and flags
override it. Bad input prints one line and exits with code 2. ``teach`` and ``distill`` also run under
``torchrun -m fastensdistill``; the first process alone reports.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastensdistill.config import DataConfig, DistillRun, ModelConfig, RunConfig, TeachRun, read_yaml
from fastensdistill.errors import InputError, unknown


@dataclass
class EvaluateRun(DataConfig):
    """Measure networks, ensembles and whole runs on the test images: a table, results.json and a report."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional] = field(default_factory=tuple)
    """Files and run folders. Runs that differ only in their seed share a row."""
    out: Path | None = None
    """Folder for results.json, report.html and its pictures. Unset: only the table is printed."""
    model: tuple[str, ...] = ()
    """Architecture of files that do not say it: one for all, or one for each file."""
    mean: tuple[float, ...] = ()
    """Their normalisation: a mean for each channel of pixels in [0, 1], for all files, or for one after another. Unset:
    the data's."""
    std: tuple[float, ...] = ()
    """Standard deviations, as the means."""
    ensemble: bool = False
    """Also measure all files together, as one ensemble."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU if there is one."""


@dataclass
class ExportRun(DataConfig):
    """Export an averaged network: safetensors with a JSON card, torch.export, ONNX; each reloaded and compared."""

    path: Annotated[Path, tyro.conf.Positional] = Path("runs/run")
    """A run folder of distill, or a network's file."""
    out: Path = Path("export")
    """Folder for the exported files."""
    formats: tuple[str, ...] = ("safetensors", "torch")
    """Any of: safetensors, torch, onnx."""
    model: str | None = None
    """Architecture of a file that does not say it."""
    mean: tuple[float, ...] = ()
    """Its normalisation: a mean for each channel of pixels in [0, 1]. Unset: the data's."""
    std: tuple[float, ...] = ()
    """Standard deviations, as the means."""


@dataclass
class DemoRun:
    """The whole job on scikit-learn's digits in a few minutes: teachers, three kinds of student, table, report."""

    out: Path = Path("runs/demo")
    """Folder for the runs, the report and the network."""
    seeds: int = 3
    """Students of each kind."""
    epochs: int | None = None
    """Override the number of epochs."""


@dataclass
class DoctorRun:
    """Say what is installed, what was built, and what can be used here."""


@dataclass
class PlanRun:
    """Print a training step: launches, groups, shapes, fusions, work, least time on a named GPU, nodes of its graph."""

    model: Annotated[str, tyro.conf.Positional] = "wrn28_4"
    """Architecture of the teachers and the student: a name as for teach --model."""
    teachers: int = 4
    """M."""
    branches: int = 4
    """K."""
    batch: int = 128
    """Images in a batch."""
    gpu: str = "h200"
    """a100, h100, h200 or b200."""


def teach(run: TeachRun) -> None:
    from fastensdistill.train.setup import seeded
    from fastensdistill.train.trainer import TeachTrainer

    data = prepare(run)
    networks = [seeded(run.seed + i, lambda: build_model(run, data)) for i in range(run.members)]
    trainer = TeachTrainer(networks, data, run, out=run.out, resume=run.resume, tensorboard=run.tensorboard)
    trainer.saved_config = run
    trainer.fit()
    if trainer.first:
        summarize([run.out], data, run.out, trainer.device, "Teachers")


def distill(run: DistillRun) -> None:
    from fastensdistill.evaluate.runs import teachers_of
    from fastensdistill.method.student import STUDENTS
    from fastensdistill.method.teachers import Teachers
    from fastensdistill.models import ModelSpec, create_model
    from fastensdistill.train.setup import seeded
    from fastensdistill.train.trainer import DistillTrainer
    from fastensdistill.weights import members

    if not run.teachers:
        raise InputError("no teachers given: expected --teachers with files, or a folder that teach wrote")
    data = prepare(run)
    run.teachers = tuple(file.resolve() for path in run.teachers for file in members(path))
    foreign = teachers_of(vars(run))
    teachers = Teachers([foreign.load(f, i, len(run.teachers), data) for i, f in enumerate(run.teachers)])
    if run.branches is None:
        run.branches = 1 if run.student == "single" else len(teachers)
    spec = getattr(teachers.networks[0], "spec", ModelSpec("wrn28_4"))

    def create() -> Any:
        if run.model or run.arguments():
            return build_model(run, data)
        shape = {k: v for k, v in spec.arguments.items() if k not in ("num_classes", "mean", "std")}
        return create_model(spec.name, data.num_classes, mean=data.mean, std=data.std, **shape)

    branches = run.branches
    student = seeded(run.seed, lambda: STUDENTS[run.student](create(), branches))
    trainer = DistillTrainer(student, teachers, data, run, out=run.out, resume=run.resume, tensorboard=run.tensorboard)
    trainer.saved_config = run
    trainer.fit()
    if trainer.first:
        summarize([run.out], data, run.out, trainer.device, f"{run.student}, {run.perturbation}")


def evaluate(run: EvaluateRun) -> None:
    from fastensdistill.evaluate import runs
    from fastensdistill.method.student import Student
    from fastensdistill.method.teachers import Teachers
    from fastensdistill.train.setup import choose_device

    data = run.load()
    candidates = runs.find_candidates(run.paths, data, runs.Foreign(run.model, run.mean, run.std))
    if run.ensemble:
        members = [n for c in candidates for n in c.networks if not isinstance(n, Student | Teachers)]
        if len(members) < 2:
            raise InputError(f"--ensemble of {len(members)} networks: expected at least 2 files")
        candidates.append(runs.Candidate(f"ensemble of {len(members)}", "ensemble", [Teachers(members)]))
    device = choose_device(run.device)
    if run.out is None:
        show([runs.evaluate_candidate(c, data, device).row for c in candidates], data)
        return
    show(runs.report(candidates, data, run.out, device, f"Evaluation on {data.name}"), data)
    print(f"report: {run.out / 'report.html'}")


def export(run: ExportRun) -> None:
    import torch

    from fastensdistill.data.loader import EvaluationSet
    from fastensdistill.evaluate import runs
    from fastensdistill.export import export_network
    from fastensdistill.method.student import LatentBE, Student
    from fastensdistill.weights import read_tensors

    path = run.path
    if path.is_dir():
        path = next((path / f for f in ("network.safetensors", "student.safetensors") if (path / f).is_file()), path)
        if path.is_dir():
            raise InputError(f"{run.path} holds no network.safetensors: expected the folder of a finished distill run")
    data = run.load()
    network = runs.Foreign(run.model, run.mean, run.std).load(path, 0, 1, data)
    if isinstance(network, Student):
        if not isinstance(network, LatentBE):
            raise InputError(f"{path} is a {network.kind} student, an ensemble; only one network can be exported")
        network = network.average()
    candidate = runs.Candidate(path.stem, "student", [network])
    row = runs.evaluate_candidate(candidate, data, torch.device("cpu")).row
    _, origin = read_tensors(path)
    card = {
        "data": data.name, "classes": list(data.classes), "macs": row.macs, "metrics": row.metrics[0].to_dict(),
        "trained": {k: origin[k] for k in ("validation_accuracy", "step") if k in origin},
    }  # fmt: skip
    images = next(EvaluationSet(data.test, "cpu").batches(64))
    for e in export_network(network, run.out, images=images, formats=run.formats, card=card):
        print(f"{e.format:12} {e.path}  checked on {len(images)} test images: relative error {e.error:.1e}")


def demo(run: DemoRun) -> None:
    from fastensdistill.demo import run_demo

    run_demo(run.out, run.seeds, run.epochs)


def doctor(run: DoctorRun) -> None:
    from fastensdistill.doctor import print_report

    print_report()


def plan(run: PlanRun) -> None:
    from fastensdistill.engine.graph_nodes import count_step
    from fastensdistill.network.gpu import GPUS
    from fastensdistill.network.table import print_plan

    for name in ("teachers", "branches", "batch"):
        if getattr(run, name) < 1:
            raise InputError(f"{name}={getattr(run, name)}: expected at least 1")
    print_plan(run.model, run.teachers, run.branches, run.batch, run.gpu)
    try:
        print(count_step(run.model, run.teachers, run.branches, run.batch, GPUS[run.gpu].arch))
    except InputError as error:  # passes can be planned that no step consists of
        print(f"graph nodes not counted: {error}")


TRAINING = ("teach", "distill")  # may run in several processes
COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "demo": (DemoRun, demo),
    "teach": (TeachRun, teach),
    "distill": (DistillRun, distill),
    "evaluate": (EvaluateRun, evaluate),
    "export": (ExportRun, export),
    "plan": (PlanRun, plan),
    "doctor": (DoctorRun, doctor),
}


def prepare(run: Any) -> Any:
    """The data of a run, its paths made absolute so that the run can be resumed from anywhere."""
    from fastensdistill.data.sources import DATASETS

    if run.data not in DATASETS and Path(run.data).exists():
        run.data = str(Path(run.data).resolve())
    if run.root is not None:
        run.root = str(Path(run.root).expanduser().resolve())
    return run.load()


def build_model(run: ModelConfig, data: Any) -> Any:
    """The network the settings name; unset, a small one for small images and the paper's otherwise."""
    from fastensdistill.models import create_model

    arguments = run.arguments()
    name = run.model or ("preresnet" if arguments or max(data.image_size) <= 16 else "wrn28_4")
    if run.model is None and not arguments and max(data.image_size) <= 16:
        arguments = {"blocks": (1, 1, 1)}
    return create_model(name, data.num_classes, mean=data.mean, std=data.std, **arguments)


def show(rows: Any, data: Any) -> None:
    from rich.console import Console

    from fastensdistill.evaluate.report import print_table

    print(f"{data.name}, {len(data.test):,} test images")
    print_table(rows, Console(width=None if sys.stdout.isatty() else 160))


def summarize(paths: Sequence[Path], data: Any, out: Path, device: Any, title: str) -> None:
    from fastensdistill.evaluate import runs

    show(runs.report(runs.find_candidates(paths, data), data, out, device, f"{title} on {data.name}"), data)
    print(f"run: {out}  report: {out / 'report.html'}")


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
