"""Un-fold: from the gradients of K branches' ordinary layers to those of W, b, r and s, all layers in two launches.

    dW = Σ_k s_k ⊗ dW_k ⊗ r_k       dr_k[i] = Σ_{o,t} s_k[o] · W · dW_k
    db = Σ_k s_k · db_k             ds_k[o] = Σ_{i,t} r_k[i] · W · dW_k + b[o] · db_k[o]

The gradients dW_k come as the kernels of the weight gradients leave them, [K, taps, Ci, Co] for each layer (a linear
layer over [C, H, W] has its inputs position by position, channels innermost), and db_k as [K, Co]; dW leaves in the
order of the parameters, [Co, Ci, taps]. Plain networks, K copies without factors, have their gradients reordered alone.

The first launch reads every gradient once: a program owns 32 output channels by 32 values that are neighbours in W (of
input channels x taps), reads 32 runs of 32 output channels of each branch, sums dW over the branches, turns the tile
and writes 32 runs along W. It leaves its sums over rows and over columns; the second launch adds those up, in a fixed
order, and does the biases. Nothing is added atomically, so two runs agree bit for bit. WRN-28-4 with K = 4: 94 MB of
gradients and 23 MB of weights read, 23 MB written, in runs of 128 bytes each, and 12 MB of partial sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastensdistill.kernels.launch import launch, tl, triton
from fastensdistill.kernels.layout import (
    PACK_FIELDS,
    LayerOffsets,
    Layout,
    Rows,
    check_buffers,
    device_tables,
    layer_factors,
    layer_weight,
    layers_of,
)
from fastensdistill.kernels.operands import check_contiguous
from fastensdistill.kernels.ops import absent, define
from fastensdistill.kernels.tiles import Tile

UNFOLD_TILE = Tile(32, 32, 0, 8, 1, "4 values a thread, 80 registers, 24 warps a multiprocessor; at 8 values 12 to 16")
FACTOR_TILE = Tile(32, 32, 0, 4, 1, "latency decides: 32 factors by 32 of their partial sums at a time")
UNFOLD_COLUMNS, FACTOR_COLUMNS = 16, 11

# ---- references


def kernel_order(gradients: Tensor, layer: LayerOffsets, copies: int) -> Tensor:
    """[copies, groups, Co/groups, Ci/groups, taps] of what the kernels left of one layer's weight in ``gradients``."""
    start, P = copies * layer.weight, layer.positions
    d = gradients[start : start + copies * layer.weight_size]
    d = d.view(copies, layer.taps * P, layer.group_channels // P, layer.groups, -1).permute(0, 3, 4, 2, 1)
    return d.reshape(*d.shape[:3], layer.group_channels, layer.taps)


def _unfold_layer(
    layer: LayerOffsets,
    dW_k: Tensor,
    db_k: Tensor | None,
    parameters: Tensor,
    deviations: Tensor,
    gradient: Tensor,
    factor_gradients: Tensor,
) -> None:
    """dW and db into ``gradient``, dr and ds into ``factor_gradients``."""
    r, s = layer_factors(deviations, layer)
    layer_weight(gradient, layer).copy_((s * dW_k * r).sum(0))
    product = layer_weight(parameters, layer) * dW_k
    dr = (s * product).sum((2, 4)).flatten(1)
    ds = (r * product).sum((3, 4)).flatten(1)
    if db_k is not None:
        b = slice(layer.bias, layer.bias + layer.out_channels)
        gradient[b] = (s.flatten(1) * db_k).sum(0)
        ds = ds + parameters[b] * db_k
    factor_gradients[:, layer.r : layer.r + layer.in_channels] = dr
    factor_gradients[:, layer.s : layer.s + layer.out_channels] = ds


def unfold_gradients_reference(
    gradients: Tensor,
    parameters: Tensor,
    deviations: Tensor | None,
    gradient: Tensor,
    fields: list[int],
    copies: int,
) -> Tensor:
    """Writes ``gradient`` and returns dr and ds, [K, R]; nothing for plain networks."""
    factor_gradients = absent(parameters)
    if deviations is not None:
        factor_gradients = torch.zeros_like(deviations, memory_format=torch.contiguous_format)
    for layer in layers_of(fields, PACK_FIELDS):
        dW_k, start = kernel_order(gradients, layer, copies), copies * layer.bias
        if deviations is None:
            at = copies * layer.weight
            gradient[at : at + copies * layer.weight_size].view(dW_k.shape).copy_(dW_k)
            continue
        db_k = None
        if layer.bias >= 0:
            db_k = gradients[start : start + copies * layer.out_channels].view(copies, -1)
        _unfold_layer(layer, dW_k, db_k, parameters, deviations, gradient, factor_gradients)
    return factor_gradients


# ---- kernels


def _tables(fields: Sequence[int]) -> tuple[Rows, ...]:
    """A row per tile for the first launch, and one per run of factors for the second."""
    tiles: Rows = []
    factors: Rows = []
    at = 0
    for layer in layers_of(fields, PACK_FIELDS):
        for group in range(layer.groups):
            at = _add_group(layer, group, at, tiles, factors)
    return tiles, factors


def _tile_counts(layer: LayerOffsets) -> tuple[int, int, int]:
    """Tiles over the output channels of a group, tiles along its rows, and the length of a row."""
    J = layer.group_channels * layer.taps
    Co = layer.out_channels // layer.groups
    return -(-Co // UNFOLD_TILE.BLOCK_M), -(-J // UNFOLD_TILE.BLOCK_N), J


def _partial_count(fields: Sequence[int]) -> int:
    """Partial sums of one branch."""
    counts = ((layer, *_tile_counts(layer)) for layer in layers_of(fields, PACK_FIELDS))
    return sum(layer.groups * tiles_o * J + layer.out_channels * tiles_j for layer, tiles_o, tiles_j, J in counts)


def _add_group(layer: LayerOffsets, group: int, at: int, tiles: Rows, factors: Rows) -> int:
    Co, Ci, taps, P = layer.out_channels // layer.groups, layer.group_channels, layer.taps, layer.positions
    tiles_o, tiles_j, J = _tile_counts(layer)
    r, s = layer.r + group * Ci, layer.s + group * Co
    over_rows, over_columns = at, at + tiles_o * J
    for n in range(tiles_o):
        for m in range(tiles_j):
            tiles.append((
                layer.weight, layer.weight_size, group * Co * J, group * Co, r, s, Co, J, taps, taps * P, Ci // P,
                layer.out_channels, n * UNFOLD_TILE.BLOCK_M, m * UNFOLD_TILE.BLOCK_N, over_rows + n * J,
                over_columns + m * Co,
            ))  # fmt: skip
    for c in range(0, Ci, FACTOR_TILE.BLOCK_M):
        factors.append((over_rows, tiles_o * taps, taps, J, taps, c, Ci, r, -1, 0, 0))
    for c in range(0, Co, FACTOR_TILE.BLOCK_M):
        bias = layer.bias, group * Co, layer.out_channels
        factors.append((over_columns, tiles_j, 1, Co, 1, c, Co, s, *bias))
    return over_columns + tiles_j * Co


@triton.jit
def unfold_kernel(
    p_gradients,
    p_parameters,
    p_deviations,
    p_gradient,
    p_partials,
    p_table,
    K,
    factors,
    partials,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    p_row = p_table + tl.program_id(0) * COLUMNS
    weight = tl.load(p_row)
    size = tl.load(p_row + 1)
    p_d = p_gradients + K * weight + tl.load(p_row + 3)
    CO = tl.load(p_row + 6).to(tl.int32)
    J = tl.load(p_row + 7).to(tl.int32)
    taps = tl.load(p_row + 9).to(tl.int32)
    C = tl.load(p_row + 10).to(tl.int32)
    s_d = tl.load(p_row + 11).to(tl.int32)
    o_o = tl.load(p_row + 12).to(tl.int32) + tl.arange(0, BLOCK_M)
    o_j = tl.load(p_row + 13).to(tl.int32) + tl.arange(0, BLOCK_N)
    m_o = o_o < CO
    m_j = o_j < J
    # gradients are read along output channels, weights read and written along their rows: two orders of one tile
    o_d = ((o_j % taps * C + o_j // taps) * s_d)[:, None] + o_o[None, :]
    m_d = m_j[:, None] & m_o[None, :]
    within = tl.load(p_row + 2)
    o_w = (o_o * J)[:, None] + o_j[None, :]
    m_w = m_o[:, None] & m_j[None, :]
    if p_deviations is None:
        i_k = tl.program_id(1).to(tl.int64)
        b_d = tl.load(p_d + i_k * size + o_d, mask=m_d, other=0.0)
        tl.store(p_gradient + (K * weight + i_k * size + within) + o_w, tl.trans(b_d), mask=m_w)
    else:
        o_r = o_j // tl.load(p_row + 8).to(tl.int32)
        p_r = p_deviations + tl.load(p_row + 4)
        p_s = p_deviations + tl.load(p_row + 5)
        p_rows = p_partials + tl.load(p_row + 14)
        p_columns = p_partials + tl.load(p_row + 15)
        b_w = tl.trans(tl.load(p_parameters + (weight + within) + o_w, mask=m_w, other=0.0))
        b_sum = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for _ in range(K):
            b_r = 1.0 + tl.load(p_r + o_r, mask=m_j, other=0.0)
            b_s = 1.0 + tl.load(p_s + o_o, mask=m_o, other=0.0)
            b_d = tl.load(p_d + o_d, mask=m_d, other=0.0)
            b_sum += b_s[None, :] * b_d * b_r[:, None]
            b_product = b_w * b_d
            tl.store(p_rows + o_j, tl.sum(b_s[None, :] * b_product, 1), mask=m_j)
            tl.store(p_columns + o_o, tl.sum(b_r[:, None] * b_product, 0), mask=m_o)
            p_r += factors
            p_s += factors
            p_d += size
            p_rows += partials
            p_columns += partials
        tl.store(p_gradient + (weight + within) + o_w, tl.trans(b_sum), mask=m_w)


@triton.jit
def unfold_factors_kernel(
    p_gradients,
    p_parameters,
    p_deviations,
    p_gradient,
    p_factor_gradients,
    p_partials,
    p_table,
    K,
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
        o_b = tl.load(p_row + 9) + o_c
        s_b = tl.load(p_row + 10)
        p_b = p_gradients + K * bias + o_b
        b_b = tl.load(p_parameters + bias + o_b, mask=m_c, other=0.0)
        b_sum += b_b * tl.load(p_b + i_k * s_b, mask=m_c, other=0.0)
        if i_k == 0:
            b_bias = tl.zeros((BLOCK_M,), tl.float32)
            for k in range(K):
                i_n = tl.cast(k, tl.int64)
                b_s = 1.0 + tl.load(p_deviations + i_n * factors + factor + o_c, mask=m_c, other=0.0)
                b_bias += b_s * tl.load(p_b + i_n * s_b, mask=m_c, other=0.0)
            tl.store(p_gradient + bias + o_b, b_bias, mask=m_c)
    tl.store(p_factor_gradients + i_k * factors + factor + o_c, b_sum, mask=m_c)


def _launch(gradients, parameters, deviations, gradient, fields, copies):
    tiles, factors = device_tables(_tables, fields, parameters.device)
    partials = 0 if deviations is None else _partial_count(fields)
    operands = {
        "p_gradients": gradients,
        "p_parameters": parameters.contiguous(),
        "p_deviations": None if deviations is None else deviations.contiguous(),
        "p_gradient": gradient,
        "p_partials": parameters.new_empty(copies * partials),
        "K": copies,
        "factors": 0 if deviations is None else deviations.shape[1],
        "partials": partials,
    }
    grid = (len(tiles),) if deviations is not None else (len(tiles), copies)
    launch(unfold_kernel, grid, UNFOLD_TILE, **operands, p_table=tiles, COLUMNS=UNFOLD_COLUMNS)
    if deviations is None:
        return absent(parameters)
    factor_gradients = deviations.new_empty(deviations.shape)
    launch(
        unfold_factors_kernel,
        (len(factors), copies),
        FACTOR_TILE,
        **operands,
        p_factor_gradients=factor_gradients,
        p_table=factors,
        COLUMNS=FACTOR_COLUMNS,
    )
    return factor_gradients


# ---- registration and public function


def _fake(gradients, parameters, deviations, gradient, fields, copies):
    return absent(parameters) if deviations is None else deviations.new_empty(deviations.shape)


_unfold_gradients = define("unfold_gradients", unfold_gradients_reference, _fake, _launch, mutates=("gradient",))


def unfold_gradients(
    gradients: Tensor, parameters: Tensor, deviations: Tensor | None, layout: Layout, gradient: Tensor
) -> Tensor:
    """The gradients of all layers' parameters from those of the weights which the kernels multiply with.

    Args:
        gradients: [K · layout.ranked], for every weight [K, taps, Ci/groups, Co] and for every bias [K, Co] from K
            times its offset in the parameters on, as ``conv_weight_gradient`` and ``head_backward`` leave them.
        parameters: [layout.size] float32 or float64; without deviations [K · layout.size], every parameter
            [K, *shape].
        deviations: [K, layout.factors], r − 1 and s − 1 of K branches, or None for K plain networks.
        layout: the table of layers.
        gradient: as ``parameters``, contiguous; dW and db are written where W and b lie in these. Left as they are:
            what has no factors and, of plain networks, biases, whose gradients need no reordering.

    Returns:
        dr and ds, [K, layout.factors]; without deviations nothing, [0].

    Raises:
        InputError: a dtype, shape or device that does not fit the layout.

    Source: Nam et al., ICML 2022, section 2.
    """
    K = max(1, parameters.numel() // layout.size) if deviations is None else len(deviations)
    copies = K if deviations is None else 1
    extra = [("gradients", gradients, (K * layout.ranked,)), ("gradient", gradient, (copies * layout.size,))]
    check_buffers(layout, parameters, deviations, extra, copies)
    check_contiguous(("gradients", gradients), ("gradient", gradient))
    deviations = None if deviations is None else deviations.detach()
    return _unfold_gradients(gradients, parameters.detach(), deviations, gradient, layout.pack_fields, K)
