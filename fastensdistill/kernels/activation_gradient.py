"""The gradient of ``activation``, and the partial sums that a BatchNorm's gradient before it needs.

    u = (d + residual) · f'(scale · z + shift)
    statistics = Σ u, Σ u · (z − mean) · inv_std per channel, one row per program, no atomics

u is the gradient with respect to scale · z + shift. One read of d and z, one write of u: 6 bytes per value in bfloat16,
8 with a residual. f' is in ``activation.py``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.activation import KINDS, activation_derivative, parsed, scaled
from fastensdistill.kernels.elementwise_gradient import ROWS_BLOCK, ElementwiseGradient, gradient_sums
from fastensdistill.kernels.launch import BATCH_SIZES, launch, row_stride, tl, triton
from fastensdistill.kernels.operands import accumulator, check_pair, check_tensor
from fastensdistill.kernels.ops import define, present
from fastensdistill.kernels.reference import partial_rows
from fastensdistill.kernels.tiles import rows_tile


class ActivationGradientOperands(NamedTuple):
    """What ``activation_gradient`` takes."""

    d: Tensor  # (G, N, H, W, C)
    z: Tensor  # like d
    kind: str
    scale: Tensor | None  # (Q, C) float32
    shift: Tensor | None
    residual: Tensor | None  # like d: the gradient that another reader of the value gave
    mean: Tensor | None  # (Q, C) float32: with them statistics are made
    inv_std: Tensor | None


def activation_gradient_reference(o: ActivationGradientOperands) -> tuple[Tensor, Tensor]:
    high = accumulator(o.d.dtype)
    name, a = parsed(o.kind)
    u = o.d.to(high) if o.residual is None else o.d.to(high) + o.residual.to(high)
    u = (u * KINDS[name].derivative(scaled(o.z, o.scale, o.shift).to(high), a)).to(o.d.dtype)
    return u, gradient_sums(u, None, o, lambda values: partial_rows(values.flatten(1, 3), ROWS_BLOCK))


@triton.jit(do_not_specialize=BATCH_SIZES)
def activation_gradient_kernel(
    p_d, p_z, p_scale, p_shift, p_residual, p_mean, p_inv_std, p_out, p_sums,
    positions, n_partials, s_scale, s_mean,
    C: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(2).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < C
    if p_scale is not None:
        b_scale = tl.load(p_scale + i_g * s_scale + o_n, mask=m_n, other=0.0)
        b_shift = tl.load(p_shift + i_g * s_scale + o_n, mask=m_n, other=0.0)
    if p_mean is not None:
        b_mean = tl.load(p_mean + i_g * s_mean + o_n, mask=m_n, other=0.0)
        b_inv = tl.load(p_inv_std + i_g * s_mean + o_n, mask=m_n, other=0.0)
        first = tl.zeros((BLOCK_N,), tl.float32)
        second = tl.zeros((BLOCK_N,), tl.float32)
    o_group = i_g * positions * C
    for i in range(0, ROWS, BLOCK_M):
        o_m = tl.program_id(0) * ROWS + i + tl.arange(0, BLOCK_M)
        m_d = (o_m < positions)[:, None] & m_n[None, :]
        o_d = o_m[:, None] * C + o_n[None, :]
        b_d = tl.load(p_d + o_group + o_d, mask=m_d, other=0.0).to(tl.float32)
        if p_residual is not None:
            b_d += tl.load(p_residual + o_group + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_z = tl.load(p_z + o_group + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_x = b_z
        if p_scale is not None:
            b_x = b_z * b_scale[None, :] + b_shift[None, :]
        b_out = (b_d * activation_derivative(b_x, KIND, A)).to(p_out.dtype.element_ty)
        tl.store(p_out + o_group + o_d, b_out, mask=m_d)
        if p_mean is not None:
            # past the positions d is 0, and with it u
            b_d = b_out.to(tl.float32)
            first += tl.sum(b_d, 0)
            second += tl.sum(b_d * ((b_z - b_mean[None, :]) * b_inv[None, :]), 0)
    if p_mean is not None:
        p_sums += (i_g * n_partials + tl.program_id(0)) * (2 * C)
        tl.store(p_sums + o_n, first, mask=m_n)
        tl.store(p_sums + C + o_n, second, mask=m_n)


def _empty(o):
    groups, images, height, width, channels = o.d.shape
    rows = -(-images * height * width // ROWS_BLOCK)
    shape = (0,) if o.mean is None else (groups, rows, 2, channels)
    return torch.empty_like(o.d), o.d.new_empty(shape, dtype=accumulator(o.d.dtype))


def _launch(o):
    out, sums = _empty(o)
    groups, images, height, width, channels = o.d.shape
    positions, tile = images * height * width, rows_tile(channels)
    rows = -(-positions // ROWS_BLOCK)
    name, a = parsed(o.kind)
    launch(
        activation_gradient_kernel,
        (rows, -(-channels // tile.BLOCK_N), groups),
        tile,
        o,
        p_out=out,
        p_sums=present(sums),
        positions=positions,
        n_partials=rows,
        s_scale=row_stride(o.scale),
        s_mean=row_stride(o.mean),
        C=channels,
        KIND=name,
        A=a,
        ROWS=ROWS_BLOCK,
        BLOCK_M=min(tile.BLOCK_M, ROWS_BLOCK),
    )
    return out, sums


_activation_gradient = define("activation_gradient", activation_gradient_reference, _empty, _launch)


def activation_gradient(
    d: Tensor,
    z: Tensor,
    *,
    kind: str,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    mean: Tensor | None = None,
    inv_std: Tensor | None = None,
) -> ElementwiseGradient:
    """The gradient with respect to ``scale · z + shift``, and the sums that ``batch_norm_backward`` needs.

    Args:
        d: (G, N, H, W, C), float32, float16 or bfloat16, which the result is too (float64: reference only).
        z: like d; ``kind``, ``scale`` and ``shift`` as ``activation`` had them.
        residual: like d, added to it.
        mean, inv_std: (Q, C) float32, Q = G or 1, by group: of the BatchNorm of z.

    Raises:
        InputError: shapes that disagree, or an unknown kind.
    """
    check_tensor("d", d, 5)
    parsed(kind)
    for name, value in (("z", z), ("residual", residual)):
        if value is not None and not (value.shape == d.shape and value.is_contiguous()):
            raise InputError(f"{name} has shape {tuple(value.shape)}, expected {tuple(d.shape)}, contiguous")
    check_pair("scale and shift", scale, shift, d.shape[0], d.shape[4])
    check_pair("mean and inv_std", mean, inv_std, d.shape[0], d.shape[4])
    o = ActivationGradientOperands(d, z, kind, scale, shift, residual, mean, inv_std)
    out, sums = _activation_gradient(*o)
    return ElementwiseGradient(out, present(sums))
