"""One step of SGD with Nesterov momentum over a flat buffer, in place, in one launch (PyTorch's form).

    g' = c·g + λ·p        v ← μ·v + g'        p ← p − scale·η·(g' + μ·v)        e ← e + w·(p − e)

η is a scalar on the device, so that a captured graph can change it. ``scale`` is a fixed factor of the rate: K for the
deviations of K branches (docs/method.md, Loss). c, the clipping factor of the network that the values are of
(``clip_factors.py``), and e, an average over time (``update.py``), are there where they are asked for. 20 bytes per
value are moved, in five launches 60; with an average 28.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import tl, triton
from fastensdistill.kernels.operands import check_contiguous, check_like
from fastensdistill.kernels.ops import define
from fastensdistill.kernels.tiles import Tile
from fastensdistill.kernels.update import (
    Average,
    average_weight,
    averaged,
    block_field,
    block_values,
    check_like_values,
    check_runs,
    check_scalars,
    launch_update,
    of_run,
    runs_of,
)

SGD_TILE = Tile(0, 1024, 0, 4, 1, "8 values a thread: two 16-byte loads of each of three buffers")


class SgdOperands(NamedTuple):
    """What ``sgd`` takes."""

    p: Tensor  # parameters, any shape, written
    v: Tensor  # momentum, like p, written
    g: Tensor  # gradient, like p
    rate: Tensor  # η, a scalar
    average: Tensor | None  # e, like p, written
    updates: Tensor | None  # t of the average, a scalar
    clip: Tensor | None  # c, (networks,)
    runs: list[int]  # RUN_FIELDS integers each; none: all values are one run
    scale: float
    momentum: float  # μ
    weight_decay: float  # λ
    average_decay: float


def sgd_reference(o: SgdOperands) -> None:
    rate = o.rate if o.scale == 1 else o.scale * o.rate
    for run in runs_of(o.runs, o.p.numel()):
        p, v, g = (of_run(x, run) for x in (o.p, o.v, o.g.contiguous()))
        if run.moves:
            g = g if o.clip is None else g * o.clip[run.network]
            g = g.add(p, alpha=o.weight_decay * run.decays)
            v.mul_(o.momentum).add_(g)
            p.sub_(g.add_(v, alpha=o.momentum).mul_(rate))
        if o.average is not None and o.updates is not None:
            e = of_run(o.average, run)
            e.add_((p - e).mul_(average_weight(o.updates, o.average_decay)))


@triton.jit
def sgd_kernel(
    p_p, p_v, p_g, p_rate, p_average, p_updates, p_clip, p_blocks, count, scale, momentum, weight_decay, least,
    UNIT: tl.constexpr, RUNS: tl.constexpr, AVERAGE: tl.constexpr, CLIP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o, m = block_values(p_blocks, count, UNIT, RUNS, BLOCK_N)
    m_moves = m
    if RUNS:
        weight_decay *= block_field(p_blocks, 4)
        m_moves = m & (block_field(p_blocks, 5) != 0)
    rate = scale * tl.load(p_rate)
    b_p = tl.load(p_p + o, mask=m, other=0.0)
    b_g = tl.load(p_g + o, mask=m_moves, other=0.0)
    if CLIP:
        b_g *= tl.load(p_clip + (block_field(p_blocks, 2) if RUNS else 0))
    b_g += weight_decay * b_p
    b_v = momentum * tl.load(p_v + o, mask=m_moves, other=0.0) + b_g
    tl.store(p_v + o, b_v, mask=m_moves)
    b_moved = b_p - rate * (b_g + momentum * b_v)
    tl.store(p_p + o, b_moved, mask=m_moves)
    if AVERAGE:
        averaged(p_average, p_updates, tl.where(m_moves, b_moved, b_p), o, m, least)


def _launch(o):
    launch_update(sgd_kernel, SGD_TILE, o)


_sgd = define("sgd", sgd_reference, launcher=_launch, mutates=("p", "v", "average"))


def sgd(
    p: Tensor, v: Tensor, g: Tensor, rate: Tensor, *, momentum: float, weight_decay: float, scale: float = 1.0,
    average: Average | None = None, clip: Tensor | None = None, runs: Sequence[int] = (),
) -> None:  # fmt: skip
    """Moves ``p`` and its momentum ``v`` by one step of SGD with Nesterov momentum.

    Args:
        p, v: float32 or float64, contiguous, any shape; written in place. v starts at zero.
        g: gradient, shape, dtype and device of p; left as it is.
        rate: η, a scalar tensor on the same device, of p's dtype.
        momentum: μ. weight_decay: λ, part of the gradient. scale: factor of the rate.
        average: an average over time of p's shape, which is moved too.
        clip: factors of the gradient, (networks,), as ``clip_factors`` leaves them.
        runs: which values are of which network, decay, and move at all, as ``update.fields_of`` gives them; what is in
            none of them is left as it is.

    Raises:
        InputError: a dtype, shape or device that does not fit, or runs that do not.

    Source: torch.optim.SGD(nesterov=True); Sutskever et al., ICML 2013.
    """
    if p.dtype not in (torch.float32, torch.float64):
        raise InputError(f"p has dtype {p.dtype}; expected float32 or float64")
    for name, tensor, shape in (("v", v, p.shape), ("g", g, p.shape), ("rate", rate, torch.Size())):
        if tensor.shape != shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")
        check_like(name, tensor, "p", p)
    check_contiguous(("p", p), ("v", v))
    check_scalars("clip", clip, 1, p)
    check_runs(runs, p, clip)
    values, updates, decay = average or (None, None, 0.0)
    check_like_values("average", values, p)
    check_scalars("updates", updates, 0, p)
    _sgd(
        p.detach(), v, g.detach(), rate.detach(), values, updates, clip, list(runs), scale, momentum, weight_decay,
        decay,
    )  # fmt: skip
