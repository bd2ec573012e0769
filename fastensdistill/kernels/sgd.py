"""One step of SGD with Nesterov momentum over a flat buffer, in place, in one launch (PyTorch's form).

    g' = g + λ·p        v ← μ·v + g'        p ← p − scale·η·(g' + μ·v)

η is a scalar on the device, so that a captured graph can change it. ``scale`` is a fixed factor of the rate: K for the
deviations of K branches (docs/method.md, Loss). 20 bytes per value are moved, in five launches 60.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import launch, tl, triton
from fastensdistill.kernels.operands import check_contiguous, check_like
from fastensdistill.kernels.ops import define
from fastensdistill.kernels.tiles import Tile

SGD_TILE = Tile(0, 1024, 0, 4, 1, "8 values a thread: two 16-byte loads of each of three buffers")


class SgdOperands(NamedTuple):
    """What ``sgd`` takes."""

    p: Tensor  # parameters, any shape, written
    v: Tensor  # momentum, like p, written
    g: Tensor  # gradient, like p
    rate: Tensor  # η, a scalar
    scale: float
    momentum: float  # μ
    weight_decay: float  # λ


def sgd_reference(o: SgdOperands) -> None:
    g = o.g.add(o.p, alpha=o.weight_decay)
    o.v.mul_(o.momentum).add_(g)
    o.p.sub_(g.add_(o.v, alpha=o.momentum).mul_(o.rate if o.scale == 1 else o.scale * o.rate))


@triton.jit
def sgd_kernel(p_p, p_v, p_g, p_rate, count, scale, momentum, weight_decay, BLOCK_N: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = o < count
    rate = scale * tl.load(p_rate)
    b_p = tl.load(p_p + o, mask=m, other=0.0)
    b_g = tl.load(p_g + o, mask=m, other=0.0) + weight_decay * b_p
    b_v = momentum * tl.load(p_v + o, mask=m, other=0.0) + b_g
    tl.store(p_v + o, b_v, mask=m)
    tl.store(p_p + o, b_p - rate * (b_g + momentum * b_v), mask=m)


def _launch(o):
    count = o.p.numel()
    launch(sgd_kernel, (-(-count // SGD_TILE.BLOCK_N),), SGD_TILE, o, p_g=o.g.contiguous(), count=count)


_sgd = define("sgd", sgd_reference, launcher=_launch, mutates=("p", "v"))


def sgd(
    p: Tensor, v: Tensor, g: Tensor, rate: Tensor, *, momentum: float, weight_decay: float, scale: float = 1.0
) -> None:
    """Moves ``p`` and its momentum ``v`` by one step of SGD with Nesterov momentum.

    Args:
        p, v: float32 or float64, contiguous, any shape; written in place. v starts at zero.
        g: gradient, shape, dtype and device of p; left as it is.
        rate: η, a scalar tensor on the same device, of p's dtype.
        momentum: μ. weight_decay: λ, part of the gradient. scale: factor of the rate.

    Raises:
        InputError: a dtype, shape or device that does not fit.

    Source: torch.optim.SGD(nesterov=True); Sutskever et al., ICML 2013.
    """
    if p.dtype not in (torch.float32, torch.float64):
        raise InputError(f"p has dtype {p.dtype}; expected float32 or float64")
    for name, tensor, shape in (("v", v, p.shape), ("g", g, p.shape), ("rate", rate, torch.Size())):
        if tensor.shape != shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")
        check_like(name, tensor, "p", p)
    check_contiguous(("p", p), ("v", v))
    _sgd(p.detach(), v, g.detach(), rate.detach(), scale, momentum, weight_decay)
