"""The block that a run prints before its first step, and what it adds to its settings and files."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from rich.console import Console
from torch import nn

from fastensdistill.config import DistillConfig
from fastensdistill.data.presets import SWITCHES, augmentation, doubts
from fastensdistill.data.sources import Dataset
from fastensdistill.engine.common import precision_on
from fastensdistill.engine.select import no_cuda
from fastensdistill.files import expanded
from fastensdistill.train.schedule import in_words

if TYPE_CHECKING:
    from fastensdistill.train.distill import DistillTrainer
    from fastensdistill.train.trainer import Trainer

WIDTH, INDENT = 80, 12  # of a log, or a terminal that is not narrower
SOURCE = ("data", "root", "limit", "validation", "image_size")  # of the settings, what says which images


def describe(trainer: Trainer) -> str:
    """The block: data, augmentation, model, engine, and of a student its teachers. Measures the teachers."""
    config, data = trainer.config, trainer.data
    networks = list(trainer.networks.values())
    distilled = trainer.title == "distill"
    seeds = f"seed {trainer.seeds[0]}" + (f" to {trainer.seeds[-1]}" if len(trainer.seeds) > 1 else "")
    count = f"{_several(len(networks), 'network')}, {seeds}"
    where = f", into {trainer.out}" if trainer.out is not None else ""
    length = f"{_several(config.epochs, 'epoch')} of {_several(trainer.steps_per_epoch, 'step')}"
    then = in_words(vars(config))
    rate = "AdamW, " if config.optimizer == "adamw" else ""
    rate += f"learning rate {config.learning_rate:g}, warm-up {config.warmup_epochs:g} epochs"
    rate += f", then {then}" if then else ""
    rate += f", averages over time of decay {config.ema_decay:g}" if config.ema_decay else ""
    size = f"{data.image_size[0]}x{data.image_size[1]}, {_several(data.channels, 'channel')}"
    device = "" if trainer.engine.reason == no_cuda(trainer.device) else f" on {trainer.device}"  # said there
    lines = {
        "recipe": f"{length}, batch {config.batch_size}, {rate}",
        "data": splits(data),
        "classes": per_class(data),
        "images": f"{size}; in training {augmentation(trainer.augment)}",
        "model": models(networks),
        "engine": f"{trainer.engine}; precision {precision_on(config, trainer.device)}{device}",
    }
    if distilled:
        about = cast("DistillTrainer", trainer)
        count = f"a student of {_several(len(about.teachers), 'teacher')}, {seeds}"
        lines |= _about_student(about)
    told_lines = [("", f"{trainer.title}: {count}{where}"), *lines.items()]
    notes = (*data.notes, *doubts(trainer.augment, data), *trainer.notes)
    told_lines += [("note", note) for note in notes]
    width = min(WIDTH, max(40, Console(stderr=True).width)) if sys.stderr.isatty() else WIDTH
    return "\n".join(_line(label, text, width) for label, text in told_lines)


def _about_student(trainer: DistillTrainer) -> dict[str, str]:
    student, settings = trainer.student, trainer.config
    assert isinstance(settings, DistillConfig)
    told = trainer.about_teachers()
    each = " ".join(f"{100 * a:.2f}" for a in told["teacher_accuracy"])
    together = f", their ensemble {100 * told['ensemble_accuracy']:.2f} %" if "ensemble_accuracy" in told else ""
    branches = _several(student.branches, "branch", "es")
    size = f" of size {255 * settings.step_size:.3g}/255" if settings.perturbation != "none" else ""
    alone = student.branches == 1
    return {
        "model": models([student.module]) + ("" if alone else " with its branches"),
        "teachers": f"{models(list(trainer.teachers.networks))}; validation {each} %{together}",
        "student": f"{student.kind}, {branches}, perturbation {settings.perturbation}{size}",
    }


def splits(data: Dataset) -> str:
    """The name of a data set and how many images its splits have."""
    train, validation, test = (f"{len(split):,}" for split in (data.train, data.validation, data.test))
    return f"{data.name}: {train} training, {validation} validation, {test} test images"


def per_class(data: Dataset) -> str:
    """What the classes are called, and the smallest and the largest of them among the training images."""
    counts = np.bincount(data.train.labels, minlength=data.num_classes)
    low, high = int(counts.argmin()), int(counts.argmax())
    few = f"{counts[low]:,} ({data.classes[low]}) to {counts[high]:,} ({data.classes[high]})"
    named = data.classes if data.num_classes <= 5 else (*data.classes[:3], "...", data.classes[-1])
    spread = f"{counts[low]:,} each" if counts[low] == counts[high] else few
    return f"{data.num_classes}: {', '.join(named)}; training images: {spread}"


def models(networks: list[nn.Module]) -> str:
    """Of networks, what they are and how many parameters each has: "2 of preresnet (blocks 1 1), 1,384 parameters"."""
    found = Counter(_model(network) for network in networks)
    return "; ".join(f"{n} of {name}" if len(networks) > 1 else name for name, n in found.items())


def used(trainer: Trainer) -> Any:
    """The settings that config.yaml holds, with what "auto" meant in them: engine, precision and augmentation."""
    settings = trainer.saved_config
    resolved = {"engine": trainer.engine.name, "precision": precision_on(trainer.config, trainer.device)}
    return dataclasses.replace(settings, **resolved, **{name: getattr(trainer.augment, name) for name in SWITCHES})


def source(trainer: Trainer) -> dict[str, Any]:
    """For a file's card: the images a network was made for, and where they were loaded from, as far as is known."""
    data, settings = trainer.data, trainer.saved_config
    about = {"data": data.name, "classes": list(data.classes), "image_size": list(data.image_size),
             "channels": data.channels}  # fmt: skip
    said = {key: getattr(settings, key) for key in SOURCE} if getattr(settings, "data", None) else {}
    if not said and trainer.data_given is not None:
        path = expanded(trainer.data_given)
        said = {"data": str(path.resolve()) if path.exists() else str(trainer.data_given)}
    return {**about, **({"source": said} if said else {})}


def _model(network: nn.Module) -> str:
    spec = getattr(network, "spec", None)
    name = spec.name if spec else type(network).__name__
    shape = spec.arguments if spec else {}
    told = [f"{k.replace('_', ' ')} {_plain(shape[k])}" for k in ("blocks", "widen", "in_planes") if shape.get(k)]
    count = sum(p.numel() for p in network.parameters())
    return f"{name} ({', '.join(told)}), {count:,} parameters" if told else f"{name}, {count:,} parameters"


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _several(count: int, what: str, ending: str = "s") -> str:
    return f"{count} {what}{ending * (count != 1)}"


def _line(label: str, text: str, width: int) -> str:
    if not label:
        return text
    return textwrap.fill(
        text, width, initial_indent=f"  {label:{INDENT - 2}}", subsequent_indent=" " * INDENT, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
