"""Weights of one part of a plan as the kernels read them: a slot per network, in the dtype that is multiplied in.

    forward packing      (S, taps, Ci, Co), Ci those of a channel group
    gradient packing     (S, taps reversed, Co, Ci)
    biases, scales …     (S, C), float32
    tensors              (S, *shape), float32: what PyTorch computes with; integers as they are

In evaluation mode a BatchNorm right behind a convolution is in the convolution's weights already. Slots are written in
place, so a captured graph that reads them sees the new values. What fills them:

    a plain network's state dict     once: :meth:`PackedWeights.write`
    what is being trained            at the start of every pass that reads it: :meth:`TrainedWeights.refresh`

A step therefore depends on nothing but the flat parameters. Branch k of a student is W_k = s_k ⊗ W ⊗ r_k, and with a
BatchNorm in the weights

    s'_k = s_k·scale,  W'_k = s'_k ⊗ W ⊗ r_k,  b'_k = s'_k·b + shift

so that either mode takes two launches for all layers: ``branch_rows`` computes what there is per channel, the s'_k
too, and ``pack_weights`` the weights (bf16: 0.2 GB moved for WRN-28-4 with K = 4, 0.05 ms of an H200's bandwidth).
Layers with channel groups are a third. Parameters that PyTorch computes with are values per channel as well: of what is
trained, evaluation mode has ``branch_rows`` copy them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from types import UnionType
from typing import Any

import torch
from torch import Tensor

from fastensdistill.engine.parameters import FlatParameters, NormWeights, flat_layout, function_tensors
from fastensdistill.kernels.branch_rows import branch_rows
from fastensdistill.kernels.conv_data_gradient import flip_weight
from fastensdistill.kernels.operands import accumulator
from fastensdistill.kernels.pack import pack_weights
from fastensdistill.network.fold import Parameters, image_scale_shift, layer_weights, norm_scale_shift
from fastensdistill.network.launch import Part
from fastensdistill.network.nodes import Affine, Layer, Linear, Node, Norm


@dataclass
class LayerWeights:
    """One layer's weights in every slot, packed for the forward pass and for the data gradient."""

    forward: Tensor  # (S, taps, Ci, Co)
    gradient: Tensor  # (S, taps reversed, Co, Ci)
    bias: Tensor | None  # (S, Co)


def pack_layer(weight: Tensor, layer: Layer) -> Tensor:
    """(Co, Ci, kh, kw) → (taps, Ci, Co); a linear layer's (Co, C·H·W) → (1, H·W·C, Co): channels are innermost here."""
    if weight.dim() == 4:
        return weight.permute(2, 3, 1, 0).flatten(0, 1)
    shape = layer.in_shape if isinstance(layer, Linear) else (layer.in_channels, 1, 1)
    return weight.unflatten(1, shape).permute(2, 3, 1, 0).reshape(1, -1, len(weight))


def unpack_gradient(gradient: Tensor, layer: Layer) -> Tensor:
    """(G, taps, Ci, Co) → (G, Co, Ci, kh, kw), or (G, 1, H·W·C, Co) → (G, Co, C·H·W)."""
    kernel = layer.weight_shape[2:]
    if kernel:
        return gradient.unflatten(1, kernel).permute(0, 4, 3, 1, 2)
    C, H, W = layer.in_shape if isinstance(layer, Linear) else (layer.in_channels, 1, 1)
    return gradient.view(len(gradient), H, W, C, -1).permute(0, 4, 3, 1, 2).flatten(2)


def packed_shapes(layer: Layer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of one slot in the forward packing, and in that of the data gradient."""
    Co, Ci, taps = layer.shape[0], layer.in_channels, layer.taps
    return (taps, Ci, Co), (taps, Co, Ci)


def carried_norm(part: Part, layer: Layer) -> Norm | None:
    """The BatchNorm that the weights of ``layer`` contain."""
    user = part.network.sole(layer.name)
    return user if isinstance(user, Norm) and part.folded(user) else None


ALIGNMENT = 32  # values: what there is per channel starts at a multiple of 128 bytes, as an allocation of its own would


class PackedWeights:
    """Weights of so many ``slots`` for the network of ``part``, in its BatchNorm mode; zero until they are written.

    Args:
        more_values: so many are added at the end of ``values``.

    Attributes:
        layers: packings and bias of every convolution and linear layer, by name.
        scale_shift: scale and shift (S, C) of the image's normalisation and, in evaluation mode, of every BatchNorm
            that no convolution's weights contain.
        tensors: the parameters and buffers (S, *shape) that ``Function`` nodes compute with, by name.
        values: the memory of all biases, scales and shifts, and of these tensors where they are no integers.
        norms: what a BatchNorm in training mode reads and moves.
    """

    def __init__(self, part: Part, slots: int, dtype: torch.dtype, device: torch.device | str, more_values: int = 0):
        self.part, self.dtype = part, dtype
        nodes, layers, norms = part.network.nodes, part.network.layers, part.network.norms
        self.carried = {layer.name: carried_norm(part, layer) for layer in layers}
        scaled: list[Node] = [node for node in nodes if isinstance(node, Affine)]
        scaled += [norm for norm in norms if not (part.training or part.folded(norm))]
        channels = {f"{layer.name}.bias": layer.shape[0] for layer in layers if layer.bias or self.carried[layer.name]}
        channels |= {f"{node.name}.{kind}": node.shape[0] for node in scaled for kind in ("scale", "shift")}
        shapes, self.constants = function_tensors(part.network)
        counts = [*channels.values(), *map(prod, shapes.values())]
        sizes = [-(-slots * count // ALIGNMENT) * ALIGNMENT for count in counts]
        wide: dict[str, Any] = {"dtype": accumulator(dtype), "device": device}
        self.values = torch.zeros(sum(sizes) + more_values, **wide)
        pieces = self.values.split([*sizes, more_values])[:-1]
        every = [piece[: slots * count].view(slots, count) for count, piece in zip(counts, pieces, strict=True)]
        rows = dict(zip(channels, every, strict=False))
        own = zip(shapes.items(), every[len(channels) :], strict=True)
        self.trained = tuple(shapes)
        self.tensors: dict[str, Tensor] = {name: row.view(slots, *shape) for (name, shape), row in own}
        self.slots, self.filled = slots, set[tuple[str, int]]()  # which of the constants have been written
        self.layers: dict[str, LayerWeights] = {}
        for layer in layers:
            forward, gradient = (torch.zeros(slots, *s, dtype=dtype, device=device) for s in packed_shapes(layer))
            self.layers[layer.name] = LayerWeights(forward, gradient, rows.get(f"{layer.name}.bias"))
        self.scale_shift = {node.name: (rows[f"{node.name}.scale"], rows[f"{node.name}.shift"]) for node in scaled}
        self.norms: dict[str, NormWeights] = {}
        for norm in norms if part.training else []:
            self.norms[norm.name] = NormWeights(*(torch.zeros(part.sets, norm.shape[0], **wide) for _ in range(4)))

    @torch.no_grad()
    def write(self, slot: int, state: Parameters) -> None:
        """Fill ``slot`` with a plain network's state dict. A BatchNorm that all slots share takes the last one's."""
        for name, layer in self.layers.items():
            node = self.part.network.by_name[name]
            assert isinstance(node, Layer)
            weight, bias = layer_weights(state, node, self.carried[name])
            packed = pack_layer(weight, node)
            layer.forward[slot].copy_(packed)
            layer.gradient[slot].copy_(flip_weight(packed[None])[0])
            if layer.bias is not None and bias is not None:
                layer.bias[slot].copy_(bias)
        self.write_scale_shift(slot, state)
        for name in self.trained:
            self.tensors[name][slot].copy_(state[name])
        self.write_constants(slot, state)
        for name, norm in self.norms.items():
            for key in ("weight", "bias", "running_mean", "running_var"):
                getattr(norm, key)[slot % self.part.sets].copy_(state[f"{name}.{key}"])

    @torch.no_grad()
    def write_scale_shift(self, slot: int, state: Parameters, kinds: type | UnionType = Affine | Norm) -> None:
        """Fill the scales and shifts of ``slot`` that nodes of these ``kinds`` have."""
        for name, rows in self.scale_shift.items():
            node = self.part.network.by_name[name]
            if isinstance(node, kinds):
                fold = norm_scale_shift(state, node) if isinstance(node, Norm) else image_scale_shift(state, name)
                for row, value in zip(rows, fold, strict=True):
                    row[slot].copy_(value)

    @torch.no_grad()
    def write_constants(self, slot: int, state: Parameters) -> None:
        """Fill ``slot`` with the buffers that ``Function`` nodes compute with, whose dtypes the first ones decide.

        What ``state`` lacks stays as it is: a state dict is without buffers that are not saved in it, which the first
        state of a slot has (``common.state_of``).
        """
        for name, shape in self.constants.items():
            if name not in state and (name, slot) in self.filled:
                continue
            value = state[name]
            self.filled.add((name, slot))
            if name not in self.tensors:
                dtype = self.values.dtype if value.is_floating_point() else value.dtype
                self.tensors[name] = torch.zeros(self.slots, *shape, dtype=dtype, device=self.values.device)
            self.tensors[name][slot].copy_(value)


def pack(part: Part, states: Sequence[Parameters], dtype: torch.dtype, device: torch.device | str) -> PackedWeights:
    """Weights with one slot per state dict of a plain network, in order."""
    weights = PackedWeights(part, len(states), dtype, device)
    for slot, state in enumerate(states):
        weights.write(slot, state)
    return weights


Index = Tensor | int
NONE = -1  # of ``branch_rows``, in the place of an index: no such factor, or no such summand
ONE = MINUS_ONE = -2  # the same: the parameter is 1; the shift is −1


class TrainedWeights(PackedWeights):
    """Those of what is trained, which :meth:`refresh` writes into the slots from ``first`` on.

    They are the K branches of a student whose layers have factors, those of several students one after the other, or
    the copies of a network without. In evaluation mode, where factors are what a BatchNorm goes into the weights by, a
    network without has one branch, of zero deviations. Slots before ``first`` are for networks that do not change. What
    training mode need not pack is the memory of ``parameters`` itself: ``tensors`` of parameters are (copies, *shape)
    there, which is one set for all the branches of a student.
    """

    def __init__(self, part: Part, parameters: FlatParameters, dtype: torch.dtype, first: int = 0):
        self.parameters, self.first = parameters, first
        deviations = parameters.deviations if parameters.ranked else None
        if deviations is None and not part.training:
            deviations = parameters.values.new_zeros(parameters.copies, parameters.layout.factors)
        slots = first + (parameters.copies if deviations is None else len(deviations))
        more = deviations.numel() if deviations is not None and not part.training else 0
        super().__init__(part, slots, dtype, parameters.device, more)
        self.layout = flat_layout(part.network, slots)
        self.packed, self.packed_gradient = (
            torch.zeros(self.layout.packed_size, dtype=dtype, device=parameters.device) for _ in range(2)
        )
        for offsets in self.layout.layers:
            layer = self.layers[offsets.name]
            at = slice(offsets.packed, offsets.packed + layer.forward.numel())
            layer.forward = self.packed[at].view_as(layer.forward)
            layer.gradient = self.packed_gradient[at].view_as(layer.gradient)
            if deviations is None and layer.bias is not None:
                layer.bias = parameters.view(parameters.values, f"{offsets.name}.bias")
        for norm in parameters.network.norms if part.training else []:
            self.norms[norm.name] = parameters.norm_weights(norm)
        for name in self.trained if part.training else ():
            self.tensors[name] = parameters.view(parameters.values, name)
        for slot in range(first, slots):
            buffers = parameters.buffers[(slot - first) // parameters.branches]
            self.write_scale_shift(slot, buffers, Affine)
            self.write_constants(slot, buffers)
        self.deviations = self.packed_deviations = deviations
        self.table: Tensor | None = None
        if deviations is not None:
            packed = deviations if part.training else self.values[-more:].view_as(deviations)
            self.packed_deviations, self.table = packed, self._table(deviations, packed).to(parameters.device)

    def _table(self, deviations: Tensor, packed_deviations: Tensor) -> Tensor:
        """What ``branch_rows`` is to compute: for every value per channel of a branch, where its parts are.

        Both are (K, R), those trained and those that weights are packed by; in training mode they are the same.
        """
        parameters, first = self.parameters, self.first
        index = torch.arange(deviations.numel()).view_as(deviations)
        scales = torch.full_like(index, NONE)  # per deviation: of an s, its channel in the BatchNorm carried
        columns = [torch.zeros(5, 0, dtype=torch.int64)]

        def add(rows: Tensor, deviation: Index = NONE, scale: Index = NONE, parameter: Index = NONE,
                shift: Index = NONE) -> None:  # fmt: skip
            """``rows`` (K, C) = (1 + deviation)·scale·parameter + shift, of which one without an index is not there."""
            target = rows.storage_offset() + torch.arange(rows.numel()).view(rows.shape)
            parts = (target, deviation, scale, parameter, shift)
            columns.append(torch.stack([torch.as_tensor(part).expand(rows.shape).flatten() for part in parts]))

        for node, offsets in zip(parameters.network.layers, parameters.layout.layers, strict=True):
            norm, bias, C = self.carried[node.name], self.layers[node.name].bias, offsets.out_channels
            s = slice(offsets.s, offsets.s + C)
            if norm:
                scales[:, s] = parameters.by_branch(parameters.norm_offsets[norm.name], C)
            if bias is not None:  # b'_k = s_k·scale·b + shift
                b = parameters.by_branch(offsets.bias, C) if node.bias else NONE
                add(bias[first:], deviation=index[:, s], scale=scales[:, s], parameter=b, shift=scales[:, s])
        for norm in parameters.network.norms:
            if norm.name in self.scale_shift:
                (scale, shift), C = self.scale_shift[norm.name], norm.shape[0]
                channels = parameters.by_branch(parameters.norm_offsets[norm.name], C)
                add(scale[first:], scale=channels, parameter=ONE)
                add(shift[first:], shift=channels)
        for name in () if self.part.training else self.trained:
            rows = self.tensors[name][first:].flatten().view(len(deviations), -1)
            add(rows, parameter=parameters.by_branch(parameters.offsets[name], rows.shape[1]))
        if packed_deviations is not deviations:  # s'_k − 1 = s_k·scale − 1, and r_k as it is
            add(packed_deviations, deviation=index, scale=scales, parameter=ONE, shift=MINUS_ONE)
        return torch.cat(columns, 1)

    @torch.no_grad()
    def refresh(self) -> None:
        """Pack the flat parameters and, in evaluation mode, the running statistics."""
        flat = self.parameters
        if self.table is not None and self.deviations is not None:
            branch_rows(
                self.values, self.table, flat.values, self.deviations, flat.running_mean, flat.running_var, flat.eps,
                flat.copies * flat.layout.ranked,
            )  # fmt: skip
        pack_weights(flat.values, self.packed_deviations, self.layout, self.packed, self.packed_gradient, self.first)
