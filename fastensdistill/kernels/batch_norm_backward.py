"""BatchNorm in training mode, backward.

    dβ = Σ u,   dγ = Σ u · x̂,   x̂ = (z − mean) · inv_std            (u: the gradient of its output)
    dz = A·u + B·z + C (+ residual),   A = γ·inv_std,   B = −A·inv_std·dγ/n,   C = −A·dβ/n − B·mean

The sums come with u out of ``conv_data_gradient``, ``head_backward`` or ``elementwise_gradient``: (G, P, 2, C) in
float32, added in a fixed order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import BATCH_SIZES, launch, tl, triton
from fastensdistill.kernels.operands import accumulator, check_out, check_rows, check_tensor
from fastensdistill.kernels.ops import define
from fastensdistill.kernels.reference import leave, wide
from fastensdistill.kernels.sums import SET_BLOCKS, SET_TILE, fewer_rows, set_grid, set_sums, sum_rows
from fastensdistill.kernels.tiles import rows_tile


class NormBackwardOperands(NamedTuple):
    """What ``batch_norm_backward`` takes."""

    d: Tensor  # u (G, N, H, W, C)
    z: Tensor  # (G, N, H, W, C)
    partials: Tensor  # (G, P, 2, C) float32: both sums of rows
    values: int  # n: so many a channel of a set has
    weight: Tensor  # γ (Q, C) float32
    mean: Tensor  # (Q, C) float32
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


def batch_norm_backward_reference(o: NormBackwardOperands) -> Tensor:
    high = accumulator(o.d.dtype)
    first, second = set_sums(o.partials, o.weight.shape[0])
    a = o.weight * o.inv_std
    b = -a * o.inv_std * second / o.values
    c = -a * first / o.values - b * o.mean
    out = wide(a) * o.d.to(high) + wide(b) * o.z.to(high) + wide(c)
    if o.residual is not None:
        out = out + o.residual.to(high)
    leave(second, o.d_weight, o.add)
    leave(first, o.d_bias, o.add)
    return out.to(o.d.dtype)


@triton.jit(do_not_specialize=BATCH_SIZES)
def batch_norm_coefficients_kernel(
    p_partials, p_weight, p_mean, p_inv_std, p_d_weight, p_d_bias, p_abc,
    n_rows, share,
    C: tl.constexpr, ADD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_q = tl.program_id(1).to(tl.int64)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_d_bias, b_d_weight = sum_rows(p_partials, i_q * n_rows, n_rows, o_c, m_c, C, BLOCK_R, BLOCK_C)
    o = i_q * C + o_c
    b_inv = tl.load(p_inv_std + o, mask=m_c, other=0.0)
    b_a = tl.load(p_weight + o, mask=m_c, other=0.0) * b_inv
    b_b = -b_a * b_inv * b_d_weight * share
    b_c = -b_a * b_d_bias * share - b_b * tl.load(p_mean + o, mask=m_c, other=0.0)
    if ADD:
        b_d_weight += tl.load(p_d_weight + o, mask=m_c, other=0.0)
        b_d_bias += tl.load(p_d_bias + o, mask=m_c, other=0.0)
    tl.store(p_d_weight + o, b_d_weight, mask=m_c)
    tl.store(p_d_bias + o, b_d_bias, mask=m_c)
    p_abc += i_q * (3 * C)
    tl.store(p_abc + o_c, b_a, mask=m_c)
    tl.store(p_abc + C + o_c, b_b, mask=m_c)
    tl.store(p_abc + 2 * C + o_c, b_c, mask=m_c)


@triton.jit(do_not_specialize=BATCH_SIZES)
def batch_norm_backward_kernel(
    p_d, p_z, p_abc, p_residual, p_out,
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
    p_abc += i_g * s_abc
    b_a = tl.load(p_abc + o_n, mask=m_n, other=0.0)
    b_b = tl.load(p_abc + C + o_n, mask=m_n, other=0.0)
    b_c = tl.load(p_abc + 2 * C + o_n, mask=m_n, other=0.0)
    o_group = i_g * positions * C
    b_d = tl.load(p_d + o_group + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_z = tl.load(p_z + o_group + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_out = b_a[None, :] * b_d + b_b[None, :] * b_z + b_c[None, :]
    if p_residual is not None:
        b_out += tl.load(p_residual + o_group + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_out + o_group + o_d, b_out.to(p_out.dtype.element_ty), mask=m_d)


def _empty(o):
    return torch.empty_like(o.d)


def _launch(o):
    out = _empty(o)
    sets, channels = o.weight.shape
    rows = fewer_rows(o.partials, sets)
    coefficients = o.weight.new_empty(sets, 3, channels)
    launch(
        batch_norm_coefficients_kernel,
        set_grid(sets, channels),
        SET_TILE,
        o,
        p_partials=rows,
        p_abc=coefficients,
        n_rows=rows.shape[1],
        share=1.0 / o.values,
        C=channels,
        **SET_BLOCKS,
    )
    tile = rows_tile(channels)
    groups, images, height, width, _ = o.d.shape
    positions = images * height * width
    launch(
        batch_norm_backward_kernel,
        (-(-positions // tile.BLOCK_M), -(-channels // tile.BLOCK_N), groups),
        tile,
        o,
        p_abc=coefficients,
        p_out=out,
        positions=positions,
        s_abc=0 if sets == 1 else 3 * channels,
        C=channels,
    )
    return out


_batch_norm_backward = define(
    "batch_norm_backward", batch_norm_backward_reference, _empty, _launch, mutates=("d_weight", "d_bias")
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
        weight, mean, inv_std: (Q, C) float32.
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
    for name, rows in (("weight", weight), ("mean", mean), ("inv_std", inv_std)):
        check_rows(name, rows, d.shape[0], d.shape[4])
        if rows.shape != weight.shape:
            raise InputError(f"{name} has shape {tuple(rows.shape)}, expected {tuple(weight.shape)}")
    d_weight, d_bias = (
        check_out(name, out, tuple(weight.shape), d, add) for name, out in (("d_weight", d_weight), ("d_bias", d_bias))
    )
    o = NormBackwardOperands(d, z, partials, count, weight, mean, inv_std, residual, d_weight, d_bias, add)
    return NormGradient(_batch_norm_backward(*o), d_weight, d_bias)
