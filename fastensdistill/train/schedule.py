"""The learning rate of every step, and the epochs after which the network is validated (docs/method.md, Recipe)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastensdistill.config import TrainConfig
from fastensdistill.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0, then ``kind``, per step: step 0 has rate 0.

    "cosine" ends at 0, "constant" stays at the peak, and "step" multiplies by ``gamma`` from each of the ``milestones``
    on, which are steps.
    """

    peak: float
    warmup_steps: int
    total_steps: int
    kind: str = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 1.0

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.kind == "cosine":
            done = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
            return self.peak * 0.5 * (1 + math.cos(math.pi * done))
        return self.peak * self.gamma ** sum(step >= milestone for milestone in self.milestones)


def make_schedule(config: TrainConfig, steps_per_epoch: int) -> Schedule:
    """Raises InputError where the warm-up leaves no step for the rest."""
    assert config.warmup_epochs is not None
    warmup, total = round(config.warmup_epochs * steps_per_epoch), config.epochs * steps_per_epoch
    if warmup >= total:
        raise InputError(f"warmup_epochs={config.warmup_epochs}: expected less than the run's {config.epochs} epochs")
    milestones = tuple(round(share * total) for share in config.milestones)
    return Schedule(config.learning_rate, warmup, total, config.schedule, milestones, config.gamma)


def in_words(settings: Mapping[str, Any]) -> str:
    """How the rate of a run with these settings goes on after the warm-up; "" for the recipe's cosine."""
    kind = settings.get("schedule", "cosine")
    if kind == "step":
        at = " ".join(f"{100 * share:g}" for share in settings["milestones"])
        return f"times {settings['gamma']:g} at {at} % of the run"
    return "" if kind == "cosine" else kind


def is_validation_epoch(epoch: int, epochs: int) -> bool:
    """Whether epoch (from 1) is looked at: the first, every tenth of the run, and each of the last tenth."""
    tenth = max(1, round(epochs / 10))
    return epoch == 1 or epoch % tenth == 0 or epoch > epochs - tenth
