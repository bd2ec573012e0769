"""Pack: the weights of K networks, all dense layers in one launch, into the two orders that the convolutions read.

    packed[k, t, i, o] = packed_gradient[k, taps − 1 − t, o, i] = W_k[o, i, t]

with W_k = s_k ⊗ W ⊗ r_k for the branches of a rank-one student (r and s given as deviations from one), or W_k as it
lies in the parameters of K plain networks, [K, *shape] per parameter. So lie those of several rank-one students, whose
branches are one after the other, as many of each. A linear layer over [C, H, W] has its inputs position by position:
 packed[k, p·C + c, o] = packed_gradient[k, o, p·C + c] = W_k[o, c·H·W + p].

With channel groups r_k has the inputs of all groups, and W_k[o, i, t] those of the group of o:

    r_k[(o // (Co / groups))·Ci + i]

A program owns 32 x 32 channels of one network, with all taps. It reads along taps, a stride of 36 bytes for 3x3, which
the first-level cache makes up for; it writes runs of 32 values, in the order of either packing. Least traffic for
WRN-28-4 with K = 4 in bf16: 23 MB read, 94 MB written; the parameters are read once per branch, from the second-level
cache after the first.

Layers with channel groups have few inputs an output, a depthwise one a single input, of which a tile of channels would
be 1/32. Their own launch has tiles of 32 outputs by 32 values of a row of W, which lie side by side: all 25 taps of a
5x5, or 9 of them with 3 inputs. It gathers r per value, the 4 bytes from the first-level cache. Dense layers of the
same network stay in the launch of dense ones, whose kernel knows nothing of groups.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.kernels.launch import launch, tl, triton
from fastensdistill.kernels.layout import (
    DENSE_FIELDS,
    LayerOffsets,
    Layout,
    Rows,
    branch_weights,
    check_buffers,
    check_packed,
    copies_of,
    device_tables,
    layer_factors,
    layers_of,
)
from fastensdistill.kernels.ops import define, implementation
from fastensdistill.kernels.tiles import Tile

PACK_TILE = Tile(32, 32, 0, 4, 1, "32 bf16 are two 32-byte sectors either way; 8 values a thread leave registers free")
EXTENSION_TAPS = 144  # of a row that the extension keeps in shared memory, in float64: tile_row in csrc/pack.h
COLUMNS, GROUPED_COLUMNS = 15, 11


class PackOperands(NamedTuple):
    """What ``pack_weights`` takes."""

    parameters: Tensor  # [copies · layout.size]
    deviations: Tensor | None  # [K, layout.factors]; None for plain networks
    packed: Tensor  # [layout.packed_size], written
    packed_gradient: Tensor  # [layout.packed_size], written
    fields: list[int]  # layout.fields
    first_slot: int
    networks: int  # K
    copies: int  # of whose parameters there are: 1, several students or, without deviations, K


class BranchPackOperands(NamedTuple):
    """What the extension serves: branches in bf16, without a linear layer over positions and channel groups."""

    parameters: Tensor
    deviations: Tensor
    packed: Tensor
    packed_gradient: Tensor
    fields: list[int]  # layout.dense_fields
    first_slot: int


def pack_weights_reference(o: PackOperands) -> None:
    """Writes slots first_slot … first_slot + K − 1 of both packings, layer by layer."""
    for layer in layers_of(o.fields):
        K, n, P = o.networks, layer.weight_size, layer.positions
        W = branch_weights(o.parameters, layer, o.copies, K)
        if o.deviations is not None:
            r, s = layer_factors(o.deviations, layer)
            W = s * W * r
        W = W.to(o.packed.dtype).view(K, layer.out_channels, -1, layer.taps * P)  # one of taps and P is 1
        forward = W.permute(0, 3, 2, 1)
        gradient = W.transpose(2, 3) if P > 1 else W.flip(3).permute(0, 3, 1, 2)
        start = layer.packed + o.first_slot * n
        for buffer, value in ((o.packed, forward), (o.packed_gradient, gradient)):
            buffer[start : start + K * n].view(value.shape).copy_(value)


def pack_rank_one_reference(o: BranchPackOperands) -> None:
    fields = [value for layer in layers_of(o.fields, DENSE_FIELDS) for value in layer[1:]]
    pack_weights_reference(PackOperands(*o._replace(fields=fields), networks=len(o.deviations), copies=1))


def _table(fields: Sequence[int]) -> tuple[Rows, ...]:
    """A row per tile of a dense layer, and one per tile of the others; strides and offsets in elements."""
    rows: Rows = []
    grouped: Rows = []
    for layer in layers_of(fields):
        if layer.channel_groups > 1:
            grouped += _grouped_rows(layer)
            continue
        P, Co = layer.positions, layer.out_channels
        C, taps = layer.in_channels // P, layer.taps * P
        if P > 1:  # every position has factors of its own, and the gradient's inputs are position by position
            gradient = (layer.packed, taps * C, C)
            factors = (P, 1)
        else:
            gradient = (layer.packed + (taps - 1) * Co * C, C, -Co * C)
            factors = (1, 0)
        for o in range(0, Co, PACK_TILE.BLOCK_M):
            for i in range(0, C, PACK_TILE.BLOCK_N):
                rows.append((
                    layer.weight, layer.weight_size, layer.r, layer.s, Co, C, taps, o, i, layer.packed,
                    *gradient, *factors,
                ))  # fmt: skip
    return rows, grouped


def _grouped_rows(layer: LayerOffsets) -> Rows:
    Co, Ci, taps = layer.out_channels, layer.in_channels, layer.taps
    return [
        (layer.weight, layer.weight_size, layer.r, layer.s, Co, Ci, taps, layer.group_outputs, o, j, layer.packed)
        for o in range(0, Co, PACK_TILE.BLOCK_M)
        for j in range(0, Ci * taps, PACK_TILE.BLOCK_N)
    ]


@triton.jit
def pack_kernel(
    p_parameters, p_deviations, p_packed, p_packed_gradient, p_table,
    factors, first_slot, copies, branches,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    p_row = p_table + tl.program_id(0) * COLUMNS
    i_k = tl.program_id(1).to(tl.int64)
    weight = tl.load(p_row)
    size = tl.load(p_row + 1)
    CO = tl.load(p_row + 4).to(tl.int32)
    C = tl.load(p_row + 5).to(tl.int32)
    taps = tl.load(p_row + 6).to(tl.int32)
    o_o = tl.load(p_row + 7).to(tl.int32) + tl.arange(0, BLOCK_M)
    o_i = tl.load(p_row + 8).to(tl.int32) + tl.arange(0, BLOCK_N)
    s_gradient = tl.load(p_row + 11).to(tl.int32)
    s_gradient_tap = tl.load(p_row + 12).to(tl.int32)
    s_r = tl.load(p_row + 13).to(tl.int32)
    s_r_tap = tl.load(p_row + 14).to(tl.int32)
    m_o = o_o < CO
    m_i = o_i < C
    m = m_o[:, None] & m_i[None, :]
    slot = (first_slot + i_k) * size
    p_forward = p_packed + tl.load(p_row + 9) + slot
    p_gradient = p_packed_gradient + tl.load(p_row + 10) + slot
    p_w = p_parameters + (copies * weight + i_k // branches * size)
    if p_deviations is not None:
        p_r = p_deviations + i_k * factors + tl.load(p_row + 2)
        b_s = 1.0 + tl.load(p_deviations + i_k * factors + tl.load(p_row + 3) + o_o, mask=m_o, other=0.0)
    o_w = (o_o * (C * taps))[:, None] + (o_i * taps)[None, :]
    o_f = o_o[:, None] + (o_i * CO)[None, :]
    o_g = (o_o * s_gradient)[:, None] + o_i[None, :]
    for t in range(taps):
        b_w = tl.load(p_w + (o_w + t), mask=m, other=0.0)
        if p_deviations is not None:
            b_r = 1.0 + tl.load(p_r + (o_i * s_r + t * s_r_tap), mask=m_i, other=0.0)
            b_w = b_s[:, None] * b_w * b_r[None, :]
        b_stored = b_w.to(p_packed.dtype.element_ty)
        tl.store(p_forward + (o_f + t * (C * CO)), b_stored, mask=m)
        tl.store(p_gradient + (o_g + t * s_gradient_tap), b_stored, mask=m)


@triton.jit
def pack_grouped_kernel(
    p_parameters, p_deviations, p_packed, p_packed_gradient, p_table,
    factors, first_slot, copies, branches,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    p_row = p_table + tl.program_id(0) * COLUMNS
    i_k = tl.program_id(1).to(tl.int64)
    weight = tl.load(p_row)
    size = tl.load(p_row + 1)
    CO = tl.load(p_row + 4).to(tl.int32)
    C = tl.load(p_row + 5).to(tl.int32)
    taps = tl.load(p_row + 6).to(tl.int32)
    o_o = tl.load(p_row + 8).to(tl.int32) + tl.arange(0, BLOCK_M)
    o_j = tl.load(p_row + 9).to(tl.int32) + tl.arange(0, BLOCK_N)
    m_o = o_o < CO
    m = m_o[:, None] & (o_j < C * taps)[None, :]
    i_c = o_j // taps
    i_t = o_j % taps
    o_w = copies * weight + i_k // branches * size + (o_o * (C * taps))[:, None] + o_j[None, :]
    if p_deviations is not None:
        p_factors = p_deviations + i_k * factors
        o_r = (o_o // tl.load(p_row + 7).to(tl.int32) * C)[:, None] + i_c[None, :]
        b_s = 1.0 + tl.load(p_factors + tl.load(p_row + 3) + o_o, mask=m_o, other=0.0)
        b_r = 1.0 + tl.load(p_factors + tl.load(p_row + 2) + o_r, mask=m, other=0.0)
        b_w = b_s[:, None] * tl.load(p_parameters + o_w, mask=m, other=0.0) * b_r
    else:
        b_w = tl.load(p_parameters + o_w, mask=m, other=0.0)
    b_stored = b_w.to(p_packed.dtype.element_ty)
    slot = tl.load(p_row + 10) + (first_slot + i_k) * size
    o_f = o_o[:, None] + ((i_t * C + i_c) * CO)[None, :]
    # the hint puts lanes along the outputs, which are neighbours in a depthwise layer's gradient packing
    o_g = tl.max_contiguous(o_o * C, BLOCK_M)[:, None] + ((taps - 1 - i_t) * (C * CO) + i_c)[None, :]
    tl.store(p_packed + slot + o_f, b_stored, mask=m)
    tl.store(p_packed_gradient + slot + o_g, b_stored, mask=m)


def _launch(o):
    dense, grouped = device_tables(_table, o.fields, o.parameters.device)
    factors = 0 if o.deviations is None else o.deviations.shape[1]
    for kernel, table, columns in ((pack_kernel, dense, COLUMNS), (pack_grouped_kernel, grouped, GROUPED_COLUMNS)):
        grid = (len(table), o.networks)
        launch(
            kernel, grid, PACK_TILE, o, p_table=table, factors=factors, branches=o.networks // o.copies, COLUMNS=columns
        )


_mutates = ("packed", "packed_gradient")
_pack_weights = define("pack_weights", pack_weights_reference, launcher=_launch, mutates=_mutates)
_pack_rank_one = define("pack_rank_one", pack_rank_one_reference, mutates=_mutates)


def pack_weights(
    parameters: Tensor,
    deviations: Tensor | None,
    layout: Layout,
    packed: Tensor,
    packed_gradient: Tensor,
    first_slot: int = 0,
) -> None:
    """Writes the weights of K networks into slots first_slot … first_slot + K − 1 of both packings, in place.

    Args:
        parameters: [layout.size] float32 or float64; of several networks [copies · layout.size], every parameter
            [copies, *shape]. Without deviations these are K.
        deviations: [K, layout.factors], r − 1 and s − 1 of K branches, K / copies neighbours of each network; or None
            for K plain networks.
        layout: the table of layers.
        packed, packed_gradient: [layout.packed_size], both bf16, fp16, float32 or float64; orders as above.
        first_slot: slot of the first network; other slots are left as they are.

    The compiled extension serves one network's branches in bf16 on a GPU where no layer has channel groups, Triton
    everything else there but float64, the reference what is left.

    Raises:
        InputError: a dtype, shape, device or slot that does not fit the layout.
    """
    K, copies = check_buffers(layout, parameters, deviations), copies_of(layout, parameters)
    check_packed(layout, parameters, K, packed, packed_gradient, first_slot)
    parameters = parameters.detach().contiguous()
    if deviations is not None:
        deviations = deviations.detach().contiguous()
        covered = (
            copies == 1
            and packed.dtype == torch.bfloat16
            and all(
                layer.positions == layer.channel_groups == 1 and layer.taps <= EXTENSION_TAPS for layer in layout.layers
            )
        )
        if covered and implementation("pack_rank_one", parameters.device.type, parameters.dtype) == "extension":
            _pack_rank_one(parameters, deviations, packed, packed_gradient, layout.dense_fields, first_slot)
            return
    _pack_weights(parameters, deviations, packed, packed_gradient, layout.fields, first_slot, K, copies)
