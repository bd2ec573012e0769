"""Depthwise convolutions of known networks, forward and both gradients, beside cuDNN's.

``bench/test_ops.py`` times them, once they agree with their references, and ``bench.kernel_report`` compiles them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as nn_grad

from bench.elementwise import Case
from fastensdistill.kernels.depthwise_conv import depthwise_conv
from fastensdistill.kernels.depthwise_data_gradient import depthwise_data_gradient
from fastensdistill.kernels.depthwise_weight_gradient import depthwise_weight_gradient
from fastensdistill.kernels.operands import rectangle
from fastensdistill.kernels.vendor_conv import as_images

# layer: side of the window, stride, side of its input, channels — which networks have it
LAYERS = {
    "mobilenet_v2, first block": (3, 1, 112, 32),
    "mobilenet_v2, second block": (3, 2, 112, 96),
    "efficientnet_b0, third stage": (5, 2, 56, 144),
    "convnext_tiny, third stage": (7, 1, 14, 384),
    "convmixer_768_32": (9, 1, 32, 768),
}


def cases(device: torch.device, dtype: torch.dtype, groups: int = 4, images: int = 128) -> Iterator[Case]:
    """All of them, with ``images`` per group, made one after the other."""
    for layer, (kernel, stride, side, channels) in LAYERS.items():
        yield from of_layer(layer, kernel, stride, (groups, images, side, side, channels), device, dtype)


def of_layer(
    layer: str, kernel: int, stride: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Iterator[Case]:
    """One layer's, of an input of ``shape`` (G, N, H, H, C)."""
    G, N, H, _, C = shape
    pairs = {"kernel": (kernel, kernel), "stride": (stride, stride), "padding": (kernel // 2, kernel // 2)}
    window = rectangle(**pairs)
    out = window.sizes(H, H)

    def values(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    def together(t: Tensor) -> Tensor:
        """(G, N, H, W, C) → (N, G·C, H, W), channels-last: what cuDNN takes all groups in one call as."""
        return as_images(t.permute(1, 2, 3, 0, 4).flatten(3).contiguous())

    x, d, weight = values(*shape), values(G, N, *out, C), values(G, window.taps, 1, C)
    index = torch.arange(G, dtype=torch.int32, device=device)
    images, gradients = together(x), together(d)
    flat = weight[:, :, 0].transpose(1, 2).reshape(G * C, 1, kernel, kernel).contiguous()
    places = window.stride, window.padding, window.dilation, G * C
    rows = {name: values(1, C, dtype=torch.float32) for name in ("mean", "inv_std")}
    bits = torch.zeros(G, N, H, H, -(-C // 8), dtype=torch.uint8, device=device)
    nbytes = (x.numel() + d.numel()) * x.element_size()

    def case(name: str, op: Any, operands: tuple[Any, ...], options: dict[str, Any], peer: Callable[[], Any],
             more: int = 0) -> Case:  # fmt: skip
        return Case(f"{name}, {layer}", op, operands, {**pairs, **options}, peer, nbytes + more)

    forward = (x, weight, index)
    backward = (d, weight.flip(1).transpose(2, 3).contiguous(), index)

    def data_gradient() -> Tensor:
        return nn_grad.conv2d_input(images.shape, flat, gradients, *places)

    yield case("forward", depthwise_conv, forward, {"center": rows["mean"]},
               lambda: F.conv2d(images, flat, None, *places))  # fmt: skip
    yield case("data gradient", depthwise_data_gradient, backward, {"in_size": (H, H)}, data_gradient)
    yield case("data gradient with sums", depthwise_data_gradient, backward,
               {"in_size": (H, H), "z": x, "mask": bits, "residual": x, **rows}, data_gradient,
               2 * x.numel() * x.element_size() + bits.numel())  # fmt: skip
    yield case("weight gradient", depthwise_weight_gradient, (x, d), {},
               lambda: nn_grad.conv2d_weight(images, list(flat.shape), gradients, *places))  # fmt: skip
