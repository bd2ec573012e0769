"""Functions and methods that have a node of their own; any other stays an expression (``values.py``).

Each of ``TYPED`` says whether it could make a node of the operation at hand.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from fastensdistill.network.nodes import Activation, Add, Gate, Pool, ReLU
from fastensdistill.network.read_layers import conv, drop, linear, out_size, pair
from fastensdistill.network.values import Values
from fastensdistill.network.views import Ref

Given = dict[str, Any]
Read = Callable[[Values, fx.Node, Given], bool]
INPLACE = ("inplace",)
POOL = ("kernel_size", "stride", "padding")
CONV = ("weight", "bias", "stride", "padding", "dilation", "groups")
POSITIONS = {"image": {2, 3}, "last": {1, 2}, "tokens": {1}}  # dimensions of the positions of an image, by layout


def computed(values: Values, x: Any) -> Ref | None:
    """The value as a node's, unless it is part of an expression that goes on with the operation at hand."""
    if not values.fits(x):
        return None
    held = values.inline(x)
    return held if isinstance(held, Ref) else None


def relu(values: Values, op: fx.Node, given: Given) -> bool:
    """A ReLU of whatever shape."""
    ref = computed(values, given.get("input"))
    if ref is None:
        return False
    values.put(op, ReLU(values.free_name(), (ref.name,), values.shapes[ref.name]), ref.layout)
    return True


def activation(kind: str, parameter: str = "", usual: float = 0.0) -> Read:
    """The reading of another function of each value; ``parameter`` is in the kind's name where it is not the usual."""

    def read(values: Values, op: fx.Node, given: Given) -> bool:
        ref = computed(values, given.get("input"))
        a = given.get(parameter, usual)
        if ref is None or not isinstance(a, int | float):
            return False
        full = kind if a == usual else f"{kind}({float(a)!r})"
        values.put(op, Activation(values.free_name(), (ref.name,), values.shapes[ref.name], full), ref.layout)
        return True

    return read


def gelu(values: Values, op: fx.Node, given: Given) -> bool:
    """GELU, by the error function or by tanh."""
    kind = "gelu" if given.get("approximate", "none") == "none" else "gelu_tanh"
    return activation(kind)(values, op, given)


def hardtanh(values: Values, op: fx.Node, given: Given) -> bool:
    """ReLU6 by another name."""
    limits = given.get("min_val", -1.0), given.get("max_val", 1.0)
    return limits == (0.0, 6.0) and activation("relu6")(values, op, given)


def add(values: Values, op: fx.Node, given: Given) -> bool:
    """The sum of two values of one shape; adding the number 0, as ``sum`` begins, changes nothing."""
    first, second = given.get("input"), given.get("other")
    if given.get("alpha", 1) != 1:
        return False
    one: Any
    other: Any
    for one, other in ((first, second), (second, first)):
        if type(one) is int and one == 0 and values.is_tensor(other):
            values.held[op] = values.held[other]
            return True
    if not (values.fits(first) and values.fits(second)) or values.shape(first) != values.shape(second):
        return False
    main = computed(values, first) or computed(values, second)
    if main is None:
        return False
    refs = [values.ref(x, main.layout) for x in (first, second)]
    shape = values.shapes[main.name]
    if any(values.shapes[ref.name] != shape for ref in refs):
        return False
    values.put(op, Add(values.free_name(), (refs[0].name, refs[1].name), shape), main.layout)
    return True


def multiply(values: Values, op: fx.Node, given: Given) -> bool:
    """An image times one value for each of its channels."""
    first, second = given.get("input"), given.get("other")
    for x, gate in ((first, second), (second, first)):
        gate = broadcast(values, gate)
        if not (values.fits(x) and values.fits(gate)) or len(values.shape(x)) != len(values.shape(gate)):
            continue
        image = computed(values, x)
        if image is None or image.layout not in POSITIONS:
            continue
        wanted = tuple(1 if i in POSITIONS[image.layout] else n for i, n in enumerate(values.shape(x)))
        if values.shape(gate) != wanted:
            continue
        ref = values.ref(gate, image.layout)
        if ref.name == image.name:
            continue
        shape = values.shapes[image.name]
        values.put(op, Gate(values.free_name(), (image.name, ref.name), shape), image.layout)
        return True
    return False


def broadcast(values: Values, x: Any) -> Any:
    """What was expanded to the shape of ``x``; a product does that itself."""
    if isinstance(x, fx.Node) and x.target in ("expand", "expand_as") and values.is_tensor(x.args[0]):
        source: Any = x.args[0]
        return source if len(values.shape(source)) == len(values.shape(x)) else x
    return x


def mean(values: Values, op: fx.Node, given: Given) -> bool:
    """The mean over all positions."""
    x, dims = given.get("input"), given.get("dim")
    ref = computed(values, x)
    if ref is None or ref.layout not in POSITIONS or dims is None:
        return False
    rank = len(values.shape(x))
    if {d % rank for d in (dims if isinstance(dims, tuple | list) else (dims,))} != POSITIONS[ref.layout]:
        return False
    layout = ref.layout if given.get("keepdim", False) else "flat"
    shape = values.shapes[ref.name]
    if shape[1:] == (1, 1):
        values.held[op] = Ref(ref.name, layout)
        return True
    values.put(op, Pool(values.free_name(), (ref.name,), (shape[0], 1, 1), "adaptive", shape), layout)
    return True


def adaptive(values: Values, op: fx.Node, given: Given) -> bool:
    """The mean over as many windows as make the size; nothing where that is the size at hand."""
    x, size = given.get("input"), given.get("output_size")
    if not values.fits(x) or len(values.shape(x)) != 4:
        return False
    ref = values.ref(x, "image")
    shape = values.shapes[ref.name]
    sizes = tuple(size) if isinstance(size, tuple | list) else (size, size)
    height, width = (have if want is None else int(want) for want, have in zip(sizes, shape[1:], strict=True))
    if (height, width) == shape[1:]:
        values.held[op] = ref
    else:
        values.put(op, Pool(values.free_name(), (ref.name,), (shape[0], height, width), "adaptive", shape), "image")
    return True


def window(kind: str) -> Read:
    """The reading of pooling over square windows; what is rounded up, dilated or padded for a mean is none."""

    def read(values: Values, op: fx.Node, given: Given) -> bool:
        x = given.get("input")
        kernel, padding = given.get("kernel_size"), given.get("padding", 0)
        stride = given.get("stride")
        sizes = [pair(v) for v in (kernel, kernel if stride in (None, (), []) else stride, padding)]
        usual = {
            "dilation": (1, (1, 1)),
            "ceil_mode": (False,),
            "return_indices": (False,),
            "divisor_override": (None,),
        }
        plain = all(given.get(key, either[0]) in either for key, either in usual.items())
        if kind == "avg":
            plain = plain and sizes[2] == (0, 0)
        if not plain or any(len(set(size)) != 1 for size in sizes) or not values.fits(x) or len(values.shape(x)) != 4:
            return False
        ref = values.ref(x, "image")
        shape = values.shapes[ref.name]
        out = (shape[0], *out_size(values, shape, sizes[0], sizes[1], sizes[2]))
        k, s, p = (size[0] for size in sizes)
        values.put(op, Pool(values.free_name(), (ref.name,), out, kind, shape, k, s, p), "image")
        return True

    return read


def owner(values: Values, given: Given, kind: type[nn.Module]) -> tuple[str, Any] | None:
    """The layer whose own weight and bias the function gets, by name."""
    weight, bias = given.get("weight"), given.get("bias")
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or str(weight.target) not in values.weights:
        return None
    name = str(weight.target).rpartition(".")[0]
    layer: Any = values.module.get_submodule(name)
    own = bias is None if layer.bias is None else isinstance(bias, fx.Node) and bias.target == f"{name}.bias"
    return (name, layer) if isinstance(layer, kind) and own and weight.target == f"{name}.weight" else None


def conv2d(values: Values, op: fx.Node, given: Given) -> bool:
    """A layer that has a forward pass of its own, which calls this with its weight."""
    found, padding = owner(values, given, nn.Conv2d), given.get("padding", 0)
    if found is None or isinstance(padding, str) or given.get("groups", 1) != found[1].groups:
        return False
    name, layer = found
    conv(values, op, layer, name, given.get("input"), given.get("stride", 1), padding, given.get("dilation", 1))
    return True


def fully(values: Values, op: fx.Node, given: Given) -> bool:
    """As ``conv2d``, for a linear layer."""
    found = owner(values, given, nn.Linear)
    if found is None:
        return False
    linear(values, op, found[1], found[0], given.get("input"))
    return True


def dropout(over: str) -> Read:
    """The reading of dropout by a function."""

    def read(values: Values, op: fx.Node, given: Given) -> bool:
        x, p = given.get("input"), given.get("p", 0.5)
        if over == "channel" and p and values.is_tensor(x) and len(values.shape(x)) != 4:
            raise values.refuse(f"drops channels of a tensor of shape {values.shape(x)}; expected four dimensions")
        drop(values, op, x, p, given.get("training", True), over)
        return True

    return read


TYPED: dict[Any, tuple[Read, tuple[str, ...]]] = {}
"""Per function, or name of a method: how it is read, and its arguments after the input."""


def _typed(read: Read, names: Iterable[str], *targets: Any) -> None:
    TYPED.update(dict.fromkeys(targets, (read, tuple(names))))


_typed(relu, INPLACE, F.relu, torch.relu, torch.relu_, "relu", "relu_")
_typed(activation("relu6"), INPLACE, F.relu6)
_typed(hardtanh, ("min_val", "max_val", "inplace"), F.hardtanh)
_typed(activation("silu"), INPLACE, F.silu)
_typed(activation("hardswish"), INPLACE, F.hardswish)
_typed(activation("hardsigmoid"), INPLACE, F.hardsigmoid)
_typed(activation("mish"), INPLACE, F.mish)
_typed(activation("sigmoid"), (), torch.sigmoid, F.sigmoid, "sigmoid", torch.sigmoid_, "sigmoid_")
_typed(activation("tanh"), (), torch.tanh, F.tanh, "tanh", torch.tanh_, "tanh_")
_typed(activation("leaky_relu", "negative_slope", 0.01), ("negative_slope", "inplace"), F.leaky_relu)
_typed(activation("elu", "alpha", 1.0), ("alpha", "inplace"), F.elu)
_typed(gelu, ("approximate",), F.gelu)
_typed(add, ("other", "alpha"), operator.add, operator.iadd, torch.add, "add", "add_")
_typed(multiply, ("other",), operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply")
_typed(mean, ("dim", "keepdim"), torch.mean, "mean")
_typed(adaptive, ("output_size",), F.adaptive_avg_pool2d)
_typed(window("max"), (*POOL, "dilation", "ceil_mode", "return_indices"), F.max_pool2d)
_typed(window("avg"), (*POOL, "ceil_mode", "count_include_pad", "divisor_override"), F.avg_pool2d)
_typed(conv2d, CONV, F.conv2d)
_typed(fully, ("weight", "bias"), F.linear)
_typed(dropout("value"), ("p", "training", "inplace"), F.dropout, torch.dropout)
_typed(dropout("channel"), ("p", "training", "inplace"), F.dropout2d)


def read_function(values: Values, op: fx.Node) -> None:
    """The call of a function or of a tensor's method."""
    read, names = TYPED.get(op.target, (None, ()))
    if read is not None and len(op.args) <= 1 + len(names) and set(op.kwargs) <= {"input", *names}:
        given = dict(zip(("input", *names), op.args, strict=False)) | op.kwargs
        if read(values, op, given):
            return
    if "error" not in op.meta:
        values.lazy(op)
