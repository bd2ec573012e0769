"""Which weight gradients leave partial results to the un-fold, and how many: decided when a step is planned.

A weight gradient's positions are split over blocks, each with a result of its own. Where a network is trained, the
un-fold reads all of them and adds them up in a fixed order; elsewhere, and where they are too large, a launch after the
weight gradient does.

Left to the un-fold, partial results of P bytes are read from memory, and lie there for the whole step. A launch of its
own reads them from L2, if they are still there, but begins 1.2 µs after the one before, takes 1.5 at least, and writes
a result of S bytes that the un-fold reads as well. Of an H100, 0.85 x 3.0 TB/s from memory (``network.gpu``) and 6.6
from L2 (``bench.recorded``), predicted µs:

    K = 4, bf16, by Triton          P = splits x S, MB    by the un-fold    by a launch, L2 holds all    or nothing
    16 → 16, 32 x 32, batch 512      2.8 = 77 x 0.04           1.1                 2.7                       2.7
    64 → 64, 32 x 32, batch 512     23.0 = 39 x 0.59           9.0                 5.1                      10.7
    128 → 128, 16 x 16, batch 512   16.5 =  7 x 2.36           6.5                 5.6                       9.5
    256 → 256, 8 x 8, batch 128     28.3 =  3 x 9.44          11.1                12.9                      19.7
    256 → 256, 8 x 8, batch 512     84.9 =  9 x 9.44          33.3                   -                      41.9

So up to ``MOST``, which L2 can hold beside what streams through it, the one is not clearly worse than the other, and a
step has fewer nodes. What is larger would be faster in the un-fold, too (by 0.06 ms of a step of 45, all seven layers
of 256 together), but is not worth the memory (0.6 GB).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastensdistill.engine.dispatch import Dispatch
from fastensdistill.engine.part_run import Implement, kernels_themselves
from fastensdistill.kernels.conv_weight_gradient import WeightGradientShape, weight_gradient_partials
from fastensdistill.kernels.layout import Partials
from fastensdistill.kernels.operands import Window, accumulator
from fastensdistill.kernels.tiles import device_arch
from fastensdistill.kernels.wgmma_weight_gradient import partial_count
from fastensdistill.network.launch import INPUT, Launch, Part
from fastensdistill.network.nodes import Conv, Layer

MOST = 32 * 2**20  # bytes of a layer's partial results that are left to the un-fold
# Implementation → how many partial results it has; the others make one result
COUNTED: dict[str, Callable[[WeightGradientShape], int]] = {
    "triton": weight_gradient_partials,
    "wgmma": partial_count,
}


def gradient_shape(part: Part, launch: Launch, dtype: torch.dtype, device: torch.device) -> WeightGradientShape:
    """What is known of a weight gradient when it is planned. ``dtype``: of activations."""
    node = part.network.by_name[launch.node]
    assert isinstance(node, Layer)
    C, H, W = node.in_shape if isinstance(node, Conv) else (node.in_channels, 1, 1)
    window = Window(node.kernel, node.stride, node.padding) if isinstance(node, Conv) else Window(1)
    groups = len(part.groups)
    x = (1 if launch.reads[0] == INPUT else groups, part.batch, H, W, C)
    normed = any(step.kind == "norm_gradient" for step in launch.prologue)
    return WeightGradientShape(x, groups, node.shape[0], window, dtype, device, normed)


def count(implement: Implement, part: Part, launch: Launch, shape: WeightGradientShape) -> int:
    """Partial results of a weight gradient by whatever computes it."""
    name = "triton" if implement is kernels_themselves else ""
    if isinstance(implement, Dispatch):
        x_dtype = accumulator(shape.dtype) if launch.reads[0] == INPUT else shape.dtype
        arch = device_arch(torch.empty(0, device=shape.device))
        name = implement.implementation(part, launch, arch, x_dtype)
    return COUNTED[name](shape) if name in COUNTED else 1


def left_to_unfold(part: Part, implement: Implement, dtype: torch.dtype, device: torch.device) -> dict[str, Partials]:
    """By its layer, every weight gradient of a backward ``part`` that leaves several partial results."""
    found = {}
    for launch in part.launches:
        if launch.op == "weight gradient":
            shape = gradient_shape(part, launch, dtype, device)
            splits = count(implement, part, launch, shape)
            one = shape.groups * shape.window.kernel**2 * shape.x[4] * shape.out_channels
            if splits > 1 and 4 * splits * one <= MOST:
                found[launch.node] = Partials(splits)
    return found
