"""One step of AdamW over a flat buffer, in place, in one launch (PyTorch's form: decoupled decay, bias corrections).

    t = counts + 1        u = scale·η        g' = c·g        p ← p·(1 − u·λ)
    m ← m + (1 − β1)·(g' − m)        s ← β2·s + (1 − β2)·g'²
    p ← p − u / (1 − β1^t) · m / (√s / √(1 − β2^t) + ε)        e ← e + w·(p − e)

η and the counts of steps so far are on the device, so that a captured graph can go on; whoever calls raises the counts
afterwards. Each run of values has its own, as parameters that were frozen for a while need. 1 − β^t is taken in
float64: at β2 = 0.999 three digits cancel. c, the clipping factor of the network that the values are of
(``clip_factors.py``), and e, an average over time (``update.py``), are there where they are asked for. 28 bytes per
value are moved, with an average 36.
"""

import math
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

ADAMW_TILE = Tile(0, 1024, 0, 4, 1, "8 values a thread: two 16-byte loads of each of four buffers")
EPSILON = 1e-8  # PyTorch's


class AdamwOperands(NamedTuple):
    """What ``adamw`` takes."""

    p: Tensor  # parameters, any shape, written
    m: Tensor  # mean gradient, like p, written
    s: Tensor  # mean squared gradient, like p, written
    g: Tensor  # gradient, like p
    rate: Tensor  # η, a scalar
    counts: Tensor  # (counters,): steps before this one
    average: Tensor | None  # e, like p, written
    updates: Tensor | None  # t of the average, a scalar
    clip: Tensor | None  # c, (networks,)
    runs: list[int]  # RUN_FIELDS integers each; none: all values are one run
    scale: float
    beta1: float
    beta2: float
    weight_decay: float  # λ
    average_decay: float


def adamw_reference(o: AdamwOperands) -> None:
    rate = o.scale * o.rate
    for run in runs_of(o.runs, o.p.numel()):
        p, m, s, g = (of_run(x, run) for x in (o.p, o.m, o.s, o.g.contiguous()))
        if run.moves:
            g = g if o.clip is None else g * o.clip[run.network]
            first, second = (_correction(beta, o.counts[run.counter] + 1) for beta in (o.beta1, o.beta2))
            p.mul_(1 - rate * (o.weight_decay * run.decays))
            m.lerp_(g, 1 - o.beta1)
            s.mul_(o.beta2).addcmul_(g, g, value=1 - o.beta2)
            p.sub_(m / (s.sqrt() / second.sqrt() + EPSILON) * (rate / first))
        if o.average is not None and o.updates is not None:
            e = of_run(o.average, run)
            e.add_((p - e).mul_(average_weight(o.updates, o.average_decay)))


def _correction(beta: float, t: Tensor) -> Tensor:
    """1 − β^t, of the dtype of t."""
    return (1 - beta ** t.double()).to(t.dtype)


@triton.jit
def correction(log_beta, t):
    """1 − β^t, given log2 β."""
    return (1.0 - tl.exp2(t.to(tl.float64) * log_beta)).to(tl.float32)


@triton.jit
def adamw_kernel(
    p_p, p_m, p_s, p_g, p_rate, p_counts, p_average, p_updates, p_clip, p_blocks, count, scale, beta2, rest1, rest2,
    log_beta1, log_beta2, weight_decay, epsilon, least,
    UNIT: tl.constexpr, RUNS: tl.constexpr, AVERAGE: tl.constexpr, CLIP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o, m = block_values(p_blocks, count, UNIT, RUNS, BLOCK_N)
    m_moves = m
    if RUNS:
        p_counts += block_field(p_blocks, 3)
        weight_decay *= block_field(p_blocks, 4)
        m_moves = m & (block_field(p_blocks, 5) != 0)
    t = tl.load(p_counts) + 1.0
    rate = scale * tl.load(p_rate)
    b_p = tl.load(p_p + o, mask=m, other=0.0)
    b_g = tl.load(p_g + o, mask=m_moves, other=0.0)
    if CLIP:
        b_g *= tl.load(p_clip + (block_field(p_blocks, 2) if RUNS else 0))
    b_m = tl.load(p_m + o, mask=m_moves, other=0.0)
    b_m += rest1 * (b_g - b_m)
    b_s = beta2 * tl.load(p_s + o, mask=m_moves, other=0.0) + rest2 * b_g * b_g
    tl.store(p_m + o, b_m, mask=m_moves)
    tl.store(p_s + o, b_s, mask=m_moves)
    b_root = tl.sqrt(b_s) / tl.sqrt(correction(log_beta2, t)) + epsilon
    b_moved = b_p * (1.0 - rate * weight_decay) - rate / correction(log_beta1, t) * (b_m / b_root)
    tl.store(p_p + o, b_moved, mask=m_moves)
    if AVERAGE:
        averaged(p_average, p_updates, tl.where(m_moves, b_moved, b_p), o, m, least)


def _launch(o):
    launch_update(
        adamw_kernel, ADAMW_TILE, o, rest1=1 - o.beta1, rest2=1 - o.beta2, log_beta1=_log2(o.beta1),
        log_beta2=_log2(o.beta2), epsilon=EPSILON,
    )  # fmt: skip


def _log2(beta: float) -> float:
    return math.log2(beta) if beta else -math.inf


_adamw = define("adamw", adamw_reference, launcher=_launch, mutates=("p", "m", "s", "average"))


def adamw(
    p: Tensor, m: Tensor, s: Tensor, g: Tensor, rate: Tensor, counts: Tensor, *, beta1: float, beta2: float,
    weight_decay: float, scale: float = 1.0, average: Average | None = None, clip: Tensor | None = None,
    runs: Sequence[int] = (),
) -> None:  # fmt: skip
    """Moves ``p`` and its moments by one step of AdamW.

    Args:
        p, m, s: float32 or float64, contiguous, any shape; written in place. The moments start at zero.
        g: gradient, shape, dtype and device of p; left as it is.
        rate: η, a scalar tensor on the same device, of p's dtype.
        counts: steps before this one, (counters,), of p's dtype; left as they are.
        beta1, beta2: decays of the moments. weight_decay: λ, beside the gradient. scale: factor of the rate.
        average: an average over time of p's shape, which is moved too.
        clip: factors of the gradient, (networks,), as ``clip_factors`` leaves them.
        runs: which values are of which network, have which count, decay, and move at all, as ``update.fields_of`` gives
            them; what is in none of them is left as it is.

    Raises:
        InputError: a dtype, shape or device that does not fit, or runs that do not.

    Source: torch.optim.AdamW; Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.
    """
    if p.dtype not in (torch.float32, torch.float64):
        raise InputError(f"p has dtype {p.dtype}; expected float32 or float64")
    check_contiguous(("p", p))
    for name, tensor in (("m", m), ("s", s)):
        check_like_values(name, tensor, p)
    if g.shape != p.shape:
        raise InputError(f"g has shape {tuple(g.shape)}; expected {tuple(p.shape)}")
    check_like("g", g, "p", p)
    check_scalars("rate", rate, 0, p)
    check_scalars("counts", counts, 1, p)
    check_scalars("clip", clip, 1, p)
    check_runs(runs, p, clip, counts)
    values, updates, decay = average or (None, None, 0.0)
    check_like_values("average", values, p)
    check_scalars("updates", updates, 0, p)
    _adamw(
        p.detach(), m, s, g.detach(), rate.detach(), counts, values, updates, clip, list(runs), scale, beta1, beta2,
        weight_decay, decay,
    )  # fmt: skip
