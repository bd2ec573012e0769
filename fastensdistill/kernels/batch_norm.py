"""BatchNorm in training mode, forward: statistics from partial sums, and application.

The Q sets of groups which share statistics: one (all K branches of a student), G (teachers, each its own) or a divisor
of G between (several students); results have a row where Q is 1, else one per group.

    mean = center + S₁/n,  var = S₂/n − (S₁/n)²           (biased; S about center = the running mean)
    running = (1 − momentum) · running + momentum · (mean, correction · var)
    scale = γ / √(var + ε),  shift = β − scale · mean
    y = scale · z + shift (+ residual), ReLU
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.gather import load_shortcut, store_bits
from fastensdistill.kernels.launch import BATCH_SIZES, launch, row_stride, sizes, tl, triton
from fastensdistill.kernels.operands import (
    accumulator,
    check_pair,
    check_sets,
    check_shortcut,
    check_tensor,
)
from fastensdistill.kernels.ops import absent, define, present
from fastensdistill.kernels.reference import pack_mask, shortcut, wide
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


class StatisticsOperands(NamedTuple):
    """What ``batch_norm_statistics`` takes."""

    partials: Tensor  # (G, P, 2, C) float32: S₁ and S₂ of rows
    values: int  # n: so many a channel of a set has
    weight: Tensor  # γ (Q, C) float32
    bias: Tensor  # β, and both running estimates like γ
    running_mean: Tensor
    running_var: Tensor
    momentum: float
    eps: float
    correction: float


class NormStatistics(NamedTuple):
    """Of the batch, as the normalisation and its backward read them."""

    mean: Tensor  # each (1 or G, C) float32
    inv_std: Tensor
    scale: Tensor
    shift: Tensor


class ApplyOperands(NamedTuple):
    """What ``batch_norm_apply`` takes."""

    z: Tensor  # (G, N, H, W, C)
    scale: Tensor  # (Q, C) float32
    shift: Tensor
    residual: Tensor | None  # (G, N, Hr, Wr, Cr ≤ C), read at every s-th position
    residual_stride: int  # s
    relu: bool
    mask: bool  # also where y is positive


class NormOutput(NamedTuple):
    """The normalised value, and the bits of its ReLU."""

    y: Tensor  # (G, N, H, W, C)
    mask: Tensor | None  # (G, N, H, W, ceil(C/8)) uint8


def batch_norm_statistics_reference(o: StatisticsOperands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, second = (sums / o.values for sums in set_sums(o.partials, o.weight.shape[0]))
    mean, var = o.running_mean + first, (second - first.square()).clamp_min(0)
    o.running_mean.lerp_(mean, o.momentum)
    o.running_var.lerp_(o.correction * var, o.momentum)
    inv_std = (var + o.eps).rsqrt()
    scale = o.weight * inv_std
    mean, inv_std, scale, shift = (
        by_group(rows, len(o.partials)) for rows in (mean, inv_std, scale, o.bias - scale * mean)
    )
    return mean, inv_std, scale, shift


def batch_norm_apply_reference(o: ApplyOperands) -> tuple[Tensor, Tensor]:
    z = o.z.to(accumulator(o.z.dtype))
    y = z * wide(o.scale) + wide(o.shift)
    if o.residual is not None:
        y = y + shortcut(o.residual, o.residual_stride, *z.shape[2:]).to(z.dtype)
    y = (y.relu() if o.relu else y).to(o.z.dtype)
    return y, pack_mask(y > 0) if o.mask else absent(z.new_empty(0, dtype=torch.uint8))


@triton.jit(do_not_specialize=BATCH_SIZES)
def batch_norm_statistics_kernel(
    p_partials, p_weight, p_bias, p_running_mean, p_running_var, p_mean, p_inv_std, p_scale, p_shift,
    n_rows, share, momentum, eps, correction, repeat,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_q = tl.program_id(1).to(tl.int64)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    first, second = sum_rows(p_partials, i_q * n_rows, n_rows, o_c, m_c, C, BLOCK_R, BLOCK_C)
    o = i_q * C + o_c
    b_running_mean = tl.load(p_running_mean + o, mask=m_c, other=0.0)
    b_running_var = tl.load(p_running_var + o, mask=m_c, other=0.0)
    offset = first * share
    b_mean = b_running_mean + offset
    b_var = tl.maximum(second * share - offset * offset, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(p_running_mean + o, b_running_mean + momentum * offset, mask=m_c)
    tl.store(p_running_var + o, b_running_var + momentum * (correction * b_var - b_running_var), mask=m_c)
    b_inv_std = 1.0 / tl.sqrt_rn(b_var + eps)
    b_scale = tl.load(p_weight + o, mask=m_c, other=0.0) * b_inv_std
    b_shift = tl.load(p_bias + o, mask=m_c, other=0.0) - b_scale * b_mean
    for i in range(repeat):  # a row of the set, or of each of its groups
        o_row = (i_q * repeat + i) * C + o_c
        tl.store(p_mean + o_row, b_mean, mask=m_c)
        tl.store(p_inv_std + o_row, b_inv_std, mask=m_c)
        tl.store(p_scale + o_row, b_scale, mask=m_c)
        tl.store(p_shift + o_row, b_shift, mask=m_c)


@triton.jit(do_not_specialize=BATCH_SIZES)
def batch_norm_apply_kernel(
    p_z, p_scale, p_shift, p_residual, p_y, p_mask,
    N, s_scale,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, HR: tl.constexpr, WR: tl.constexpr, CR: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr, RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(1)
    i_g = tl.program_id(2).to(tl.int64)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    positions = N * (H * W)
    m_m = o_m < positions
    m_n = o_n < C
    m_z = m_m[:, None] & m_n[None, :]
    o_z = o_m[:, None] * C + o_n[None, :]
    b_scale = tl.load(p_scale + i_g * s_scale + o_n, mask=m_n, other=0.0)
    b_shift = tl.load(p_shift + i_g * s_scale + o_n, mask=m_n, other=0.0)
    b_y = tl.load(p_z + i_g * positions * C + o_z, mask=m_z, other=0.0).to(tl.float32)
    b_y = b_y * b_scale[None, :] + b_shift[None, :]
    if p_residual is not None:
        p_residual += i_g * N * (HR * WR * CR)
        image = o_m // (H * W)
        i_h = (o_m % (H * W)) // W
        i_w = o_m % W
        b_y += load_shortcut(p_residual, image, i_h, i_w, m_m, o_n, HR, WR, CR, RESIDUAL_STRIDE)
    if RELU:
        b_y = tl.maximum(b_y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    b_stored = b_y.to(p_y.dtype.element_ty)
    tl.store(p_y + i_g * positions * C + o_z, b_stored, mask=m_z)
    if p_mask is not None:
        p_bits = p_mask + i_g * positions * ((C + 7) // 8)
        store_bits(p_bits, (b_stored > 0) & m_z, o_m, m_m, i_n * BLOCK_N, C, BLOCK_M, BLOCK_N)


def _empty_statistics(o):
    sets, channels = o.weight.shape
    return tuple(o.weight.new_empty(result_rows(len(o.partials), sets), channels) for _ in NormStatistics._fields)


def _empty_output(o):
    shape = (*o.z.shape[:4], -(-o.z.shape[4] // 8)) if o.mask else (0,)
    return torch.empty_like(o.z), o.z.new_empty(shape, dtype=torch.uint8)


def _launch_statistics(o):
    mean, inv_std, scale, shift = _empty_statistics(o)
    sets, channels = o.weight.shape
    rows = fewer_rows(o.partials, sets)
    launch(
        batch_norm_statistics_kernel,
        set_grid(sets, channels),
        SET_TILE,
        o,
        p_partials=rows,
        p_mean=mean,
        p_inv_std=inv_std,
        p_scale=scale,
        p_shift=shift,
        n_rows=rows.shape[1],
        share=1.0 / o.values,
        repeat=len(mean) // sets,
        C=channels,
        **SET_BLOCKS,
    )
    return mean, inv_std, scale, shift


def _launch_apply(o):
    y, bits = _empty_output(o)
    groups, images, height, width, channels = o.z.shape
    tile = rows_tile(channels)
    launch(
        batch_norm_apply_kernel,
        (-(-images * height * width // tile.BLOCK_M), -(-channels // tile.BLOCK_N), groups),
        tile,
        o,
        p_y=y,
        p_mask=bits if o.mask else None,
        N=images,
        s_scale=row_stride(o.scale),
        **sizes("H W C", o.z),
        **sizes("HR WR CR", o.residual),
    )
    return y, bits


_batch_norm_statistics = define(
    "batch_norm_statistics",
    batch_norm_statistics_reference,
    _empty_statistics,
    _launch_statistics,
    mutates=("running_mean", "running_var"),
)
_batch_norm_apply = define("batch_norm_apply", batch_norm_apply_reference, _empty_output, _launch_apply)


def batch_norm_statistics(
    partials: Tensor,
    count: int,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    correction: float = 1.0,
) -> NormStatistics:
    """Mean, inverse deviation, scale and shift of each set, by group, and the running estimates moved in place.

    Args:
        partials: (G, P, 2, C) float32, ``grouped_conv``'s statistics about ``center=running_mean``.
        count: values of a channel per **set** (all groups together where Q = 1).
        weight, bias, running_mean, running_var: (Q, C) float32, Q a divisor of G.
        momentum, eps: of BatchNorm. correction: the running variance moves towards so many times the biased one,
            n/(n − 1) for PyTorch's unbiased one.

    Raises:
        InputError: shapes that disagree.
    """
    if partials.dim() != 4:
        raise InputError(f"partials has shape {tuple(partials.shape)}, expected (groups, rows, 2, channels)")
    o = StatisticsOperands(partials, count, weight, bias, running_mean, running_var, momentum, eps, correction)
    for name in ("weight", "bias", "running_mean", "running_var"):
        rows = getattr(o, name)
        check_sets(name, rows, partials.shape[0], partials.shape[3])
        if rows.shape != weight.shape:
            raise InputError(f"{name} has shape {tuple(rows.shape)}, expected {tuple(weight.shape)}")
    return NormStatistics(*_batch_norm_statistics(*o))


def batch_norm_apply(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    residual_stride: int = 1,
    relu: bool = True,
    mask: bool = False,
) -> NormOutput:
    """``relu(scale · z + shift + residual)`` and, with ``mask``, the bits where it is positive.

    Args:
        z: (G, N, H, W, C), float32, float16 or bfloat16, which the result is too (float64: reference only).
        scale, shift: (Q, C) float32, Q = G or 1, by group.
        residual: (G, N, Hr, Wr, Cr ≤ C), read at every ``residual_stride``-th position, missing channels being 0.

    Raises:
        InputError: shapes that disagree.
    """
    check_tensor("z", z, 5)
    check_pair("scale and shift", scale, shift, z.shape[0], z.shape[4])
    check_shortcut(residual, residual_stride, z.shape)
    o = ApplyOperands(z, scale, shift, residual, residual_stride, relu, mask)
    y, bits = _batch_norm_apply(*o)
    return NormOutput(y, present(bits))
