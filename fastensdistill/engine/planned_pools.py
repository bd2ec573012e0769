"""What the pooling and padding launches of a plan run; ``planned_ops`` lists them with the others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastensdistill.engine.part_run import PartRun
from fastensdistill.kernels.pool import max_pool, max_pool_backward
from fastensdistill.kernels.reference import shortcut
from fastensdistill.network.launch import Launch, index
from fastensdistill.network.nodes import Pad, Pool


def pool(run: PartRun, launch: Launch) -> None:
    """Max or mean pooling."""
    node, x = run.node(launch.node), run.read(launch.reads[0])
    assert isinstance(node, Pool)
    if node.kind == "max":
        y, run.buffers[index(node.name)] = max_pool(x, kernel=node.kernel, stride=node.stride, padding=node.padding)
    else:
        y = grouped(mean_windows(images_of(x), node), run.groups)
    run.write(launch.steps("store"), y)


def pool_gradient(run: PartRun, launch: Launch) -> None:
    """The gradient of a pooling's input."""
    node, d = run.node(launch.node), run.read(launch.reads[0])
    assert isinstance(node, Pool)
    if node.kind == "max":
        size = node.in_shape[1], node.in_shape[2]
        window = {"kernel": node.kernel, "stride": node.stride, "padding": node.padding}
        result = max_pool_backward(d, run.read(launch.reads[1]), in_size=size, **window)
    elif node.is_global:  # one write; autograd's gradient is transposed and copied
        C, H, W = node.in_shape
        result = (d / (H * W)).expand(*d.shape[:2], H, W, C).contiguous()
    else:
        result = grouped(mean_windows_gradient(images_of(d), node), run.groups)
    run.write(launch.steps("store"), result)


def mean_windows(x: Tensor, node: Pool) -> Tensor:
    """Mean pooling of (images, C, H, W): windows, or however many adaptive ones make the output's size."""
    if node.kind == "avg":
        return F.avg_pool2d(x, node.kernel, node.stride)
    return F.adaptive_avg_pool2d(x, node.shape[1:])


def mean_windows_gradient(d: Tensor, node: Pool) -> Tensor:
    """Gradient of ``mean_windows``; it is linear, so the input does not matter."""
    with torch.enable_grad():
        x = d.new_zeros(len(d), *node.in_shape, requires_grad=True)
        return torch.autograd.grad(mean_windows(x, node), x, d)[0]


def images_of(x: Tensor) -> Tensor:
    """(G, N, H, W, C) → (G·N, C, H, W), as PyTorch's pooling takes them."""
    return x.flatten(0, 1).permute(0, 3, 1, 2)


def grouped(x: Tensor, groups: int) -> Tensor:
    """(G·N, C, H, W) → (G, N, H, W, C)."""
    return x.permute(0, 2, 3, 1).unflatten(0, (groups, -1)).contiguous()


def pad(run: PartRun, launch: Launch) -> None:
    """A zero-padded shortcut, where no addition reads it in place."""
    node = run.node(launch.node)
    assert isinstance(node, Pad)
    C, H, W = node.shape
    run.write(launch.steps("store"), shortcut(run.read(launch.reads[0]), node.stride, H, W, C).contiguous())


def pad_gradient(run: PartRun, launch: Launch) -> None:
    """Its gradient."""
    node, d = run.node(launch.node), run.read(launch.reads[0])
    assert isinstance(node, Pad)
    C, H, W = node.in_shape
    result = d.new_zeros(*d.shape[:2], H, W, C)
    result[:, :, :: node.stride, :: node.stride] = d[..., :C]
    run.write(launch.steps("store"), result)
