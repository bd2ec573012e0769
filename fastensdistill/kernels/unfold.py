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

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastensdistill.kernels.launch import launch, tl, triton
from fastensdistill.kernels.layout import (
    LayerOffsets,
    Layout,
    Rows,
    check_buffers,
    check_flat,
    device_tables,
    layer_bias,
    layer_factors,
    layer_weight,
    layers_of,
)
from fastensdistill.kernels.operands import check_contiguous
from fastensdistill.kernels.ops import absent, define
from fastensdistill.kernels.tiles import Tile

UNFOLD_TILE = Tile(32, 32, 0, 8, 1, "4 values a thread, 80 registers, 24 warps a multiprocessor; at 8 values 12 to 16")
FACTOR_TILE = Tile(32, 32, 0, 4, 1, "latency decides: 32 factors by 32 of their partial sums at a time")
UNFOLD_COLUMNS, FACTOR_COLUMNS = 13, 9


class UnfoldOperands(NamedTuple):
    """What ``unfold_gradients`` takes."""

    gradients: Tensor  # [K · layout.ranked], in the kernels' order
    parameters: Tensor  # [layout.size] of branches, [K · layout.size] of plain networks
    deviations: Tensor | None  # [K, layout.factors]; None for plain networks
    gradient: Tensor  # like the parameters, written
    fields: list[int]  # layout.fields
    networks: int  # K


def kernel_order(gradients: Tensor, layer: LayerOffsets, K: int) -> Tensor:
    """[K, Co, Ci, taps] of what the kernels left of one layer's weight in ``gradients``, [K, taps, Ci, Co]."""
    C = layer.in_channels // layer.positions
    d = layer_weight(gradients, layer, K).view(K, -1, C, layer.out_channels).permute(0, 3, 2, 1)
    return d.reshape(K, layer.out_channels, layer.in_channels, layer.taps)


def unfold_gradients_reference(o: UnfoldOperands) -> Tensor:
    """Writes ``gradient`` and returns dr and ds, [K, R]; nothing for plain networks."""
    factor_gradients, K = _empty(o), o.networks
    for layer in layers_of(o.fields):
        dW_k = kernel_order(o.gradients, layer, K)
        if o.deviations is None:
            layer_weight(o.gradient, layer, K).copy_(dW_k)
            continue
        r, s = layer_factors(o.deviations, layer)
        layer_weight(o.gradient, layer)[0] = (s * dW_k * r).sum(0)
        product = layer_weight(o.parameters, layer) * dW_k
        dr, ds = (s * product).sum((1, 3)), (r * product).sum((2, 3))
        if layer.bias >= 0:
            db_k = layer_bias(o.gradients, layer, K)
            layer_bias(o.gradient, layer)[0] = (s.flatten(1) * db_k).sum(0)
            ds = ds + layer_bias(o.parameters, layer) * db_k
        factor_gradients[:, layer.r : layer.r + layer.in_channels] = dr
        factor_gradients[:, layer.s : layer.s + layer.out_channels] = ds
    return factor_gradients


def _tile_counts(layer: LayerOffsets) -> tuple[int, int, int]:
    """Tiles over the output channels, tiles along a row of W, and the length of a row."""
    J = layer.in_channels * layer.taps
    return -(-layer.out_channels // UNFOLD_TILE.BLOCK_M), -(-J // UNFOLD_TILE.BLOCK_N), J


def _partial_count(fields: Sequence[int]) -> int:
    """Partial sums of one branch."""
    counts = ((layer, *_tile_counts(layer)) for layer in layers_of(fields))
    return sum(tiles_o * J + layer.out_channels * tiles_j for layer, tiles_o, tiles_j, J in counts)


def _tables(fields: Sequence[int]) -> tuple[Rows, ...]:
    """A row per tile for the first launch, and one per run of factors for the second."""
    tiles: Rows = []
    factors: Rows = []
    over_rows = 0
    for layer in layers_of(fields):
        Co, Ci, taps, P = layer.out_channels, layer.in_channels, layer.taps, layer.positions
        tiles_o, tiles_j, J = _tile_counts(layer)
        over_columns = over_rows + tiles_o * J
        for n in range(tiles_o):
            for m in range(tiles_j):
                tiles.append((
                    layer.weight, layer.weight_size, layer.r, layer.s, Co, J, taps, taps * P, Ci // P,
                    n * UNFOLD_TILE.BLOCK_M, m * UNFOLD_TILE.BLOCK_N, over_rows + n * J, over_columns + m * Co,
                ))  # fmt: skip
        for c in range(0, Ci, FACTOR_TILE.BLOCK_M):
            factors.append((over_rows, tiles_o * taps, taps, J, taps, c, Ci, layer.r, -1))
        for c in range(0, Co, FACTOR_TILE.BLOCK_M):
            factors.append((over_columns, tiles_j, 1, Co, 1, c, Co, layer.s, layer.bias))
        over_rows = over_columns + tiles_j * Co
    return tiles, factors


@triton.jit
def unfold_kernel(
    p_gradients, p_parameters, p_deviations, p_gradient, p_partials, p_table,
    K, factors, partials,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    p_row = p_table + tl.program_id(0) * COLUMNS
    weight = tl.load(p_row)
    size = tl.load(p_row + 1)
    p_d = p_gradients + K * weight
    CO = tl.load(p_row + 4).to(tl.int32)
    J = tl.load(p_row + 5).to(tl.int32)
    taps = tl.load(p_row + 7).to(tl.int32)
    C = tl.load(p_row + 8).to(tl.int32)
    o_o = tl.load(p_row + 9).to(tl.int32) + tl.arange(0, BLOCK_M)
    o_j = tl.load(p_row + 10).to(tl.int32) + tl.arange(0, BLOCK_N)
    m_o = o_o < CO
    m_j = o_j < J
    # gradients are read along output channels, weights read and written along their rows: two orders of one tile
    o_d = ((o_j % taps * C + o_j // taps) * CO)[:, None] + o_o[None, :]
    m_d = m_j[:, None] & m_o[None, :]
    o_w = (o_o * J)[:, None] + o_j[None, :]
    m_w = m_o[:, None] & m_j[None, :]
    if p_deviations is None:
        i_k = tl.program_id(1).to(tl.int64)
        b_d = tl.load(p_d + i_k * size + o_d, mask=m_d, other=0.0)
        tl.store(p_gradient + (K * weight + i_k * size) + o_w, tl.trans(b_d), mask=m_w)
    else:
        o_r = o_j // tl.load(p_row + 6).to(tl.int32)
        p_r = p_deviations + tl.load(p_row + 2)
        p_s = p_deviations + tl.load(p_row + 3)
        p_rows = p_partials + tl.load(p_row + 11)
        p_columns = p_partials + tl.load(p_row + 12)
        b_w = tl.trans(tl.load(p_parameters + weight + o_w, mask=m_w, other=0.0))
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
        tl.store(p_gradient + weight + o_w, tl.trans(b_sum), mask=m_w)


@triton.jit
def unfold_factors_kernel(
    p_gradients, p_parameters, p_deviations, p_gradient, p_factor_gradients, p_partials, p_table,
    K, factors, partials,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    p_row = p_table + tl.program_id(0) * COLUMNS
    i_k = tl.program_id(1).to(tl.int64)
    n_terms = tl.load(p_row + 1).to(tl.int32)
    n_inner = tl.load(p_row + 2).to(tl.int32)
    s_outer = tl.load(p_row + 3).to(tl.int32)
    s_c = tl.load(p_row + 4).to(tl.int32)
    o_c = tl.load(p_row + 5).to(tl.int32) + tl.arange(0, BLOCK_M)
    count = tl.load(p_row + 6)
    m_c = o_c < count.to(tl.int32)
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
        p_b = p_gradients + K * bias + o_c
        b_b = tl.load(p_parameters + bias + o_c, mask=m_c, other=0.0)
        b_sum += b_b * tl.load(p_b + i_k * count, mask=m_c, other=0.0)
        if i_k == 0:
            b_bias = tl.zeros((BLOCK_M,), tl.float32)
            for k in range(K):
                i_n = tl.cast(k, tl.int64)
                b_s = 1.0 + tl.load(p_deviations + i_n * factors + factor + o_c, mask=m_c, other=0.0)
                b_bias += b_s * tl.load(p_b + i_n * count, mask=m_c, other=0.0)
            tl.store(p_gradient + bias + o_c, b_bias, mask=m_c)
    tl.store(p_factor_gradients + i_k * factors + factor + o_c, b_sum, mask=m_c)


def _empty(o):
    return absent(o.parameters) if o.deviations is None else o.deviations.new_empty(o.deviations.shape)


def _launch(o):
    tiles, factors = device_tables(_tables, o.fields, o.parameters.device)
    factor_gradients, K = _empty(o), o.networks
    partials = 0 if o.deviations is None else _partial_count(o.fields)
    shared = {
        "p_partials": o.parameters.new_empty(K * partials),
        "K": K,
        "factors": 0 if o.deviations is None else o.deviations.shape[1],
        "partials": partials,
    }
    grid = (len(tiles), K) if o.deviations is None else (len(tiles),)
    launch(unfold_kernel, grid, UNFOLD_TILE, o, p_table=tiles, COLUMNS=UNFOLD_COLUMNS, **shared)
    if o.deviations is not None:
        launch(
            unfold_factors_kernel,
            (len(factors), K),
            FACTOR_TILE,
            o,
            p_factor_gradients=factor_gradients,
            p_table=factors,
            COLUMNS=FACTOR_COLUMNS,
            **shared,
        )
    return factor_gradients


_unfold_gradients = define("unfold_gradients", unfold_gradients_reference, _empty, _launch, mutates=("gradient",))


def unfold_gradients(
    gradients: Tensor, parameters: Tensor, deviations: Tensor | None, layout: Layout, gradient: Tensor
) -> Tensor:
    """The gradients of all layers' parameters from those of the weights which the kernels multiply with.

    Args:
        gradients: [K · layout.ranked], for every weight [K, taps, Ci, Co] and for every bias [K, Co] from K times its
            offset in the parameters on, as ``conv_weight_gradient`` and ``head_backward`` leave them.
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

    Source: docs/method.md, Student.
    """
    K = check_buffers(layout, parameters, deviations)
    check_flat("gradients", gradients, (K * layout.ranked,), parameters)
    check_flat("gradient", gradient, tuple(parameters.shape), parameters)
    check_contiguous(("gradients", gradients), ("gradient", gradient))
    deviations = None if deviations is None else deviations.detach().contiguous()
    return _unfold_gradients(gradients, parameters.detach().contiguous(), deviations, gradient, layout.fields, K)
