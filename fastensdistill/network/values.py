"""What is known of every recorded value while a module is read: a node, or an expression that is none yet."""

from __future__ import annotations

import operator
import re
from functools import cache
from inspect import signature
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastensdistill.errors import InputError
from fastensdistill.network.expression import Call, ListOf, Own, Slice, evaluate, logical
from fastensdistill.network.nodes import Function, Node, Shape
from fastensdistill.network.recording import BATCHES, COUNTS, WEIGHTED, Recorder
from fastensdistill.network.views import (
    BATCH,
    DEVICE,
    DTYPE,
    VIEWS,
    Ref,
    bind,
    leaves,
    name_of,
    only_views,
    seen_as,
)

LAYOUTS = {2: ("flat",), 3: ("tokens",), 4: ("image", "last")}
# What is the same for a value that is not looked at by its strides, and that nothing overwrites
SAME = ("contiguous", "clone", "identity")
RESHAPES = {"view": "reshape", "view_as": "reshape_as"}  # a value's strides in a plan are not those of its module
FACTORIES = (torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.linspace, torch.eye)
LARGEST = 1000  # operations of an expression, which doubles where a value is added to what is computed from it
MIXING = ("batch_norm", "instance_norm")  # unless they are given statistics


class Values:
    """``held`` has the expression of each recorded tensor: a ``Ref`` where it is a node's value."""

    def __init__(self, module: nn.Module, recorder: Recorder, training: bool, trains: bool):
        self.module, self.recorder, self.training, self.trains = module, recorder, training, trains
        self.nodes: dict[str, Node] = {}
        self.shapes: dict[str, Shape] = {}
        self.held: dict[fx.Node, Any] = {}
        self.sizes: dict[fx.Node, int] = {}
        self.live: set[fx.Node] = set()
        self.where, self.operation, self.base = "", "", ""
        self.parameters = dict(module.named_parameters())
        named = dict(module.named_modules())
        self.layers = {name for name, layer in named.items() if isinstance(layer, WEIGHTED)}
        weighted = {name for name in self.layers if isinstance(named[name], nn.Conv2d | nn.Linear)}
        self.weights = {n for n in self.parameters if n.rpartition(".")[0] in weighted}

    def refuse(self, why: str) -> InputError:
        """The error to raise about the operation at hand."""
        where = self.where.partition("@")[0]  # the recorder counts the calls of a module
        place = f"module {where!r}" if where else "the outermost module"
        kind = type(self.module).__name__
        return InputError(f"{kind}: {place}, operation {self.operation!r}: {why}")

    def at(self, op: fx.Node) -> None:
        """``op`` is the operation at hand."""
        self.where, layer = next(reversed((op.meta.get("nn_module_stack") or {"": ("", None)}).items()))
        self.operation = name_of(op.target)
        kind = layer[1]
        own = self.where.partition("@")[0]
        whole = kind is not None and kind.__module__.startswith("torch.nn.modules.")
        base = re.sub(r"_\d+$", "", op.name)
        self.base = own if whole or op.op == "call_module" else f"{own}.{base}" if own else base

    def free_name(self, base: str = "") -> str:
        """A name for a node of the operation at hand: ``base``, with a number where there is such a node already."""
        base = base or self.base
        name, count = base, 1
        while name in self.nodes or name in self.layers:
            count += 1
            name = f"{base}#{count}"
        return name

    def put(self, op: fx.Node | None, node: Node, layout: str) -> Ref:
        """A new node, whose value in ``layout`` is that of ``op``."""
        self.nodes[node.name], self.shapes[node.name] = node, node.shape
        ref = Ref(node.name, layout)
        if op is not None:
            self.held[op] = ref
        return ref

    def shape(self, op: Any) -> tuple[int, ...]:
        """Of the recorded tensor, with the number of images first."""
        return tuple(op.meta["values"][0].shape)

    def shown(self, op: fx.Node) -> str:
        """The shape as errors write it."""
        first, second = op.meta["values"]
        sizes = (str(n) if n == m else "batch" for n, m in zip(first.shape, second.shape, strict=True))
        return f"({', '.join(sizes)})"

    def is_tensor(self, op: Any) -> bool:
        """Whether it is a recorded tensor."""
        return isinstance(op, fx.Node) and op in self.held and isinstance(op.meta["values"][0], Tensor)

    def per_image(self, op: fx.Node) -> bool:
        """Whether it is a tensor of one row for each image."""
        first, second = (tuple(value.shape) for value in op.meta["values"])
        return (first[:1], second[:1]) == ((BATCHES[0],), (BATCHES[1],)) and first[1:] == second[1:]

    def has_rows(self, op: Any) -> bool:
        """Whether it can be a node's value."""
        return self.is_tensor(op) and op.meta["values"][0].dim() in LAYOUTS and self.per_image(op)

    def fits(self, op: Any) -> bool:
        """Whether it can be a node's value, and is computed from one.

        Positions and masks are none: activations would round them.
        """
        numbers = self.has_rows(op) and op.meta["values"][0].is_floating_point()
        return numbers and any(isinstance(leaf, Ref) for leaf in leaves(self.held[op]))

    def ref(self, op: Any, *wanted: str) -> Ref:
        """The value as a node's, in one of the layouts ``wanted``, or in that which is free; a new node if need be."""
        if not self.is_tensor(op):
            raise self.refuse("takes something other than a tensor computed before")
        held = self.held[op]
        if isinstance(held, Ref) and (not wanted or held.layout in wanted):
            return held
        if not self.has_rows(op):
            raise self.refuse(f"takes a tensor of shape {self.shown(op)}; expected one row for each image")
        possible = [layout for layout in LAYOUTS[len(self.shape(op))] if not wanted or layout in wanted]
        if not possible:
            raise self.refuse(f"takes a tensor of shape {self.shown(op)}; expected {' or '.join(wanted)}")
        found = self.function(held, self.shape(op), possible, op)
        if not isinstance(held, Ref):
            self.held[op] = found
        return found

    def function(
        self, expression: Any, shape: tuple[int, ...], possible: list[str], op: fx.Node | None = None, base: str = ""
    ) -> Ref:
        """A node of ``expression``, which gives a tensor of ``shape`` in one of the ``possible`` layouts.

        Named by ``base``, or by the recorded ``op``.
        """
        if self.of_numbers(expression):
            expression = Call("to", (expression, DTYPE))
        bound, refs, own = bind(expression, self.shapes)
        if tuple(self.tried(bound, refs, own, COUNTS[-1]).shape) != (COUNTS[-1], *shape[1:]):
            raise self.refuse(f"gives tensors of other shapes for other numbers of images than {BATCHES[0]}")
        layout = possible[0] if len(possible) == 1 else self.free_layout(bound, refs, own, possible)
        n = {"image": (1, 2, 3), "last": (3, 1, 2), "tokens": (2, 1, 0), "flat": (1, 0, 0)}[layout]
        C, H, W = (shape[i] if i else 1 for i in n)
        trained = tuple(name for name in own if name in self.parameters)
        constants = tuple(name for name in own if name not in self.parameters)
        node = Function(
            self.free_name(base) if base else self.named(op),
            tuple(ref.name for ref in refs),
            (C, H, W),
            bound,
            tuple(ref.layout for ref in refs),
            layout,
            trained,
            constants,
            tuple(tuple(self.recorder.own[name].shape) for name in (*trained, *constants)),
        )
        return self.put(None, node, layout)

    def vector(self, op: Any) -> Ref:
        """The value (images, C) as that of a node of shape (C, 1, 1)."""
        ref = self.ref(op, "flat")
        C, H, W = self.shapes[ref.name]
        return ref if (H, W) == (1, 1) else self.function(ref, (BATCHES[0], C * H * W), ["flat"])

    def named(self, op: fx.Node | None) -> str:
        """A name for the node of ``op``, which was recorded before the operation at hand."""
        kept = self.where, self.operation, self.base
        if op is not None:
            self.at(op)
        name = self.free_name()
        self.where, self.operation, self.base = kept
        return name

    def free_layout(self, bound: Any, refs: list[Ref], own: list[str], possible: list[str]) -> str:
        """The layout in which the result lies in memory as values of a plan do, so that nothing is copied."""
        result = self.tried(bound, refs, own, BATCHES[0])
        image = result.permute(0, 2, 3, 1)
        free = {"image": image.is_contiguous(), "last": result.is_contiguous()}
        return next((layout for layout in possible if free[layout]), possible[0])

    def tried(self, bound: Any, refs: list[Ref], own: list[str], images: int) -> Tensor:
        """The result for so many images, on the meta device."""
        values = []
        for ref in refs:
            C, H, W = self.shapes[ref.name]
            values.append(logical(self.recorder.images[0].new_empty(images, H, W, C), ref.layout))
        return evaluate(bound, values, {name: self.recorder.own[name] for name in own})

    def fanout(self, op: fx.Node) -> int:
        """How many operations read the value or a view of it."""
        count = 0
        for user in op.users:
            values = user.meta.get("values", (None,))
            if user not in self.live or not (user.op == "output" or _has_tensors(values[0])):
                continue
            count += self.fanout(user) if name_of(user.target) in VIEWS and user.args[:1] == (op,) else 1
        return count

    def inline(self, op: fx.Node) -> Any:
        """The value as part of an expression; what several operations read is computed once, where it can be."""
        held = self.held[op]
        if isinstance(held, Ref | Own) or not isinstance(held, Call) or only_views(held):
            return held
        if self.fits(op) and self.fanout(op) > 1:
            return self.ref(op)
        return Call("to", (held, DTYPE)) if self.of_numbers(held) and self.is_usual(op) else held

    def of_numbers(self, held: Any) -> bool:
        """Whether it is computed from no value of the network and no tensor of the module."""
        return not any(isinstance(leaf, Ref | Own) for leaf in leaves(held))

    def is_usual(self, op: fx.Node) -> bool:
        """Whether the tensor has the dtype of images."""
        value = op.meta["values"][0]
        return isinstance(value, Tensor) and value.dtype == self.recorder.images[0].dtype

    def argument(self, value: Any, fixed: bool = False) -> Any:
        """An argument of a recorded operation as part of an expression.

        What is computed of numbers alone, as a ``fixed`` operation is, has the precision that the module's code says,
        whatever the precision of the run.
        """
        if isinstance(value, fx.Node):
            if value not in self.held:
                return self.count(value)
            return self.held[value] if fixed else self.inline(value)
        if isinstance(value, slice):
            return Slice(*(self.argument(part, fixed) for part in (value.start, value.stop, value.step)))
        if isinstance(value, list):
            return ListOf(tuple(self.argument(part, fixed) for part in value))
        if isinstance(value, tuple):
            return tuple(self.argument(part, fixed) for part in value)
        if isinstance(value, torch.device):
            return DEVICE
        if isinstance(value, torch.dtype) and value == self.recorder.images[0].dtype and not fixed:
            return DTYPE
        return value

    def count(self, op: fx.Node) -> Any:
        """A number that follows the number of images."""
        numbers = op.meta.get("numbers", ())
        each = numbers[0] if len(numbers) == len(COUNTS) else None
        if type(each) is not int or any(number != each * n for number, n in zip(numbers, COUNTS, strict=True)):
            raise self.refuse(f"takes {op.name!r}, which is no multiple of the number of images")
        return BATCH if each == 1 else Call(operator.mul, (BATCH, each))

    def lazy(self, op: fx.Node) -> None:
        """The operation becomes an expression, or another layout of a node."""
        if "values" not in op.meta:  # a named tuple, which ``torch.fx`` itself makes of its values
            raise self.refuse("puts what it computes into a tuple of its own")
        target, args, kwargs = self.out_of_place(op)
        name = name_of(target)
        target = RESHAPES.get(name, target)
        if name in SAME and args and isinstance(args[0], fx.Node):
            self.held[op] = self.held[args[0]]
            return
        if name == "as_strided":
            raise self.refuse("looks at a value by its strides")
        if target in FACTORIES and kwargs.get("device") is None:
            kwargs["device"] = DEVICE  # the host's memory is none of a captured step's
        fixed = all(self.of_numbers(self.held[source]) for source in op.all_input_nodes if source in self.held)
        if name == "view_as_complex" and any(isinstance(self.held.get(source), Own) for source in op.all_input_nodes):
            raise self.refuse("sees a parameter as complex numbers, which may lie at an odd place in memory")
        expression = Call(
            target,
            tuple(self.argument(arg, fixed) for arg in args),
            tuple((key, self.argument(value, fixed)) for key, value in kwargs.items()),
        )
        self.check(expression, name)
        self.sizes[op] = 1
        fx.map_arg((args, kwargs), lambda source: self.grow(op, source))
        if self.sizes[op] > LARGEST:
            raise self.refuse(f"ends {LARGEST} operations and more between two values of a layout that plans have")
        if op.meta["random"]:
            raise self.refuse("draws random numbers")
        self.held[op] = expression
        value = op.meta["values"][0]
        if isinstance(value, Tensor) and self.per_image(op):
            size = prod(value.shape[1:])
            self.held[op] = seen_as(expression, self.shapes, value.dim(), size) or expression

    def grow(self, op: fx.Node, source: fx.Node) -> fx.Node:
        """Count the operations of ``source``, as often as ``op`` reads it: an expression is written out as a tree."""
        if isinstance(self.held.get(source), Call):
            self.sizes[op] += self.sizes.get(source, 1)
        return source

    def check(self, expression: Call, name: str) -> None:
        """Refuse what would compute something else in a plan."""
        found = leaves(expression)
        for leaf in found:
            if isinstance(leaf, Own) and leaf.name in self.weights and self.trains:
                raise self.refuse(f"computes with {leaf.name!r}, a layer's own weight")
        given = [value for value in (*expression.args[5:6], *dict(expression.kwargs).values()) if value is True]
        if name in MIXING[:1] and given and any(isinstance(leaf, Ref) for leaf in found):
            raise self.refuse("takes statistics over the images of a batch")
        if name == "scaled_dot_product_attention":
            p = dict(expression.kwargs).get("dropout_p", (*expression.args[4:5], 0.0)[0])
            if p:
                raise self.refuse(f"drops values with p={p} inside of attention")

    def out_of_place(self, op: fx.Node) -> tuple[Any, tuple, dict[str, Any]]:
        """The operation and its arguments; of one that overwrites its input, the one that does not."""
        target, args, kwargs = op.target, op.args, dict(op.kwargs)
        if not op.meta.get("overwrites"):
            return target, args, kwargs
        name = name_of(target)
        if any(source.op == "get_attr" for source in op.meta["overwrites"]):
            raise self.refuse("overwrites a tensor of the module")
        if isinstance(target, str):
            plain = name.removesuffix("_")
            if plain != name and hasattr(Tensor, plain):
                return plain, args, kwargs
        elif getattr(operator, name, None) is target and name != "setitem":
            return getattr(operator, name.removeprefix("i")), args, kwargs
        elif "inplace" in _parameters(target):
            names = _parameters(target)
            bound = {**dict(zip(names, args, strict=False)), **kwargs, "inplace": False}
            return target, (bound.pop(names[0]),), bound
        elif name.endswith("_") and hasattr(torch, name.removesuffix("_")):
            return getattr(torch, name.removesuffix("_")), args, kwargs
        raise self.refuse("overwrites a value in place")


@cache
def _parameters(function: Any) -> tuple[str, ...]:
    try:
        return tuple(signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, tuple | list) and any(isinstance(item, Tensor) for item in value)
    )
