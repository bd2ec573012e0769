"""BatchNorm in training mode, backward.

    dβ = Σ u,   dγ = Σ u · x̂,   x̂ = (z − mean) · inv_std            (u: the gradient of its output)
    dz = A·u + B·z + C (+ residual),   A = γ·inv_std,   B = −A·inv_std·dγ/n,   C = −A·dβ/n − B·mean

``batch_norm_coefficients`` leaves A, B and C to a convolution's gradients that apply them as they load u and z.
The sums come with u out of ``conv_data_gradient``, ``head_backward`` or ``elementwise_gradient``: (G, P, 2, C) in
float32, added in a fixed order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import BATCH_SIZES, launch, tl, triton
from fastensdistill.kernels.operands import accumulator, check_out, check_sets, check_tensor
from fastensdistill.kernels.ops import define
from fastensdistill.kernels.reference import leave, wide
from fastensdistill.kernels.sums import (
    SET_BLOCKS,
    SET_TILE,
    by_group,
    fewer_rows,
    result_rows,
    set_grid,
    set_sums,
    sum_rows,
)
from fastensdistill.kernels.tiles import rows_tile


class NormBackwardOperands(NamedTuple):
    """What ``batch_norm_backward`` takes."""

    d: Tensor  # u (G, N, H, W, C)
    z: Tensor  # (G, N, H, W, C)
    partials: Tensor  # (G, P, 2, C) float32: both sums of rows
    values: int  # n: so many a channel of a set has
    weight: Tensor  # γ (Q, C) float32
    mean: Tensor  # (1 or G, C) float32
    inv_std: Tensor
    residual: Tensor | None  # (G, N, H, W, C)
    d_weight: Tensor  # dγ (Q, C) float32, written
    d_bias: Tensor  # dβ (Q, C) float32, written
    add: bool  # on top of what they hold


class NormGradient(NamedTuple):
    """Gradients of the input, the scale and the shift."""

    d: Tensor  # (G, N, H, W, C)
    d_weight: Tensor  # (Q, C) float32
    d_bias: Tensor


class CoefficientOperands(NamedTuple):
    """What ``batch_norm_coefficients`` takes: those of :class:`NormBackwardOperands` that are per channel."""

    partials: Tensor
    values: int
    weight: Tensor
    mean: Tensor
    inv_std: Tensor
    d_weight: Tensor
    d_bias: Tensor
    add: bool


class NormCoefficients(NamedTuple):
    """A, B and C of the equations, and gradients of the scale and the shift."""

    a: Tensor  # (1 or G, C) float32, by group
    b: Tensor
    c: Tensor
    d_weight: Tensor  # (Q, C) float32
    d_bias: Tensor


def batch_norm_coefficients_reference(o: CoefficientOperands) -> tuple[Tensor, Tensor, Tensor]:
    sets, groups = o.weight.shape[0], len(o.partials)
    first, second = set_sums(o.partials, sets)
    mean, inv_std = (rows[:: len(rows) // sets] for rows in (o.mean, o.inv_std))
    a = o.weight * inv_std
    b = -a * inv_std * second / o.values
    c = -a * first / o.values - b * mean
    leave(second, o.d_weight, o.add)
    leave(first, o.d_bias, o.add)
    return by_group(a, groups), by_group(b, groups), by_group(c, groups)


def per_channel(o: NormBackwardOperands) -> CoefficientOperands:
    """Those of the operands that the coefficients depend on."""
    return CoefficientOperands(o.partials, o.values, o.weight, o.mean, o.inv_std, o.d_weight, o.d_bias, o.add)


def batch_norm_backward_reference(o: NormBackwardOperands) -> Tensor:
    high = accumulator(o.d.dtype)
    a, b, c = batch_norm_coefficients_reference(per_channel(o))
    out = wide(a) * o.d.to(high) + wide(b) * o.z.to(high) + wide(c)
    if o.residual is not None:
        out = out + o.residual.to(high)
    return out.to(o.d.dtype)


@triton.jit(do_not_specialize=BATCH_SIZES)
def batch_norm_coefficients_kernel(
    p_partials, p_weight, p_mean, p_inv_std, p_d_weight, p_d_bias, p_a, p_b, p_c,
    n_rows, share, repeat,
    C: tl.constexpr, ADD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_q = tl.program_id(1).to(tl.int64)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_d_bias, b_d_weight = sum_rows(p_partials, i_q * n_rows, n_rows, o_c, m_c, C, BLOCK_R, BLOCK_C)
    o = i_q * C + o_c
    o_row = i_q * repeat * C + o_c  # of the set, or of its first group
    b_inv = tl.load(p_inv_std + o_row, mask=m_c, other=0.0)
    b_a = tl.load(p_weight + o, mask=m_c, other=0.0) * b_inv
    b_b = -b_a * b_inv * b_d_weight * share
    b_c = -b_a * b_d_bias * share - b_b * tl.load(p_mean + o_row, mask=m_c, other=0.0)
    if ADD:
        b_d_weight += tl.load(p_d_weight + o, mask=m_c, other=0.0)
        b_d_bias += tl.load(p_d_bias + o, mask=m_c, other=0.0)
    tl.store(p_d_weight + o, b_d_weight, mask=m_c)
    tl.store(p_d_bias + o, b_d_bias, mask=m_c)
    for _ in range(repeat):
        tl.store(p_a + o_row, b_a, mask=m_c)
        tl.store(p_b + o_row, b_b, mask=m_c)
        tl.store(p_c + o_row, b_c, mask=m_c)
        o_row += C


@triton.jit(do_not_specialize=BATCH_SIZES)
def batch_norm_backward_kernel(
    p_d, p_z, p_a, p_b, p_c, p_residual, p_out,
    positions, s_abc,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(2).to(tl.int64)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < C
    m_d = (o_m < positions)[:, None] & m_n[None, :]
    o_d = o_m[:, None] * C + o_n[None, :]
    o_row = i_g * s_abc + o_n
    b_a = tl.load(p_a + o_row, mask=m_n, other=0.0)
    b_b = tl.load(p_b + o_row, mask=m_n, other=0.0)
    b_c = tl.load(p_c + o_row, mask=m_n, other=0.0)
    o_group = i_g * positions * C
    b_d = tl.load(p_d + o_group + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_z = tl.load(p_z + o_group + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_out = b_a[None, :] * b_d + b_b[None, :] * b_z + b_c[None, :]
    if p_residual is not None:
        b_out += tl.load(p_residual + o_group + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_out + o_group + o_d, b_out.to(p_out.dtype.element_ty), mask=m_d)


def _empty(o):
    return torch.empty_like(o.d)


def _empty_coefficients(o):
    return tuple(torch.empty_like(o.mean) for _ in range(3))


def _launch_coefficients(o):
    a, b, c = _empty_coefficients(o)
    sets, channels = o.weight.shape
    rows = fewer_rows(o.partials, sets)
    launch(
        batch_norm_coefficients_kernel,
        set_grid(sets, channels),
        SET_TILE,
        o,
        p_partials=rows,
        p_a=a,
        p_b=b,
        p_c=c,
        n_rows=rows.shape[1],
        share=1.0 / o.values,
        repeat=len(a) // sets,
        C=channels,
        **SET_BLOCKS,
    )
    return a, b, c


def _launch(o):
    out = _empty(o)
    a, b, c = _launch_coefficients(per_channel(o))
    rows, channels = a.shape
    tile = rows_tile(channels)
    groups, images, height, width, _ = o.d.shape
    positions = images * height * width
    launch(
        batch_norm_backward_kernel,
        (-(-positions // tile.BLOCK_M), -(-channels // tile.BLOCK_N), groups),
        tile,
        o,
        p_a=a,
        p_b=b,
        p_c=c,
        p_out=out,
        positions=positions,
        s_abc=0 if rows == 1 else channels,
        C=channels,
    )
    return out


_batch_norm_backward = define(
    "batch_norm_backward", batch_norm_backward_reference, _empty, _launch, mutates=("d_weight", "d_bias")
)
_batch_norm_coefficients = define(
    "batch_norm_coefficients",
    batch_norm_coefficients_reference,
    _empty_coefficients,
    _launch_coefficients,
    mutates=("d_weight", "d_bias"),
)


def batch_norm_backward(
    d: Tensor,
    z: Tensor,
    partials: Tensor,
    count: int,
    weight: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    *,
    residual: Tensor | None = None,
    d_weight: Tensor | None = None,
    d_bias: Tensor | None = None,
    add: bool = False,
) -> NormGradient:
    """Gradient of BatchNorm's input, weight γ and bias β, from the sums (G, P, 2, C) made with ``d``.

    Args:
        d, z: (G, N, H, W, C), float32, float16 or bfloat16, which the result is too (float64: reference only).
        count: as of ``batch_norm_statistics``.
        weight: (Q, C) float32, Q a divisor of G. mean, inv_std: (1 or G, C), as ``batch_norm_statistics`` gives them.
        residual: another gradient of z, (G, N, H, W, C), which is added last.
        d_weight, d_bias: (Q, C) float32, where the parameters' gradients are written, with ``add`` on top of what they
            hold; without them in new memory.

    Raises:
        InputError: shapes that disagree.
    """
    check_tensor("d", d, 5)
    for name, x in (("z", z), ("residual", residual)):
        if x is not None:
            check_tensor(name, x, 5)
            if x.shape != d.shape:
                raise InputError(f"{name} has shape {tuple(x.shape)}, expected {tuple(d.shape)}")
    _check_sets(weight, mean, inv_std, d.shape[0], d.shape[4])
    d_weight, d_bias = _outputs(weight, d, d_weight, d_bias, add)
    o = NormBackwardOperands(d, z, partials, count, weight, mean, inv_std, residual, d_weight, d_bias, add)
    return NormGradient(_batch_norm_backward(*o), d_weight, d_bias)


def _check_sets(weight: Tensor, mean: Tensor, inv_std: Tensor, groups: int, channels: int) -> None:
    check_sets("weight", weight, groups, channels)
    wanted = (result_rows(groups, len(weight)), channels)
    for name, rows in (("mean", mean), ("inv_std", inv_std)):
        if not (tuple(rows.shape) == wanted and rows.is_contiguous()):
            raise InputError(f"{name} has shape {tuple(rows.shape)}, expected {wanted}, contiguous")


def _outputs(
    weight: Tensor, like: Tensor, d_weight: Tensor | None, d_bias: Tensor | None, add: bool
) -> tuple[Tensor, Tensor]:
    shape = tuple(weight.shape)
    return check_out("d_weight", d_weight, shape, like, add), check_out("d_bias", d_bias, shape, like, add)


def batch_norm_coefficients(
    partials: Tensor,
    count: int,
    weight: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    *,
    d_weight: Tensor | None = None,
    d_bias: Tensor | None = None,
    add: bool = False,
) -> NormCoefficients:
    """A, B and C of BatchNorm's gradient (1 or G, C), and the gradients of γ and β, from the sums (G, P, 2, C).

    Arguments as of :func:`batch_norm_backward`. Raises InputError for shapes that disagree.
    """
    if partials.dim() != 4:
        raise InputError(f"partials has shape {tuple(partials.shape)}, expected (groups, rows, 2, channels)")
    _check_sets(weight, mean, inv_std, partials.shape[0], partials.shape[3])
    d_weight, d_bias = _outputs(weight, partials, d_weight, d_bias, add)
    o = CoefficientOperands(partials, count, weight, mean, inv_std, d_weight, d_bias, add)
    a, b, c = _batch_norm_coefficients(*o)
    return NormCoefficients(a, b, c, d_weight, d_bias)
