"""Which weights a run ends with.

A network is looked at on the validation images after some epochs; the best look outside the warm-up is kept.

    fewer than 1,000 validation images   the smallest NLL, then the highest accuracy
    1,000 and more                       the highest accuracy, then the smallest NLL

and of looks that are equal in both, the later one. On few images accuracies differ by luck alone: on 60 images the
standard error of an accuracy near one half is 6.5 points, on 1,000 still 1.6; the NLL weighs every image by how sure
the network is of it, and varies less. In the warm-up the rate still rises: what scores well there does so by luck.
A look that is not finite is never kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from fastensdistill.evaluate import metrics
from fastensdistill.evaluate.landscape import Averaging

FEW = 1000  # validation images below which the NLL decides
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Score:
    """One look: accuracy in [0, 1] and NLL in nats on the validation images, NaN where a prediction is not finite.

    ``averaging`` is what was found of the branches that the network is the average of, None where there are none.
    """

    accuracy: float
    nll: float
    averaging: Averaging | None = None
    step: int = 0

    @classmethod
    def of(cls, p: Tensor, labels: Tensor) -> Score:
        """From probabilities (N, C) of what is deployed."""
        if not bool(torch.isfinite(p).all()):
            return cls(math.nan, math.nan)
        return cls(metrics.accuracy(p, labels), metrics.nll(p, labels))

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Score:
        """The way back from ``asdict``, also of a run from before something was noted."""
        values = {f.name: saved[f.name] for f in fields(cls) if f.name in saved}
        if values.get("averaging") is not None:
            values["averaging"] = Averaging(**values["averaging"])
        return cls(**values)

    @property
    def finite(self) -> bool:
        """Whether both numbers are, so that the weights may be kept."""
        return math.isfinite(self.accuracy) and math.isfinite(self.nll)

    def order(self, images: int) -> tuple[float, float, int]:
        """The larger the better, on so many validation ``images``."""
        return (-self.nll, self.accuracy, self.step) if images < FEW else (self.accuracy, -self.nll, self.step)


class Keeper:
    """The best look of every network so far with its weights, and the last look.

    Args:
        images: how many validation images there are.
        warmup_steps: looks up to this step are not for choosing.
    """

    def __init__(self, images: int, warmup_steps: int):
        self.images, self.warmup_steps = images, warmup_steps
        self.best: dict[str, tuple[Score, Weights]] = {}
        self.last: dict[str, Score] = {}

    def note(self, name: str, score: Score, network: nn.Module) -> bool:
        """Note a validation; whether it is the best so far, whose weights are copied."""
        self.last[name] = score
        if score.step <= self.warmup_steps or not score.finite:
            return False
        if name in self.best and score.order(self.images) < self.best[name][0].order(self.images):
            return False
        self.best[name] = score, {k: v.detach().clone() for k, v in network.state_dict().items()}
        return True

    def kept(self) -> dict[str, Score]:
        """The best score of every network that has one."""
        return {name: score for name, (score, _) in self.best.items()}

    def state_dict(self) -> dict[str, Any]:
        """Best scores with their weights, and the last scores, for a checkpoint."""
        return {
            "best": {name: {**asdict(score), "weights": weights} for name, (score, weights) in self.best.items()},
            "last": {name: asdict(score) for name, score in self.last.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The way back from :meth:`state_dict`."""
        self.best = {}
        for name, kept in state.get("best", {}).items():
            self.best[name] = Score.from_dict(kept), kept["weights"]
        self.last = {name: Score.from_dict(score) for name, score in state.get("last", {}).items()}


def in_words(kept: Mapping[str, Score], last: Mapping[str, Score], steps_per_epoch: int, epochs: int,
             images: int) -> str:  # fmt: skip
    """One line: ``kept epoch 28 of 30, validation 54.9% (last: 54.7%)``, with a number for each network."""

    def numbers(scores: Mapping[str, Score], name: str, shown: str) -> str:
        factor = 100 if name == "accuracy" else 1
        return " ".join(format(factor * getattr(scores[network], name), shown) for network in kept)

    at = " ".join(f"{score.step / steps_per_epoch:g}" for score in kept.values())
    line = (
        f"kept {'epoch' if len(kept) == 1 else 'epochs'} {at} of {epochs}, "
        f"validation {numbers(kept, 'accuracy', '.1f')}% (last: {numbers(last, 'accuracy', '.1f')}%)"
    )
    if images < FEW:
        line += f", by NLL {numbers(kept, 'nll', '.3f')} (last: {numbers(last, 'nll', '.3f')})"
    return line


def as_record(kept: Mapping[str, Score], last: Mapping[str, Score], steps_per_epoch: int) -> dict[str, Any]:
    """What a run ends with: the epochs of the weights that are kept, their scores, the last ones. A list of each where
    there are several networks."""

    def each(value: Callable[[Score], float], scores: Mapping[str, Score]) -> Any:
        values = [value(score) for score in scores.values()]
        return values[0] if len(values) == 1 else values

    return {
        "kept_epoch": each(lambda s: s.step / steps_per_epoch, kept),
        "accuracy": each(lambda s: s.accuracy, kept), "nll": each(lambda s: s.nll, kept),
        "last_accuracy": each(lambda s: s.accuracy, last), "last_nll": each(lambda s: s.nll, last),
    }  # fmt: skip


def warn_of_images(images: int) -> list[str]:
    """A line where there are so few validation images that little can be told apart on them."""
    if images >= 200:
        return []
    error = 100 * 0.5 / math.sqrt(images)
    return [f"{images} validation images: accuracies near one half have a standard error of {error:.1f} points; the "
            "setting validation sets more aside"]  # fmt: skip


def warn_of_student(score: Score, teachers: list[float], images: int) -> list[str]:
    """A line where the kept student is far below its teachers' mean accuracy."""
    if not teachers:
        return []
    mean = sum(teachers) / len(teachers)
    gap = mean - score.accuracy
    error = math.sqrt(max(mean * (1 - mean), score.accuracy * (1 - score.accuracy)) / images)
    if not ((gap > 0.2 or gap > mean / 2) and gap > 2 * error):
        return []
    return [f"the student's validation accuracy is {100 * score.accuracy:.1f}%, its teachers have {100 * mean:.1f}%: "
            "train longer, lower learning_rate, or check that teachers and data fit"]  # fmt: skip
