"""From run folders and files to the rows of a table and what a report shows."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastensdistill.data.loader import EvaluationSet
from fastensdistill.data.sources import Dataset
from fastensdistill.errors import InputError
from fastensdistill.evaluate import metrics
from fastensdistill.evaluate.predict import predict
from fastensdistill.evaluate.report import Row, read_metrics, write_report
from fastensdistill.files import write_atomically
from fastensdistill.method.modes import evaluating
from fastensdistill.method.perturbation import Perturbation
from fastensdistill.method.student import Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.weights import load_network, teacher_files

STRIP = 8  # images beside their perturbed versions
SHOWN = ("model", "epochs", "batch_size", "learning_rate", "weight_decay", "temperature", "alpha", "precision")


@dataclass
class Candidate:
    """One row: a network, or an ensemble (Teachers, or a student that is one), once for each seed."""

    name: str
    group: str  # teachers, ensemble or student
    networks: list[nn.Module]
    folders: list[Path] = field(default_factory=list)


@dataclass
class Evaluated:
    row: Row
    probabilities: Tensor  # (N, C) of the first seed on the test split


def evaluate_candidate(candidate: Candidate, data: Dataset, device: torch.device) -> Evaluated:
    """All metrics of every seed on the test split, its parameters and the cost of one image.

    Raises InputError for a network whose output does not fit the data.
    """
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
    return sum(p.numel() for p in network.parameters())


def count_macs(network: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image (channels, H, W): those of convolutions and linear layers."""
    device = next(network.parameters()).device
    with evaluating(network), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *image_shape, device=device))
    return counter.get_total_flops() // 2


def find_candidates(paths: Sequence[Path], data: Dataset, foreign: Foreign | None = None) -> list[Candidate]:
    """The rows that files and run folders make; runs that differ only in their seed share one.

    ``foreign`` says what the files among ``paths`` hold that do not say it.
    A folder of ``teach`` gives its members and their ensemble; one of ``distill`` its averaged network, or the
    branch ensemble where that is what the student is for. Raises InputError for a path that holds neither.
    """
    candidates: list[Candidate] = []
    seeds: dict[str, Candidate] = {}
    foreign = foreign or Foreign()
    files = [path for path in paths if path.is_file()]
    for path in paths:
        if path in files:
            network = foreign.load(path, files.index(path), len(files), data)
            candidates.append(Candidate(path.stem, "student", [network]))
            continue
        teachers = teacher_files(path)
        if teachers:
            networks = [load_network(f) for f in teachers]
            prefix = "" if path.name == "teachers" else f"{path.name}: "
            candidates.append(Candidate(f"{prefix}teachers", "teachers", networks, [path]))
            if len(networks) > 1:
                candidates.append(Candidate(f"{prefix}ensemble of {len(networks)}", "ensemble", [Teachers(networks)]))
            continue
        file = next((path / f for f in ("network.safetensors", "student.safetensors") if (path / f).is_file()), None)
        if file is None:
            raise InputError(f"{path}: expected a safetensors file, or the folder of a finished run")
        config = read_config(path)
        free = ("seed", "out", "resume", "tensorboard", "device", "engine")
        # A run made from Python saves no teachers and no data: what else differs cannot be seen
        whole = {"teachers", "data"} <= set(config)
        key = json.dumps({k: v for k, v in config.items() if k not in free}, default=str) if whole else str(path)
        if key in seeds:
            seeds[key].networks.append(load_network(file))
            seeds[key].folders.append(path)
            seeds[key].name = re.sub(r"[-_]?(seed)?[-_]?\d+$", "", seeds[key].folders[0].name) or path.name
        else:
            seeds[key] = Candidate(path.name, "student", [load_network(file)], [path])
            candidates.append(seeds[key])
    if not candidates:
        raise InputError("nothing to evaluate: expected at least one file or run folder")
    return candidates


@dataclass(frozen=True)
class Foreign:
    """What files hold that do not say it: each field for all of them, or for one after another.

    ``models`` are architectures, ``mean`` and ``std`` the normalisation of pixels in [0, 1], a value per channel; unset
    it is the data's, as is the number of classes. ``prefix`` begins the settings' names in errors.
    """

    models: str | Sequence[str] | None = ()
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    prefix: str = ""

    def load(self, path: Path, index: int, count: int, data: Dataset) -> nn.Module:
        """The network in ``path``, the file ``index`` of ``count``. Raises InputError for settings that do not fit."""
        models = [self.models] if isinstance(self.models, str) else list(self.models or ())
        model = self._own("model", models, 1, index, count)
        mean = self._own("mean", self.mean, data.channels, index, count) or data.mean
        std = self._own("std", self.std, data.channels, index, count) or data.std
        return load_network(path, model[0] if model else None, mean=mean, std=std, num_classes=data.num_classes)

    def _own(self, name: str, values: Sequence[Any], each: int, index: int, count: int) -> Sequence[Any]:
        if len(values) not in (0, each, each * count):
            raise InputError(
                f"{self.prefix}{name} has {len(values)} values: expected {each} for all files, or {each * count} for "
                f"the {count} files one after another"
            )
        return values[index * each : (index + 1) * each] if len(values) > each else values


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of the run in ``folder``, {} where it has none."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a mapping of settings, got {type(config).__name__}")
    return config


def teachers_of(config: dict[str, Any]) -> Foreign:
    """What a distill run's settings say of its teachers' files."""
    model, mean, std = (config.get(f"teacher_{name}") or () for name in ("model", "mean", "std"))
    return Foreign(model, mean, std, prefix="teacher_")


def strip_images(student: Student, teachers: Teachers, config: dict[str, Any], data: Dataset) -> tuple[Any, ...] | None:
    """Test images, the same perturbed as the student was trained, and the names of their classes."""
    if config.get("perturbation", "none") == "none" or not {"step_size", "temperature"} <= set(config):
        return None
    images = next(EvaluationSet(data.test, "cpu").batches(STRIP))
    pick, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    perturbation = Perturbation(
        config["perturbation"], len(teachers), student.branches, size=config["step_size"],
        temperature=config["temperature"], pick=pick, noise=noise,
    )  # fmt: skip
    perturbed = perturbation(images, teachers.cpu(), student.cpu(), data.num_classes).images
    return images, perturbed, [data.classes[i] for i in data.test.labels[:STRIP]]


def report(candidates: Sequence[Candidate], data: Dataset, out: Path, device: torch.device, title: str) -> list[Row]:
    """Evaluate all candidates and write ``results.json``, ``report.html`` and its pictures to ``out``."""
    evaluated = [evaluate_candidate(c, data, device) for c in candidates]
    rows = [e.row for e in evaluated]
    curves = {}
    for candidate in candidates:
        for folder in candidate.folders:
            seed = read_config(folder).get("seed", "?")
            name = candidate.name if len(candidate.folders) == 1 else f"{candidate.name}, seed {seed}"
            if (folder / "metrics.jsonl").is_file():
                curves[name] = read_metrics(folder / "metrics.jsonl")
    labels = torch.from_numpy(data.test.labels)
    reliability = {e.row.name: (e.probabilities, labels) for e in evaluated}
    strip = None
    configs: list[dict[str, Any]] = [c for c in (read_config(f) for x in candidates for f in x.folders) if c]
    found = {k: {str(c[k]) for c in configs if c.get(k) is not None} for k in SHOWN}
    shared = {k: values.pop() for k, values in found.items() if len(values) == 1}
    for candidate in reversed(candidates):
        config = read_config(candidate.folders[0]) if candidate.folders else {}
        files = [Path(f) for f in config.get("teachers", ())]
        if strip is None and files and all(f.is_file() for f in files):
            student = load_network(candidate.folders[0] / "student.safetensors")
            foreign = teachers_of(config)
            teachers = Teachers([foreign.load(f, i, len(files), data) for i, f in enumerate(files)])
            strip = strip_images(student, teachers, config, data) if isinstance(student, Student) else None
    facts = {
        "data": f"{data.name}: {len(data.train):,} training, {len(data.validation):,} validation, "
        f"{len(data.test):,} test images, {data.num_classes} classes",
        **shared,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
    }  # fmt: skip
    results = {"title": title, "facts": facts, "rows": [
        {"name": r.name, "group": r.group, "parameters": r.parameters, "macs": r.macs,
         "metrics": [m.to_dict() for m in r.metrics]} for r in rows
    ]}  # fmt: skip
    write_atomically(out / "results.json", json.dumps(results, indent=1).encode())
    write_report(out, title=title, rows=rows, curves=curves, reliability=reliability, strip=strip, facts=facts)
    return rows
