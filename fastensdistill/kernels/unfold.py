"""Un-fold: from the gradients of K branches' ordinary layers to those of W, b, r and s, all layers in two launches.

    dW = Σ_k s_k ⊗ dW_k ⊗ r_k       dr_k[i] = Σ_{o,t} s_k[o] · W · dW_k
    db = Σ_k s_k · db_k             ds_k[o] = Σ_{i,t} r_k[i] · W · dW_k + b[o] · db_k[o]

The first launch reads every gradient once: a program owns 32 output channels by 32 neighbours in memory (of input
channels x taps), sums dW over the branches, and leaves its sums over rows and over columns. The second adds those up,
in a fixed order, and does the biases. Nothing is added atomically, so two runs agree bit for bit. WRN-28-4 with K = 4:
140 MB of gradients and weights, 12 MB of partial sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastensdistill.kernels.layout import (
    RankOneLayer,
    Rows,
    device_tables,
    layer_factors,
    layer_weight,
    layers_of,
)
from fastensdistill.kernels.tiles import Tile
from fastensdistill.kernels.triton_utils import launch, runs_kernel, tl, triton

UNFOLD_TILE = Tile(32, 32, 0, 4, 1, "8 values a thread, 96 registers; 16 take 255 in 64-bit addresses")
FACTOR_TILE = Tile(32, 32, 0, 4, 1, "latency decides: 32 factors by 32 of their partial sums at a time")
UNFOLD_COLUMNS, FACTOR_COLUMNS = 10, 9

# ---- reference


def unfold_rank_one_reference(
    branch_gradients: Tensor, parameters: Tensor, deviations: Tensor, fields: list[int]
) -> tuple[Tensor, Tensor]:
    """dW and db of every layer, [ranked], and dr and ds, [K, R]."""
    gradient = parameters.new_zeros(branch_gradients.shape[1])
    factor_gradients = torch.zeros_like(deviations, memory_format=torch.contiguous_format)
    for layer in layers_of(fields):
        r, s = layer_factors(deviations, layer)
        dW_k = layer_weight(branch_gradients, layer)
        layer_weight(gradient, layer).copy_((s * dW_k * r).sum(0))
        product = layer_weight(parameters, layer) * dW_k
        dr = (s * product).sum((2, 4)).flatten(1)
        ds = (r * product).sum((3, 4)).flatten(1)
        if layer.bias >= 0:
            b = slice(layer.bias, layer.bias + layer.out_channels)
            gradient[b] = (s.flatten(1) * branch_gradients[:, b]).sum(0)
            ds = ds + parameters[b] * branch_gradients[:, b]
        factor_gradients[:, layer.r : layer.r + layer.in_channels] = dr
        factor_gradients[:, layer.s : layer.s + layer.out_channels] = ds
    return gradient, factor_gradients


# ---- kernels


def _tables(fields: Sequence[int]) -> tuple[Rows, ...]:
    """A row per tile for the first launch, and one per run of factors for the second."""
    tiles: Rows = []
    factors: Rows = []
    at = 0
    for layer in layers_of(fields):
        for group in range(layer.groups):
            at = _add_group(layer, group, at, tiles, factors)
    return tiles, factors


def _tile_counts(layer: RankOneLayer) -> tuple[int, int, int]:
    """Tiles over the output channels of a group, tiles along its rows, and the length of a row."""
    J = layer.group_channels * layer.taps
    Co = layer.out_channels // layer.groups
    return -(-Co // UNFOLD_TILE.BLOCK_M), -(-J // UNFOLD_TILE.BLOCK_N), J


def _partial_count(fields: Sequence[int]) -> int:
    """Partial sums of one branch."""
    counts = ((layer, *_tile_counts(layer)) for layer in layers_of(fields))
    return sum(layer.groups * tiles_o * J + layer.out_channels * tiles_j for layer, tiles_o, tiles_j, J in counts)


def _add_group(layer: RankOneLayer, group: int, at: int, tiles: Rows, factors: Rows) -> int:
    Co, Ci, taps = layer.out_channels // layer.groups, layer.group_channels, layer.taps
    tiles_o, tiles_j, J = _tile_counts(layer)
    r, s, weight = layer.r + group * Ci, layer.s + group * Co, layer.weight + group * Co * J
    over_rows, over_columns = at, at + tiles_o * J
    for n in range(tiles_o):
        for m in range(tiles_j):
            o, j = n * UNFOLD_TILE.BLOCK_M, m * UNFOLD_TILE.BLOCK_N
            partial = over_rows + n * J, over_columns + m * Co
            tiles.append((weight, r, s, Co, J, taps, o, j, *partial))
    for c in range(0, Ci, FACTOR_TILE.BLOCK_M):
        factors.append((over_rows, tiles_o * taps, taps, J, taps, c, Ci, r, -1))
    bias = -1 if layer.bias < 0 else layer.bias + group * Co
    for c in range(0, Co, FACTOR_TILE.BLOCK_M):
        factors.append((over_columns, tiles_j, 1, Co, 1, c, Co, s, bias))
    return over_columns + tiles_j * Co


@triton.jit
def unfold_kernel(
    p_branch_gradients,
    p_parameters,
    p_deviations,
    p_gradient,
    p_partials,
    p_table,
    K,
    ranked,
    factors,
    partials,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    p_row = p_table + tl.program_id(0) * COLUMNS
    weight = tl.load(p_row)
    CO = tl.load(p_row + 3).to(tl.int32)
    J = tl.load(p_row + 4).to(tl.int32)
    taps = tl.load(p_row + 5).to(tl.int32)
    o_o = tl.load(p_row + 6).to(tl.int32) + tl.arange(0, BLOCK_M)
    o_j = tl.load(p_row + 7).to(tl.int32) + tl.arange(0, BLOCK_N)
    m_o = o_o < CO
    m_j = o_j < J
    m = m_o[:, None] & m_j[None, :]
    o_w = (o_o * J)[:, None] + o_j[None, :]
    p_d = p_branch_gradients + weight
    p_r = p_deviations + tl.load(p_row + 1) + o_j // taps
    p_s = p_deviations + tl.load(p_row + 2) + o_o
    p_rows = p_partials + tl.load(p_row + 8) + o_j
    p_columns = p_partials + tl.load(p_row + 9) + o_o
    b_w = tl.load(p_parameters + weight + o_w, mask=m, other=0.0)
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(K):
        i_k = tl.cast(k, tl.int64)
        b_r = 1.0 + tl.load(p_r + i_k * factors, mask=m_j, other=0.0)
        b_s = 1.0 + tl.load(p_s + i_k * factors, mask=m_o, other=0.0)
        b_d = tl.load(p_d + i_k * ranked + o_w, mask=m, other=0.0)
        b_sum += b_s[:, None] * b_d * b_r[None, :]
        b_product = b_w * b_d
        tl.store(p_rows + i_k * partials, tl.sum(b_s[:, None] * b_product, 0), mask=m_j)
        tl.store(p_columns + i_k * partials, tl.sum(b_r[None, :] * b_product, 1), mask=m_o)
    tl.store(p_gradient + weight + o_w, b_sum, mask=m)


@triton.jit
def unfold_factors_kernel(
    p_branch_gradients,
    p_parameters,
    p_deviations,
    p_gradient,
    p_factor_gradients,
    p_partials,
    p_table,
    K,
    ranked,
    factors,
    partials,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    p_row = p_table + tl.program_id(0) * COLUMNS
    i_k = tl.program_id(1).to(tl.int64)
    n_terms = tl.load(p_row + 1).to(tl.int32)
    n_inner = tl.load(p_row + 2).to(tl.int32)
    s_outer = tl.load(p_row + 3).to(tl.int32)
    s_c = tl.load(p_row + 4).to(tl.int32)
    o_c = tl.load(p_row + 5).to(tl.int32) + tl.arange(0, BLOCK_M)
    m_c = o_c < tl.load(p_row + 6).to(tl.int32)
    factor = tl.load(p_row + 7)
    bias = tl.load(p_row + 8)
    p_terms = p_partials + tl.load(p_row) + i_k * partials
    b_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for n in range(0, n_terms, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        o = (o_c * s_c)[:, None] + (o_n // n_inner * s_outer + o_n % n_inner)[None, :]
        b_sums += tl.load(p_terms + o, mask=m_c[:, None] & (o_n < n_terms)[None, :], other=0.0)
    b_sum = tl.sum(b_sums, 1)
    if bias >= 0:
        p_b = p_branch_gradients + bias + o_c
        b_b = tl.load(p_parameters + bias + o_c, mask=m_c, other=0.0)
        b_sum += b_b * tl.load(p_b + i_k * ranked, mask=m_c, other=0.0)
        if i_k == 0:
            b_bias = tl.zeros((BLOCK_M,), tl.float32)
            for k in range(K):
                i_n = tl.cast(k, tl.int64)
                b_s = 1.0 + tl.load(p_deviations + i_n * factors + factor + o_c, mask=m_c, other=0.0)
                b_bias += b_s * tl.load(p_b + i_n * ranked, mask=m_c, other=0.0)
            tl.store(p_gradient + bias + o_c, b_bias, mask=m_c)
    tl.store(p_factor_gradients + i_k * factors + factor + o_c, b_sum, mask=m_c)


def _launch(branch_gradients, parameters, deviations, fields):
    K, ranked = branch_gradients.shape
    gradient, factor_gradients = parameters.new_empty(ranked), deviations.new_empty(deviations.shape)
    tiles, factors = device_tables(_tables, fields, parameters.device)
    partials = _partial_count(fields)
    operands = {
        "p_branch_gradients": branch_gradients.contiguous(),
        "p_parameters": parameters.contiguous(),
        "p_deviations": deviations.contiguous(),
        "p_gradient": gradient,
        "p_partials": parameters.new_empty(K * partials),
        "K": K,
        "ranked": ranked,
        "factors": deviations.shape[1],
        "partials": partials,
    }
    launch(unfold_kernel, (len(tiles),), UNFOLD_TILE, **operands, p_table=tiles, COLUMNS=UNFOLD_COLUMNS)
    launch(
        unfold_factors_kernel,
        (len(factors), K),
        FACTOR_TILE,
        **operands,
        p_factor_gradients=factor_gradients,
        p_table=factors,
        COLUMNS=FACTOR_COLUMNS,
    )
    return gradient, factor_gradients


# ---- what the op runs


def unfold_portable(
    branch_gradients: Tensor, parameters: Tensor, deviations: Tensor, fields: list[int]
) -> tuple[Tensor, Tensor]:
    """What serves without the extension: the Triton kernels where they run, else the reference."""
    run = _launch if runs_kernel(parameters) else unfold_rank_one_reference
    return run(branch_gradients, parameters, deviations, fields)
