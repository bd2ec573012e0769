"""What each command does. Its settings are a dataclass whose fields are the flags; ``cli`` parses them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastensdistill.config import DataConfig, DistillRun, ModelConfig, TeachRun, check_device_name
from fastensdistill.errors import InputError
from fastensdistill.export import FORMATS
from fastensdistill.files import expanded
from fastensdistill.models import check_name
from fastensdistill.network.gpu import GPUS
from fastensdistill.settings import Settings, setting

if TYPE_CHECKING:
    from fastensdistill.data.sources import Dataset


@dataclass
class EvaluateRun(DataConfig):
    """Measure networks, ensembles and whole runs on the test images: a table, results.json and a report."""

    paths: tuple[Path, ...] = setting((), positional=True)
    """Files and run folders. Runs that differ only in their seed share a row."""
    out: Path | None = None
    """Folder for results.json, report.html and its pictures. Unset: only the table is printed."""
    model: tuple[str, ...] = setting((), check=check_name)
    """Architecture of files that do not say it: one for all, or one for each file."""
    mean: tuple[float, ...] = ()
    """Their normalisation: a mean for each channel of pixels in [0, 1], for all files, or for one after another. Unset:
    that of published weights for torchvision's and timm's models, the data's for ours."""
    std: tuple[float, ...] = setting((), above=0)
    """Standard deviations, as the means."""
    ensemble: bool = False
    """Also measure all files together, as one ensemble."""
    unfinished: bool = False
    """Also take runs that did not end, as they are."""
    device: str = setting("auto", check=check_device_name)
    """cpu, cuda, cuda:1, ...; auto takes the GPU if there is one."""


@dataclass
class ExportRun(DataConfig):
    """Export an averaged network: safetensors with a JSON card, torch.export, ONNX; each reloaded and compared."""

    path: Path = setting(Path("runs/run"), positional=True)
    """A run folder of distill, or a network's file."""
    out: Path = Path("export")
    """Folder for the exported files."""
    formats: tuple[str, ...] = setting(FORMATS[:2], choices=FORMATS)
    """Any of: safetensors, torch, onnx."""
    model: str | None = setting(None, check=check_name)
    """Architecture of a file that does not say it."""
    mean: tuple[float, ...] = ()
    """Its normalisation: a mean for each channel of pixels in [0, 1]. Unset: that of published weights for
    torchvision's and timm's models, the data's for ours."""
    std: tuple[float, ...] = setting((), above=0)
    """Standard deviations, as the means."""
    unfinished: bool = False
    """Also take a run that did not end, as it is."""


@dataclass
class DemoRun(Settings):
    """The whole job on scikit-learn's digits in a few minutes: teachers, three kinds of student, table, report."""

    out: Path = Path("runs/demo")
    """Folder for the runs, the report and the network."""
    seeds: int = setting(3, least=1, most=1000)
    """Students of each kind."""
    epochs: int | None = setting(None, least=1, most=10**6)
    """Override the number of epochs."""


@dataclass
class DoctorRun(Settings):
    """Say what is installed, what was built, and what can be used here."""


@dataclass
class PlanRun(Settings):
    """Print a training step: launches, groups, shapes, fusions, work, least time on a named GPU, nodes of its graph."""

    model: str = setting("wrn28_4", check=check_name, positional=True)
    """Architecture of the teachers and the student: a name as for teach --model."""
    teachers: int = setting(4, least=1, most=1000)
    """M."""
    branches: int = setting(4, least=1, most=1000)
    """K."""
    batch: int = setting(128, least=1, most=10**6)
    """Images in a batch."""
    gpu: str = setting("h200", choices=GPUS)
    """a100, h100, h200 or b200."""
    on_load: bool = setting(False)
    """Show the launches of convolutions that take in BatchNorm, its gradient and shortcuts as they load."""


def teach(run: TeachRun) -> None:
    """Train M teachers, and write their networks, metrics and report to ``run.out``."""
    from fastensdistill.evaluate import runs
    from fastensdistill.train.setup import seeded
    from fastensdistill.train.teach import TeachTrainer

    notes = [] if run.data else ["no --data was given: scikit-learn's digits"]
    run.data = run.data or "digits"
    data = prepare(run)
    networks = [seeded(run.seed + i, lambda: build_model(run, data)) for i in range(run.members)]
    record_model(run, networks[0])
    trainer = TeachTrainer(networks, data, run, out=run.out, resume=run.resume, tensorboard=run.tensorboard)
    trainer.saved_config, trainer.notes = run, notes
    trainer.fit()
    if trainer.first:
        rows = runs.find_candidates([run.out], data)
        summarize(rows, trainer.data, run.out, trainer.device, "Teachers", trainer.warnings)


def distill(run: DistillRun) -> None:
    """Distil teachers into a student, and write its networks, metrics and report to ``run.out``."""
    from fastensdistill.data.channels import for_networks
    from fastensdistill.evaluate import runs
    from fastensdistill.evaluate.origin import choose_data, origins
    from fastensdistill.method.student import STUDENTS
    from fastensdistill.method.teachers import Teachers
    from fastensdistill.models import ModelSpec, create_model
    from fastensdistill.train.distill import DistillTrainer
    from fastensdistill.train.setup import seeded
    from fastensdistill.weights import members

    if not run.teachers:
        raise InputError("no teachers given: expected --teachers with files, or a folder that teach wrote")
    for path in run.teachers:
        members(path)  # what is no file and holds no teachers is named before anything is read
    given = origins(run.teachers, run.unfinished)
    run, line = choose_data(run, given)
    data = prepare(run)
    notes: list[str] = []
    networks, files = runs.load_teachers_of(given, runs.teachers_of(vars(run)), data, notes)
    run.teachers = tuple(files)
    data = for_networks(data, networks)
    teachers = Teachers(networks)
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
    record_model(run, student.module)
    trainer = DistillTrainer(student, teachers, data, run, out=run.out, resume=run.resume, tensorboard=run.tensorboard)
    trainer.saved_config, trainer.notes = run, [*([line] if line else []), *notes]
    trainer.fit()
    if trainer.first:
        beside = runs.teacher_candidates(list(trainer.teachers.networks), run.teachers)
        rows = runs.uniquely_named([*beside, *runs.find_candidates([run.out], data)])
        told = [*notes, *trainer.warnings]
        summarize(rows, trainer.data, run.out, trainer.device, f"{run.student}, {run.perturbation}", told)


def evaluate(run: EvaluateRun) -> None:
    """Measure networks, ensembles and runs on the test images: a table, ``results.json`` and a report."""
    from fastensdistill.evaluate import comparison, runs
    from fastensdistill.evaluate.origin import choose_data, origins
    from fastensdistill.train.setup import choose_device

    if not run.paths:
        raise InputError("nothing to evaluate: expected at least one file or run folder")
    if run.out is not None:
        comparison.check_writable(run.out)
    asked, line = choose_data(run, origins(run.paths, run.unfinished))
    data, notes = load_data(asked), list[str]()
    foreign = runs.Foreign(run.model, run.mean, run.std)
    candidates = runs.find_candidates(run.paths, data, foreign, unfinished=run.unfinished, notes=notes)
    if run.ensemble:
        candidates = runs.uniquely_named([*candidates, runs.ensemble_of(candidates)])
    device = choose_device(run.device)
    found = comparison.compare(candidates, data, device)
    say(line, [*data.notes, *notes])
    show([e.row for e in found], data)
    if run.out is not None:
        comparison.write(found, candidates, data, run.out, device, f"Evaluation on {data.name}", notes)
        print(f"report: {run.out / 'report.html'}")


def export(run: ExportRun) -> None:
    """Write an averaged network in the chosen formats, each reloaded and compared."""
    import torch

    from fastensdistill.data.channels import for_networks
    from fastensdistill.data.loader import EvaluationSet
    from fastensdistill.evaluate import comparison, runs
    from fastensdistill.evaluate.classes import check_card, reordered
    from fastensdistill.evaluate.origin import KEPT, choose_data, origins
    from fastensdistill.export import export_network
    from fastensdistill.method.copying import copy_network
    from fastensdistill.method.student import LatentBE, Student
    from fastensdistill.weights import teacher_files

    path = run.path
    if path.is_dir() and not any((path / f).is_file() for f in KEPT):
        if teacher_files(path):
            raise InputError(f"{path} holds teachers, each a network of its own: name one of them, as in "
                             f"{teacher_files(path)[0]}, or distill them into one")  # fmt: skip
        raise InputError(f"{path} holds no network.safetensors: expected the folder of a finished distill run")
    [given] = origins([path], run.unfinished)
    comparison.check_writable(run.out)
    asked, line = choose_data(run, [given])
    data, file, card = load_data(asked), given.files[0], given.card
    network = runs.Foreign(run.model, run.mean, run.std).load(file, 0, 1, data)
    data = for_networks(data, [network])
    order, notes = check_card(card, data, file)
    if isinstance(network, Student):
        if not isinstance(network, LatentBE):
            raise InputError(f"{file} is a {network.kind} student, an ensemble; only one network can be exported")
        network = network.average()
    measured = network
    if order is not None:  # what is exported stays in the order of the network's own classes, which its card names
        measured = reordered(copy_network(network), order, (data.channels, *data.image_size))
    row = comparison.evaluate_candidate(runs.Candidate(file.stem, "student", [measured]), data, torch.device("cpu")).row
    about = {
        "data": data.name, "classes": list(card.get("classes") or data.classes), "image_size": list(data.image_size),
        "channels": data.channels, "macs": row.macs, "metrics": row.metrics[0].to_dict(),
        "trained": {k: card[k] for k in (*comparison.KEPT_FACTS, "data") if k in card},
    }  # fmt: skip
    images = next(EvaluationSet(data.test, "cpu").batches(64))
    exported = export_network(network, run.out, images=images, formats=run.formats, card=about)
    say(line, notes)
    for e in exported:
        print(f"{e.format:12} {e.path}  checked on {len(images)} test images: relative error {e.error:.1e}")


def demo(run: DemoRun) -> None:
    """Run the whole job on scikit-learn's digits."""
    from fastensdistill.demo import run_demo

    run_demo(run.out, run.seeds, run.epochs)


def doctor(run: DoctorRun) -> None:
    """Print what is installed, what was built, and what can be used."""
    from fastensdistill.doctor import print_report

    print_report()


def plan(run: PlanRun) -> None:
    """Print the launches of a training step, the least time it takes, and the nodes of its graph."""
    from fastensdistill.engine.dispatch import PREDICTED, Dispatch, decisions
    from fastensdistill.engine.graph_nodes import count_step
    from fastensdistill.network.table import print_plan

    arch, numbers = GPUS[run.gpu].arch, (run.model, run.teachers, run.branches, run.batch)
    rows = Dispatch(predicted=PREDICTED, built=True)
    parts = print_plan(*numbers, run.gpu, fusions=rows.fusions(arch), on_load=run.on_load)
    print(*decisions(parts, arch), sep="\n")
    try:
        print(count_step(*numbers, arch, implementations=rows if run.on_load else None))
    except InputError as error:  # passes can be planned that no step consists of
        print(f"graph nodes not counted: {error}")


def load_data(settings: DataConfig) -> Dataset:
    """The data set that ``settings`` name; digits where they name none."""
    from fastensdistill.data.sources import load_dataset

    return load_dataset(
        settings.data or "digits", root=settings.root, limit=settings.limit, validation=settings.validation,
        image_size=settings.image_size,
    )  # fmt: skip


def prepare(run: Any) -> Dataset:
    """The data of a run, its paths made absolute so that the run can be resumed from anywhere."""
    from fastensdistill.data.sources import DATASETS
    from fastensdistill.train.setup import check_tf32, choose_device

    check_tf32(run, choose_device(run.device))
    if run.data not in DATASETS and expanded(run.data).exists():
        run.data = str(expanded(run.data).resolve())
    if run.root is not None:
        run.root = str(expanded(run.root).resolve())
    return load_data(run)


def record_model(run: Any, network: Any) -> None:
    """Set the model that was built among the settings of a new run, for its config.yaml; a resumed one has it there."""
    spec = getattr(network, "spec", None)
    if spec is None or (run.resume and (run.out / "config.yaml").is_file()):
        return
    run.model = spec.name
    for name in ("blocks", "widen", "in_planes"):
        value = spec.arguments.get(name)
        setattr(run, name, tuple(value) if isinstance(value, list) else value)  # a card has lists


def build_model(run: ModelConfig, data: Any) -> Any:
    """The network the settings name; unset, a small one for small images and the paper's otherwise."""
    from fastensdistill.models import create_model, takes_colour

    arguments = run.arguments()
    name = run.model or ("preresnet" if arguments or max(data.image_size) <= 16 else "wrn28_4")
    if run.model is None and not arguments and max(data.image_size) <= 16:
        arguments = {"blocks": (1, 1, 1)}
    colours = 3 if takes_colour(name) and data.channels == 1 else 1  # the trainer repeats the images as often
    return create_model(name, data.num_classes, mean=data.mean * colours, std=data.std * colours, **arguments)


def say(line: str, notes: Sequence[str]) -> None:
    """Which data was taken, and notes, on stderr; of several processes by the first alone. Not before what can fail: an
    error is one line."""
    from fastensdistill.engine import parallel

    if parallel.rank() == 0:
        for text in [*([line] if line else []), *(f"note: {note}" for note in notes)]:
            print(text, file=sys.stderr)


def show(rows: Any, data: Any) -> None:
    """Print the table of results."""
    from rich.console import Console

    from fastensdistill.evaluate.report import print_table

    print(f"{data.name}, {len(data.test):,} test images")
    print_table(rows, Console(width=None if sys.stdout.isatty() else 160))


def compare_and_write(
    candidates: Sequence[Any], data: Any, out: Path, device: Any, title: str, notes: Sequence[str] = ()
) -> None:
    """Measure all rows and print their table, then write it and the report: where that fails, the table is there."""
    from fastensdistill.evaluate import comparison

    found = comparison.compare(candidates, data, device)
    show([e.row for e in found], data)
    comparison.write(found, candidates, data, out, device, title, notes)


def summarize(
    candidates: Sequence[Any], data: Any, out: Path, device: Any, title: str, notes: Sequence[str] = ()
) -> None:
    """:func:`compare_and_write` for one run, and where its files are."""
    compare_and_write(candidates, data, out, device, f"{title} on {data.name}", notes)
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
