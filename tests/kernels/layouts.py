"""Layers with rank-one factors in flat buffers, and what a branch's weights are by the formula."""

from __future__ import annotations

import torch
from torch import Tensor

from fastensdistill.kernels.layout import Layout
from tests.untyped import untyped

# id: (K, plain, [(name, weight shape, bias)]) — why
CASES = {
    "linear": (2, 0, [("fc", (10, 7), True)]),
    "stem": (3, 5, [("stem", (16, 3, 3, 3), False)]),  # three input channels
    "tiles": (2, 3, [("conv", (70, 41, 3, 3), False), ("down", (65, 33, 1, 1), True)]),  # tiles cut short
    "wide-kernel": (2, 0, [("patch", (5, 3, 8, 8), True)]),  # few channels fit in a tile
    "one-branch": (1, 9, [("a", (8, 8, 3, 3), False), ("fc", (3, 8), True)]),
    "many-layers": (2, 7, [(f"conv{i}", (4 + i % 3, 3, 1, 1 + i % 2), i % 4 == 0) for i in range(12)]),
    "two-tables": (2, 7, [(f"conv{i}", (4, 3, 1, 1), i % 4 == 0) for i in range(70)]),  # of the CUDA packing
}
# The same, with channel groups: (…, {name: groups}); Ci of a weight is that of a group
GROUPED = {
    "depthwise": (2, 3, [("a", (34, 1, 3, 1), True), ("b", (5, 1, 5, 7), False)], {"a": 34, "b": 5}),  # above 32 taps
    "multiplier": (3, 0, [("a", (34, 1, 1, 3), True)], {"a": 17}),  # two outputs per input
    "small-groups": (2, 5, [("a", (36, 2, 3, 1), True), ("b", (9, 3, 1, 1), False)], {"a": 12, "b": 3}),
    "large-groups": (2, 0, [("a", (66, 5, 3, 1), True), ("b", (96, 34, 1, 1), False)], {"a": 2, "b": 3}),
    "both": (2, 4, [("stem", (10, 3, 3, 3), False), ("a", (10, 1, 3, 3), True), ("b", (66, 5, 1, 2), False),
                    ("fc", (5, 66), True)], {"a": 10, "b": 2}),
}  # fmt: skip


def problem(case: str, dtype: torch.dtype, slots: int | None = None) -> tuple[Layout, dict[str, Tensor]]:
    K, plain, weights, *groups = untyped((CASES | GROUPED)[case])
    layout = Layout.build(weights, plain, slots or K, None, *groups)
    g = torch.Generator().manual_seed(K + plain + layout.size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return layout, {
        "parameters": normal(layout.size),
        "deviations": 0.3 * normal(K, layout.factors),
        "branch_gradients": 0.1 * normal(K, layout.ranked),
    }


def folded_by_layer(layout: Layout, parameters: Tensor, deviations: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    """(W_k [K, Co, Ci, taps], b_k [K, Co]) of every layer, from the formula."""
    result = []
    for layer in layout.layers:
        W = parameters[layer.weight : layer.weight + layer.weight_size]
        W = W.view(layer.out_channels, layer.in_channels, layer.taps)
        n, Ci = layer.channel_groups, layer.in_channels
        r = 1 + deviations[:, layer.r : layer.r + n * Ci]
        r = torch.cat([r[:, None, g * Ci : (g + 1) * Ci].expand(-1, layer.out_channels // n, -1) for g in range(n)], 1)
        s = 1 + deviations[:, layer.s : layer.s + layer.out_channels]
        b = None if layer.bias < 0 else s * parameters[layer.bias : layer.bias + layer.out_channels]
        result.append((s[:, :, None, None] * W * r[..., None], b))
    return result


def folded(layout: Layout, parameters: Tensor, deviations: Tensor) -> Tensor:
    """[K, ranked]: W_k and b_k of every layer where ``parameters`` holds W and b."""
    pairs = folded_by_layer(layout, parameters, deviations)
    return torch.cat([part.flatten(1) for pair in pairs for part in pair if part is not None], 1)
