"""The recorded operations of a module, read one after the other into typed nodes."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from fastensdistill.errors import InputError
from fastensdistill.models.layers import BatchNorm2d, Normalize, PadShortcut
from fastensdistill.network.launch import INPUT
from fastensdistill.network.nodes import (
    Add,
    Affine,
    Conv,
    Input,
    Linear,
    Network,
    Node,
    Norm,
    Pad,
    Pool,
    ReLU,
    Shape,
)

LEAVES = (
    Normalize, BatchNorm2d, PadShortcut, nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d,
    nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity, nn.Dropout,
)  # fmt: skip
"""The layers that become nodes as a whole."""
RELU = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
FLATTEN = (torch.flatten, "flatten")
MEAN = (torch.mean, "mean")
POOL = ("kernel_size", "stride", "padding")
# The arguments of a function after its input; what is given besides is refused.
FUNCTIONS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys(RELU, ("inplace",)),
    **dict.fromkeys(ADD, ("other", "alpha")),
    **dict.fromkeys(FLATTEN, ("start_dim", "end_dim")),
    **dict.fromkeys(MEAN, ("dim", "keepdim")),
    F.adaptive_avg_pool2d: ("output_size",),
    F.max_pool2d: (*POOL, "dilation", "ceil_mode", "return_indices"),
    F.avg_pool2d: (*POOL, "ceil_mode", "count_include_pad", "divisor_override"),
    F.dropout: ("p", "training", "inplace"),
}
IN_PLACE = (torch.relu_, "relu_", "add_", operator.iadd)
# What changes nothing, by the names of PyTorch's settings
USUAL_CONV = {"groups": 1, "dilation": (1, 1), "padding_mode": "zeros"}
USUAL_POOL = {"dilation": 1, "ceil_mode": False, "return_indices": False, "divisor_override": None}


def settings(values: Mapping[str, Any]) -> str:
    """As one writes them in Python."""
    return ", ".join(f"{key}={value!r}" for key, value in values.items())


class Reader:
    """Walks the recorded graph once. ``values`` maps each recorded operation to the name of the value it stands for."""

    def __init__(self, module: nn.Module, input_size: Shape, training: bool):
        self.module, self.input_size, self.training = module, input_size, training
        self.nodes: dict[str, Node] = {}
        self.values: dict[fx.Node, str] = {}
        self.flat: set[fx.Node] = set()
        self.in_place: list[str] = []
        self.dropout: list[str] = []
        self.where, self.operation = "", ""

    def read(self, graph: fx.Graph) -> Network:
        """The whole graph. Raises InputError, naming the module and the operation, for what cannot be planned."""
        output = ""
        for op in graph.nodes:
            self.where = next(reversed(op.meta.get("nn_module_stack") or {"": None}))
            self.operation = op.target if isinstance(op.target, str) else getattr(op.target, "__name__", str(op.target))
            if op.op == "placeholder":
                if self.nodes:
                    raise self.refuse("takes more than one input")
                self.put(op, Input(INPUT, (), self.input_size))
            elif op.op == "call_module":
                self.layer(op, self.module.get_submodule(str(op.target)))
            elif op.op in ("call_function", "call_method"):
                self.function(op)
            elif op.op == "output":
                if op.args[0] not in self.flat:
                    raise self.refuse("does not return one tensor of shape (batch, classes)")
                output = self.values[op.args[0]]
            else:
                raise self.refuse("reads a tensor of the module directly")
        network = Network(self.reachable(output), output, tuple(self.dropout))
        self.check(network)
        return network

    def refuse(self, why: str) -> InputError:
        """The error to raise about the operation at hand."""
        where = self.where.partition("@")[0]  # the recorder counts the calls of a module
        place = f"module {where!r}" if where else "the outermost module"
        kind = type(self.module).__name__
        return InputError(f"{kind}: {place}, operation {self.operation!r}: {why}")

    def put(self, op: fx.Node, node: Node, flat: bool = False) -> None:
        """The operation computes a new ``node``, whose value is flattened or an image."""
        self.nodes[node.name] = node
        self.values[op] = node.name
        if flat:
            self.flat.add(op)

    def alias(self, op: fx.Node, source: fx.Node, flat: bool | None = None) -> None:
        """The operation changes nothing but, perhaps, whether the value is flattened."""
        self.values[op] = self.values[source]
        if source in self.flat if flat is None else flat:
            self.flat.add(op)

    def source(self, op: fx.Node, image: bool = False) -> tuple[fx.Node, str, Shape]:
        """The operation's first argument, the value it stands for and its shape."""
        source = op.args[0] if op.args else op.kwargs.get("input")
        if not isinstance(source, fx.Node) or source not in self.values:
            raise self.refuse("takes something other than a tensor computed before")
        if image and source in self.flat:
            raise self.refuse("takes an image, but its input is flattened")
        name = self.values[source]
        return source, name, self.nodes[name].shape

    def free_name(self, base: str) -> str:
        """``base``, with a number where there is such a node already."""
        name, count = base, 1
        while name in self.nodes:
            count += 1
            name = f"{base}#{count}"
        return name

    def layer(self, op: fx.Node, layer: nn.Module) -> None:
        """The call of a module of ``LEAVES``."""
        path = str(op.target)
        if path in self.nodes and isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            why = "a layer with parameters is used twice" if path != INPUT else "has the name of the image"
            raise self.refuse(why)
        source, value, shape = self.source(op, image=isinstance(layer, nn.Conv2d | nn.BatchNorm2d | Normalize))
        channels, height, width = shape
        name, inputs = self.free_name(path), (value,)
        if isinstance(layer, Normalize):
            self.put(op, Affine(name, inputs, shape))
        elif isinstance(layer, nn.Conv2d):
            self.convolution(op, layer, name, value, shape)
        elif isinstance(layer, nn.BatchNorm2d):
            self.batch_norm(op, layer, name, value, shape)
        elif isinstance(layer, nn.ReLU):
            self.relu(op, name, layer.inplace)
        elif isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
            self.window(op, name, "max" if isinstance(layer, nn.MaxPool2d) else "avg", vars(layer))
        elif isinstance(layer, nn.AdaptiveAvgPool2d):
            self.adaptive(op, name, layer.output_size)
        elif isinstance(layer, PadShortcut):
            s = layer.stride
            out = (channels + layer.new_channels, -(-height // s), -(-width // s))
            self.put(op, Pad(name, inputs, out, shape, s))
        elif isinstance(layer, nn.Linear):
            if source not in self.flat:
                raise self.refuse("a linear layer needs a flattened input")
            self.weighs(layer, (layer.out_features, channels * height * width))
            self.put(op, Linear(name, inputs, (layer.out_features, 1, 1), shape, layer.bias is not None), flat=True)
        elif isinstance(layer, nn.Flatten):
            self.flatten(op, layer.start_dim, layer.end_dim)
        elif isinstance(layer, nn.Dropout):
            self.drop(op, path, layer.p, layer.training)
        else:
            self.alias(op, source)

    def function(self, op: fx.Node) -> None:
        """The call of one of ``FUNCTIONS``, which may be a tensor's method."""
        target = op.target
        if target not in FUNCTIONS:
            raise self.refuse("is not an operation of the fast path")
        names = FUNCTIONS[target]
        given: dict[str, Any] = dict(zip(names, op.args[1:], strict=False)) | op.kwargs
        given.pop("input", None)
        if len(op.args) > 1 + len(names) or not set(given) <= set(names):
            raise self.refuse(f"takes {', '.join(names)} after its input; got {op.args[1:]} and {op.kwargs}")
        base = re.sub(r"_\d+$", "", op.name)
        name = self.free_name(f"{self.where}.{base}" if self.where else base)
        source, value, shape = self.source(op)
        if target in RELU:
            self.relu(op, name, target in IN_PLACE or given.get("inplace", False))
        elif target in ADD:
            other = given.get("other")
            if not (isinstance(other, fx.Node) and other in self.values) or given.get("alpha", 1) != 1:
                raise self.refuse("adds something other than two tensors")
            second = self.nodes[self.values[other]].shape
            if second != shape or (other in self.flat) != (source in self.flat):
                raise self.refuse(f"adds tensors of different shapes, {shape} and {second}")
            self.put(op, Add(name, (value, self.values[other]), shape), flat=source in self.flat)
            if target in IN_PLACE:
                self.in_place.append(name)
        elif target in FLATTEN:
            self.flatten(op, given.get("start_dim", 0), given.get("end_dim", -1))
        elif target is F.adaptive_avg_pool2d:
            self.adaptive(op, name, given.get("output_size"))
        elif target in MEAN:
            dims = given.get("dim")
            if source in self.flat or not isinstance(dims, tuple | list) or sorted(d % 4 for d in dims) != [2, 3]:
                raise self.refuse("a mean over anything but height and width")
            self.adaptive(op, name, 1)
            if not given.get("keepdim", False):
                self.flat.add(op)
        elif target in (F.max_pool2d, F.avg_pool2d):
            self.window(op, name, "max" if target is F.max_pool2d else "avg", given)
        else:
            self.drop(op, name, given.get("p", 0.5), given.get("training", True))

    def relu(self, op: fx.Node, name: str, in_place: bool) -> None:
        """A ReLU of whatever shape."""
        source, value, shape = self.source(op)
        self.put(op, ReLU(name, (value,), shape), flat=source in self.flat)
        if in_place:
            self.in_place.append(name)

    def convolution(self, op: fx.Node, layer: nn.Conv2d, name: str, value: str, shape: Shape) -> None:
        """A plain, square convolution of ``value``."""
        kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding
        wrong = {key: getattr(layer, key) for key, usual in USUAL_CONV.items() if getattr(layer, key) != usual}
        sizes = {"kernel_size": kernel, "stride": stride, "padding": padding}
        wrong |= {key: v for key, v in sizes.items() if isinstance(v, str) or len(set(v)) != 1}
        if wrong:
            raise self.refuse(f"a convolution with {settings(wrong)}; expected it plain, square and padded by a number")
        if layer.in_channels != shape[0]:
            raise self.refuse(f"takes {layer.in_channels} channels, but its input has {shape[0]}")
        k, s, p = kernel[0], stride[0], int(padding[0])
        self.weighs(layer, (layer.out_channels, layer.in_channels, k, k))
        out = (layer.out_channels, *self.out_size(shape, k, s, p))
        self.put(op, Conv(name, (value,), out, shape, layer.bias is not None, k, s, p))

    def out_size(self, shape: Shape, kernel: int, stride: int, padding: int) -> tuple[int, int]:
        """Height and width after windows of ``kernel`` have gone over an image of ``shape``."""
        height, width = ((size + 2 * padding - kernel) // stride + 1 for size in shape[1:])
        if min(height, width) < 1:
            raise self.refuse(f"a window of {kernel} does not fit into an image of {shape[1]}x{shape[2]}")
        return height, width

    def window(self, op: fx.Node, name: str, kind: str, given: Mapping[str, Any]) -> None:
        """Pooling over windows, with the settings of PyTorch's layer or function of that kind."""
        _, value, shape = self.source(op, image=True)
        sizes = [given.get("kernel_size"), given.get("stride"), given.get("padding", 0)]
        sizes[1] = sizes[0] if sizes[1] in (None, (), []) else sizes[1]
        pairs = [tuple(v) if isinstance(v, tuple | list) else (v, v) for v in sizes]
        wrong = {key: given[key] for key, usual in USUAL_POOL.items() if given.get(key, usual) not in (usual, (1, 1))}
        wrong |= {key: v for key, v in zip(POOL, pairs, strict=True) if len(set(v)) != 1}
        if kind == "avg" and any(pairs[2]):
            wrong["padding"] = given["padding"]
        if wrong:
            raise self.refuse(
                f"a pooling with {settings(wrong)}; expected square windows, none dilated, rounded up, "
                "returning indices, or padded where they are averaged"
            )
        k, s, p = (int(v[0]) for v in pairs)
        self.put(op, Pool(name, (value,), (shape[0], *self.out_size(shape, k, s, p)), kind, shape, k, s, p))

    def adaptive(self, op: fx.Node, name: str, size: Any) -> None:
        """The mean over as many windows as make ``size``; nothing where that is the size at hand."""
        source, value, shape = self.source(op, image=True)
        sizes = tuple(size) if isinstance(size, tuple | list) else (size, size)
        height, width = (have if want is None else int(want) for want, have in zip(sizes, shape[1:], strict=True))
        if (height, width) == shape[1:]:
            self.alias(op, source)
        else:
            self.put(op, Pool(name, (value,), (shape[0], height, width), "adaptive", shape))

    def flatten(self, op: fx.Node, start: int, end: int) -> None:
        """Channels, height and width as one dimension."""
        source, _, _ = self.source(op)
        if start != 1 or end not in (-1, 3):
            raise self.refuse("flattens other dimensions than channels, height and width")
        self.alias(op, source, flat=True)

    def drop(self, op: fx.Node, name: str, p: float, active: bool) -> None:
        """Dropout, which does nothing in evaluation mode; what would drop values in training is noted."""
        self.alias(op, self.source(op)[0])
        if p > 0 and active and not self.training:
            raise self.refuse(f"drops values with p={p} in evaluation mode too")
        if p > 0 and (active or not self.training):
            self.dropout.append(name)

    def batch_norm(self, op: fx.Node, layer: nn.BatchNorm2d, name: str, value: str, shape: Shape) -> None:
        """BatchNorm with all it can have, in the mode of the whole network."""
        settled = {"track_running_stats": layer.track_running_stats, "affine": layer.affine}
        wrong: dict[str, Any] = {key: has for key, has in settled.items() if not has}
        tensors = ("weight", "bias", "running_mean", "running_var", "momentum")
        wrong |= {key: None for key in tensors if getattr(layer, key) is None}
        if wrong:
            raise self.refuse(
                f"BatchNorm with {settings(wrong)}; expected scale and shift, running statistics and a momentum"
            )
        if layer.training != self.training:
            kept, other = ("training", "evaluates") if layer.training else ("evaluation", "trains")
            raise self.refuse(f"BatchNorm stays in {kept} mode while the network {other}")
        assert layer.momentum is not None
        self.weighs(layer, (shape[0],))
        unbiased = type(layer) is not BatchNorm2d
        self.put(op, Norm(name, (value,), shape, layer.eps, layer.momentum, unbiased))

    def weighs(self, layer: nn.Conv2d | nn.Linear | nn.BatchNorm2d, expected: tuple[int, ...]) -> None:
        """Refuse a weight whose shape is not ``expected``."""
        if tuple(layer.weight.shape) != expected:
            raise self.refuse(f"its weight has shape {tuple(layer.weight.shape)}; expected {expected}")

    def reachable(self, output: str) -> tuple[Node, ...]:
        """The nodes the output depends on."""
        used = {output}
        for node in reversed(self.nodes.values()):
            if node.name in used:
                used.update(node.inputs)
        return tuple(node for node in self.nodes.values() if node.name in used)

    def check(self, network: Network) -> None:
        """What only the whole network shows: normalisation first, and nothing reads a value that was overwritten."""
        order = [node.name for node in network.nodes]
        for name in self.in_place:
            if name not in network.by_name:
                self.where, self.operation = name, type(self.nodes[name]).__name__
                raise self.refuse("overwrites in place, and nothing reads its result")
        for i, node in enumerate(network.nodes):
            self.where, self.operation = node.name, type(node).__name__
            users = network.consumers[node.name]
            if isinstance(node, Affine) and (node.inputs != (INPUT,) or not all(isinstance(u, Conv) for u in users)):
                raise self.refuse("normalisation must stand between the image and a convolution")
            if isinstance(node, Input) and len(users) != 1:
                raise self.refuse("the image must be read by one layer")
            if node.name in self.in_place:
                after = {name for v in node.inputs for u in network.consumers[v] if (name := u.name) in order[i + 1 :]}
                if after:
                    raise self.refuse(f"overwrites in place what {min(after)!r} reads afterwards")
