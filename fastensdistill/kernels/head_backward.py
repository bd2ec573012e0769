"""Backward of the classifier (``head``).

dpooled = dlogits · Wᵀ,   d = [scale · z + shift > 0] · dpooled / (H·W)   (· scale in eval mode)
dW = pooledᵀ · dlogits,   db = Σ dlogits
statistics = Σ d, Σ d · x̂ per channel, one row per block of images (training mode)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.kernels.elementwise_gradient import gradient_sums
from fastensdistill.kernels.head import (
    CHANNELS_BLOCK,
    HEAD_TILE,
    IMAGES_BLOCK,
    check_head,
    check_shape,
    class_block,
    head_sizes,
    normalized,
)
from fastensdistill.kernels.launch import BATCH_SIZES, launch, row_stride, tl, triton
from fastensdistill.kernels.operands import check_out, check_pair
from fastensdistill.kernels.ops import define, present
from fastensdistill.kernels.reference import leave, partial_rows, pick


class HeadBackwardOperands(NamedTuple):
    """What ``head_backward`` takes."""

    d_logits: Tensor  # (G, N, classes) float32
    z: Tensor  # (G, N, H, W, C); this and what follows as in ``head``
    weight: Tensor  # (S, C, classes)
    weight_index: Tensor  # (G,) int32
    scale: Tensor | None  # (S or 1, C) float32
    shift: Tensor | None
    relu: bool
    mean: Tensor | None  # (S or 1, C) float32, in training mode
    inv_std: Tensor | None
    pooled: Tensor | None  # (G, N, C) float32, where the parameters' gradients are asked for
    precision: str
    d_weight: Tensor | None  # (G, C, classes) float32, written
    d_bias: Tensor | None  # (G, classes) float32, written
    add: bool  # on top of what they hold


class HeadGradient(NamedTuple):
    """Gradients of the features, the weight and the bias, and partial sums."""

    d: Tensor  # (G, N, H, W, C)
    d_weight: Tensor | None  # (G, C, classes) float32
    d_bias: Tensor | None  # (G, classes) float32
    statistics: Tensor | None  # (G, P, 2, C) float32


def head_backward_reference(o: HeadBackwardOperands) -> tuple[Tensor, Tensor]:
    y = normalized(o)
    d_logits = o.d_logits.to(o.weight.dtype).to(y.dtype)
    d_pooled = d_logits @ o.weight[o.weight_index.long()].to(y.dtype).transpose(1, 2) / (y.shape[2] * y.shape[3])
    d = d_pooled[:, :, None, None, :] * (y > 0 if o.relu else torch.ones_like(y))
    if o.scale is not None and o.mean is None:
        d = d * pick(o.scale, o.weight_index)
    d = d.to(o.z.dtype)
    if o.pooled is not None and o.d_weight is not None and o.d_bias is not None:
        leave(o.pooled.to(o.weight.dtype).to(y.dtype).transpose(1, 2) @ d_logits, o.d_weight, o.add)
        leave(o.d_logits.sum(1), o.d_bias, o.add)
    rows = lambda v: partial_rows(v.sum((2, 3)), IMAGES_BLOCK)  # noqa: E731
    return d, gradient_sums(d, o.weight_index, o, rows)


@triton.jit(do_not_specialize=BATCH_SIZES)
def head_data_gradient_kernel(
    p_d_logits, p_z, p_weight, p_weight_index, p_scale, p_shift, p_mean, p_inv_std, p_d, p_statistics,
    N, n_partials, s_scale, s_mean,
    POSITIONS: tl.constexpr, C: tl.constexpr, CLASSES: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(2).to(tl.int64)
    i_slot = tl.load(p_weight_index + i_g).to(tl.int64)
    o_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    m_b = o_b < N
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_p = tl.arange(0, BLOCK_P)
    p_d_logits += i_g * N * CLASSES
    p_weight += i_slot * (C * CLASSES)
    acc = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for i_k in range(0, CLASSES, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < CLASSES
        m_d = m_b[:, None] & m_k[None, :]
        b_d_logits = tl.load(p_d_logits + (o_b[:, None] * CLASSES + o_k[None, :]), mask=m_d, other=0.0)
        m_w = m_k[:, None] & m_c[None, :]
        b_w = tl.load(p_weight + (o_c[None, :] * CLASSES + o_k[:, None]), mask=m_w, other=0.0)
        acc = tl.dot(b_d_logits.to(b_w.dtype), b_w, acc, input_precision=PRECISION)
    b_share = (acc * (1.0 / POSITIONS))[:, None, :]
    if p_scale is not None:
        b_scale = tl.load(p_scale + i_slot * s_scale + o_c, mask=m_c, other=0.0)[None, None, :]
        b_shift = tl.load(p_shift + i_slot * s_scale + o_c, mask=m_c, other=0.0)[None, None, :]
    if p_mean is not None:
        b_mean = tl.load(p_mean + i_slot * s_mean + o_c, mask=m_c, other=0.0)[None, None, :]
        b_inv = tl.load(p_inv_std + i_slot * s_mean + o_c, mask=m_c, other=0.0)[None, None, :]
    first = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    second = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    p_z += i_g * N * (POSITIONS * C)
    p_d += i_g * N * (POSITIONS * C)
    for i_p in range(0, POSITIONS, BLOCK_P):
        m_z = m_b[:, None, None] & ((i_p + o_p) < POSITIONS)[None, :, None] & m_c[None, None, :]
        o_z = (o_b[:, None, None] * POSITIONS + (i_p + o_p)[None, :, None]) * C + o_c[None, None, :]
        b_z = tl.load(p_z + o_z, mask=m_z, other=0.0).to(tl.float32)
        b_d = tl.where(m_z, b_share, 0.0)
        if RELU:
            if p_scale is not None:
                b_d = tl.where(b_z * b_scale + b_shift > 0, b_d, 0.0)
            else:
                b_d = tl.where(b_z > 0, b_d, 0.0)
        if p_scale is not None and p_mean is None:
            b_d *= b_scale
        b_stored = b_d.to(p_d.dtype.element_ty)
        tl.store(p_d + o_z, b_stored, mask=m_z)
        if p_mean is not None:
            b_d = b_stored.to(tl.float32)
            first += tl.sum(b_d, 1)
            second += tl.sum(b_d * ((b_z - b_mean) * b_inv), 1)
    if p_mean is not None:
        p_statistics += (i_g * n_partials + tl.program_id(0)) * (2 * C)
        tl.store(p_statistics + o_c, tl.sum(first, 0), mask=m_c)
        tl.store(p_statistics + C + o_c, tl.sum(second, 0), mask=m_c)


@triton.jit(do_not_specialize=BATCH_SIZES)
def head_weight_gradient_kernel(
    p_d_logits, p_pooled, p_weight, p_d_weight, p_d_bias,
    N,
    C: tl.constexpr, CLASSES: tl.constexpr, PRECISION: tl.constexpr, ADD: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(2).to(tl.int64)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < CLASSES
    p_d_logits += i_g * N * CLASSES
    p_pooled += i_g * N * C
    LOW = p_weight.dtype.element_ty  # products are in the weight's type, which is all it is here for
    acc = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    b_bias = tl.zeros((BLOCK_N,), tl.float32)
    for i_b in range(0, N, BLOCK_B):
        o_b = i_b + tl.arange(0, BLOCK_B)
        m_b = o_b < N
        b_pooled = tl.load(p_pooled + (o_b[:, None] * C + o_c[None, :]), mask=m_b[:, None] & m_c[None, :], other=0.0)
        m_d = m_b[:, None] & m_n[None, :]
        b_d = tl.load(p_d_logits + (o_b[:, None] * CLASSES + o_n[None, :]), mask=m_d, other=0.0)
        b_bias += tl.sum(b_d, 0)
        acc = tl.dot(tl.trans(b_pooled).to(LOW), b_d.to(LOW), acc, input_precision=PRECISION)
    o_w = o_c[:, None] * CLASSES + o_n[None, :]
    p_d_weight += i_g * (C * CLASSES)
    p_d_bias += i_g * CLASSES
    m_w = m_c[:, None] & m_n[None, :]
    if ADD:
        acc += tl.load(p_d_weight + o_w, mask=m_w, other=0.0)
    tl.store(p_d_weight + o_w, acc, mask=m_w)
    if tl.program_id(0) == 0:
        if ADD:
            b_bias += tl.load(p_d_bias + o_n, mask=m_n, other=0.0)
        tl.store(p_d_bias + o_n, b_bias, mask=m_n)


def _empty(o):
    groups, images, *_, channels = o.z.shape
    shape = (groups, -(-images // IMAGES_BLOCK), 2, channels) if o.mean is not None else (0,)
    return torch.empty_like(o.z), o.d_logits.new_empty(shape)


def _launch(o):
    d, statistics = _empty(o)
    groups, images, *_, channels = o.z.shape
    classes, blocks, rows = o.weight.shape[2], -(-channels // CHANNELS_BLOCK), -(-images // IMAGES_BLOCK)
    launch(
        head_data_gradient_kernel,
        (rows, blocks, groups),
        HEAD_TILE,
        o,
        p_d=d,
        p_statistics=present(statistics),
        n_partials=rows,
        s_scale=row_stride(o.scale),
        s_mean=row_stride(o.mean),
        BLOCK_K=32,
        **head_sizes(o),
    )
    if o.pooled is not None:
        columns = class_block(classes)
        launch(
            head_weight_gradient_kernel,
            (blocks, -(-classes // columns), groups),
            HEAD_TILE,
            o,
            N=images,
            C=channels,
            CLASSES=classes,
            BLOCK_B=32,
            BLOCK_C=CHANNELS_BLOCK,
            BLOCK_N=columns,
        )
    return d, statistics


_head_backward = define("head_backward", head_backward_reference, _empty, _launch, mutates=("d_weight", "d_bias"))


def head_backward(
    d_logits: Tensor,
    z: Tensor,
    weight: Tensor,
    weight_index: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = True,
    mean: Tensor | None = None,
    inv_std: Tensor | None = None,
    pooled: Tensor | None = None,
    precision: str = "ieee",
    d_weight: Tensor | None = None,
    d_bias: Tensor | None = None,
    add: bool = False,
) -> HeadGradient:
    """Gradient of ``head``: of z, and, where ``pooled`` is given, of weight and bias per group.

    Args:
        d_logits: (G, N, classes) float32. z, weight, weight_index, scale, shift, relu, precision: as of ``head``.
        mean, inv_std: (S or 1, C) float32. Without them the gradient is of z itself (evaluation mode: times scale);
            with them of the BatchNorm's output, with its partial sums for ``batch_norm_backward``.
        pooled: (G, N, C) float32, as ``head`` returned it.
        d_weight, d_bias: (G, C, classes) and (G, classes) float32, where these gradients are written, with ``add`` on
            top of what they hold; without them in new memory.

    Raises:
        InputError: shapes that disagree, another precision.
    """
    o = HeadBackwardOperands(
        d_logits, z, weight, weight_index, scale, shift, relu, mean, inv_std, pooled, precision, d_weight, d_bias, add
    )
    check_head(o)
    check_pair("mean and inv_std", mean, inv_std, weight.shape[0], z.shape[4])
    groups, (_, channels, classes) = z.shape[0], weight.shape
    check_shape("d_logits", d_logits, (groups, z.shape[1], classes))
    if pooled is None:
        o = o._replace(d_weight=None, d_bias=None)
    else:
        check_shape("pooled", pooled, (groups, z.shape[1], channels))
        d_weight = check_out("d_weight", d_weight, (groups, channels, classes), d_logits, add)
        o = o._replace(d_weight=d_weight, d_bias=check_out("d_bias", d_bias, (groups, classes), d_logits, add))
    d, statistics = _head_backward(*o)
    return HeadGradient(d, o.d_weight, o.d_bias, present(statistics))
