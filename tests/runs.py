"""Small runs that the tests share: their data, trainers, flags, and how they are interrupted."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fastensdistill.config import DistillConfig
from fastensdistill.data.sources import Dataset, Split
from fastensdistill.method.student import STUDENTS
from fastensdistill.method.teachers import Teachers
from fastensdistill.train.distill import DistillTrainer
from fastensdistill.train.setup import seeded
from fastensdistill.train.trainer import Trainer
from tests.networks import tiny

ROOT = Path(__file__).parent.parent
NETWORK = ["--model", "preresnet", "--blocks", "1", "1", "--in-planes", "4"]  # ``tiny``, on the command line


def dataset(train: int = 40, classes: int = 4) -> Dataset:
    """Images whose brightest quadrant is their class, with noise: learnable in seconds."""
    rng = np.random.default_rng(0)

    def split(n: int) -> Split:
        labels = rng.integers(0, classes, n)
        images = rng.integers(0, 120, (n, 8, 8, 3))
        for image, label in zip(images, labels, strict=True):
            y, x = divmod(int(label), 2)
            image[4 * y : 4 * y + 4, 4 * x : 4 * x + 4] += 110
        return Split(images.astype(np.uint8), labels.astype(np.int64))

    names = tuple("abcd"[:classes])
    return Dataset("quadrants", split(train), split(24), split(24), names, (0.4,) * 3, (0.2,) * 3)


def make(
    kind: str = "latent-be",
    out: Path | str | None = None,
    *,
    data: Dataset | None = None,
    resume: bool = False,
    network: Callable[[], nn.Module] = lambda: tiny(4),
    **settings: Any,
) -> DistillTrainer:
    """A distillation of two tiny teachers, not started; ``settings`` change its config, ``network`` the student's."""
    settings = {"epochs": 4, "batch_size": 8, "student": kind, "learning_rate": 0.05, "device": "cpu", **settings}
    config = DistillConfig(**settings)
    teachers = Teachers([seeded(10 + i, lambda: tiny(4)) for i in range(2)])
    branches = 1 if kind == "single" else 2
    student = seeded(config.seed, lambda: STUDENTS[kind](network(), branches))
    return DistillTrainer(student, teachers, data or dataset(), config, out=out, resume=resume, quiet=True)


class At:
    """Calls ``do(scalars)`` after one step of a trainer; what it returns takes the scalars' place."""

    def __init__(self, trainer: Trainer, step: int, do: Callable[[Any], Any]) -> None:
        self.trainer, self.at, self.do, self.inner = trainer, step, do, trainer.train_step
        trainer.train_step = self  # type: ignore[method-assign]

    def __call__(self) -> Any:
        scalars = self.inner()
        return scalars if self.trainer.step_index != self.at else self.do(scalars)


class StopAt:
    """Raises SIGINT in the middle of a run, as a user pressing Ctrl-C does."""

    def __init__(self, trainer: Trainer, step: int) -> None:
        self.step, self.inner = step, trainer.train_step
        trainer.train_step = self  # type: ignore[method-assign]
        self.count = trainer.step_index

    def __call__(self) -> Any:
        self.count += 1
        if self.count == self.step:
            signal.raise_signal(signal.SIGINT)
        return self.inner()
