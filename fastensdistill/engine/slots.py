"""What fills the weight slots of networks that change every step: one writer per kind of student.

``BranchSlots`` packs the K branches of a rank-one student, W_k = s_k ⊗ W ⊗ r_k, and in evaluation mode BatchNorm too:

    folded into a convolution    s'_k = s_k·scale,  W'_k = s'_k ⊗ W ⊗ r_k,  b'_k = s'_k·b + shift

so that both modes are one call of ``pack_rank_one`` for all layers (bf16: 0.2 GB moved for WRN-28-4 with K = 4, 0.05 ms
of an H200's bandwidth). Biases, scales and shifts of all layers are one gather. They are written at the start of every
pass that reads them: a step depends on nothing but the master weights. ``PlainSlots`` packs networks as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from fastensdistill.engine.master import Master
from fastensdistill.engine.weights import LayerWeights, Weights
from fastensdistill.kernels.rank_one import RankOneLayout, fold_rank_one, pack_rank_one
from fastensdistill.network.fold import image_scale_shift
from fastensdistill.network.launch import Part
from fastensdistill.network.nodes import Affine, Conv, Linear, Network, Norm

NOTHING = torch.zeros(0, dtype=torch.int64)


def write_layers(weights: Weights, network: Network, first: int, source: Callable[[str], Tensor]) -> None:
    """Both packings of every layer, two copies each, in any dtype; ``source`` gives a layer's (K, Co, Ci, …)."""
    for name, layer in weights.layers.items():
        node, W = network.by_name[name], source(name)
        assert isinstance(node, Conv | Linear)
        slots = slice(first, first + len(W))
        W = W.unflatten(2, node.in_shape) if isinstance(node, Linear) else W
        packed = W.permute(0, 3, 4, 2, 1)  # taps or positions, channels in, channels out
        size = packed.shape[1:3]
        if isinstance(node, Conv):
            layer.forward[slots].unflatten(1, size).copy_(packed)
            layer.gradient[slots].unflatten(1, size).copy_(packed.flip(1, 2).transpose(3, 4))
        else:
            layer.forward[slots, 0].unflatten(1, packed.shape[1:4]).copy_(packed)
            layer.gradient[slots, 0].unflatten(2, packed.shape[1:4]).copy_(packed.permute(0, 4, 1, 2, 3))


@torch.no_grad()
def write_images(weights: Weights, master: Master, slots: Sequence[int]) -> None:
    """The normalisation of the image, which no step changes; several slots may belong to one module."""
    for i, slot in enumerate(slots):
        for node in master.network.nodes:
            if isinstance(node, Affine):
                values = image_scale_shift(master.buffers[i % master.copies], node.name)
                for rows, value in zip(weights.scale_shift[node.name], values, strict=True):
                    rows[slot].copy_(value)


class PlainSlots:
    """Training weights of networks without factors, slot i being copy i; biases are the master's own memory."""

    def __init__(self, part: Part, master: Master, dtype: torch.dtype):
        self.master, self.weights = master, Weights(part, len(part.groups), dtype, master.device)
        for node in master.layers:
            if node.bias:
                self.weights.layers[node.name].bias = master.view(master.parameters, f"{node.name}.bias")
        for norm in master.norms:
            self.weights.norms[norm.name] = master.norm_weights(norm)
        write_images(self.weights, master, range(len(part.groups)))

    @torch.no_grad()
    def write(self) -> None:
        view, parameters = self.master.view, self.master.parameters
        write_layers(self.weights, self.master.network, 0, lambda name: view(parameters, f"{name}.weight"))


class Rows:
    """Per-slot rows of many layers in one tensor, those of the branches filled by one A·B + C over gathered values."""

    def __init__(self, slots: int, first: int, branches: int):
        self.slots, self.first, self.K = slots, first, branches
        self.count = 0
        self.pieces: list[tuple[Callable[[Tensor], None], int, int]] = []
        self.index: tuple[list[Tensor], ...] = ([NOTHING], [NOTHING], [NOTHING], [NOTHING])  # target, A, B, C

    def add(self, assign: Callable[[Tensor], None], C: int, *gathered: Tensor) -> None:
        """Rows (slots, C), handed to ``assign``; ``gathered`` says where A, B and C come from, broadcast to (K, C)."""
        target = self.count + (self.first + torch.arange(self.K)[:, None]) * C + torch.arange(C)
        for indices, index in zip(self.index, (target, *gathered), strict=True):
            indices.append(index.expand(self.K, C).flatten())
        self.pieces.append((assign, self.count, C))
        self.count += self.slots * C

    def finish(self, device: torch.device, dtype: torch.dtype) -> None:
        self.values = torch.zeros(self.count, dtype=dtype, device=device)
        self.target, self.a, self.b, self.c = (torch.cat(indices).to(device) for indices in self.index)
        for assign, start, C in self.pieces:
            assign(self.values[start : start + self.slots * C].view(self.slots, C))

    def fill(self, pool: Tensor) -> None:
        a, b, c = (pool.index_select(0, index) for index in (self.a, self.b, self.c))
        self.values.index_copy_(0, self.target, torch.addcmul(c, a, b))


class BranchSlots:
    """Slots ``first`` … ``first + K − 1`` of ``slots`` for the branches of a rank-one student."""

    def __init__(self, part: Part, master: Master, dtype: torch.dtype, slots: int, first: int = 0):
        self.master, self.first, self.K = master, first, len(master.deviations)
        self.weights = Weights(part, slots, dtype, master.device)
        self.evaluation = not part.training
        for norm in [] if self.evaluation else master.norms:
            self.weights.norms[norm.name] = master.norm_weights(norm)
        write_images(self.weights, master, [first + k for k in range(self.K)])
        # A linear layer over positions has its inputs in another order here, which the one-launch packing cannot write
        flat = any(isinstance(node, Linear) and node.in_shape[1:] != (1, 1) for node in master.layers)
        self.at_once = dtype == torch.bfloat16 and not flat
        self.layout = self._packed_layout(slots) if self.at_once else master.layout
        self._plan_rows(slots)

    def _packed_layout(self, slots: int) -> RankOneLayout:
        master = self.master
        layout = RankOneLayout.build(
            [(node.name, master.entries[f"{node.name}.weight"].shape, 1, node.bias) for node in master.layers],
            plain=2 * master.norm_size, slots=slots,
        )  # fmt: skip
        self.packed, self.packed_gradient = (
            torch.zeros(layout.packed_size, dtype=torch.bfloat16, device=master.device) for _ in range(2)
        )
        for layer in layout.layers:
            at = slice(layer.packed, layer.packed + slots * layer.weight_size)
            Ci, Co = layer.in_channels, layer.out_channels
            old = self.weights.layers[layer.name]
            self.weights.layers[layer.name] = LayerWeights(
                self.packed[at].view(slots, layer.taps, Ci, Co),
                self.packed_gradient[at].view(slots, layer.taps, Co, Ci),
                old.bias,
            )
        return layout

    def _plan_rows(self, slots: int) -> None:
        """Rows gather from [scale, shift of every BatchNorm; s' of every branch; biases; 1, 0]."""
        master, K, R, P = self.master, self.K, self.master.layout.factors, self.master.norm_size
        biased = [layer for layer in master.layout.layers if layer.bias >= 0]
        own = [torch.arange(layer.bias, layer.bias + layer.out_channels) for layer in biased]
        self.bias_index = torch.cat([*own, NOTHING]).to(master.device)
        starts = dict(zip((layer.name for layer in biased), accumulate((len(o) for o in own), initial=0), strict=False))
        factors, biases = 2 * P, 2 * P + K * R
        one = torch.tensor(biases + len(self.bias_index))
        zero = one + 1
        column = torch.full((R,), P)  # of the deviations → index into [scales, 1]
        self.rows = Rows(slots, self.first, K)
        for node, layer in zip(master.layers, master.layout.layers, strict=True):
            norm, C, weights = self.weights.norm_of(node), layer.out_channels, self.weights.layers[node.name]
            shift = zero
            if norm:
                at = master.norm_offsets[norm.name] + torch.arange(C)
                column[layer.s : layer.s + C] = at
                shift = P + at
            if weights.bias is not None:
                s = factors + torch.arange(K)[:, None] * R + layer.s + torch.arange(C)
                b = biases + starts[node.name] + torch.arange(C) if node.bias else zero
                self.rows.add(partial(setattr, weights, "bias"), C, s, b, shift)
        for name in self.weights.scale_shift:
            if isinstance(user := master.network.by_name[name], Norm):
                C = user.shape[0]
                at = master.norm_offsets[name] + torch.arange(C)
                self.rows.add(partial(self._set_row, name, 0), C, at, one, zero)
                self.rows.add(partial(self._set_row, name, 1), C, zero, zero, P + at)
        self.rows.finish(master.device, master.dtype)
        self.column = column.to(master.device)
        self.constants = torch.tensor([1, 0], dtype=master.dtype, device=master.device)
        eps = [torch.full((norm.shape[0],), norm.eps, dtype=master.dtype) for norm in master.norms]
        self.eps = torch.cat([*eps, NOTHING.to(master.dtype)]).to(master.device)

    def _set_row(self, name: str, which: int, view: Tensor) -> None:
        pair = list(self.weights.scale_shift[name])
        pair[which] = view
        self.weights.scale_shift[name] = (pair[0], pair[1])

    @torch.no_grad()
    def write(self) -> None:
        """Fill the branches' slots from the master weights and, in evaluation mode, the running statistics."""
        master, P = self.master, self.master.norm_size
        parameters, deviations = master.parameters, master.deviations
        factors = 1 + deviations
        scale = shift = parameters.new_zeros(P)
        if self.evaluation:
            gamma, beta = parameters[master.layout.ranked :].unflatten(0, (2, P))
            scale = gamma * (master.running_var + self.eps).rsqrt()
            shift = beta - scale * master.running_mean
            factors = factors * torch.cat([scale, self.constants[:1]]).index_select(0, self.column)
            deviations = factors - 1
        biases = parameters.index_select(0, self.bias_index)
        self.rows.fill(torch.cat([scale, shift, factors.flatten(), biases, self.constants]))
        if self.at_once:
            pack_rank_one(parameters, deviations, self.layout, self.packed, self.packed_gradient, self.first)
            return
        folded = fold_rank_one(parameters, deviations, master.layout)
        places = {layer.name: layer for layer in master.layout.layers}

        def of(name: str) -> Tensor:
            start = places[name].weight
            shape = master.entries[f"{name}.weight"].shape
            return folded[:, start : start + places[name].weight_size].unflatten(1, shape)

        write_layers(self.weights, master.network, self.first, of)
