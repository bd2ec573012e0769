"""An average over time of what no update moves, such as running statistics, in place, in one launch.

e ← e + w·(p − e)        w as in ``update.py``
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import launch, tl, triton
from fastensdistill.kernels.ops import define
from fastensdistill.kernels.tiles import Tile
from fastensdistill.kernels.update import average_weight, averaged, check_like_values, check_scalars

AVERAGE_TILE = Tile(0, 1024, 0, 4, 1, "8 values a thread: two 16-byte loads of each of two buffers")


class AverageOperands(NamedTuple):
    """What ``move_average`` takes."""

    average: Tensor  # e, any shape, written
    p: Tensor  # like e
    updates: Tensor  # t, a scalar
    average_decay: float


def move_average_reference(o: AverageOperands) -> None:
    o.average.add_((o.p - o.average).mul_(average_weight(o.updates, o.average_decay)))


@triton.jit
def move_average_kernel(p_average, p_p, p_updates, count, least, BLOCK_N: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = o < count
    averaged(p_average, p_updates, tl.load(p_p + o, mask=m, other=0.0), o, m, least)


def _launch(o):
    count, least = o.p.numel(), 1 - o.average_decay
    launch(move_average_kernel, (-(-count // AVERAGE_TILE.BLOCK_N),), AVERAGE_TILE, o, count=count, least=least)


_move_average = define("move_average", move_average_reference, launcher=_launch, mutates=("average",))


def move_average(average: Tensor, p: Tensor, updates: Tensor, decay: float) -> None:
    """Moves ``average`` towards ``p``.

    Args:
        average, p: float32 or float64, contiguous, of one shape; the first is written in place.
        updates: how many there were before, a scalar tensor on the same device, of p's dtype.
        decay: share that the average keeps, below 1.

    Raises:
        InputError: a dtype, shape or device that does not fit.
    """
    if average.dtype not in (torch.float32, torch.float64):
        raise InputError(f"average has dtype {average.dtype}; expected float32 or float64")
    check_like_values("p", p, average)
    check_like_values("average", average, p)
    check_scalars("updates", updates, 0, p)
    _move_average(average, p.detach(), updates, decay)
