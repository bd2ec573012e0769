"""The learning rate of every step, and the epochs after which the network is validated (docs/method.md, Recipe)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastensdistill.config import TrainConfig
from fastensdistill.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0, then a cosine to 0, per step: step 0 has rate 0."""

    peak: float
    warmup_steps: int
    total_steps: int

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        done = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.peak * 0.5 * (1 + math.cos(math.pi * done))


def make_schedule(config: TrainConfig, steps_per_epoch: int) -> Schedule:
    """Raises InputError where the warm-up leaves no step for the rest."""
    assert config.warmup_epochs is not None
    warmup, total = round(config.warmup_epochs * steps_per_epoch), config.epochs * steps_per_epoch
    if warmup >= total:
        raise InputError(f"warmup_epochs={config.warmup_epochs}: expected less than the run's {config.epochs} epochs")
    return Schedule(config.learning_rate, warmup, total)


def is_validation_epoch(epoch: int, epochs: int) -> bool:
    """Whether epoch (from 1) is looked at: the first, every tenth of the run, and each of the last tenth."""
    tenth = max(1, round(epochs / 10))
    return epoch == 1 or epoch % tenth == 0 or epoch > epochs - tenth
