"""Says that a student's branches have parted, while there is time and at the end (docs/method.md, Averaging and its
barrier).

Branches have parted where

    barrier > 0.1 nats, or they are more than 5 points of accuracy above their average,

and by more than three standard errors of that difference on the validation images. Measured on digits every two of 60
epochs, a run each: those whose branches stay together (rates 0.03, 0.05 and 0.1, warm-up of 18 epochs) have a barrier
of at most 0.021 nats at any look, the warm-up included, and branches at most 3 points above the average; the one whose
branches part (rate 0.1, warm-up of 5 epochs) has 1.1 nats in epoch 10, when the accuracies are still level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fastensdistill.config import TrainConfig
from fastensdistill.evaluate.landscape import BARRIER, Averaging
from fastensdistill.train.keeping import Score

GAP = 0.05  # of accuracy
ERRORS = 3.0
MORE_BARRIER, MORE_GAP = 2.0, 0.2  # times the barrier, and of accuracy, that are worth a second line


def parted(found: Averaging | None) -> bool:
    """Whether branches have clearly parted from one another, one of them at least; False where there are none."""
    return found is not None and (_beyond(found.barrier, found) or behind(found))


def behind(found: Averaging | None) -> bool:
    """Whether the average itself is clearly worse than its branches: one may have parted from the others alone."""
    if found is None:
        return False
    excess = found.nll - sum(found.branch_nll) / len(found.branch_nll)
    return _beyond(excess, found) or found.gap > max(GAP, ERRORS * found.gap_error)


def _beyond(excess: float, found: Averaging) -> bool:
    return excess > max(BARRIER, ERRORS * found.barrier_error)


def advice(config: TrainConfig) -> str:
    """What to change, with the values that the run has."""
    return (f"lower learning_rate ({config.learning_rate:g}) or factor_rate, or lengthen warmup_epochs "
            f"({config.warmup_epochs:g})")  # fmt: skip


@dataclass
class Guard:
    """Looks at every validation and speaks once, and a second time where it has become clearly worse.

    ``spoke`` counts its lines; ``barrier`` and ``gap`` are what the first was said of.
    """

    spoke: int = 0
    barrier: float = 0.0
    gap: float = 0.0

    def look(self, found: Averaging | None, epoch: float, config: TrainConfig) -> list[str]:
        """The line to say after this validation, if there is one."""
        if found is None or not parted(found) or self.spoke > 1:
            return []
        worse = found.barrier >= MORE_BARRIER * max(self.barrier, BARRIER) or found.gap >= self.gap + MORE_GAP
        if self.spoke and not worse:
            return []
        self.spoke, self.barrier, self.gap = self.spoke + 1, found.barrier, found.gap
        mean = sum(found.branch_accuracy) / len(found.branch_accuracy)
        return [
            f"epoch {epoch:g}: the average of the branches has {100 * found.accuracy:.1f}%, they have "
            f"{100 * mean:.1f}% (barrier {found.barrier:.1f} nats): they are parting; {advice(config)}"
        ]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The way back from :meth:`state_dict`; {} is that of a run from before there was a guard."""
        for f in fields(self):
            setattr(self, f.name, state.get(f.name, f.default))


def at_the_end(kept: Score, last: Score, config: TrainConfig, name: str) -> list[str]:
    """A line where the average that is kept in the file ``name``, or the last one, is worse than its branches."""
    found = kept.averaging if behind(kept.averaging) else last.averaging
    if found is None or not behind(found):
        return []
    each = " ".join(f"{100 * a:.1f}" for a in found.branch_accuracy)
    numbers = (
        f"{100 * found.accuracy:.1f}% (NLL {found.nll:.2f}), they have {each}%, their ensemble "
        f"{100 * found.ensemble_accuracy:.1f}% (NLL {found.ensemble_nll:.2f})"
    )
    change = f"{advice(config).capitalize()}, or train with --student batch-ensemble, which keeps them as an ensemble"
    if found is not kept.averaging:
        return [f"the branches parted: at the end their average has {numbers}. {name} is from before that, with "
                f"{100 * kept.accuracy:.1f}%. {change}"]  # fmt: skip
    best = max(range(len(found.branch_accuracy)), key=lambda k: (found.branch_accuracy[k], -found.branch_nll[k]))
    file = ", which is student.safetensors," if name == "network.safetensors" else ""  # those of an EMA have none
    return [f"{name} is the average of branches that have parted: it has {numbers}. Better than it are the branches as "
            f"an ensemble{file} and branch {best} alone. {change}"]  # fmt: skip
