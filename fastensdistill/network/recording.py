"""A module's operations are recorded, with the shapes that they give.

``torch.fx`` records the operations. Beside it, every operation is computed on the meta device, where values have shapes
and take no memory, for two numbers of images: ``meta["values"]`` of a recorded operation. A size that is the same for
both is a plain number to the module's code, which may decide by it; one that differs follows the number of images and
is recorded. The same values show which operation overwrites a tensor, and which draws random numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastensdistill.errors import InputError
from fastensdistill.method.copying import copy_network
from fastensdistill.models.layers import BatchNorm2d, Normalize, PadShortcut
from fastensdistill.network.nodes import Shape

BATCHES = (3, 5)
"""Numbers of images; a module that splits a batch in two fails on an odd one."""
META = torch.device("meta")
COUNTS = (1, 2, 3, 4, 5, 8, 30, 127, 128, 1000, 4096)
"""Numbers of images for which a number has to be the same, to be taken as one that does not follow them."""
_NUMBERS = (int, float, str, type(None), torch.dtype, torch.device)
_OF_THE_DEVICE = ("device", "is_cuda", "is_cpu", "is_meta")
_LEAVES = (Normalize, BatchNorm2d, PadShortcut)
WEIGHTED = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)
_CONV = nn.Conv2d._conv_forward
# Layers of other packages, by the name of their class: what they do is told by these attributes.
DROPPING = {"DropPath": ("drop_prob", "scale_by_keep"), "StochasticDepth": ("p", "mode")}


def _own_gradient(*args: Any, **kwargs: Any) -> Any:
    """In the place of ``apply``: newer versions of PyTorch would record the forward pass, without the gradient."""
    raise InputError("an autograd.Function has a gradient of its own, which no plan knows")


class Stopped(Exception):
    """An operation cannot be computed; it is the last in the graph, and ``meta["error"]`` says why."""


def drops_images(layer: nn.Module) -> bool:
    """Whether it is stochastic depth, timm's or torchvision's."""
    return all(hasattr(layer, name) for name in DROPPING.get(type(layer).__name__, ("",)))


def activated(layer: nn.Module) -> bool:
    """Whether it is timm's BatchNorm with what follows it: a dropout and an activation of its own."""
    own = isinstance(layer, nn.BatchNorm2d) and type(layer).forward is not nn.BatchNorm2d.forward
    return own and all(isinstance(getattr(layer, name, None), nn.Module) for name in ("drop", "act"))


class Recorded(fx.Proxy):
    """A value while the module's code runs: a tensor, or a number that follows the number of images."""

    tracer: Recorder

    @property
    def values(self) -> Any:
        """One value for each of ``BATCHES``; None where they are not known."""
        return self.node.meta.get("values")

    def __getattr__(self, name: str) -> Any:
        if self.values is None:
            return super().__getattr__(name)
        own = getattr(self.values[0], name)  # an AttributeError is one of the module's code
        if name in _OF_THE_DEVICE:
            return self.tracer.device if name == "device" else self.tracer.device.type == name[3:]
        if callable(own):
            return super().__getattr__(name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __len__(self) -> int:
        if self.values and isinstance(self.values[0], int | float):
            raise InputError("depends on the number of images")
        lengths = [len(value) for value in self.values or ()]
        if len(set(lengths)) != 1:
            raise InputError("depends on the number of images")
        return lengths[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))  # type: ignore[index]

    def __bool__(self) -> bool:
        if self.values and isinstance(self.values[0], int):
            raise InputError("depends on the number of images")
        return super().__bool__()

    def __index__(self) -> int:
        if self.values and isinstance(self.values[0], Tensor):
            raise InputError("reads a value of a tensor on the host")
        raise InputError("depends on the number of images")

    def __float__(self) -> float:
        return float(self.__index__())

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _overwriting(function: Callable) -> Callable:
    def record(self: Recorded, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(Recorded, f"__{_name}__", _overwriting(getattr(operator, _name)))


class _Draws(TorchDispatchMode):
    """Notes whether anything computed inside would draw random numbers."""

    drawn = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and "scaled_dot_product" not in func.name():
            self.drawn = True
        return func(*args, **(kwargs or {}))


class Recorder(fx.Tracer):
    """Stops at the layers that the reader knows as a whole; any other is looked into."""

    def __init__(self, module: nn.Module, input_size: Shape):
        super().__init__()
        self.module, self.path, self.evaluating = module, "", False
        meta = copy_network(module, forget=True, meta=True)
        self.layers = dict(meta.named_modules(remove_duplicate=False))
        for layer in self.layers.values():
            layer.training = False
        self.own = {**dict(meta.named_parameters(remove_duplicate=False)), **dict(meta.named_buffers())}
        named = [*module.named_parameters(), *module.named_buffers()]
        self.names = {id(tensor): name for name, tensor in named}
        first = next((t for _, t in named if t.is_floating_point()), torch.zeros(()))
        self.device = first.device
        self.images = [torch.empty(n, *input_size, device="meta", dtype=first.dtype) for n in BATCHES]
        self.overwriters: dict[int, fx.Node] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kind: Any = type(m)
        if kind in _LEAVES or drops_images(m) or activated(m):
            return True
        plain = any(isinstance(m, base) and kind.forward is base.forward for base in WEIGHTED)
        return plain and getattr(kind, "_conv_forward", _CONV) is _CONV

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        self.path = self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        return m.act(m.drop(result)) if activated(m) else result  # type: ignore[operator]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        name = None if self.evaluating else self.names.get(id(attr_val))
        return attr_val if name is None else self.create_proxy("get_attr", name, (), {})

    def proxy(self, node: fx.Node) -> Recorded:
        return Recorded(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        try:
            self.evaluate(proxy.node)
        except Exception as error:  # whatever the operation itself raises, or a layer's own code
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            proxy.node.meta["error"] = f"{type(error).__name__}: {reason}"
            raise Stopped from error
        return self.settled(proxy, proxy.values)

    def settled(self, proxy: Any, values: Any) -> Any:
        """The recorded value as code gets it: a number that is always the same is itself, a tuple one of its items."""
        first, second = values
        proxy.node.meta["version"] = getattr(first, "_version", 0)
        if isinstance(first, tuple | list) and len(first) == len(second):
            items = [self.item(proxy, i, pair) for i, pair in enumerate(zip(first, second, strict=True))]
            if isinstance(first, torch.Size):
                return torch.Size(items) if all(type(item) is int for item in items) else tuple(items)
            return items if type(first) is list else tuple(items) if type(first) is tuple else type(first)(items)
        numbers = proxy.node.meta["numbers"] = self.numbers(proxy.node)
        if isinstance(first, _NUMBERS) and first == second and len(set(numbers)) == 1:
            return first
        return proxy

    def numbers(self, node: fx.Node) -> tuple[Any, ...]:
        """What ``node``, which is no tensor, is for each of ``COUNTS``; empty where that cannot be told."""
        first, second = (self.value(node, i) for i in range(len(BATCHES)))
        sources = [s for s in node.all_input_nodes if isinstance(self.value(s, 0), int | float)]
        if not sources:
            if type(first) is not int:
                return (first,) if isinstance(first, _NUMBERS) and first == second else ()
            each, rest = divmod(second - first, BATCHES[1] - BATCHES[0])  # of a shape: so many for each image
            return () if rest else tuple(first + each * (n - BATCHES[0]) for n in COUNTS)
        known = [source.meta["numbers"] for source in sources]
        if node.op != "call_function" or len(sources) < len(node.all_input_nodes) or not all(known):
            return ()
        with suppress(ArithmeticError):
            each = (dict(zip(sources, given, strict=True)) for given in zip(*known, strict=True))
            return tuple(self.number(node, given) for given in each)
        return ()

    def number(self, node: fx.Node, given: dict[fx.Node, Any]) -> Any:
        """``node``, computed with the numbers ``given``."""
        args: Any
        kwargs: Any
        args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def item(self, proxy: Any, i: int, values: Any) -> Any:
        """What is at ``i`` of a tuple."""
        if isinstance(values[0], _NUMBERS) and values[0] == values[1]:
            return values[0]
        return proxy[i]

    def evaluate(self, node: fx.Node) -> None:
        """Compute ``node`` for both numbers of images."""
        sources = [source for source in node.all_input_nodes if isinstance(self.value(source, 0), Tensor)]
        for source in sources:
            if self.value(source, 0)._version != source.meta.get("version", 0):
                node.meta["stale"] = self.overwriters[self.storage(source)]
        before = [self.value(source, 0)._version for source in sources]
        self.evaluating = True
        try:
            with torch.inference_mode(False), torch.no_grad(), META, _Draws() as draws:
                node.meta["values"] = tuple(self.compute(node, i) for i in range(len(BATCHES)))
        finally:
            self.evaluating = False
        node.meta["random"] = draws.drawn
        changed = [s for s, version in zip(sources, before, strict=True) if self.value(s, 0)._version != version]
        node.meta["overwrites"] = changed
        for source in changed:
            self.overwriters[self.storage(source)] = node

    def storage(self, node: fx.Node) -> int:
        """Where the value of ``node`` lies: views share it."""
        return self.value(node, 0).untyped_storage()._cdata

    def compute(self, node: fx.Node, i: int) -> Any:
        """The value of ``node`` for the ``i``-th number of images."""
        if node.op == "placeholder":
            return self.images[i]
        if node.op == "get_attr":
            return self.attribute(str(node.target))
        args: Any
        kwargs: Any
        args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), lambda part: self.given(part, i))
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        layer = self.layers[str(node.target)]
        if isinstance(layer, nn.BatchNorm2d):
            return nn.BatchNorm2d.forward(layer, *args, **kwargs)
        return layer.forward(*args, **kwargs)

    def given(self, part: Any, i: int) -> Any:
        """A part of the arguments of an operation; every tensor is on the meta device."""
        if isinstance(part, torch.device):
            return META
        return self.value(part, i) if isinstance(part, fx.Node) else part

    def value(self, node: fx.Node, i: int) -> Any:
        """As :meth:`compute`, once; a constant of the module's code has no proxy."""
        if "values" not in node.meta:
            node.meta["values"] = (self.attribute(str(node.target)),) * len(BATCHES)
        return node.meta["values"][i]

    def attribute(self, name: str) -> Any:
        """The module's tensor of this name, or a constant of its code, on the meta device."""
        if name not in self.own:
            value = self.constant(name)
            self.own[name] = value.to("meta") if isinstance(value, Tensor) else value
        return self.own[name]

    def constant(self, name: str) -> Any:
        """The module's attribute of this name, which may be one that recording gave it."""
        value: Any = self.root
        for part in name.split("."):
            value = getattr(value, part)
        return value

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        return root_fn, [self.root, self.create_proxy("placeholder", "image", (), {})]

    def record(self) -> fx.Graph:
        """The operations of the module, which may change attributes of it; the graph ends early where one fails."""
        with suppress(Stopped), patch.object(torch.autograd.Function, "apply", _own_gradient):
            self.trace(self.module)
        return self.graph
