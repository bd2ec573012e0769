"""Settings of the update, every kind of it alone and all together, and the averages over time of two steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.compare import check_close

UPDATES: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "average": {"ema_decay": 0.3},
    "clipped": {"clip_norm": 0.05},
    "spared": {"decay_norm_and_bias": False, "weight_decay": 0.1},
    "factors": {"factor_rate": 0.3},
    "sgd, all": {
        "ema_decay": 0.2, "clip_norm": 0.05, "decay_norm_and_bias": False, "weight_decay": 0.1, "factor_rate": 0.3,
    },
    "adamw, all": {
        "optimizer": "adamw", "beta1": 0.8, "beta2": 0.95, "ema_decay": 0.2, "clip_norm": 0.05,
        "decay_norm_and_bias": False, "weight_decay": 0.1, "factor_rate": 0.3,
    },
}  # fmt: skip
TEACHING = {name: {k: v for k, v in of_one.items() if k != "factor_rate"} for name, of_one in UPDATES.items()}
del TEACHING["factors"]
BRANCHES = ("latent-be", "batch-ensemble")  # the kinds of students that have factors


def update_of(kind: str, name: str) -> dict[str, Any]:
    """One of the settings, for a student of the ``kind``."""
    return UPDATES[name] if kind in BRANCHES else TEACHING[name]


def averages(step: Any) -> dict[str, Tensor]:
    """Everything that the averages of ``step`` hold, by name."""
    every: list[nn.Module] = step.averages
    return {f"average {m}: {name}": value for m, own in enumerate(every) for name, value in own.state_dict().items()}


def check_averages(one: Any, other: Any, tolerance: float) -> None:
    """Those of two steps."""
    expected, actual = averages(one), averages(other)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        check_close(name, actual[name].double(), value.double(), tolerance)
