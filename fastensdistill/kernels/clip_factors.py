"""The factor by which each network's gradient is scaled so that its norm is at most so large, without a host.

    c = min(1, most / (‖g‖ + 1e-6))        ‖g‖ over all values of a network, its factors' among them

A NaN anywhere makes a NaN of c, as PyTorch's does. Programs leave the sum of squares of 4096 values each, and one
program a network adds these up: a fixed order, without atomics.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import launch, tl, triton
from fastensdistill.kernels.layout import Rows, device_tables
from fastensdistill.kernels.operands import check_like
from fastensdistill.kernels.ops import define
from fastensdistill.kernels.tiles import Tile
from fastensdistill.kernels.update import Run, block_values, check_runs, cut, fields_of, of_run, runs_of

SQUARES_TILE = Tile(0, 4096, 0, 8, 1, "16 values a thread; 1,434 partial sums of WRN-28-4's 5.9 million")
NORM_TILE = Tile(0, 1024, 0, 8, 1, "one program a network: latency decides")
LITTLE = 1e-6  # PyTorch's, against a norm of zero


class ClipOperands(NamedTuple):
    """What ``clip_factors`` takes: gradients in one or two flat tensors, and their runs, ``RUN_FIELDS`` integers each.

    Values of no run, or of one that does not move, count nowhere.
    """

    g: Tensor
    factor_g: Tensor | None
    runs: list[int]
    factor_runs: list[int]
    networks: int
    most: float


def moving(fields: Sequence[int], values: Tensor | None) -> list[Run]:
    """The runs that count, those of a network together."""
    runs = [] if values is None else [run for run in runs_of(fields, values.numel()) if run.moves]
    return sorted(runs, key=lambda run: run.network)


def clip_factors_reference(o: ClipOperands) -> Tensor:
    squares = [o.g.new_zeros(()) for _ in range(o.networks)]
    for g, fields in ((o.g, o.runs), (o.factor_g, o.factor_runs)):
        for run, x in [(run, g.contiguous()) for run in moving(fields, g)] if g is not None else []:
            squares[run.network] = squares[run.network] + of_run(x, run).square().sum()
    return (o.most / (torch.stack(squares).sqrt() + LITTLE)).clamp(max=1.0)


@triton.jit
def squares_kernel(p_g, p_squares, p_blocks, UNIT: tl.constexpr, BLOCK_N: tl.constexpr):
    o, m = block_values(p_blocks, 0, UNIT, True, BLOCK_N)
    b_g = tl.load(p_g + o, mask=m, other=0.0)
    tl.store(p_squares + tl.program_id(0), tl.sum(b_g * b_g, 0))


@triton.jit
def clip_factors_kernel(p_squares, p_bounds, p_factors, most, little, BLOCK_N: tl.constexpr):
    """A row of bounds has the first of a network's partial sums and the one after the last, for each flat tensor."""
    p_row = p_bounds + tl.program_id(0) * 4
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for side in tl.static_range(2):
        end = tl.load(p_row + 2 * side + 1)
        for first in range(tl.load(p_row + 2 * side), end, BLOCK_N):
            o = first + tl.arange(0, BLOCK_N)
            acc += tl.load(p_squares + o, mask=o < end, other=0.0)
    c = most / (tl.sqrt(tl.sum(acc, 0)) + little)
    tl.store(p_factors + tl.program_id(0), tl.where(c > 1.0, 1.0, c))


def _bounds(counts: Sequence[int]) -> tuple[Rows]:
    """Of how many partial sums each network has in the one flat tensor, then in the other: where they begin and end."""
    networks, ends = len(counts) // 2, [0, *accumulate(counts)]
    return ([(*ends[n : n + 2], *ends[networks + n : networks + n + 2]) for n in range(networks)],)


def _launch(o):
    block, counts, squares = SQUARES_TILE.BLOCK_N, [], []
    for g, fields in ((o.g, o.runs), (o.factor_g, o.factor_runs)):
        runs = moving(fields, g)
        of_networks = [[run for run in runs if run.network == n] for n in range(o.networks)]
        counts += [sum(-(-run.size // block) for run in own) for own in of_networks]
        squares.append((g, runs))
    partial = o.g.new_empty(sum(counts))
    at = 0
    for g, runs in squares:
        if runs:
            over = cut(fields_of(runs), g, block)
            launch(
                squares_kernel, (over.programs,), SQUARES_TILE, p_g=g.contiguous(), p_squares=partial[at:],
                p_blocks=over.blocks, UNIT=over.unit,
            )  # fmt: skip
            at += over.programs
    (bounds,) = device_tables(_bounds, counts, o.g.device)
    factors = o.g.new_empty(o.networks)
    launch(
        clip_factors_kernel, (o.networks,), NORM_TILE, p_squares=partial, p_bounds=bounds, p_factors=factors,
        most=o.most, little=LITTLE,
    )  # fmt: skip
    return factors


_clip_factors = define("clip_factors", clip_factors_reference, lambda o: o.g.new_empty(o.networks), _launch)


def clip_factors(
    g: Tensor, factor_g: Tensor | None = None, *, most: float, networks: int = 1, runs: Sequence[int] = (),
    factor_runs: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """Factors (networks,) by which each network's gradient has a norm of at most ``most``.

    Args:
        g: gradients, float32 or float64, any shape.
        factor_g: more of them, of the same networks, of g's dtype and device.
        most: above 0.
        networks: how many there are.
        runs, factor_runs: which values are of which network, and which count at all, as ``update.fields_of`` gives
            them; without any, all are network 0's.

    Raises:
        InputError: a dtype or device that does not fit, or runs that do not.

    Source: torch.nn.utils.clip_grad_norm_; Pascanu et al., ICML 2013.
    """
    if g.dtype not in (torch.float32, torch.float64):
        raise InputError(f"g has dtype {g.dtype}; expected float32 or float64")
    if not most > 0 or networks < 1:
        raise InputError(f"most is {most} and networks {networks}; expected above 0, and at least 1")
    named = g.new_empty(networks)
    check_runs(runs, g, named)
    if factor_g is not None:
        check_like("factor_g", factor_g, "g", g)
        check_runs(factor_runs, factor_g, named)
    factors: Tensor = _clip_factors(
        g.detach(), None if factor_g is None else factor_g.detach(), list(runs), list(factor_runs), networks, most
    )
    return factors
