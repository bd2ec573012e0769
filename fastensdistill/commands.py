"""What each command does. Its settings are a dataclass whose fields are the flags; ``cli`` parses them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastensdistill.config import OPTIMIZERS, AugmentConfig, DataConfig, DistillRun, TeachRun, check_device_name
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
    ema: bool = False
    """The run's average over time, which one with --ema-decay kept, instead of the network itself."""
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
    seeds: int = setting(5, least=1, most=1000)
    """Students of each kind."""
    epochs: int = setting(90, least=1, most=10**6)
    """How long students are trained; teachers in proportion."""


@dataclass
class DoctorRun(Settings):
    """Say what is installed, what was built, and what can be used here."""


@dataclass
class PlanRun(AugmentConfig):
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
    optimizer: str = setting("sgd", choices=OPTIMIZERS)
    """sgd or adamw, of the update."""
    ema_decay: float | None = setting(None, above=0, below=1)
    """With an average over time."""
    clip_norm: float | None = setting(None, above=0, most=1e38)
    """With clipping."""
    seeds: int = setting(1, least=1, most=64)
    """Also say what it is predicted to give to train so many students at once, each of its own seed."""
    on_load: bool = setting(False)
    """Show the launches of convolutions that take in BatchNorm, its gradient and shortcuts as they load."""


def teach(run: TeachRun) -> None:
    """Train M teachers, or those of several seeds, and write their networks, metrics and report to ``run.out``."""
    from fastensdistill import building
    from fastensdistill.evaluate import runs
    from fastensdistill.train.seeds import train_seeds
    from fastensdistill.train.setup import seeded
    from fastensdistill.train.teach import TeachTrainer

    notes = [] if run.data else ["no --data was given: scikit-learn's digits"]
    run.data = run.data or "digits"
    data = building.prepare(run)

    def trainer_of(own: TeachRun) -> TeachTrainer:
        networks = [seeded(own.seed + i, lambda: building.build_model(own, data)) for i in range(own.members)]
        building.record_model(own, networks[0])
        trainer = TeachTrainer(networks, data, own, out=own.out, resume=own.resume, tensorboard=own.tensorboard)
        trainer.saved_config, trainer.notes = own, notes
        return trainer

    if run.seeds:
        building.record_model(run, building.build_model(run, data))
        conclude(run, data, *train_seeds(run, trainer_of), "Teachers", [])
        return
    trainer = trainer_of(run).fit()
    if trainer.first and run.report:
        rows = runs.find_candidates([run.out], data)
        summarize(rows, trainer.data, run.out, trainer.device, "Teachers", trainer.warnings)


def distill(run: DistillRun) -> None:
    """Distil teachers into a student, or one of each seed, and write networks, metrics and report to ``run.out``."""
    from fastensdistill import building
    from fastensdistill.data.channels import for_networks
    from fastensdistill.evaluate import runs
    from fastensdistill.evaluate.origin import choose_data
    from fastensdistill.method.teachers import Teachers
    from fastensdistill.train.distill import DistillTrainer
    from fastensdistill.train.seeds import train_seeds

    if not run.teachers:
        raise InputError("no teachers given: expected --teachers with files, or a folder that teach wrote")
    sets = runs.teacher_sets(run.teachers, run.seeds, unfinished=run.unfinished, ema=run.teacher_ema)
    run, line = choose_data(run, [one for given in sets for one in given])
    data = building.prepare(run)
    notes: list[str] = []
    foreign = runs.teachers_of(vars(run))
    loaded = [runs.load_teachers_of(given, foreign, data, notes) for given in sets]
    notes = list(dict.fromkeys(notes))
    data = for_networks(data, [network for networks, _ in loaded for network in networks])
    learned_from = [(Teachers(networks), tuple(files)) for networks, files in loaded]
    told = [*([line] if line else []), *notes]

    def trainer_of(own: DistillRun) -> DistillTrainer:
        teachers, own.teachers = learned_from[run.seeds.index(own.seed) if len(sets) > 1 else 0]
        student = building.build_student(own, data, teachers)
        building.record_model(own, student.module)
        trainer = DistillTrainer(student, teachers, data, own, out=own.out, resume=own.resume,
                                 tensorboard=own.tensorboard)  # fmt: skip
        trainer.saved_config, trainer.notes = own, told
        return trainer

    title = f"{run.student}, {run.perturbation}"
    if run.seeds:
        run.teachers = tuple(expanded(path).resolve() for path in run.teachers)
        building.record_model(run, building.build_student(replace(run), data, learned_from[0][0]).module)
        beside = runs.rows_of_teachers(learned_from)
        conclude(run, data, *train_seeds(run, trainer_of), title, notes, beside)
        return
    trainer = trainer_of(run).fit()
    if trainer.first and run.report:
        beside = runs.rows_of_teachers([(trainer.teachers, run.teachers)])
        rows = runs.uniquely_named([*beside, *runs.find_candidates([run.out], data)])
        summarize(rows, trainer.data, run.out, trainer.device, title, [*notes, *trainer.warnings])


def conclude(
    run: Any, data: Dataset, ended: Sequence[Path], failed: Sequence[str], title: str, notes: Sequence[str],
    beside: Sequence[Any] = (),
) -> None:  # fmt: skip
    """The table and report of several seeds, with rows ``beside`` it. Raises InputError where any ``failed``."""
    from fastensdistill.engine import parallel
    from fastensdistill.evaluate import runs
    from fastensdistill.evaluate.origin import seed_origin
    from fastensdistill.train.setup import choose_device

    if ended and run.report and parallel.rank() == 0:
        rows = runs.uniquely_named([*beside, *runs.candidates_of([seed_origin(f) for f in ended], data)])
        summarize(rows, data, run.out, choose_device(run.device), title, [*notes, *failed])
    if failed:
        others = f"; the others are in {run.out}" if ended else ""
        raise InputError(f"{len(failed)} of {len(run.seeds)} seeds failed: {'; '.join(failed)}{others}")


def evaluate(run: EvaluateRun) -> None:
    """Measure networks, ensembles and runs on the test images: a table, ``results.json`` and a report."""
    from fastensdistill import building
    from fastensdistill.evaluate import comparison, runs
    from fastensdistill.evaluate.origin import choose_data, origins
    from fastensdistill.train.setup import choose_device

    if not run.paths:
        raise InputError("nothing to evaluate: expected at least one file or run folder")
    if run.out is not None:
        comparison.check_writable(run.out)
    asked, line = choose_data(run, origins(run.paths, run.unfinished))
    data, notes = building.load_data(asked), list[str]()
    foreign = runs.Foreign(run.model, run.mean, run.std)
    candidates = runs.find_candidates(run.paths, data, foreign, unfinished=run.unfinished, notes=notes)
    if run.ensemble:
        candidates = runs.uniquely_named([*candidates, runs.ensemble_of(candidates)])
    device = choose_device(run.device)
    found = comparison.compare(candidates, data, device)
    say(line, [*data.notes, *notes], [f"{c.name}: {w}" for c in candidates for w in comparison.warned(c)])
    show([e.row for e in found], data)
    if run.out is not None:
        comparison.write(found, candidates, data, run.out, device, f"Evaluation on {data.name}", notes)
        print(f"report: {run.out / 'report.html'}")


def export(run: ExportRun) -> None:
    """Write an averaged network in the chosen formats, each reloaded and compared."""
    import torch

    from fastensdistill import building
    from fastensdistill.data.channels import for_networks
    from fastensdistill.data.loader import EvaluationSet
    from fastensdistill.evaluate import comparison, runs
    from fastensdistill.evaluate.classes import check_card, reordered
    from fastensdistill.evaluate.origin import KEPT, choose_data, origins, seed_folders
    from fastensdistill.export import export_network
    from fastensdistill.method.copying import copy_network
    from fastensdistill.method.student import LatentBE, Student
    from fastensdistill.weights import teacher_files

    path = run.path
    if seeds := seed_folders(path):
        raise InputError(f"{path} holds runs of {len(seeds)} seeds: name one of them, as in {seeds[0]}")
    if path.is_dir() and not any((path / f).is_file() for f in KEPT):
        if teacher_files(path):
            raise InputError(f"{path} holds teachers, each a network of its own: name one of them, as in "
                             f"{teacher_files(path)[0]}, or distill them into one")  # fmt: skip
        raise InputError(f"{path} holds no network.safetensors: expected the folder of a finished distill run")
    [given] = origins([path], run.unfinished)
    given = given.averaged() if run.ema else given
    comparison.check_writable(run.out)
    asked, line = choose_data(run, [given])
    data, file, card = building.load_data(asked), given.files[0], given.card
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
        "trained": {k: card[k] for k in (*comparison.KEPT_FACTS, "data", "warnings") if k in card},
    }  # fmt: skip
    images = next(EvaluationSet(data.test, "cpu").batches(64))
    exported = export_network(network, run.out, images=images, formats=run.formats, card=about)
    say(line, notes, card.get("warnings", ()))
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
    from fastensdistill.data.augment import augment_cost
    from fastensdistill.data.presets import Photographs, augmentation, choose_augment, switches
    from fastensdistill.engine.dispatch import PREDICTED, Dispatch, decisions
    from fastensdistill.engine.graph_nodes import count_step
    from fastensdistill.engine.seeds_gain import predicted_for_model
    from fastensdistill.engine.update_cost import update_cost
    from fastensdistill.models import image_size
    from fastensdistill.network.table import print_plan

    arch, numbers = GPUS[run.gpu].arch, (run.model, run.teachers, run.branches, run.batch)
    size, gpu = image_size(run.model), GPUS[run.gpu]
    augment = choose_augment(Photographs((size, size)), **switches(run))
    rows = Dispatch(predicted=PREDICTED, built=True)
    parts = print_plan(*numbers, run.gpu, fusions=rows.fusions(arch), on_load=run.on_load)
    print(*decisions(parts, arch), sep="\n")
    cost = augment_cost(augment, (run.batch, 3, size, size))
    print(f"reading a batch, {augmentation(augment)}: {cost.launches} launches, {cost.moved / 1e6:.2f} MB, at least "
          f"{cost.moved / gpu.bandwidth * 1e6:.1f} us on {gpu.name}")  # fmt: skip
    update: dict[str, Any] = {"optimizer": run.optimizer, "ema_decay": run.ema_decay, "clip_norm": run.clip_norm}
    values, moved = update_cost(run.model, run.branches, run.optimizer, bool(run.ema_decay), bool(run.clip_norm))
    print(f"update of {values:,} values by {run.optimizer}: {moved / 1e6:.2f} MB, at least "
          f"{moved / gpu.bandwidth * 1e6:.1f} us on {gpu.name}")  # fmt: skip
    try:
        implementations = rows if run.on_load else None
        print(count_step(*numbers, arch, implementations=implementations, **update))
        if run.seeds > 1:
            print(predicted_for_model(run.model, run.seeds, *numbers[1:], gpu, implementations, **update))
    except InputError as error:  # passes can be planned that no step consists of
        print(f"graph nodes not counted: {error}")


def say(line: str, notes: Sequence[str], warnings: Sequence[str] = ()) -> None:
    """Which data was taken, notes and warnings, on stderr; of several processes by the first alone. Not before what can
    fail: an error is one line."""
    from fastensdistill.engine import parallel

    if parallel.rank() == 0:
        told = [*(f"note: {note}" for note in notes), *(f"warning: {warning}" for warning in warnings)]
        for text in [*([line] if line else []), *told]:
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
