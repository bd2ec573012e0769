"""What the fused engine's update of a student is predicted to move (``kernels/sgd.py``, ``kernels/adamw.py``)."""

from __future__ import annotations

from typing import NamedTuple

from fastensdistill.method.student import LatentBE
from fastensdistill.models import create_model

BYTES = {"sgd": 20, "adamw": 28}
"""A value's: the value and its one or two moments are read and written, its gradient is read; 4 bytes each."""
AVERAGE, NORM = 8, 4
"""More with an average over time, which is read and written, and with clipping, which reads gradients once more."""


class UpdateCost(NamedTuple):
    """Of one update."""

    values: int  # of the network's parameters and the branches' factors
    moved: int  # bytes read from and written to the device's memory


def update_cost(model: str, branches: int, optimizer: str = "sgd", averaged: bool = False, clipped: bool = False
) -> UpdateCost:  # fmt: skip
    """The cost of updating a student of so many branches, its network ``model`` for 100 classes; each value once.

    Launches are in ``graph_nodes.count_step``. Raises InputError for an unknown model.
    """
    values = sum(p.numel() for p in LatentBE(create_model(model, 100), branches).parameters())
    return UpdateCost(values, values * (BYTES[optimizer] + AVERAGE * averaged + NORM * clipped))
