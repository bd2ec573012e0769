"""Measure the networks of every row, and write the results: results.json and the report."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastensdistill.config import DistillRun
from fastensdistill.data.channels import for_networks
from fastensdistill.data.loader import EvaluationSet
from fastensdistill.data.presets import augmentation, recorded
from fastensdistill.data.sources import Dataset
from fastensdistill.errors import InputError
from fastensdistill.evaluate import metrics
from fastensdistill.evaluate.augmented import augmented
from fastensdistill.evaluate.landscape import Landscape, landscape
from fastensdistill.evaluate.origin import origin, read_config
from fastensdistill.evaluate.predict import predict
from fastensdistill.evaluate.report import Row, read_metrics, write_report
from fastensdistill.evaluate.runs import Candidate, fit, load_teachers_of, teachers_of
from fastensdistill.files import write_atomically
from fastensdistill.method.modes import evaluating
from fastensdistill.method.perturbation import Perturbation
from fastensdistill.method.student import Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.settings import settings_of
from fastensdistill.train.progress import Piece, Progress, shown
from fastensdistill.train.schedule import in_words
from fastensdistill.weights import load_network, read_card

STRIP = 8  # images beside their perturbed versions
SHOWN = (
    "model", "epochs", "batch_size", "learning_rate", "weight_decay", "temperature", "alpha", "ema_decay", "engine",
    "precision",
)  # fmt: skip
MOST_LANDSCAPES = 3  # students whose branches are drawn with the loss around them
BUDGETS = {"cpu": 1e10, "cuda": 1e14}  # multiply-accumulates for each: some 4 seconds of a core, predicted for a GPU
SET = (  # shown where they are not the paper's
    "optimizer", "clip_norm", "decay_norm_and_bias", "factor_rate", "label_smoothing", "standardize_logits", "target",
    "teacher_weights",
)  # fmt: skip
KEPT_FACTS = ("epoch", "step", "validation_accuracy", "validation_nll")  # of a card, about the weights that were kept


@dataclass
class Evaluated:
    """A row of the results, and the predictions of its first seed, for the plots."""

    row: Row
    probabilities: Tensor  # (N, C) of the first seed on the test split


def evaluate_candidate(candidate: Candidate, data: Dataset, device: torch.device) -> Evaluated:
    """All metrics of every seed on the test split, its parameters and the cost of one image.

    Raises InputError for a network whose output does not fit the data.
    """
    data = for_networks(data, candidate.networks)
    test, validation = EvaluationSet(data.test, device), EvaluationSet(data.validation, device)
    found, first = [], None
    for network in candidate.networks:
        network = network.to(device)
        shape = (data.channels, *data.image_size)
        lead = (len(network),) if isinstance(network, Teachers) else ()
        lead = (network.branches,) if isinstance(network, Student) else lead
        Teachers.check_output(network, candidate.name, shape, (*lead, 1, data.num_classes))
        p = predict(network, test)
        found.append(metrics.evaluate(p, test.labels, predict(network, validation), validation.labels))
        first = p.mean(0).cpu() if first is None else first
    assert first is not None
    example = candidate.networks[0]
    row = Row(candidate.name, candidate.group, found, count_parameters(example), count_macs(example, shape))
    return Evaluated(row, first)


def count_parameters(network: nn.Module) -> int:
    """Values in all parameters, trained or frozen; buffers do not count."""
    return sum(p.numel() for p in network.parameters())


def count_macs(network: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image (channels, H, W): those of convolutions and linear layers."""
    device = next(network.parameters()).device
    with evaluating(network), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *image_shape, device=device))
    return counter.get_total_flops() // 2


def strip_images(student: Student, teachers: Teachers, config: dict[str, Any], data: Dataset) -> tuple[Any, ...] | None:
    """Test images, the same perturbed as the student was trained, and the names of their classes."""
    if config.get("perturbation", "none") == "none" or not {"step_size", "temperature"} <= set(config):
        return None
    data = for_networks(data, [student, teachers])
    images = next(EvaluationSet(data.test, "cpu").batches(STRIP))
    pick, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    perturbation = Perturbation(
        config["perturbation"], len(teachers), student.branches, size=config["step_size"],
        temperature=config["temperature"], pick=pick, noise=noise,
    )  # fmt: skip
    perturbed = perturbation(images, teachers.cpu(), student.cpu()).images
    return images, perturbed, [data.classes[i] for i in data.test.labels[:STRIP]]


def compare(candidates: Sequence[Candidate], data: Dataset, device: torch.device) -> list[Evaluated]:
    """All candidates measured, one after another, with the progress on stderr."""
    networks = sum(len(candidate.networks) for candidate in candidates)
    total = networks * (len(data.test) + len(data.validation))
    found = []
    with shown(Progress("evaluate", total, "image", transient=True)) as progress:
        for candidate in candidates:
            progress.notes = [Piece(candidate.name[:24], 5)]
            found.append(evaluate_candidate(candidate, data, device))
    return found


def check_writable(folder: Path) -> None:
    """Raise InputError unless files can be written to ``folder``, which may have to be made; nothing stays there."""
    place = folder.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    try:
        if not place.is_dir():
            raise NotADirectoryError(20, "a file is in the way", str(place))
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror} ({place})") from error


def write(
    evaluated: Sequence[Evaluated], candidates: Sequence[Candidate], data: Dataset, out: Path, device: torch.device,
    title: str, notes: Sequence[str] = (),
) -> None:  # fmt: skip
    """Write ``results.json``, ``report.html`` and its pictures to ``out``. Raises InputError where that cannot be."""
    notes = [*data.notes, *notes]
    curves = {}
    for candidate in candidates:
        for folder in candidate.folders:
            seed = read_config(folder).get("seed", "?")
            name = candidate.name if len(candidate.folders) == 1 else f"{candidate.name}, seed {seed}"
            if (folder / "metrics.jsonl").is_file():
                records = read_metrics(folder / "metrics.jsonl")
                curves[name] = averaged_records(records) if candidate.over_time else records
    labels = torch.from_numpy(data.test.labels)
    reliability = {e.row.name: (e.probabilities, labels) for e in evaluated}
    strip = perturbed(candidates, data, notes)
    around = landscapes(candidates, data, device, notes)
    rows = [
        {"name": e.row.name, "group": e.row.group, "files": [str(f) for f in c.files], "kept": kept(c),
         "parameters": e.row.parameters, "macs": e.row.macs, "metrics": [m.to_dict() for m in e.row.metrics]}
        for e, c in zip(evaluated, candidates, strict=True)
    ]  # fmt: skip
    facts = facts_about(candidates, data, device) | ({"note": "; ".join(notes)} if notes else {})
    results = {"title": title, "facts": facts, "rows": rows}
    write_atomically(out / "results.json", json.dumps(results, indent=1).encode())
    write_report(
        out, title=title, rows=[e.row for e in evaluated], curves=curves, reliability=reliability, strip=strip,
        facts=facts, augmented=augmented([folder for c in candidates for folder in c.folders], data), landscapes=around,
    )  # fmt: skip


def averaged_records(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a run's records say of its networks' averages over time, as if of the networks; training has none."""
    shared = ("event", "step", "epoch")
    found = []
    for record in records:
        own = {k.removeprefix("ema_"): v for k, v in record.items() if k.startswith("ema_")}
        found += [{**{k: record[k] for k in shared if k in record}, **own}] if own else []
    return found


def kept(candidate: Candidate) -> list[dict[str, Any]]:
    """For each file of a row, what its card says of the weights in it: when they were reached, how good they were."""
    cards = [read_card(file) for file in candidate.files]
    return [{key: card[key] for key in KEPT_FACTS if key in card} for card in cards]


def warned(candidate: Candidate) -> list[str]:
    """What the cards of a row's files warn of: that a network is worse than the branches it is the average of."""
    return [line for file in candidate.files for line in read_card(file).get("warnings", ())]


def facts_about(candidates: Sequence[Candidate], data: Dataset, device: torch.device) -> dict[str, str]:
    """What a reader of the report has to know besides the numbers, in order."""
    configs: list[dict[str, Any]] = [c for c in (read_config(f) for x in candidates for f in x.folders) if c]
    found = {k: {_shown(c[k]) for c in configs if c.get(k) is not None} for k in SHOWN}
    for k in SET:
        values = {_shown(c[k]) for c in configs if k in c}
        found[k] = values if values != {_shown(settings_of(DistillRun)[k].default)} else set()
    found["schedule"] = {in_words(c) or "cosine" for c in configs} - {"cosine"}
    found["augmentation"] = {augmentation(augment) for augment in (recorded(c, data) for c in configs) if augment}
    counts = torch.bincount(torch.from_numpy(data.test.labels), minlength=data.num_classes).tolist()
    few, many = (f"{n:,} ({data.classes[counts.index(n)]})" for n in (min(counts), max(counts)))
    kept_weights, warnings = told(candidates)
    return {
        "data": f"{data.name}: {len(data.train):,} training, {len(data.validation):,} validation, "
        f"{len(data.test):,} test images, {data.num_classes} classes",
        "test images per class": f"{few} to {many}" if min(counts) < max(counts) else f"{max(counts):,}",
        **{k: values.pop() for k, values in found.items() if len(values) == 1},
        **({"kept weights": kept_weights} if kept_weights else {}), **({"warnings": warnings} if warnings else {}),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
    }  # fmt: skip


def told(candidates: Sequence[Candidate]) -> tuple[str, str]:
    """What the rows' runs said at their ends: which weights they kept, and warnings, each with the rows it is about.

    Of files without their run it is what their cards hold."""
    when, warnings = [], dict[str, list[str]]()
    for candidate in candidates:
        if candidate.group == "ensemble":
            continue
        ends = [end for folder in candidate.folders if not candidate.over_time for end in _ends(folder)]
        lines = [line for end in ends for line in end.get("warnings", ())] if ends else warned(candidate)
        for warning in dict.fromkeys(lines):
            warnings.setdefault(warning, []).append(candidate.name)
        said = [end["said"] for end in ends if "said" in end]
        reached = [k for k in kept(candidate) if k.get("epoch") is not None]
        if said:
            when.append(f"{candidate.name}: {', '.join(said)}")
        elif reached:
            epochs = ", ".join(f"{k['epoch']:g}" for k in reached)
            best = ", ".join(f"{100 * k['validation_accuracy']:.1f}" for k in reached if "validation_accuracy" in k)
            when.append(f"{candidate.name}: epoch {epochs}" + (f" (validation {best} %)" if best else ""))
    return "; ".join(when), "; ".join(f"{', '.join(names)}: {warning}" for warning, names in warnings.items())


def _ends(folder: Path) -> list[dict[str, Any]]:
    records = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    return [record for record in records if record.get("event") == "kept"][-1:]


def perturbed(candidates: Sequence[Candidate], data: Dataset, notes: list[str]) -> tuple[Any, ...] | None:
    """The strip of the last candidate that was distilled; None, with a note, where its teachers are gone."""
    for candidate in reversed(candidates):
        config = read_config(candidate.folders[0]) if candidate.folders else {}
        files = [Path(f) for f in config.get("teachers", ())]
        if not files or not (candidate.folders[0] / "student.safetensors").is_file():
            continue
        if not all(f.is_file() for f in files):
            notes.append(f"the teachers of {candidate.name} are not in {files[0].parent} any more")
            continue
        file = candidate.folders[0] / "student.safetensors"
        [student] = fit([load_network(file)], [file], data, [])
        networks, _ = load_teachers_of([origin(f) for f in files], teachers_of(config), data, [])
        strip = strip_images(student, Teachers(networks), config, data) if isinstance(student, Student) else None
        if strip is not None:
            return strip
    return None


def landscapes(
    candidates: Sequence[Candidate], data: Dataset, device: torch.device, notes: list[str]
) -> dict[str, Landscape]:
    """The loss around the branches of the first students that ship their average, three at most, in bounded time."""
    found: dict[str, Landscape] = {}
    for candidate in candidates:
        file = candidate.folders[0] / "student.safetensors" if candidate.folders else None
        if file is None or not file.is_file() or candidate.over_time or len(found) == MOST_LANDSCAPES:
            continue
        [student] = fit([load_network(file)], [file], data, [])
        if not isinstance(student, Student) or student.branches == 1 or student.deployed() is student:
            continue
        own, student = for_networks(data, [student]), student.to(device)
        macs = count_macs(student.deployed(), (own.channels, *own.image_size))
        images = EvaluationSet(own.validation, device)
        one = landscape(student, images, macs, BUDGETS[device.type])
        if one is None:
            notes.append(f"the loss around the branches of {candidate.name} is not drawn: it would take too long here")
        else:
            found[candidate.name] = one
    return found


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
