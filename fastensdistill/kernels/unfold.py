"""Un-fold: from the gradients of K branches' ordinary layers to W, b, r and s, all dense layers in two launches.

    dW = Σ_k s_k ⊗ dW_k ⊗ r_k       dr_k[i] = Σ_{o,t} s_k[o] · W · dW_k
    db = Σ_k s_k · db_k             ds_k[o] = Σ_{i,t} r_k[i] · W · dW_k + b[o] · db_k[o]

The gradients dW_k come as the kernels of the weight gradients leave them: partial results [splits, K, …], in the order
that ``layout.Order`` defines, and db_k as [K, Co]. A linear layer over [C, H, W] has its inputs position by position,
channels innermost. dW leaves in the order of the parameters, [Co, Ci, taps]. Plain networks, K copies without factors,
have their gradients summed and reordered alone. Of several students each has its own W and K neighbouring branches.
With channel groups, r_k[i] stands for the r of the i-th input of the group that output o is in, and dr_k is summed over
the outputs of one group.

The first launch reads every gradient once: a program owns 32 output channels by 32 values of a row of W, which are
neighbours there or, where Ci is innermost, input channels at one tap. It reads 32 runs of 32 channels, 128 bytes, of
each partial result, 8 of these at once, and adds them one after the other, ((p₀ + p₁) + p₂) + …; then it sums dW over
the branches, turns the tile and writes 32 runs along W. (Input channels at one tap lie 36 bytes apart there. The
programs of the 9 taps are neighbours, so that L2 makes whole lines of what they write, once for all that they read.) It
leaves its sums over rows and over columns; the second launch adds those up, in a fixed order, and does the biases.
Tiles of small channel groups have a launch of their own between these two (``unfold_tables``).
Nothing is added atomically, so two runs agree bit for bit. WRN-28-4 with K = 4: 94 MB of gradients a split and 23 MB of
weights read, 23 MB written, in runs of 128 bytes each, and 12 MB of partial sums.
"""

from typing import NamedTuple

from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import launch, tl, triton
from fastensdistill.kernels.layout import (
    GradientLayout,
    LayerOffsets,
    Layout,
    Place,
    branch_weights,
    check_buffers,
    check_flat,
    copies_of,
    device_tables,
    layer_bias,
    layer_factors,
    layer_weight,
    layers_of,
    weight_partials,
)
from fastensdistill.kernels.operands import check_contiguous
from fastensdistill.kernels.ops import absent, define
from fastensdistill.kernels.unfold_tables import (
    FACTOR_COLUMNS,
    FACTOR_TILE,
    GROUPED_COLUMNS,
    UNFOLD_COLUMNS,
    UNFOLD_TILE,
    across_groups,
    partial_count,
    places_of,
    tables,
)

TERMS = 8  # partial results that a program loads at once


class UnfoldOperands(NamedTuple):
    """What ``unfold_gradients`` takes."""

    gradients: Tensor  # [memory.size], in the kernels' order
    parameters: Tensor  # [copies · layout.size]
    deviations: Tensor | None  # [K, layout.factors]; None for plain networks
    gradient: Tensor  # like the parameters, written
    fields: list[int]  # layout.fields
    places: list[int]  # memory.fields
    networks: int  # K
    copies: int  # of whose parameters there are: 1, several students or, without deviations, K


def kernel_order(gradients: Tensor, layer: LayerOffsets, place: Place, K: int) -> Tensor:
    """[K, Co, Ci, taps] of what the kernels left of one layer's weight in ``gradients``, the partial results added."""
    first, *others = weight_partials(gradients, layer, place, K)
    d = first
    for other in others:
        d = d + other
    if place.in_innermost:
        d = d.transpose(4, 5)
    C, Co = layer.in_channels // layer.positions, layer.out_channels
    d = d.permute(0, 2, 5, 1, 4, 3).flatten(3, 4).flatten(1, 2)[:, :Co, :C]  # [K, Co, C, taps or positions]
    return d.reshape(K, Co, layer.in_channels, layer.taps)


def unfold_gradients_reference(o: UnfoldOperands) -> Tensor:
    """Writes ``gradient`` and returns dr and ds, [K, R]; nothing for plain networks."""
    factor_gradients, K = _empty(o), o.networks
    for layer, place in zip(layers_of(o.fields), places_of(o.places), strict=True):
        dW_k = kernel_order(o.gradients, layer, place, K)
        if o.deviations is None:
            layer_weight(o.gradient, layer, K).copy_(dW_k)
            continue
        r, s = layer_factors(o.deviations, layer)
        layer_weight(o.gradient, layer, o.copies).copy_((s * dW_k * r).unflatten(0, (o.copies, -1)).sum(1))
        product = branch_weights(o.parameters, layer, o.copies, K) * dW_k
        dr = (s * product).unflatten(1, (layer.channel_groups, -1)).sum((2, 4)).flatten(1)
        ds = (r * product).sum((2, 3))
        if layer.bias >= 0:
            db_k = o.gradients[place.bias : place.bias + K * layer.out_channels].view(K, -1)
            layer_bias(o.gradient, layer, o.copies).copy_((s.flatten(1) * db_k).unflatten(0, (o.copies, -1)).sum(1))
            b = layer_bias(o.parameters, layer, o.copies)
            ds = ds + b.repeat_interleave(K // o.copies, 0) * db_k
        factor_gradients[:, layer.r : layer.r + layer.inputs] = dr
        factor_gradients[:, layer.s : layer.s + layer.out_channels] = ds
    return factor_gradients


@triton.jit
def sum_splits(p, o, m, splits, s_split, TERMS: tl.constexpr):
    """Partial results from ``p + o`` on, ``s_split`` apart, one after the other, ``TERMS`` loaded at once."""
    b_sum = tl.zeros(o.shape, tl.float32)
    for i in range(0, splits, TERMS):
        # a pointer of this round's own: one that went on from round to round would be kept per element, 255 registers
        p_i = p + i * s_split
        for t in tl.static_range(TERMS):
            b_sum += tl.load(p_i + o, mask=m & (i + t < splits), other=0.0)
            p_i += s_split
    return b_sum


@triton.jit
def sum_tile(p, o_in, o_out, m_in, m_out, in_innermost, splits, s_split, TERMS: tl.constexpr):
    """The sum over splits of a tile (in, out) of gradients, read along the side that is innermost."""
    if in_innermost:
        o = o_out[:, None] + tl.arange(0, m_in.shape[0])[None, :]
        b_sum = tl.trans(sum_splits(p, o, m_out[:, None] & m_in[None, :], splits, s_split, TERMS))
    else:
        o = o_in[:, None] + tl.arange(0, m_out.shape[0])[None, :]
        b_sum = sum_splits(p, o, m_in[:, None] & m_out[None, :], splits, s_split, TERMS)
    return b_sum


@triton.jit
def unfold_kernel(
    p_gradients, p_parameters, p_deviations, p_gradient, p_partials, p_table,
    K, copies, factors, partials,
    COLUMNS: tl.constexpr, TERMS: tl.constexpr, GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    p_row = p_table + tl.program_id(0) * COLUMNS
    weight = tl.load(p_row)
    size = tl.load(p_row + 1)
    p_d = p_gradients + tl.load(p_row + 2)
    share = tl.load(p_row + 3)
    splits = tl.load(p_row + 4).to(tl.int32)
    in_innermost = tl.load(p_row + 5) != 0
    J = tl.load(p_row + 8).to(tl.int32)
    taps = tl.load(p_row + 10).to(tl.int32)
    block = tl.load(p_row + 11).to(tl.int32)
    s_block = tl.load(p_row + 12).to(tl.int32)
    s_channel = tl.load(p_row + 13).to(tl.int32)
    s_tap = tl.load(p_row + 14).to(tl.int32)
    o_o = tl.load(p_row + 15).to(tl.int32) + tl.arange(0, BLOCK_M)
    m_o = o_o < tl.load(p_row + 16).to(tl.int32)
    o_j = tl.load(p_row + 17).to(tl.int32) + tl.arange(0, BLOCK_N) * tl.load(p_row + 19).to(tl.int32)
    m_j = o_j < tl.load(p_row + 18).to(tl.int32)
    i_c = o_j // taps
    o_in = i_c // block * s_block + i_c % block * s_channel + o_j % taps * s_tap
    o_out = o_o // block * s_block + o_o % block * s_channel
    # gradients are read along the side that is innermost, weights read and written along their rows. A hint for that,
    # about the order of lanes alone: no load of unknown alignment is made a wider one, so that a step does no harm
    o_w = (o_o * J)[:, None] + tl.max_contiguous(o_j, BLOCK_N)[None, :]
    m_w = m_o[:, None] & m_j[None, :]
    i_copy = tl.program_id(1).to(tl.int64)
    branches = K // copies
    p_d += i_copy * branches * share
    weight = copies * weight + i_copy * size
    if p_deviations is None:
        b_d = sum_tile(p_d, o_in, o_out, m_j, m_o, in_innermost, splits, K * share, TERMS)
        tl.store(p_gradient + weight + o_w, tl.trans(b_d), mask=m_w)
    else:
        o_r = o_j // tl.load(p_row + 9).to(tl.int32)
        m_r = m_j
        if GROUPED:  # an output's r are those of its channel group
            i_group = o_o // tl.load(p_row + 22).to(tl.int32)
            o_r = o_r[:, None] + (i_group * tl.load(p_row + 23).to(tl.int32))[None, :]
            m_r = m_j[:, None] & m_o[None, :]
        first = i_copy * branches
        p_r = p_deviations + first * factors + tl.load(p_row + 6)
        p_s = p_deviations + first * factors + tl.load(p_row + 7)
        p_rows = p_partials + first * partials + tl.load(p_row + 20)
        p_columns = p_partials + first * partials + tl.load(p_row + 21)
        b_w = tl.trans(tl.load(p_parameters + weight + o_w, mask=m_w, other=0.0))
        b_sum = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for _ in range(branches):
            b_r = 1.0 + tl.load(p_r + o_r, mask=m_r, other=0.0)
            if not GROUPED:
                b_r = b_r[:, None]
            b_s = 1.0 + tl.load(p_s + o_o, mask=m_o, other=0.0)
            b_d = sum_tile(p_d, o_in, o_out, m_j, m_o, in_innermost, splits, K * share, TERMS)
            b_sum += b_s[None, :] * b_d * b_r
            b_product = b_w * b_d
            if GROUPED:
                tl.store(p_rows + o_w, tl.trans(b_s[None, :] * b_product), mask=m_w)
            else:
                tl.store(p_rows + o_j, tl.sum(b_s[None, :] * b_product, 1), mask=m_j)
            tl.store(p_columns + o_o, tl.sum(b_r * b_product, 0), mask=m_o)
            p_r += factors
            p_s += factors
            p_d += share
            p_rows += partials
            p_columns += partials
        tl.store(p_gradient + weight + o_w, tl.trans(b_sum), mask=m_w)


@triton.jit
def unfold_factors_kernel(
    p_gradients, p_parameters, p_deviations, p_gradient, p_factor_gradients, p_partials, p_table,
    K, copies, factors, partials,
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
    p_b = p_gradients + tl.load(p_row + 9) + o_c
    p_terms = p_partials + tl.load(p_row) + i_k * partials
    b_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for n in range(0, n_terms, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        o = (o_c * s_c)[:, None] + (o_n // n_inner * s_outer + o_n % n_inner)[None, :]
        b_sums += tl.load(p_terms + o, mask=m_c[:, None] & (o_n < n_terms)[None, :], other=0.0)
    b_sum = tl.sum(b_sums, 1)
    if bias >= 0:
        branches = K // copies
        bias = copies * bias + i_k // branches * count
        b_b = tl.load(p_parameters + bias + o_c, mask=m_c, other=0.0)
        b_sum += b_b * tl.load(p_b + i_k * count, mask=m_c, other=0.0)
        if i_k % branches == 0:  # the first one of a network adds them up
            b_bias = tl.zeros((BLOCK_M,), tl.float32)
            for k in range(branches):
                i_n = i_k + k
                b_s = 1.0 + tl.load(p_deviations + i_n * factors + factor + o_c, mask=m_c, other=0.0)
                b_bias += b_s * tl.load(p_b + i_n * count, mask=m_c, other=0.0)
            tl.store(p_gradient + bias + o_c, b_bias, mask=m_c)
    tl.store(p_factor_gradients + i_k * factors + factor + o_c, b_sum, mask=m_c)


def _empty(o):
    return absent(o.parameters) if o.deviations is None else o.deviations.new_empty(o.deviations.shape)


def _launch(o):
    tiles, grouped, factors = device_tables(tables, [*o.fields, *o.places], o.parameters.device)
    factor_gradients, K = _empty(o), o.networks
    partials = 0 if o.deviations is None else partial_count(o.fields, o.places)
    shared = {
        "p_partials": o.parameters.new_empty(K * partials),
        "K": K,
        "factors": 0 if o.deviations is None else o.deviations.shape[1],
        "partials": partials,
    }
    splits = {False: 1, True: 1}  # at most: of the layers of the one launch and of the other
    for layer, place in zip(layers_of(o.fields), places_of(o.places), strict=True):
        splits[across_groups(layer)] = max(splits[across_groups(layer)], place.splits)
    for table, columns in ((tiles, UNFOLD_COLUMNS), (grouped, GROUPED_COLUMNS)):
        # not by how many there are, which follows from the batch size (``BATCH_SIZES``)
        terms = TERMS if splits[table is grouped] > 1 else 1
        launch(
            unfold_kernel,
            (len(table), o.copies),
            UNFOLD_TILE,
            o,
            p_table=table,
            COLUMNS=columns,
            TERMS=terms,
            GROUPED=table is grouped,
            **shared,
        )
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
    gradients: Tensor,
    memory: GradientLayout,
    parameters: Tensor,
    deviations: Tensor | None,
    layout: Layout,
    gradient: Tensor,
) -> Tensor:
    """The gradients of all layers' parameters from those of the weights which the kernels multiply with.

    Args:
        gradients: [memory.size], for every weight its partial results and for every bias [K, Co] where ``memory`` says,
            as the kernels leave them.
        memory: ``layout.gradients(K, …)``.
        parameters: [layout.size] float32 or float64; of several networks [copies · layout.size], every parameter
            [copies, *shape]. Without deviations these are K.
        deviations: [K, layout.factors], r − 1 and s − 1 of K branches, K / copies neighbours of each network; or None
            for K plain networks.
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
    if memory.networks != K or len(memory.places) != len(layout.layers):
        raise InputError(
            f"memory is for {len(memory.places)} layers of {memory.networks} networks; expected "
            f"{len(layout.layers)} of {K}"
        )
    check_flat("gradients", gradients, (memory.size,), parameters)
    check_flat("gradient", gradient, tuple(parameters.shape), parameters)
    check_contiguous(("gradients", gradients), ("gradient", gradient))
    deviations = None if deviations is None else deviations.detach().contiguous()
    parameters = parameters.detach().contiguous()
    copies = copies_of(layout, parameters)
    return _unfold_gradients(gradients, parameters, deviations, gradient, layout.fields, memory.fields, K, copies)
