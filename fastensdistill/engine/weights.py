"""The weights of one part of a plan as the kernels read them: packed per layer, one slot per network.

Forward packing (S, taps, Ci, Co), data-gradient packing (S, taps reversed, Co, Ci), in the dtype multiplied in;
biases, scales and shifts in float32, a row per slot. In evaluation mode a foldable BatchNorm is in the weights already.
Slots are written in place, so a captured graph that reads them sees the new values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastensdistill.engine.parameters import NormWeights
from fastensdistill.kernels.conv_data_gradient import flip_weight
from fastensdistill.kernels.operands import accumulator
from fastensdistill.network.build import folded, sole
from fastensdistill.network.fold import Parameters, image_scale_shift, layer_weights, norm_scale_shift
from fastensdistill.network.launch import Part
from fastensdistill.network.nodes import Affine, Conv, Linear, Norm, Shape


@dataclass
class LayerWeights:
    forward: Tensor  # (S, taps, Ci, Co)
    gradient: Tensor  # (S, taps reversed, Co, Ci)
    bias: Tensor | None  # (S, Co)


def pack_layer(weight: Tensor, in_shape: Shape) -> Tensor:
    """(Co, Ci, k, k) → (taps, Ci, Co); a linear layer's (Co, C·H·W) → (1, H·W·C, Co): channels are innermost here."""
    if weight.dim() == 4:
        return weight.permute(2, 3, 1, 0).flatten(0, 1)
    return weight.unflatten(1, in_shape).permute(2, 3, 1, 0).reshape(1, -1, len(weight))


def unpack_gradient(gradient: Tensor, layer: Conv | Linear) -> Tensor:
    """(G, taps, Ci, Co) → (G, Co, Ci, k, k), or (G, 1, H·W·C, Co) → (G, Co, C·H·W)."""
    if isinstance(layer, Conv):
        return gradient.unflatten(1, (layer.kernel, layer.kernel)).permute(0, 4, 3, 1, 2)
    C, H, W = layer.in_shape
    return gradient.view(len(gradient), H, W, C, -1).permute(0, 4, 3, 1, 2).flatten(2)


class Weights:
    """Slots for the networks of one part; ``write`` fills one."""

    def __init__(self, part: Part, slots: int, dtype: torch.dtype, device: torch.device | str = "cpu"):
        self.part, self.dtype = part, dtype
        self.layers: dict[str, LayerWeights] = {}
        self.scale_shift: dict[str, tuple[Tensor, Tensor]] = {}
        self.norms: dict[str, NormWeights] = {}
        narrow: dict[str, Any] = {"dtype": dtype, "device": device}
        wide: dict[str, Any] = {"dtype": accumulator(dtype), "device": device}
        for node in part.network.nodes:
            C = node.shape[0]
            if isinstance(node, Conv | Linear):
                taps = node.kernel**2 if isinstance(node, Conv) else 1
                size = node.in_shape[0] if isinstance(node, Conv) else node.macs // C
                has_bias = node.bias or self.norm_of(node) is not None
                self.layers[node.name] = LayerWeights(
                    torch.zeros(slots, taps, size, C, **narrow),
                    torch.zeros(slots, taps, C, size, **narrow),
                    torch.zeros(slots, C, **wide) if has_bias else None,
                )
            elif isinstance(node, Affine) or (isinstance(node, Norm) and not part.training):
                self.scale_shift[node.name] = torch.zeros(slots, C, **wide), torch.zeros(slots, C, **wide)
            elif isinstance(node, Norm):
                self.norms[node.name] = NormWeights(*(torch.zeros(part.sets, C, **wide) for _ in range(4)))

    def norm_of(self, node: Conv | Linear) -> Norm | None:
        """The BatchNorm that ``node``'s weights carry."""
        user = sole(self.part.network, node.name)
        return user if isinstance(user, Norm) and folded(self.part, user) else None

    @torch.no_grad()
    def write(self, slot: int, parameters: Parameters) -> None:
        """Fill ``slot`` with a plain network's state dict. A BatchNorm that all slots share takes the last one's."""
        for name, layer in self.layers.items():
            node = self.part.network.by_name[name]
            assert isinstance(node, Conv | Linear)
            weight, bias = layer_weights(parameters, node, self.norm_of(node))
            packed = pack_layer(weight, node.in_shape)
            layer.forward[slot].copy_(packed)
            layer.gradient[slot].copy_(flip_weight(packed[None])[0])
            if layer.bias is not None and bias is not None:
                layer.bias[slot].copy_(bias)
        for name, rows in self.scale_shift.items():
            node = self.part.network.by_name[name]
            fold = norm_scale_shift(parameters, node) if isinstance(node, Norm) else image_scale_shift(parameters, name)
            for row, value in zip(rows, fold, strict=True):
                row[slot].copy_(value)
        for name, norm in self.norms.items():
            for key in ("weight", "bias", "running_mean", "running_var"):
                getattr(norm, key)[slot % self.part.sets].copy_(parameters[f"{name}.{key}"])


def pack(part: Part, states: Sequence[Parameters], dtype: torch.dtype, device: torch.device | str = "cpu") -> Weights:
    """Weights with one slot per state dict, in order."""
    weights = Weights(part, len(states), dtype, device)
    for slot, state in enumerate(states):
        weights.write(slot, state)
    return weights
