"""Data parallel training under ``torchrun``: gradients are averaged between un-fold and update.

Process 0's weights and momentum are everybody's at the start. Every process draws its own pair and batch and keeps its
own BatchNorm statistics, as the authors' code does, unless they are to be synchronised; the parameters stay equal,
because all take the same steps from there. NCCL's all-reduce can be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Iterable

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


def rank() -> int:
    """This process among them; 0 where there is one."""
    return dist.get_rank() if processes() > 1 else 0


def same_start(tensors: Iterable[Tensor]) -> None:
    """Process 0's values for everybody, in place."""
    if processes() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
