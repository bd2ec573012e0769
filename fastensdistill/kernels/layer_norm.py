"""LayerNorm over the channels of each position, and its gradient.

    mean = Σ x / C,   inv_std = 1 / √(Σ (x − mean)² / C + ε),   x̂ = (x − mean) · inv_std
    y = weight · x̂ + bias
    dx = inv_std · (e − Σ e / C − x̂ · Σ e x̂ / C),   e = weight · d
    d_bias = Σ d,   d_weight = Σ d · x̂              (over positions, and over the groups that share a set)

A program holds whole positions in registers, so x is read once and its variance is that about its mean. The gradient
makes mean and inv_std again, of the x that it reads anyway: nothing is kept for it. y takes 4 bytes per value in
bfloat16; the gradient reads d and x and writes dx, 6 bytes, and 8 C bytes of partial sums per 64 positions, 2 % of
that. They are added in a fixed order, without atomics.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import BATCH_SIZES, launch, row_stride, tl, triton
from fastensdistill.kernels.operands import accumulator, check_pair, check_tensor
from fastensdistill.kernels.ops import absent, define, present
from fastensdistill.kernels.reference import partial_rows, pick
from fastensdistill.kernels.sums import add_rows
from fastensdistill.kernels.tiles import Tile

MOST_CHANNELS = 8192  # a position's values in the registers of 16 warps: twice as many spill in the gradient
ROWS_BLOCK = 64  # positions of one program of the gradient, and of one row of sums


class LayerNormOperands(NamedTuple):
    """What ``layer_norm`` takes."""

    x: Tensor  # (G, N, H, W, C)
    weight: Tensor | None  # (S, C)
    bias: Tensor | None
    weight_index: Tensor | None  # (G,) int32: each group's row of them; without it there is one row, or one per group
    eps: float


class LayerNormGradientOperands(NamedTuple):
    """What ``layer_norm_gradient`` takes."""

    d: Tensor  # (G, N, H, W, C)
    x: Tensor  # like d
    weight: Tensor | None  # (S, C)
    weight_index: Tensor | None  # (G,) int32
    eps: float
    sets: int  # 1 or G: how many sums over the groups; 0 makes none


class LayerNormGradient(NamedTuple):
    """The input's gradient, and those of the parameters."""

    d: Tensor  # (G, N, H, W, C)
    d_weight: Tensor | None  # (sets, C) float32
    d_bias: Tensor | None


def normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x̂ and inv_std of the equations, in what an op computes in."""
    x = x.to(accumulator(x.dtype))
    x = x - x.mean(-1, keepdim=True)
    inv_std = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * inv_std, inv_std


def layer_norm_reference(o: LayerNormOperands) -> Tensor:
    y, _ = normalized(o.x, o.eps)
    if o.weight is not None and o.bias is not None:
        y = y * pick(o.weight, o.weight_index).to(y.dtype) + pick(o.bias, o.weight_index).to(y.dtype)
    return y.to(o.x.dtype)


def layer_norm_gradient_reference(o: LayerNormGradientOperands) -> tuple[Tensor, Tensor, Tensor]:
    x_hat, inv_std = normalized(o.x, o.eps)
    d = o.d.to(x_hat.dtype)
    e = d if o.weight is None else d * pick(o.weight, o.weight_index).to(d.dtype)
    dx = inv_std * (e - e.mean(-1, keepdim=True) - x_hat * (e * x_hat).mean(-1, keepdim=True))
    if not o.sets:
        return dx.to(o.d.dtype), absent(d), absent(d)

    def sums(values: Tensor) -> Tensor:
        rows = partial_rows(values.flatten(1, 3), ROWS_BLOCK)
        return rows.reshape(o.sets, -1, values.shape[-1]).sum(1)

    return dx.to(o.d.dtype), sums(d * x_hat), sums(d)


@triton.jit
def _normalized(b_x, m_n, eps, C: tl.constexpr):
    """x̂ of whole positions, 0 past the channels, and 1 / std of each."""
    b_x = tl.where(m_n[None, :], b_x - (tl.sum(b_x, 1) * (1.0 / C))[:, None], 0.0)
    b_inv = 1.0 / tl.sqrt_rn(tl.sum(b_x * b_x, 1) * (1.0 / C) + eps)
    return b_x * b_inv[:, None], b_inv


@triton.jit(do_not_specialize=BATCH_SIZES)
def layer_norm_kernel(
    p_x, p_weight, p_bias, p_index, p_y,
    positions, s_weight, eps,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(1).to(tl.int64)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < C
    m_x = (o_m < positions)[:, None] & m_n[None, :]
    o_x = i_g * positions * C + (o_m[:, None] * C + o_n[None, :])
    b_y, _ = _normalized(tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32), m_n, eps, C)
    if p_weight is not None:
        i_row = i_g if p_index is None else tl.load(p_index + i_g).to(tl.int64)
        b_weight = tl.load(p_weight + i_row * s_weight + o_n, mask=m_n, other=0.0).to(tl.float32)
        b_bias = tl.load(p_bias + i_row * s_weight + o_n, mask=m_n, other=0.0).to(tl.float32)
        b_y = b_y * b_weight[None, :] + b_bias[None, :]
    tl.store(p_y + o_x, b_y.to(p_y.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=BATCH_SIZES)
def layer_norm_gradient_kernel(
    p_d, p_x, p_weight, p_index, p_dx, p_sums,
    positions, n_partials, s_weight, eps,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(1).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < C
    if p_weight is not None:
        i_row = i_g if p_index is None else tl.load(p_index + i_g).to(tl.int64)
        b_weight = tl.load(p_weight + i_row * s_weight + o_n, mask=m_n, other=0.0).to(tl.float32)
    if p_sums is not None:
        # by position of a block, added up at the end: a sum in every step would go through shared memory
        weights = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        biases = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(0, ROWS, BLOCK_M):
        o_m = tl.program_id(0) * ROWS + i + tl.arange(0, BLOCK_M)
        m_d = (o_m < positions)[:, None] & m_n[None, :]
        o_d = i_g * positions * C + (o_m[:, None] * C + o_n[None, :])
        b_d = tl.load(p_d + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_x, b_inv = _normalized(tl.load(p_x + o_d, mask=m_d, other=0.0).to(tl.float32), m_n, eps, C)
        if p_sums is not None:
            weights += b_d * b_x
            biases += b_d
        if p_weight is not None:
            b_d *= b_weight[None, :]
        b_first = tl.sum(b_d, 1) * (1.0 / C)
        b_second = tl.sum(b_d * b_x, 1) * (1.0 / C)
        b_d = b_inv[:, None] * (b_d - b_first[:, None] - b_x * b_second[:, None])
        tl.store(p_dx + o_d, b_d.to(p_dx.dtype.element_ty), mask=m_d)
    if p_sums is not None:
        p_sums += (i_g * n_partials + tl.program_id(0)) * (2 * C)
        tl.store(p_sums + o_n, tl.sum(weights, 0), mask=m_n)
        tl.store(p_sums + C + o_n, tl.sum(biases, 0), mask=m_n)


def positions_tile(channels: int, values: int) -> Tile:
    """Tile of a pass over whole positions: ``values`` a thread of 4 warps, and more warps where one has more."""
    columns = max(16, triton.next_power_of_2(channels))
    warps = min(16, max(4, columns // (32 * values)))
    return Tile(max(1, 128 * values // columns), columns, 0, warps, 1, f"{values} values a thread")


def _empty(o):
    return torch.empty_like(o.x)


def _launch(o):
    y = _empty(o)
    groups, images, height, width, channels = o.x.shape
    positions, tile = images * height * width, positions_tile(channels, 32)
    launch(
        layer_norm_kernel,
        (-(-positions // tile.BLOCK_M), groups),
        tile,
        o,
        p_index=o.weight_index,
        p_y=y,
        positions=positions,
        s_weight=row_stride(o.weight),
        C=channels,
    )
    return y


def _empty_gradient(o):
    shape, high = (o.sets, o.d.shape[4]) if o.sets else (0,), accumulator(o.d.dtype)
    return torch.empty_like(o.d), o.d.new_empty(shape, dtype=high), o.d.new_empty(shape, dtype=high)


def _launch_gradient(o):
    dx, d_weight, d_bias = _empty_gradient(o)
    groups, images, height, width, channels = o.d.shape
    positions, tile = images * height * width, positions_tile(channels, 16)
    rows = -(-positions // ROWS_BLOCK)
    sums = o.d.new_empty(groups, rows, 2 * channels, dtype=torch.float32) if o.sets else None
    launch(
        layer_norm_gradient_kernel,
        (rows, groups),
        tile,
        o,
        p_index=o.weight_index,
        p_dx=dx,
        p_sums=sums,
        positions=positions,
        n_partials=rows,
        s_weight=row_stride(o.weight),
        C=channels,
        ROWS=ROWS_BLOCK,
        BLOCK_M=min(tile.BLOCK_M, ROWS_BLOCK),
    )
    if sums is not None:
        total = add_rows(sums.view(o.sets, -1, 2 * channels), 1)
        d_weight, d_bias = (half.contiguous() for half in total[:, 0].chunk(2, 1))
    return dx, d_weight, d_bias


_layer_norm = define("layer_norm", layer_norm_reference, _empty, _launch)
_layer_norm_gradient = define("layer_norm_gradient", layer_norm_gradient_reference, _empty_gradient, _launch_gradient)


def _check_rows(x: Tensor, weight: Tensor | None, bias: Tensor | None, weight_index: Tensor | None) -> None:
    if x.shape[4] > MOST_CHANNELS:
        raise InputError(f"LayerNorm over {x.shape[4]} channels; at most {MOST_CHANNELS} fit a program")
    if weight_index is not None and weight is not None:
        if not (weight_index.shape == x.shape[:1] and weight_index.dtype == torch.int32):
            raise InputError(
                f"weight_index is {weight_index.dtype} of shape {tuple(weight_index.shape)}, expected int32 "
                f"({x.shape[0]},)"
            )
        check_pair("weight and bias", weight, bias, weight.shape[0], x.shape[4])
    else:
        check_pair("weight and bias", weight, bias, x.shape[0], x.shape[4])


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    weight_index: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """LayerNorm of each position over its channels.

    Args:
        x: (G, N, H, W, C), float32, float16 or bfloat16, which the result is too (float64: reference only).
        weight, bias: (S, C), any of these, or both absent.
        weight_index: (G,) int32, each group's row of them. Without it S is 1 (all groups share them) or G.
        eps: added to the variance.

    Raises:
        InputError: shapes that disagree, or more than ``MOST_CHANNELS`` channels.
    """
    check_tensor("x", x, 5)
    _check_rows(x, weight, bias, weight_index)
    return _layer_norm(*LayerNormOperands(x, weight, bias, weight_index, eps))


def layer_norm_gradient(
    d: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    *,
    weight_index: Tensor | None = None,
    eps: float = 1e-5,
    sets: int = 0,
) -> LayerNormGradient:
    """The gradients of ``layer_norm``'s input and, with ``sets``, of its parameters.

    Args:
        d: (G, N, H, W, C), which the gradient's dtype is too; x like it.
        weight, weight_index, eps: as ``layer_norm`` had them.
        sets: 1 sums the parameters' gradients over all groups, G keeps them apart, 0 leaves them out.

    Raises:
        InputError: shapes that disagree, or more than ``MOST_CHANNELS`` channels.
    """
    check_tensor("d", d, 5)
    _check_rows(d, weight, weight, weight_index)
    if not (x.shape == d.shape and x.is_contiguous()):
        raise InputError(f"x has shape {tuple(x.shape)}, expected {tuple(d.shape)}, contiguous")
    if sets not in (0, 1, d.shape[0]):
        raise InputError(f"sets is {sets}, expected 0, 1 or {d.shape[0]}")
    o = LayerNormGradientOperands(d, x, weight, weight_index, eps, sets)
    dx, d_weight, d_bias = _layer_norm_gradient(*o)
    return LayerNormGradient(dx, present(d_weight), present(d_bias))
