"""Expressions while a module is read: over nodes by name, and which of them only look at a value in another way.

An operation that is no node of its own stays an expression until a node has to read it. Its leaves are ``Ref``, a
node's value in one of the layouts of ``network.expression``, and ``Own``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastensdistill.network.expression import Call, ListOf, Own, Slice, Value, evaluate, logical
from fastensdistill.network.launch import INPUT
from fastensdistill.network.nodes import Shape


@dataclass(frozen=True)
class Ref:
    """The value of the node called ``name``, as ``logical`` gives it in ``layout``."""

    name: str
    layout: str


@dataclass(frozen=True)
class Symbol:
    """What an expression takes from the values that it is given."""

    what: str


BATCH, DEVICE, DTYPE = Symbol("batch"), Symbol("device"), Symbol("dtype")
_FROM_FIRST = {
    BATCH: Call("size", (Value(0), 0)),
    DEVICE: Call(getattr, (Value(0), "device")),
    DTYPE: Call(getattr, (Value(0), "dtype")),
}
RANKS = {"image": 4, "last": 4, "tokens": 3, "flat": 2}
# Operations that give the values of their first argument, or some of them, in another arrangement, and compute nothing
VIEWS = {
    "view", "reshape", "permute", "transpose", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as",
    "view_as", "reshape_as", "movedim", "moveaxis", "swapaxes", "swapdims", "chunk", "split", "unbind", "narrow",
    "select", "getitem", "tensor_split",
}  # fmt: skip


def name_of(target: Any) -> str:
    """An operation as one writes it."""
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def leaves(expression: Any) -> list[Any]:
    """Every ``Ref``, ``Own`` and ``Symbol`` in it, in order, as often as it occurs."""
    if isinstance(expression, tuple | list):
        return [leaf for part in expression for leaf in leaves(part)]
    if isinstance(expression, ListOf):
        return leaves(expression.items)
    if isinstance(expression, Slice):
        return leaves((expression.start, expression.stop, expression.step))
    if isinstance(expression, Call):
        return leaves((*expression.args, *(value for _, value in expression.kwargs)))
    return [expression] if isinstance(expression, Ref | Own | Symbol) else []


def only_views(expression: Any) -> bool:
    """Whether it computes nothing."""
    while isinstance(expression, Call):
        if name_of(expression.function) not in VIEWS:
            return False
        expression = expression.args[0]
    return isinstance(expression, Ref | Own)


def bind(expression: Any, shapes: Mapping[str, Shape]) -> tuple[Any, list[Ref], list[str]]:
    """The expression over values by their index, those values, once each, and the names of the module's tensors."""
    refs: dict[str, Ref] = {}
    own: list[str] = []
    for leaf in leaves(expression):
        if isinstance(leaf, Ref):
            refs.setdefault(leaf.name, leaf)
        elif isinstance(leaf, Own) and leaf.name not in own:
            own.append(leaf.name)
    if not refs:  # what it computes depends on the number of images alone
        refs[INPUT] = Ref(INPUT, "image")
    index = {name: i for i, name in enumerate(refs)}

    def of(part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(of(item) for item in part)
        if isinstance(part, ListOf):
            return ListOf(of(part.items))
        if isinstance(part, Slice):
            return Slice(of(part.start), of(part.stop), of(part.step))
        if isinstance(part, Call):
            return Call(part.function, of(part.args), tuple((name, of(value)) for name, value in part.kwargs))
        if isinstance(part, Symbol):
            return _FROM_FIRST[part]
        if not isinstance(part, Ref):
            return part
        return converted(Value(index[part.name]), refs[part.name].layout, part.layout, shapes[part.name])

    return of(expression), list(refs.values()), own


def converted(part: Any, given: str, wanted: str, shape: Shape) -> Any:
    """``part``, a value of ``shape`` in the layout ``given``, in another."""
    if given == wanted:
        return part
    image = {
        "image": part,
        "last": Call("permute", (part, 0, 3, 1, 2)),
        "tokens": Call("unflatten", (Call("transpose", (part, 1, 2)), 2, shape[1:])),
        "flat": Call("unflatten", (part, 1, shape)),
    }[given]
    return {
        "image": image,
        "last": Call("permute", (image, 0, 2, 3, 1)),
        "tokens": Call("transpose", (Call("flatten", (image, 2)), 1, 2)),
        "flat": Call("flatten", (image, 1)),
    }[wanted]


@cache
def _counted(shape: Shape) -> Tensor:
    C, H, W = shape
    return torch.arange(2 * C * H * W, dtype=torch.int32, device="cpu").view(2, H, W, C)


def seen_as(expression: Any, shapes: Mapping[str, Shape], rank: int, size: int) -> Ref | None:
    """The one node that ``expression``, of ``rank`` and ``size`` values an image, is in some layout; None for others.

    Found by looking at a value whose elements are numbered.
    """
    found = leaves(expression)
    names = {leaf.name for leaf in found if isinstance(leaf, Ref)}
    if len(names) != 1 or any(isinstance(leaf, Own) for leaf in found) or not only_views(expression):
        return None
    shape = shapes[next(iter(names))]
    if size != shape[0] * shape[1] * shape[2]:
        return None
    bound, (ref,), _ = bind(expression, shapes)
    numbers = _counted(shape)
    result = evaluate(bound, [logical(numbers, ref.layout)], {})
    for layout in (name for name, own in RANKS.items() if own == rank):
        expected = logical(numbers, layout)
        if result.shape == expected.shape and torch.equal(result, expected):
            return Ref(ref.name, layout)
    return None
