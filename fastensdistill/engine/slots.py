"""What fills the weight slots of networks that change every step: one writer per kind of student.

``BranchSlots`` packs the K branches of a rank-one student, W_k = s_k ⊗ W ⊗ r_k, and in evaluation mode BatchNorm too:

    folded into a convolution    s'_k = s_k·scale,  W'_k = s'_k ⊗ W ⊗ r_k,  b'_k = s'_k·b + shift

so that both modes are one call of ``pack_weights`` for all layers (bf16: 0.2 GB moved for WRN-28-4 with K = 4, 0.05 ms
of an H200's bandwidth). Biases, scales, shifts and s'_k of all layers are one call of ``branch_rows``. They are written
at the start of every pass that reads them: a step depends on nothing but the flat parameters. ``PlainSlots`` packs
networks as they are, in one call too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from fastensdistill.engine.parameters import FlatParameters, flat_layout
from fastensdistill.engine.weights import LayerWeights, Weights
from fastensdistill.kernels.branch_rows import branch_rows
from fastensdistill.kernels.pack import pack_weights
from fastensdistill.network.fold import image_scale_shift
from fastensdistill.network.launch import Part
from fastensdistill.network.nodes import Affine, Norm


@torch.no_grad()
def write_images(weights: Weights, parameters: FlatParameters, slots: Sequence[int]) -> None:
    """The normalisation of the image, which no step changes; several slots may belong to one module."""
    for i, slot in enumerate(slots):
        for node in parameters.network.nodes:
            if isinstance(node, Affine):
                values = image_scale_shift(parameters.buffers[i % parameters.copies], node.name)
                for rows, value in zip(weights.scale_shift[node.name], values, strict=True):
                    rows[slot].copy_(value)


class PackedLayers:
    """Every layer's two packings in two flat buffers, which one launch fills."""

    def __init__(self, weights: Weights, parameters: FlatParameters, slots: int):
        self.layout = flat_layout(parameters.network, slots)
        self.packed, self.packed_gradient = (
            torch.zeros(self.layout.packed_size, dtype=weights.dtype, device=parameters.device) for _ in range(2)
        )
        for layer in self.layout.layers:
            at = slice(layer.packed, layer.packed + slots * layer.weight_size)
            Ci, Co = layer.in_channels, layer.out_channels
            weights.layers[layer.name] = LayerWeights(
                self.packed[at].view(slots, layer.taps, Ci, Co),
                self.packed_gradient[at].view(slots, layer.taps, Co, Ci),
                weights.layers[layer.name].bias,
            )

    def write(self, parameters: Tensor, deviations: Tensor | None, first: int = 0) -> None:
        pack_weights(parameters, deviations, self.layout, self.packed, self.packed_gradient, first)


class PlainSlots:
    """Training weights of networks without factors, slot i being copy i; biases are FlatParameters' own."""

    def __init__(self, part: Part, parameters: FlatParameters, dtype: torch.dtype):
        self.parameters, self.weights = parameters, Weights(part, len(part.groups), dtype, parameters.device)
        self.layers = PackedLayers(self.weights, parameters, len(part.groups))
        for node in parameters.layers:
            if node.bias:
                self.weights.layers[node.name].bias = parameters.view(parameters.values, f"{node.name}.bias")
        for norm in parameters.norms:
            self.weights.norms[norm.name] = parameters.norm_weights(norm)
        write_images(self.weights, parameters, range(len(part.groups)))

    @torch.no_grad()
    def write(self) -> None:
        self.layers.write(self.parameters.values, None)


class Rows:
    """Per-slot rows of many layers in one tensor, those of the branches filled by one ``branch_rows``."""

    def __init__(self, slots: int, first: int, branches: int):
        self.slots, self.first, self.K = slots, first, branches
        self.count = 0
        self.pieces: list[tuple[Callable[[Tensor], None], int, tuple[int, ...]]] = []
        self.columns: list[Tensor] = [torch.zeros(5, 0, dtype=torch.int64)]

    def add(self, assign: Callable[[Tensor], None], C: int, *parts: Tensor | int) -> None:
        """Rows (slots, C), handed to ``assign``; ``parts`` are the indices of the table, broadcast to (K, C)."""
        self._add(assign, (self.slots, C), self.first, *parts)

    def add_branches(self, assign: Callable[[Tensor], None], R: int, *parts: Tensor | int) -> None:
        """Rows (K, R) for the branches alone."""
        self._add(assign, (self.K, R), 0, *parts)

    def _add(self, assign: Callable[[Tensor], None], shape: tuple[int, int], first: int, *parts: Tensor | int) -> None:
        C = shape[1]
        target = self.count + (first + torch.arange(self.K)[:, None]) * C + torch.arange(C)
        indices = (torch.as_tensor(part).expand(self.K, C) for part in (target, *parts))
        self.columns.append(torch.stack([index.flatten() for index in indices]))
        self.pieces.append((assign, self.count, shape))
        self.count += prod(shape)

    def finish(self, device: torch.device, dtype: torch.dtype) -> None:
        self.values = torch.zeros(self.count, dtype=dtype, device=device)
        self.table = torch.cat(self.columns, 1).to(device)
        for assign, start, shape in self.pieces:
            assign(self.values[start : start + prod(shape)].view(shape))


ABSENT, OTHER = -1, -2  # of ``branch_rows``: no factor, no summand; the parameter 1, the shift −1


class BranchSlots:
    """The last K of ``first + K`` slots, for the branches of a rank-one student; for a student without factors, one."""

    def __init__(self, part: Part, parameters: FlatParameters, dtype: torch.dtype, first: int = 0):
        own = parameters.deviations
        self.factors = own if len(own) else parameters.values.new_zeros(1, parameters.layout.factors)
        self.parameters, self.first, self.K = parameters, first, len(self.factors)
        slots = first + self.K
        self.weights = Weights(part, slots, dtype, parameters.device)
        self.evaluation = not part.training
        for norm in [] if self.evaluation else parameters.norms:
            self.weights.norms[norm.name] = parameters.norm_weights(norm)
        write_images(self.weights, parameters, [first + k for k in range(self.K)])
        self.layers = PackedLayers(self.weights, parameters, slots)
        self.deviations = self.factors
        self._plan_rows(slots)

    def _plan_rows(self, slots: int) -> None:
        """Where every layer's bias, every BatchNorm's scale and shift, and the branches' s'_k come from."""
        parameters, K, R = self.parameters, self.K, self.parameters.layout.factors
        folded = torch.full((R,), ABSENT)  # of the deviations → channel of the BatchNorm that is folded in
        self.rows = Rows(slots, self.first, K)
        for node, layer in zip(parameters.layers, parameters.layout.layers, strict=True):
            norm, C, weights = self.weights.norm_of(node), layer.out_channels, self.weights.layers[node.name]
            channels: Tensor | int = ABSENT
            if norm:
                channels = folded[layer.s : layer.s + C] = parameters.norm_offsets[norm.name] + torch.arange(C)
            if weights.bias is not None:
                s = torch.arange(K)[:, None] * R + layer.s + torch.arange(C)
                b = layer.bias + torch.arange(C) if node.bias else ABSENT
                self.rows.add(partial(setattr, weights, "bias"), C, s, channels, b, channels)
        for name in self.weights.scale_shift:
            if isinstance(user := parameters.network.by_name[name], Norm):
                C = user.shape[0]
                channels = parameters.norm_offsets[name] + torch.arange(C)
                self.rows.add(partial(self._set_row, name, 0), C, ABSENT, channels, OTHER, ABSENT)
                self.rows.add(partial(self._set_row, name, 1), C, ABSENT, ABSENT, ABSENT, channels)
        if self.evaluation:
            every = torch.arange(K * R).view(K, R)
            self.rows.add_branches(partial(setattr, self, "deviations"), R, every, folded, OTHER, OTHER)
        self.rows.finish(parameters.device, parameters.dtype)
        eps = [torch.full((norm.shape[0],), norm.eps, dtype=parameters.dtype) for norm in parameters.norms]
        self.eps = torch.cat([*eps, torch.zeros(0, dtype=parameters.dtype)]).to(parameters.device)

    def _set_row(self, name: str, which: int, view: Tensor) -> None:
        pair = list(self.weights.scale_shift[name])
        pair[which] = view
        self.weights.scale_shift[name] = (pair[0], pair[1])

    @torch.no_grad()
    def write(self) -> None:
        """Fill the branches' slots from the flat parameters and, in evaluation mode, the running statistics."""
        parameters = self.parameters
        branch_rows(
            self.rows.values, self.rows.table, parameters.values, self.factors, parameters.running_mean,
            parameters.running_var, self.eps, parameters.layout.ranked,
        )  # fmt: skip
        self.layers.write(parameters.values, self.deviations, self.first)
