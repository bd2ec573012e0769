"""An ``nn.Module`` becomes a ``Network``: ``torch.fx`` records the operations, this file turns each into a typed node.

What has no effect of its own is absorbed: identity, flatten, dropout in evaluation, adaptive pooling to the size at
hand. An operation outside the list raises one ``InputError`` that names the module and the operation; the caller then
uses the reference engine for that network.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from fastensdistill.errors import InputError
from fastensdistill.models.layers import BatchNorm2d, Normalize, PadShortcut
from fastensdistill.network.nodes import (
    Activation,
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
    Shape,
)

LEAVES = (
    Normalize, BatchNorm2d, PadShortcut, nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d,
    nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity, nn.Dropout,
)  # fmt: skip
RELU = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
FLATTEN = (torch.flatten, "flatten")
MEAN = (torch.mean, "mean")
FUNCTIONS = (*RELU, *ADD, *FLATTEN, *MEAN, F.adaptive_avg_pool2d, F.max_pool2d, F.avg_pool2d, F.dropout)
IN_PLACE = (torch.relu_, "relu_", "add_", operator.iadd)


class _Tracer(fx.Tracer):
    """Stops at the layers this file knows; a subclass with a forward of its own is looked into."""

    def __init__(self) -> None:
        super().__init__()
        self.path = ""

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return type(m) in LEAVES

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        self.path = self.path_of_module(m)
        return super().call_module(m, forward, args, kwargs)


def trace(module: nn.Module, input_size: Shape) -> Network:
    """The network of ``module`` for images of ``input_size`` (C, H, W).

    Raises ``InputError`` naming the module and the operation that cannot be planned.
    """
    tracer = _Tracer()
    try:
        graph = tracer.trace(module)
    except Exception as error:  # whatever user code raises when it meets a symbolic value
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{type(module).__name__}: cannot be traced after module {tracer.path!r}: {reason}") from error
    return _Reader(module, graph, input_size).network


class _Reader:
    """Walks the recorded graph once. ``values`` maps each recorded operation to the name of the value it stands for."""

    def __init__(self, module: nn.Module, graph: fx.Graph, input_size: Shape):
        self.module = module
        self.nodes: dict[str, Node] = {}
        self.values: dict[fx.Node, str] = {}
        self.flat: set[fx.Node] = set()
        self.in_place: list[str] = []
        self.dropout: list[str] = []
        self.where, self.operation = "", ""
        output = ""
        for op in graph.nodes:
            self.where = next(reversed(op.meta.get("nn_module_stack") or {"": None}))
            self.operation = op.target if isinstance(op.target, str) else getattr(op.target, "__name__", str(op.target))
            if op.op == "placeholder":
                if self.nodes:
                    raise self.refuse("takes more than one input")
                self.put(op, Input("input", (), input_size))
            elif op.op == "call_module":
                self.layer(op, module.get_submodule(str(op.target)))
            elif op.op in ("call_function", "call_method"):
                self.function(op)
            elif op.op == "output":
                if op.args[0] not in self.flat:
                    raise self.refuse("does not return one tensor of shape (batch, classes)")
                output = self.values[op.args[0]]
            else:
                raise self.refuse("reads a tensor of the module directly")
        self.network = Network(self.reachable(output), output, tuple(self.dropout))
        self.check(self.network)

    def refuse(self, why: str) -> InputError:
        place = f"module {self.where!r}" if self.where else "the outermost module"
        kind = type(self.module).__name__
        return InputError(f"{kind}: {place}, operation {self.operation!r}: {why}")

    def put(self, op: fx.Node, node: Node, flat: bool = False) -> None:
        self.nodes[node.name] = node
        self.values[op] = node.name
        if flat:
            self.flat.add(op)

    def alias(self, op: fx.Node, source: fx.Node, flat: bool | None = None) -> None:
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
        name, count = base, 1
        while name in self.nodes:
            count += 1
            name = f"{base}#{count}"
        return name

    def layer(self, op: fx.Node, layer: nn.Module) -> None:
        path = str(op.target)
        if path in self.nodes and isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            raise self.refuse("a layer with parameters is used twice")
        source, value, shape = self.source(op, image=isinstance(layer, nn.Conv2d | nn.BatchNorm2d | Normalize))
        channels, height, width = shape
        name, inputs = self.free_name(path), (value,)
        if isinstance(layer, Normalize):
            self.put(op, Affine(name, inputs, shape))
        elif isinstance(layer, nn.Conv2d):
            self.convolution(op, layer, name, value, shape)
        elif isinstance(layer, nn.BatchNorm2d):
            if not (layer.affine and layer.track_running_stats and layer.momentum is not None):
                raise self.refuse("BatchNorm needs scale and shift, running statistics and a momentum")
            unbiased = type(layer) is not BatchNorm2d
            self.put(op, Norm(name, inputs, shape, layer.eps, layer.momentum, unbiased))
        elif isinstance(layer, nn.ReLU):
            self.relu(op, name, layer.inplace)
        elif isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
            kind = "max" if isinstance(layer, nn.MaxPool2d) else "avg"
            sizes = layer.kernel_size, layer.stride, layer.padding, getattr(layer, "dilation", 1)
            self.window(op, name, kind, sizes, layer.ceil_mode or getattr(layer, "return_indices", False))
        elif isinstance(layer, nn.AdaptiveAvgPool2d):
            self.adaptive(op, name, layer.output_size)
        elif isinstance(layer, PadShortcut):
            s = layer.stride
            out = (channels + layer.new_channels, -(-height // s), -(-width // s))
            self.put(op, Pad(name, inputs, out, shape, s))
        elif isinstance(layer, nn.Linear):
            if source not in self.flat:
                raise self.refuse("a linear layer needs a flattened input")
            self.put(op, Linear(name, inputs, (layer.out_features, 1, 1), shape, layer.bias is not None), flat=True)
        elif isinstance(layer, nn.Flatten):
            self.flatten(op, layer.start_dim, layer.end_dim)
        elif isinstance(layer, nn.Dropout):
            self.drop(op, path, layer.p)
        else:
            self.alias(op, source)

    def function(self, op: fx.Node) -> None:
        # a function's arguments by position, as far as the functions below name them
        args, kwargs, target = list(op.args[1:]), dict(op.kwargs), op.target

        def argument(position: int, key: str, default: Any) -> Any:
            return args[position] if position < len(args) else kwargs.get(key, default)

        if target not in FUNCTIONS:
            raise self.refuse("is not an operation of the fast path")
        base = re.sub(r"_\d+$", "", op.name)
        name = self.free_name(f"{self.where}.{base}" if self.where else base)
        source, value, shape = self.source(op)
        if target in RELU:
            self.relu(op, name, target in IN_PLACE or argument(0, "inplace", False))
        elif target in ADD:
            other = argument(0, "other", None)
            if not (isinstance(other, fx.Node) and other in self.values) or argument(1, "alpha", 1) != 1:
                raise self.refuse("adds something other than two tensors")
            second = self.nodes[self.values[other]].shape
            if second != shape or (other in self.flat) != (source in self.flat):
                raise self.refuse(f"adds tensors of different shapes, {shape} and {second}")
            self.put(op, Add(name, (value, self.values[other]), shape), flat=source in self.flat)
            if target in IN_PLACE:
                self.in_place.append(name)
        elif target in FLATTEN:
            self.flatten(op, argument(0, "start_dim", 0), argument(1, "end_dim", -1))
        elif target is F.adaptive_avg_pool2d:
            self.adaptive(op, name, argument(0, "output_size", None))
        elif target in MEAN:
            dims, keep = argument(0, "dim", None), argument(1, "keepdim", False)
            if source in self.flat or not isinstance(dims, tuple | list) or sorted(d % 4 for d in dims) != [2, 3]:
                raise self.refuse("a mean over anything but height and width")
            self.adaptive(op, name, 1)
            if not keep:
                self.flat.add(op)
        elif target in (F.max_pool2d, F.avg_pool2d):
            kernel, kind = argument(0, "kernel_size", None), "max" if target is F.max_pool2d else "avg"
            dilation = argument(3, "dilation", 1) if kind == "max" else 1
            refused = argument(4 if kind == "max" else 3, "ceil_mode", False) or kwargs.get("return_indices", False)
            sizes = kernel, argument(1, "stride", None), argument(2, "padding", 0), dilation
            self.window(op, name, kind, sizes, refused)
        else:
            self.drop(op, name, argument(0, "p", 0.5))

    def relu(self, op: fx.Node, name: str, in_place: bool) -> None:
        source, value, shape = self.source(op)
        self.put(op, Activation(name, (value,), shape), flat=source in self.flat)
        if in_place:
            self.in_place.append(name)

    def convolution(self, op: fx.Node, layer: nn.Conv2d, name: str, value: str, shape: Shape) -> None:
        kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding
        square = not isinstance(padding, str) and all(len(set(v)) == 1 for v in (kernel, stride, padding))
        if layer.groups != 1 or set(layer.dilation) != {1} or layer.padding_mode != "zeros" or not square:
            raise self.refuse("a convolution that is grouped, dilated, not square or not zero-padded by a number")
        if layer.in_channels != shape[0]:
            raise self.refuse(f"takes {layer.in_channels} channels, but its input has {shape[0]}")
        k, s, p = kernel[0], stride[0], int(padding[0])
        out = (layer.out_channels, *self.out_size(shape, k, s, p))
        self.put(op, Conv(name, (value,), out, shape, k, s, p, layer.bias is not None))

    def out_size(self, shape: Shape, kernel: int, stride: int, padding: int) -> tuple[int, int]:
        height, width = ((size + 2 * padding - kernel) // stride + 1 for size in shape[1:])
        if min(height, width) < 1:
            raise self.refuse(f"a window of {kernel} does not fit into an image of {shape[1]}x{shape[2]}")
        return height, width

    def window(self, op: fx.Node, name: str, kind: str, sizes: Sequence[Any], refused: Any) -> None:
        """Pooling over windows; ``sizes`` are kernel, stride (None: the kernel), padding and dilation."""
        _, value, shape = self.source(op, image=True)
        pairs = [v if isinstance(v, tuple | list) else (v, v) for v in (sizes[0] if v is None else v for v in sizes)]
        k, s, p, d = (v[0] for v in pairs)
        if refused or d != 1 or any(v[0] != v[-1] for v in pairs) or (kind == "avg" and p):
            raise self.refuse("a pooling that is dilated, not square, rounded up, padded (mean) or returns indices")
        self.put(op, Pool(name, (value,), (shape[0], *self.out_size(shape, k, s, p)), kind, shape, k, s, p))

    def adaptive(self, op: fx.Node, name: str, size: Any) -> None:
        source, value, shape = self.source(op, image=True)
        sizes = tuple(size) if isinstance(size, tuple | list) else (size, size)
        height, width = (have if want is None else int(want) for want, have in zip(sizes, shape[1:], strict=True))
        if (height, width) == shape[1:]:
            self.alias(op, source)
        else:
            self.put(op, Pool(name, (value,), (shape[0], height, width), "adaptive", shape))

    def flatten(self, op: fx.Node, start: int, end: int) -> None:
        source, _, _ = self.source(op)
        if start != 1 or end not in (-1, 3):
            raise self.refuse("flattens other dimensions than channels, height and width")
        self.alias(op, source, flat=True)

    def drop(self, op: fx.Node, name: str, p: float) -> None:
        self.alias(op, self.source(op)[0])
        if p > 0:
            self.dropout.append(name)

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
        for i, node in enumerate(network.nodes):
            self.where, self.operation = node.name, type(node).__name__
            users = network.consumers[node.name]
            if isinstance(node, Affine) and (node.inputs != ("input",) or not all(isinstance(u, Conv) for u in users)):
                raise self.refuse("normalisation must stand between the image and a convolution")
            if isinstance(node, Input) and len(users) != 1:
                raise self.refuse("the image must be read by one layer")
            if node.name in self.in_place:
                after = {name for v in node.inputs for u in network.consumers[v] if (name := u.name) in order[i + 1 :]}
                if after:
                    raise self.refuse(f"overwrites in place what {min(after)!r} reads afterwards")
