"""What PyTorch computes in a plan: an expression over values of the network and tensors of the module, as data.

Values lie in memory as (images, H, W, C). An expression takes them, and gives its result, in one of four layouts:

    image   (images, C, H, W)      as convolutions take it in PyTorch
    last    (images, H, W, C)      as a linear layer or LayerNorm over channels takes it
    tokens  (images, L, C)         H = L, W = 1
    flat    (images, C·H·W)        in the order C, H, W

Every operation works on each image by itself, so that images of several groups are computed as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

LAYOUTS = ("image", "last", "tokens", "flat")


@dataclass(frozen=True)
class Value:
    """The node's ``index``-th input."""

    index: int


@dataclass(frozen=True)
class Own:
    """The module's parameter or buffer of this ``name``."""

    name: str


@dataclass(frozen=True)
class Call:
    """``function`` of ``args`` and ``kwargs`` (name, value); a string is the name of a method of the first argument."""

    function: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Slice:
    """A slice, which not every Python can hash."""

    start: Any
    stop: Any
    step: Any


@dataclass(frozen=True)
class ListOf:
    """A list, which cannot be hashed."""

    items: tuple[Any, ...]


def evaluate(expression: Any, values: Sequence[Tensor], own: Mapping[str, Tensor]) -> Any:
    """The result of ``expression``; what occurs in it several times is computed once."""
    known: dict[Any, Any] = {}

    def of(part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(of(item) for item in part)
        if isinstance(part, Value):
            return values[part.index]
        if isinstance(part, Own):
            return own[part.name]
        if isinstance(part, ListOf):
            return [of(item) for item in part.items]
        if isinstance(part, Slice):
            return slice(of(part.start), of(part.stop), of(part.step))
        if not isinstance(part, Call):
            return part
        if part not in known:
            args, kwargs = [of(arg) for arg in part.args], {name: of(value) for name, value in part.kwargs}
            method = getattr(args[0], part.function) if isinstance(part.function, str) else None
            known[part] = method(*args[1:], **kwargs) if method else part.function(*args, **kwargs)  # type: ignore[operator]
        return known[part]

    return of(expression)


def logical(x: Tensor, layout: str) -> Tensor:
    """A value (images, H, W, C) as an expression takes it in ``layout``; a view but for "flat" over positions."""
    if layout == "last":
        return x
    if layout == "tokens":
        return x.flatten(1, 2)
    image = x.permute(0, 3, 1, 2)
    return image if layout == "image" else image.flatten(1)


def physical(x: Tensor, layout: str) -> Tensor:
    """Back: what an expression gives in ``layout`` as (images, H, W, C), contiguous."""
    if layout == "image":
        x = x.permute(0, 2, 3, 1)
    elif layout == "tokens":
        x = x[:, :, None]
    elif layout == "flat":
        x = x[:, None, None]
    return x.contiguous()
