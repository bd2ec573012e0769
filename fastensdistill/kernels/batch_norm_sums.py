"""The partial sums of a BatchNorm in training mode that nothing but its statistics reads its input for.

    statistics = Σ (z − center), Σ (z − center)² per channel, one row per program, no atomics

A convolution makes these sums of its own result. Behind a concatenation, a pooling or a sum of two values nobody has
made them: one read of z, 2 bytes a value in bfloat16, where PyTorch's operations would move 30 in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.kernels.elementwise_gradient import ROWS_BLOCK
from fastensdistill.kernels.launch import BATCH_SIZES, launch, row_stride, tl, triton
from fastensdistill.kernels.operands import accumulator, check_pair, check_tensor
from fastensdistill.kernels.ops import define
from fastensdistill.kernels.reference import partial_rows, wide
from fastensdistill.kernels.tiles import rows_tile


class SumsOperands(NamedTuple):
    """What ``batch_norm_sums`` takes."""

    z: Tensor  # (G, N, H, W, C)
    center: Tensor  # (Q, C) float32


def batch_norm_sums_reference(o: SumsOperands) -> Tensor:
    rest = o.z.to(accumulator(o.z.dtype)) - wide(o.center)
    return torch.stack([partial_rows(v.flatten(1, 3), ROWS_BLOCK) for v in (rest, rest.square())], 2)


@triton.jit(do_not_specialize=BATCH_SIZES)
def batch_norm_sums_kernel(
    p_z, p_center, p_sums, positions, n_partials, s_center,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(2).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < C
    b_center = tl.load(p_center + i_g * s_center + o_n, mask=m_n, other=0.0)[None, :]
    # by position of a block, added up at the end: a sum in every step would go through shared memory
    first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    p_z += i_g * positions * C
    for i in range(0, ROWS, BLOCK_M):
        o_m = tl.program_id(0) * ROWS + i + tl.arange(0, BLOCK_M)
        m_z = (o_m < positions)[:, None] & m_n[None, :]
        b_z = tl.load(p_z + (o_m[:, None] * C + o_n[None, :]), mask=m_z, other=0.0).to(tl.float32)
        b_rest = tl.where(m_z, b_z - b_center, 0.0)
        first += b_rest
        second += b_rest * b_rest
    p_sums += (i_g * n_partials + tl.program_id(0)) * (2 * C)
    tl.store(p_sums + o_n, tl.sum(first, 0), mask=m_n)
    tl.store(p_sums + C + o_n, tl.sum(second, 0), mask=m_n)


def _empty(o: SumsOperands) -> Tensor:
    groups, images, height, width, channels = o.z.shape
    rows = -(-images * height * width // ROWS_BLOCK)
    return o.z.new_empty(groups, rows, 2, channels, dtype=accumulator(o.z.dtype))


def _launch(o: SumsOperands) -> Tensor:
    sums = _empty(o)
    groups, images, height, width, channels = o.z.shape
    tile = rows_tile(channels)
    launch(
        batch_norm_sums_kernel,
        (sums.shape[1], -(-channels // tile.BLOCK_N), groups),
        tile,
        o,
        p_sums=sums,
        positions=images * height * width,
        n_partials=sums.shape[1],
        s_center=row_stride(o.center),
        C=channels,
        ROWS=ROWS_BLOCK,
        BLOCK_M=min(tile.BLOCK_M, ROWS_BLOCK),
    )
    return sums


_batch_norm_sums = define("batch_norm_sums", batch_norm_sums_reference, _empty, _launch)


def batch_norm_sums(z: Tensor, center: Tensor) -> Tensor:
    """Rows of partial sums (G, P, 2, C), float32, as ``batch_norm_statistics`` takes them.

    Args:
        z: (G, N, H, W, C), float32, float16 or bfloat16 (float64: reference only).
        center: (Q, C) float32, Q = G or 1, by group: about what the sums are, the running mean.

    Raises:
        InputError: shapes that disagree.
    """
    check_tensor("z", z, 5)
    check_pair("center", center, center, z.shape[0], z.shape[4])
    return _batch_norm_sums(*SumsOperands(z, center))
