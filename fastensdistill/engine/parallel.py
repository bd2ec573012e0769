"""Data parallel training under ``torchrun``: gradients are averaged between un-fold and update.

Every process draws its own pair and batch and keeps its own BatchNorm statistics, as the authors' code does; the
parameters stay equal because all start equal and take the same steps. NCCL's all-reduce can be captured in a graph.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def processes() -> int:
    """How many processes train together: 1 unless ``torch.distributed`` has been initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def average(values: Tensor) -> None:
    """The mean of ``values`` over all processes, in place; nothing where there is one."""
    count = processes()
    if count > 1:
        dist.all_reduce(values)
        values.div_(count)
