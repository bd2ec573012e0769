"""The classifier: BatchNorm by known scale and shift, ReLU, mean over positions, linear.

pooled[c] = mean over positions of relu(scale · z + shift)            logits = pooled · W[slots[g]] + bias[slots[g]]
dpooled = dlogits · Wᵀ,   d = [scale · z + shift > 0] · dpooled / (H·W)   (· scale in eval mode)
dW = pooledᵀ · dlogits,   db = Σ dlogits
statistics = Σ d, Σ d · x̂ (training mode)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.kernels.launch import BATCH_SIZES, launch, row_stride, tl, triton
from fastensdistill.kernels.operands import accumulator, check_pair, check_precision, check_tensor, require
from fastensdistill.kernels.ops import define
from fastensdistill.kernels.reference import pick
from fastensdistill.kernels.tiles import Tile

IMAGES_BLOCK = 16  # images of one program, the fewest a matrix product takes; one row of the statistics each
POSITIONS_BLOCK, CHANNELS_BLOCK = 16, 32  # read at once for each of them
HEAD_TILE = Tile(0, 0, 0, 8, 2, "few programs: latency decides, so 32 values a thread are in flight")


def class_block(classes: int) -> int:
    """Classes of one program."""
    return min(128, max(16, 1 << (classes - 1).bit_length()))


class HeadOutput(NamedTuple):
    logits: Tensor  # (G, N, classes) float32
    pooled: Tensor  # (G, N, C) float32


def normalized(z: Tensor, slots: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    y = z.to(accumulator(z.dtype))
    return y if scale is None or shift is None else y * pick(scale, slots) + pick(shift, slots)


def head_reference(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    high = accumulator(z.dtype)
    y = normalized(z, slots, scale, shift)
    pooled = (y.relu() if relu else y).mean((2, 3))
    logits = pooled.to(weight.dtype).to(high) @ weight[slots.long()].to(high)
    if bias is not None:
        logits = logits + bias[slots.long()][:, None].to(high)
    return logits, pooled


@triton.jit(do_not_specialize=BATCH_SIZES)
def head_kernel(
    p_z,
    p_w,
    p_bias,
    p_slots,
    p_scale,
    p_shift,
    p_logits,
    p_pooled,
    N,
    s_scale,
    POSITIONS: tl.constexpr,
    C: tl.constexpr,
    CLASSES: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_n = tl.program_id(1)
    i_g = tl.program_id(2).to(tl.int64)
    i_slot = tl.load(p_slots + i_g).to(tl.int64)
    o_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    m_b = o_b < N
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < CLASSES
    o_p = tl.arange(0, BLOCK_P)
    p_z += i_g * N * (POSITIONS * C)
    p_w += i_slot * (C * CLASSES)
    acc = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        if p_scale is not None:
            b_scale = tl.load(p_scale + i_slot * s_scale + o_c, mask=m_c, other=0.0)[None, None, :]
            b_shift = tl.load(p_shift + i_slot * s_scale + o_c, mask=m_c, other=0.0)[None, None, :]
        b_pooled = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        for i_p in range(0, POSITIONS, BLOCK_P):
            m_z = m_b[:, None, None] & ((i_p + o_p) < POSITIONS)[None, :, None] & m_c[None, None, :]
            o_z = (o_b[:, None, None] * POSITIONS + (i_p + o_p)[None, :, None]) * C + o_c[None, None, :]
            b_y = tl.load(p_z + o_z, mask=m_z, other=0.0).to(tl.float32)
            if p_scale is not None:
                b_y = tl.where(m_z, b_y * b_scale + b_shift, 0.0)
            if RELU:
                b_y = tl.maximum(b_y, 0.0, propagate_nan=tl.PropagateNan.ALL)
            b_pooled += tl.sum(b_y, 1)
        b_pooled *= 1.0 / POSITIONS
        if i_n == 0:
            o_pooled = i_g * N * C + o_b[:, None] * C + o_c[None, :]
            tl.store(p_pooled + o_pooled, b_pooled, mask=m_b[:, None] & m_c[None, :])
        m_w = m_c[:, None] & m_n[None, :]
        b_w = tl.load(p_w + (o_c[:, None] * CLASSES + o_n[None, :]), mask=m_w, other=0.0)
        acc = tl.dot(b_pooled.to(b_w.dtype), b_w, acc, input_precision=PRECISION)
    if p_bias is not None:
        acc += tl.load(p_bias + i_slot * CLASSES + o_n, mask=m_n, other=0.0)[None, :]
    o_logits = i_g * N * CLASSES + o_b[:, None] * CLASSES + o_n[None, :]
    tl.store(p_logits + o_logits, acc, mask=m_b[:, None] & m_n[None, :])


def _launch(z, weight, bias, slots, scale, shift, relu, precision):
    groups, images, height, width, channels = z.shape
    classes = weight.shape[2]
    logits = z.new_empty(groups, images, classes, dtype=torch.float32)
    pooled = z.new_empty(groups, images, channels, dtype=torch.float32)
    columns = class_block(classes)
    launch(
        head_kernel,
        (-(-images // IMAGES_BLOCK), -(-classes // columns), groups),
        HEAD_TILE,
        p_z=z,
        p_w=weight,
        p_bias=bias,
        p_slots=slots,
        p_scale=scale,
        p_shift=shift,
        p_logits=logits,
        p_pooled=pooled,
        N=images,
        s_scale=row_stride(scale),
        POSITIONS=height * width,
        C=channels,
        CLASSES=classes,
        RELU=relu,
        PRECISION=precision,
        BLOCK_B=IMAGES_BLOCK,
        BLOCK_P=POSITIONS_BLOCK,
        BLOCK_C=CHANNELS_BLOCK,
        BLOCK_N=columns,
    )
    return logits, pooled


def _head_fake(z, weight, bias, slots, scale, shift, relu, precision):
    high = accumulator(z.dtype)
    return (
        z.new_empty(z.shape[0], z.shape[1], weight.shape[2], dtype=high),
        z.new_empty(z.shape[0], z.shape[1], z.shape[4], dtype=high),
    )


_head = define("head", head_reference, _head_fake, _launch)


def check_head(
    z: Tensor, weight: Tensor, slots: Tensor, scale: Tensor | None, shift: Tensor | None, precision: str
) -> None:
    check_tensor("z", z, 5)
    check_tensor("weight", weight, 3)
    check_precision(precision)
    require(z.shape[0] == slots.shape[0], f"z has {z.shape[0]} groups, expected {slots.shape[0]} as slots has")
    require(
        weight.shape[1] == z.shape[4],
        f"weight has shape {tuple(weight.shape)}, expected (slots, {z.shape[4]}, classes)",
    )
    check_pair("scale and shift", scale, shift, weight.shape[0], z.shape[4])


def head(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = True,
    precision: str = "ieee",
) -> HeadOutput:
    """Logits (G, N, classes) and the pooled features they come from (G, N, C), both float32.

    ``z`` (G, N, H, W, C); ``weight`` (S, C, classes), its dtype is multiplied in; ``bias`` (S, classes) float32 or
    None; ``slots`` int32 (G,); ``scale, shift`` (S or 1, C) float32, by slot, or None. ``relu=False`` for a network
    whose last layer has its ReLU already. Raises InputError for shapes that disagree.
    """
    check_head(z, weight, slots, scale, shift, precision)
    return HeadOutput(*_head(z, weight, bias, slots, scale, shift, relu, precision))
