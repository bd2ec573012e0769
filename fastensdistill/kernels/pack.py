"""Pack: the weights of K networks, all layers in one launch, into the two orders that the convolutions read.

    packed[k, t, i, o] = packed_gradient[k, taps − 1 − t, o, i] = W_k[o, i, t]

with W_k = s_k ⊗ W ⊗ r_k for the branches of a rank-one student (r and s given as deviations from one), or W_k as it
lies in the parameters of ``copies`` plain networks, [copies, *shape] per parameter. Grouped layers are packed
[taps, Ci/groups, Co] and [taps reversed, Co/groups, Ci]. A linear layer over [C, H, W] has its inputs position by
position: packed[k, p·C + c, o] = packed_gradient[k, o, p·C + c] = W_k[o, c·H·W + p].

A program owns 32 x 32 channels of one network, with all taps. It reads along taps, a stride of 36 bytes for 3x3, which
the first-level cache makes up for; it writes runs of 32 values, in the order of either packing. Least traffic for
WRN-28-4 with K = 4 in bf16: 23 MB read, 94 MB written; the parameters are read once per branch, from the second-level
cache after the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastensdistill.kernels.launch import launch, runs_kernel, tl, triton
from fastensdistill.kernels.layout import (
    PACK_FIELDS,
    LayerOffsets,
    Layout,
    Rows,
    check_buffers,
    check_packed,
    device_tables,
    layer_factors,
    layer_weight,
    layers_of,
)
from fastensdistill.kernels.ops import define, implementation
from fastensdistill.kernels.tiles import Tile

PACK_TILE = Tile(32, 32, 0, 4, 1, "32 bf16 are two 32-byte sectors either way; 8 values a thread leave registers free")
COLUMNS = 17

# ---- reference


def _weights(parameters: Tensor, deviations: Tensor | None, layer: LayerOffsets, copies: int) -> Tensor:
    """W_k, [K, groups, Co/groups, Ci/groups, taps]."""
    if deviations is not None:
        r, s = layer_factors(deviations, layer)
        return s * layer_weight(parameters, layer) * r
    shape = (copies, layer.groups, layer.out_channels // layer.groups, layer.group_channels, layer.taps)
    start = copies * layer.weight
    return parameters[start : start + copies * layer.weight_size].view(shape)


def pack_weights_reference(
    parameters: Tensor,
    deviations: Tensor | None,
    packed: Tensor,
    packed_gradient: Tensor,
    fields: list[int],
    first_slot: int,
    copies: int,
) -> None:
    """Writes slots first_slot … first_slot + K − 1 of both packings, layer by layer."""
    for layer in layers_of(fields, PACK_FIELDS):
        W = _weights(parameters, deviations, layer, copies).to(packed.dtype)
        K, n = len(W), layer.weight_size
        if layer.positions > 1:
            W = W.reshape(K, layer.out_channels, -1, layer.positions)  # [K, Co, C, H·W]
            forward, gradient = W.permute(0, 3, 2, 1), W.transpose(2, 3)
        else:
            forward, gradient = W.permute(0, 4, 3, 1, 2), W.flip(4).permute(0, 4, 2, 1, 3)
        start = layer.packed + first_slot * n
        for buffer, value in ((packed, forward), (packed_gradient, gradient)):
            buffer[start : start + K * n].view(value.shape).copy_(value)


def pack_rank_one_reference(
    parameters: Tensor, deviations: Tensor, packed: Tensor, packed_gradient: Tensor, fields: list[int], first_slot: int
) -> None:
    """:func:`pack_weights_reference` of the branches of a student, with ``FIELDS`` integers per layer."""
    fields = _pack_fields(fields)
    pack_weights_reference(parameters, deviations, packed, packed_gradient, fields, first_slot, 1)


def _pack_fields(fields: Sequence[int]) -> list[int]:
    return [value for layer in layers_of(fields) for value in (*layer.fields, layer.positions)]


# ---- kernel


def _table(fields: Sequence[int]) -> tuple[Rows, ...]:
    """A row per tile of a group of a layer; strides and offsets in elements, see the kernel."""
    rows: Rows = []
    for layer in layers_of(fields, PACK_FIELDS):
        P = layer.positions
        Co, Ci, taps = layer.out_channels // layer.groups, layer.group_channels // P, layer.taps * P
        all_Co, all_Ci = layer.out_channels, Ci * layer.groups
        if P > 1:  # every position has factors of its own, and the gradient's inputs are position by position
            gradient, gradient_row, gradient_tap, r_channel, r_tap = 0, taps * Ci, Ci, P, 1
        else:
            gradient_row, gradient_tap, r_channel, r_tap = all_Ci, -Co * all_Ci, 1, 0
            gradient = (taps - 1) * Co * all_Ci
        for group in range(layer.groups):
            for o in range(0, Co, PACK_TILE.BLOCK_M):
                for i in range(0, Ci, PACK_TILE.BLOCK_N):
                    rows.append((
                        layer.weight, layer.weight_size, group * Co * Ci * taps, layer.r + group * Ci,
                        layer.s + group * Co, Co, Ci, taps, o, i, layer.packed + group * Co, all_Co,
                        layer.packed + gradient + group * Ci, gradient_row, gradient_tap, r_channel, r_tap,
                    ))  # fmt: skip
    return (rows,)


@triton.jit
def pack_kernel(
    p_parameters,
    p_deviations,
    p_packed,
    p_packed_gradient,
    p_table,
    factors,
    first_slot,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    p_row = p_table + tl.program_id(0) * COLUMNS
    i_k = tl.program_id(1).to(tl.int64)
    weight = tl.load(p_row)
    size = tl.load(p_row + 1)
    p_w = p_parameters + tl.load(p_row + 2)
    CO = tl.load(p_row + 5).to(tl.int32)
    C = tl.load(p_row + 6).to(tl.int32)
    taps = tl.load(p_row + 7).to(tl.int32)
    o_o = tl.load(p_row + 8).to(tl.int32) + tl.arange(0, BLOCK_M)
    o_i = tl.load(p_row + 9).to(tl.int32) + tl.arange(0, BLOCK_N)
    s_forward = tl.load(p_row + 11).to(tl.int32)
    s_gradient = tl.load(p_row + 13).to(tl.int32)
    s_gradient_tap = tl.load(p_row + 14).to(tl.int32)
    s_r = tl.load(p_row + 15).to(tl.int32)
    s_r_tap = tl.load(p_row + 16).to(tl.int32)
    m_o = o_o < CO
    m_i = o_i < C
    m = m_o[:, None] & m_i[None, :]
    slot = (first_slot + i_k) * size
    p_forward = p_packed + tl.load(p_row + 10) + slot
    p_gradient = p_packed_gradient + tl.load(p_row + 12) + slot
    if p_deviations is not None:
        p_w += weight
        p_r = p_deviations + i_k * factors + tl.load(p_row + 3)
        b_s = 1.0 + tl.load(p_deviations + i_k * factors + tl.load(p_row + 4) + o_o, mask=m_o, other=0.0)
    else:
        p_w += tl.num_programs(1) * weight + i_k * size
    o_w = (o_o * (C * taps))[:, None] + (o_i * taps)[None, :]
    o_f = o_o[:, None] + (o_i * s_forward)[None, :]
    o_g = (o_o * s_gradient)[:, None] + o_i[None, :]
    for t in range(taps):
        b_w = tl.load(p_w + (o_w + t), mask=m, other=0.0)
        if p_deviations is not None:
            b_r = 1.0 + tl.load(p_r + (o_i * s_r + t * s_r_tap), mask=m_i, other=0.0)
            b_w = b_s[:, None] * b_w * b_r[None, :]
        b_stored = b_w.to(p_packed.dtype.element_ty)
        tl.store(p_forward + (o_f + t * (C * s_forward)), b_stored, mask=m)
        tl.store(p_gradient + (o_g + t * s_gradient_tap), b_stored, mask=m)


def _launch(parameters, deviations, packed, packed_gradient, fields, first_slot, copies):
    (table,) = device_tables(_table, fields, parameters.device)
    networks = copies if deviations is None else deviations.shape[0]
    launch(
        pack_kernel,
        (table.shape[0], networks),
        PACK_TILE,
        p_parameters=parameters.contiguous(),
        p_deviations=None if deviations is None else deviations.contiguous(),
        p_packed=packed,
        p_packed_gradient=packed_gradient,
        p_table=table,
        factors=0 if deviations is None else deviations.shape[1],
        first_slot=first_slot,
        COLUMNS=COLUMNS,
    )


# ---- registration


def _launch_rank_one(parameters, deviations, packed, packed_gradient, fields, first_slot):
    _launch(parameters, deviations, packed, packed_gradient, _pack_fields(fields), first_slot, 1)


_mutates = ("packed", "packed_gradient")
_pack_weights = define("pack_weights", pack_weights_reference, launcher=_launch, mutates=_mutates)
_pack_rank_one = define("pack_rank_one", pack_rank_one_reference, launcher=_launch_rank_one, mutates=_mutates)


# ---- public function


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
        parameters: [layout.size] float32 or float64; without deviations [copies · layout.size], every parameter
            [copies, *shape].
        deviations: [K, layout.factors], r − 1 and s − 1 of K branches, or None for ``copies`` plain networks.
        layout: the table of layers.
        packed, packed_gradient: [layout.packed_size], both bf16, fp16, float32 or float64; orders as above.
        first_slot: slot of the first network; other slots are left as they are.

    The compiled extension serves branches in bf16 (on the device kinds it was built for), Triton everything else on a
    GPU but float64, the reference what is left.

    Raises:
        InputError: a dtype, shape, device or slot that does not fit the layout.
    """
    copies = 1 if deviations is not None else max(1, parameters.numel() // layout.size)
    check_buffers(layout, parameters, deviations, copies=copies)
    K = copies if deviations is None else deviations.shape[0]
    check_packed(layout, parameters, K, packed, packed_gradient, first_slot)
    parameters = parameters.detach()
    if deviations is not None:
        deviations = deviations.detach()
        covered = packed.dtype == torch.bfloat16 and all(layer.positions == 1 for layer in layout.layers)
        device, dtype = parameters.device.type, parameters.dtype
        interpreted = device == "cpu" and runs_kernel(device, dtype)  # asked for, so as to be compared
        if covered and not interpreted and implementation("pack_rank_one", device, dtype) == "extension":
            _pack_rank_one(parameters, deviations, packed, packed_gradient, layout.fields, first_slot)
            return
    _pack_weights(parameters, deviations, packed, packed_gradient, layout.pack_fields, first_slot, copies)
