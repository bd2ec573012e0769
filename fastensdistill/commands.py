"""What each command does. Its settings are a dataclass whose fields are the flags; ``cli`` parses them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastensdistill.config import DataConfig, DistillRun, ModelConfig, TeachRun
from fastensdistill.errors import InputError


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
