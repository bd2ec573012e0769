"""The nodes of a network by PyTorch's own operations, one after the other: what a trace says the network computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from fastensdistill.network.expression import evaluate, logical, physical
from fastensdistill.network.nodes import (
    Activation,
    Add,
    Affine,
    Conv,
    Dropout,
    Function,
    Gate,
    GeneralConv,
    Input,
    Linear,
    Logits,
    Network,
    Node,
    Norm,
    Pad,
    PointConv,
    Pool,
    ReLU,
)

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "mish": F.mish,
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu": F.gelu, "leaky_relu": F.leaky_relu, "elu": F.elu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "leaky_relu(0.2)": lambda x: F.leaky_relu(x, 0.2),
    "elu(0.5)": lambda x: F.elu(x, 0.5),
}  # fmt: skip


def interpret(network: Network, state: Mapping[str, Tensor], x: Tensor, training: bool = False) -> Tensor:
    """The logits of images (N, C, H, W) with the tensors of a module's ``state``, which stay as they are."""
    values: dict[str, Tensor] = {}
    for node in network.nodes:
        inputs = [x] if isinstance(node, Input) else [values[name] for name in node.inputs]
        value = _value(node, inputs, state, training)
        assert value.shape == (len(x), *node.shape), (node, value.shape)
        values[node.name] = value.contiguous(memory_format=torch.channels_last)  # as values of a plan lie in memory
    return values[network.output].flatten(1)


def _value(node: Node, inputs: list[Tensor], state: Mapping[str, Tensor], training: bool) -> Tensor:
    x, *others = inputs
    own = {
        key: state[f"{node.name}.{key}"] for key in ("weight", "bias", "mean", "std") if f"{node.name}.{key}" in state
    }
    bias = own.get("bias")
    if isinstance(node, Input):
        return x
    if isinstance(node, Logits):
        return x
    if isinstance(node, Affine):
        return (x - own["mean"]) / own["std"]
    if isinstance(node, PointConv):
        return F.linear(x.permute(0, 2, 3, 1), own["weight"], bias).permute(0, 3, 1, 2)
    if isinstance(node, Conv):
        return F.conv2d(x, own["weight"], bias, node.stride, node.padding)
    if isinstance(node, GeneralConv):
        return F.conv2d(x, own["weight"], bias, node.stride, node.padding, node.dilation, node.groups)
    if isinstance(node, Linear):
        return F.linear(x.flatten(1), own["weight"], bias)[:, :, None, None]
    if isinstance(node, Norm):
        running = [state[f"{node.name}.running_{key}"].clone() for key in ("mean", "var")]
        return F.batch_norm(x, running[0], running[1], own["weight"], bias, training, node.momentum, node.eps)
    if isinstance(node, ReLU):
        return F.relu(x)
    if isinstance(node, Activation):
        return ACTIVATIONS[node.kind](x)
    if isinstance(node, Add):
        return x + others[0]
    if isinstance(node, Gate):
        assert others[0].shape[2:] == (1, 1)
        return x * others[0]
    if isinstance(node, Pool):
        if node.kind == "adaptive":
            return F.adaptive_avg_pool2d(x, node.shape[1:])
        pool = F.max_pool2d if node.kind == "max" else F.avg_pool2d
        return pool(x, node.kernel, node.stride, node.padding)
    if isinstance(node, Pad):
        added = node.shape[0] - node.in_shape[0]
        return F.pad(x[:, :, :: node.stride, :: node.stride], (0, 0, 0, 0, 0, added))
    if isinstance(node, Dropout):
        assert training
        return x * _mask(node, x)
    assert isinstance(node, Function), node
    names = (*node.trained, *node.constants)
    assert tuple(tuple(state[name].shape) for name in names) == node.tensors
    given = [logical(v.permute(0, 2, 3, 1), layout) for v, layout in zip(inputs, node.layouts, strict=True)]
    result = physical(evaluate(node.expression, given, {name: state[name] for name in names}), node.layout)
    return result.permute(0, 3, 1, 2)


def _mask(node: Dropout, x: Tensor) -> Tensor:
    """Drawn as the module draws it, in the order of its own layout."""
    if node.over == "image":
        drawn = torch.empty(len(x), 1, 1, 1, dtype=x.dtype).bernoulli_(1 - node.p)
        return drawn / (1 - node.p) if node.scaled else drawn
    ones = torch.ones_like(logical(x.permute(0, 2, 3, 1), node.layout), memory_format=torch.contiguous_format)
    if node.over == "channel":
        return F.dropout2d(ones, node.p)
    C, H, W = node.shape
    drawn = F.dropout(ones, node.p)
    return (
        physical(drawn, node.layout).view(len(x), H, W, C).permute(0, 3, 1, 2)
        if node.layout != "flat"
        else (drawn.view(len(x), C, H, W))
    )
