"""When does the perturbation help? The runs of docs/studies/perturbation.md, which says why they are as they are.

    python -m bench.perturbation_study FILE.npz [--out runs/perturbation] [--workers N] [--json FILE] [--png FILE]

FILE.npz holds CIFAR-100 as ``train_images``, ``train_labels``, ``test_images`` and ``test_labels``; classes are counted
in alphabetical order. Every run that ends is a file in the folder ``--out``, and the same call goes on with those that
are missing. ``--pilot`` takes other classes and another seed: to choose rates and lengths by, not for results.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastensdistill as fed
from bench.common import describe_host, save, table
from fastensdistill.data.sources import measure
from fastensdistill.errors import InputError
from fastensdistill.evaluate import metrics
from fastensdistill.evaluate.plots import metric_dots, png
from fastensdistill.evaluate.report import read_metrics
from fastensdistill.files import write_atomically
from fastensdistill.method.student import STUDENTS
from fastensdistill.train.setup import seeded

CLASSES, PILOT_CLASSES = range(3, 100, 10), range(8, 100, 10)
SEEDS, PILOT_SEEDS = range(5), range(1000, 1001)
KEPT = 50  # images of each class to train on, and as many to validate on; all others are for testing
SIZE = 16
MEMBERS = 2
TEACHER_SEED = 100
NETWORK: dict[str, Any] = {"blocks": (1, 1, 1), "in_planes": 8}
# The teachers' epochs, of 15 steps each; nothing else differs
TEACHERS = {"fit": 40, "not fit": 6}
RECIPE: dict[str, Any] = {"batch_size": 32, "pad": 0, "flip": False, "device": "cpu"}
TEACHER_RATE = 0.1
STUDENT: dict[str, Any] = {"learning_rate": 0.05, "epochs": 20, "warmup_epochs": 6}
# name → student, perturbation, its size in 255ths, conditions
BOTH = tuple(TEACHERS)
WAYS: dict[str, tuple[str, str, float, tuple[str, ...]]] = {
    "KD": ("single", "none", 0, BOTH),
    "LatentBE": ("latent-be", "none", 0, BOTH),
    "TDiv-SDiv 4/255": ("latent-be", "tdiv-sdiv", 4, BOTH),
    "noise 4/255": ("latent-be", "gaussian", 4, ("fit",)),
}
# What is compared: the second is subtracted from the first
PAIRS = [
    ("LatentBE", "KD"), ("TDiv-SDiv 4/255", "LatentBE"), ("TDiv-SDiv 4/255", "noise 4/255"),
    ("noise 4/255", "LatentBE"),
]  # fmt: skip
MEASURES = ("accuracy", "nll", "cnll", "branch_kl")
T95 = 2.776  # of Student's distribution with the four degrees of freedom of five seeds


def prepare(file: Path, classes: Sequence[int], kept: int = KEPT, size: int = SIZE) -> fed.Dataset:
    """Some classes of CIFAR-100, each pixel the mean of a square, of each class the first images for training and the
    next for validation. Raises InputError for a file that has none of them."""
    images: dict[str, list[np.ndarray]] = {"train": [], "validation": [], "test": []}
    labels: dict[str, list[np.ndarray]] = {"train": [], "validation": [], "test": []}
    with np.load(file) as arrays:
        for split in ("train", "test"):
            if f"{split}_images" not in arrays or f"{split}_labels" not in arrays:
                raise InputError(f"{file} lacks {split}_images or {split}_labels; expected CIFAR-100 as arrays")
            given_images, given_labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
            for i, name in enumerate(classes):
                found = shrink(given_images[given_labels == name], size)
                cuts = {"train": (0, kept), "validation": (kept, 2 * kept), "test": (2 * kept, len(found))}
                for part, (start, end) in cuts.items() if split == "train" else [("test", (0, len(found)))]:
                    images[part].append(found[start:end])
                    labels[part].append(np.full(end - start, i, dtype=np.int64))
    splits = {part: fed.Split(np.concatenate(images[part]), np.concatenate(labels[part])) for part in images}
    mean, std = measure(splits["train"].images)
    names = tuple(str(name) for name in classes)
    return fed.Dataset(file.name, splits["train"], splits["validation"], splits["test"], names, mean, std)


def shrink(images: np.ndarray, size: int) -> np.ndarray:
    """(N, H, W, 3) bytes to (N, size, size, 3), each pixel the mean of a square."""
    N, H, W, channels = images.shape
    squares = images.astype(np.float64).reshape(N, size, H // size, size, W // size, channels)
    return np.rint(squares.mean((2, 4))).astype(np.uint8)


def build(data: fed.Dataset, seed: int) -> nn.Module:
    make = lambda: fed.create_model("preresnet", data.num_classes, mean=data.mean, std=data.std, **NETWORK)  # noqa: E731
    return seeded(seed, make)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@dataclass(frozen=True)
class Run:
    """One part of the study."""

    condition: str
    way: str  # "teachers", or one of WAYS
    seed: int

    @property
    def name(self) -> str:
        """Of its folder, and with .json of the file that it leaves."""
        return f"{self.condition} {self.way} {self.seed}".lower().replace(" ", "-").replace("/", "-")


def do(run: Run, file: Path, folder: Path, classes: Sequence[int]) -> Run:
    """Train what ``run`` says, on one thread, and write what it is like."""
    torch.set_num_threads(1)
    began, data = cpu_seconds(), prepare(file, classes)
    found = teach(run, folder, data) if run.way == "teachers" else distil(run, folder, data)
    found = asdict(run) | {"cpu_seconds": round(cpu_seconds() - began, 1)} | found
    write_atomically(folder / f"{run.name}.json", json.dumps(found, indent=1).encode())
    return run


def teach(run: Run, folder: Path, data: fed.Dataset) -> dict[str, Any]:
    """The teachers of a condition: their mean accuracy and NLL, their ensemble's, and how much they differ."""
    out, networks = folder / run.name, [build(data, run.seed + i) for i in range(MEMBERS)]
    config = fed.TeachConfig(
        members=MEMBERS, seed=run.seed, learning_rate=TEACHER_RATE, epochs=TEACHERS[run.condition], **RECIPE
    )
    fed.TeachTrainer(networks, data, config, out=out, resume=(out / "config.yaml").is_file(), quiet=True).fit()
    networks, found = teachers_of(run.condition, folder), {}
    for name in ("train", "test"):
        p, labels = probabilities(networks, getattr(data, name))
        found[name] = {
            "accuracy": statistics.mean(metrics.accuracy(member, labels) for member in p),
            "nll": statistics.mean(metrics.nll(member, labels) for member in p),
            "ensemble_accuracy": metrics.accuracy(p.mean(0), labels), "ensemble_nll": metrics.nll(p.mean(0), labels),
            "kl": metrics.pairwise_kl(p), "agreement": metrics.agreement(p),
        }  # fmt: skip
    return found


def distil(run: Run, folder: Path, data: fed.Dataset) -> dict[str, Any]:
    """A student: all metrics of its last network on test images, and how much its branches differ on validation's."""
    kind, perturbation, size, _ = WAYS[run.way]
    student = STUDENTS[kind](build(data, run.seed), 1 if kind == "single" else MEMBERS)
    config = fed.DistillConfig(
        student=kind, perturbation=perturbation, step_size=size / 255, seed=run.seed, **STUDENT, **RECIPE
    )
    out, teachers = folder / run.name, teachers_of(run.condition, folder)
    resume = (out / "config.yaml").is_file()
    fed.DistillTrainer(student, teachers, data, config, out=out, resume=resume, quiet=True).fit()
    network = [fed.load_network(out / "last.safetensors")]
    found = metrics.evaluate(*probabilities(network, data.test), *probabilities(network, data.validation)).to_dict()
    looks = [look for look in read_metrics(out / "metrics.jsonl") if "branch_kl" in look]
    return found | ({"branch_kl": looks[-1]["branch_kl"]} if looks else {})


def teachers_of(condition: str, folder: Path) -> list[nn.Module]:
    """The teachers as their last step left them: those with the best validation NLL have not fitted their images."""
    files = [folder / Run(condition, "teachers", TEACHER_SEED).name / f"last-{i}.safetensors" for i in range(MEMBERS)]
    return [fed.load_network(file) for file in files]


def probabilities(networks: Iterable[nn.Module], split: fed.Split) -> tuple[Tensor, Tensor]:
    """(E, N, C) of all networks, a student's branches among them, and the labels (N,)."""
    return torch.cat([fed.predict(network, split) for network in networks]), torch.from_numpy(split.labels)


def compare(students: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Differences paired by seed, of every pair of ways in every condition, and between the conditions' differences."""
    by_run = {(s["condition"], s["way"], s["seed"]): s for s in students}
    seeds = sorted({s["seed"] for s in students})
    rows = []
    for first, second in PAIRS:
        found: dict[str, dict[str, dict[int, float]]] = {}
        for condition in TEACHERS:
            pairs = {s: (by_run.get((condition, first, s)), by_run.get((condition, second, s))) for s in seeds}
            found[condition] = {
                name: {s: a[name] - b[name] for s, (a, b) in pairs.items() if a and b and name in a and name in b}
                for name in MEASURES  # plain distillation has no branches
            }
        fit, other = (found[condition] for condition in TEACHERS)
        found[" − ".join(TEACHERS)] = {
            name: {s: fit[name][s] - other[name][s] for s in fit[name].keys() & other[name].keys()} for name in MEASURES
        }
        for condition, differences in found.items():
            row = {name: spread(list(d.values())) for name, d in differences.items() if d}
            if row:
                rows.append({"condition": condition, "first": first, "second": second} | row)
    return rows


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard error and half of the 95% interval of five seeds, and how many there are."""
    mean = statistics.mean(values)
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return {"mean": mean, "error": error, "half": T95 * error, "seeds": len(values)}


def report(found: Sequence[dict[str, Any]]) -> str:
    """What there is so far, as text: teachers, means of every way, and differences with their standard errors."""
    teachers = [
        {"condition": r["condition"], "images": name, **r[name]}
        for r in found if r["way"] == "teachers" for name in ("train", "test")
    ]  # fmt: skip
    parts = [table(teachers, {k: k for k in ("condition", "images", "accuracy", "nll", "ensemble_accuracy",
                                             "ensemble_nll", "kl", "agreement")})]  # fmt: skip
    students = [r for r in found if r["way"] != "teachers"]
    means = []
    for condition in TEACHERS:
        for way in WAYS:
            runs = [r for r in students if (r["condition"], r["way"]) == (condition, way)]
            if runs:
                row: dict[str, Any] = {"condition": condition, "way": way, "seeds": len(runs)}
                means.append(row | {m: statistics.mean(r[m] for r in runs) for m in MEASURES if m in runs[0]})
    parts.append(table(means, {k: k for k in ("condition", "way", "seeds", *MEASURES)}))
    rows = [
        {"condition": d["condition"], "difference": f"{d['first']} − {d['second']}", "seeds": d["nll"]["seeds"]}
        | {m: f"{d[m]['mean']:+.4f} ± {d[m]['error']:.4f}" for m in MEASURES if m in d}
        for d in compare(students)
    ]  # fmt: skip
    parts.append(table(rows, {k: k for k in ("condition", "difference", "seeds", *MEASURES)}))
    return "\n\n".join(parts)


def picture(students: Sequence[dict[str, Any]]) -> bytes:
    """A PNG: test NLL and accuracy of every seed, in both conditions, of the ways that both have."""
    panels = {
        f"{title}, teachers {condition}": {
            way: [factor * s[name] for s in students if (s["condition"], s["way"]) == (condition, way)]
            for way, (*_, where) in WAYS.items() if where == BOTH
        }
        for name, title, factor in (("nll", "Test NLL", 1), ("accuracy", "ACC %", 100)) for condition in TEACHERS
    }  # fmt: skip
    return png(metric_dots(panels))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.npz")
    parser.add_argument("--out", type=Path, default=Path("runs/perturbation"), help="folder of what every run found")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, a thread each")
    parser.add_argument("--json", type=Path, help="write all results there, once all runs have ended")
    parser.add_argument("--png", type=Path, help="draw them there")
    parser.add_argument("--pilot", action="store_true", help="other classes, one seed that is not reported")
    options = parser.parse_args(argv)
    classes, seeds = (PILOT_CLASSES, PILOT_SEEDS) if options.pilot else (CLASSES, SEEDS)
    teachers = [Run(condition, "teachers", TEACHER_SEED) for condition in TEACHERS]
    students = [
        Run(condition, way, seed)
        for both in (True, False) for seed in seeds  # what is in one condition alone comes last
        for way, (*_, where) in WAYS.items() if (where == BOTH) == both for condition in where
    ]  # fmt: skip
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for runs in (teachers, students):
            missing = [run for run in runs if not (options.out / f"{run.name}.json").is_file()]
            waiting = [pool.submit(do, run, options.file, options.out, classes) for run in missing]
            for done in as_completed(waiting):
                print(done.result(), flush=True)
    found = [json.loads((options.out / f"{run.name}.json").read_text()) for run in (*teachers, *students)]
    print(report(found))
    measured = [r for r in found if r["way"] != "teachers"]
    if options.png:
        write_atomically(options.png, picture(measured))
    differences = compare(measured)
    save(options.json, "perturbation", describe_host(torch.device("cpu")), options.pilot, runs=found,
         differences=differences)  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
