"""Activations, gates, sums and LayerNorms of known networks: each op beside what PyTorch would run in its place.

``bench/test_ops.py`` times them, once they agree with their references, and ``bench.kernel_report`` compiles them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastensdistill.kernels.activation import KINDS, activation
from fastensdistill.kernels.activation_gradient import activation_gradient
from fastensdistill.kernels.batch_norm_sums import batch_norm_sums
from fastensdistill.kernels.gate import gate, gate_gradient
from fastensdistill.kernels.layer_norm import layer_norm, layer_norm_gradient
from fastensdistill.kernels.reference import wide

# layer: kind, (H, W, C) — which networks have it
ACTIVATIONS = {
    "mobilenet_v2, first block": ("relu6", (112, 112, 32)),
    "mobilenet_v2, last blocks": ("relu6", (7, 7, 960)),
    "efficientnet_b0, third stage": ("silu", (28, 28, 144)),
    "mobilenet_v3": ("hardswish", (14, 14, 184)),
    "convnext_tiny, a block's": ("gelu", (14, 14, 1536)),
    "mixer, a block's": ("gelu_tanh", (14, 14, 768)),
    "yolo's": ("mish", (28, 28, 64)),
}
GATES = {
    "efficientnet_b0, third stage": (28, 28, 144),
    "efficientnet_b0, last stage": (7, 7, 1152),
    "seresnet50": (56, 56, 256),
}
SUMS = {
    "densenet121, third block": (14, 14, 640),
    "resnetv2_50, a sum": (56, 56, 256),
}
LAYER_NORMS = {
    "convnext_tiny, first stage": (56, 56, 96),
    "convnext_tiny, last stage": (7, 7, 768),
    "vit_tiny": (197, 1, 192),
}


@dataclass(frozen=True)
class Case:
    """An op with its operands; ``peer`` is the same by PyTorch's operations, ``nbytes`` what it must move."""

    name: str
    op: Callable[..., Any]
    operands: tuple[Any, ...]
    options: dict[str, Any]
    peer: Callable[[], Any]
    nbytes: int

    def run(self) -> Any:
        """The op."""
        return self.op(*self.operands, **self.options)

    def exact(self) -> Any:
        """The op in float64, by its reference."""
        return self.op(*map(_double, self.operands), **{k: _double(v) for k, v in self.options.items()})


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def cases(device: torch.device, dtype: torch.dtype, groups: int = 4, images: int = 128) -> Iterator[Case]:
    """All of them, with ``images`` per group, made one after the other."""

    def values(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    for layer, (kind, size) in ACTIVATIONS.items():
        yield from _activations(layer, kind, [values(groups, images, *size) for _ in range(2)],
                                [values(1, size[2], dtype=torch.float32) for _ in range(3)])  # fmt: skip
    for layer, size in GATES.items():
        d, x, g = (values(groups, images, *shape) for shape in (size, size, (1, 1, size[2])))
        yield from _gates(layer, d, x, g)
    for layer, size in SUMS.items():
        yield _sums(layer, values(groups, images, *size), values(1, size[2], dtype=torch.float32))
    for layer, size in LAYER_NORMS.items():
        d, x = (values(groups, images, *size) for _ in range(2))
        yield from _layer_norms(layer, d, x, *(values(1, size[2], dtype=torch.float32) for _ in range(2)))


def _activations(layer: str, kind: str, images: list[Tensor], rows: list[Tensor]) -> Iterator[Case]:
    """Behind a BatchNorm in training mode."""
    (d, z), (scale, shift, mean) = images, rows
    affine, inv_std = {"kind": kind, "scale": scale, "shift": shift}, mean.abs() + 0.5
    one = z.numel() * z.element_size()

    def normalized() -> Tensor:
        """By PyTorch's BatchNorm with the same scale and shift, which is one pass."""
        images, unit = z.flatten(0, 1).permute(0, 3, 1, 2), torch.ones_like(scale[0])
        x = F.batch_norm(images, torch.zeros_like(unit), unit, scale[0], shift[0], eps=1e-9)
        return x.permute(0, 2, 3, 1).view_as(z)

    def forward() -> Tensor:
        return KINDS[kind].value(normalized(), 0.01)

    def backward() -> tuple[Tensor, ...]:
        x = normalized()
        u = d * KINDS[kind].derivative(x, 0.01)
        return u, u.sum((0, 1, 2, 3)), (u * ((z - wide(mean)) * wide(inv_std))).sum((0, 1, 2, 3))

    yield Case(f"{kind}: {layer}", activation, (z,), affine, forward, 2 * one)
    norm = affine | {"mean": mean, "inv_std": inv_std}
    yield Case(f"{kind} gradient: {layer}", activation_gradient, (d, z), norm, backward, 3 * one)


def _gates(layer: str, d: Tensor, x: Tensor, g: Tensor) -> Iterator[Case]:
    one = x.numel() * x.element_size()
    yield Case(f"gate: {layer}", gate, (x, g), {}, lambda: x * g, 2 * one)
    yield Case(f"gate gradient: {layer}", gate_gradient, (d, x, g), {}, lambda: (d * g, (d * x).sum((2, 3))), 3 * one)


def _sums(layer: str, z: Tensor, center: Tensor) -> Case:
    """Beside PyTorch's statistics, which are one read too."""
    nbytes = z.numel() * z.element_size()
    return Case(f"BatchNorm sums: {layer}", batch_norm_sums, (z, center), {},
                lambda: torch.var_mean(z.flatten(0, 3), 0), nbytes)  # fmt: skip


def _layer_norms(layer: str, d: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Iterator[Case]:
    """With one weight for all groups."""
    shape, one = x.shape[4:], x.numel() * x.element_size()
    own = weight[0].to(x.dtype), bias[0].to(x.dtype)
    yield Case(f"LayerNorm: {layer}", layer_norm, (x, weight, bias), {},
               lambda: F.layer_norm(x, shape, *own), 2 * one)  # fmt: skip
    _, mean, inv_std = torch.native_layer_norm(x, shape, *own, 1e-5)
    backward = torch.ops.aten.native_layer_norm_backward
    yield Case(f"LayerNorm gradient: {layer}", layer_norm_gradient,
               (d, x, weight), {"sets": 1},
               lambda: backward(d, x, shape, mean, inv_std, *own, [True, True, True]), 3 * one)  # fmt: skip
