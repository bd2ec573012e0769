"""Copies of networks that share nothing with them, whatever they keep from their last forward pass."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastensdistill.errors import InputError
from fastensdistill.method.references import kept

Copied = TypeVar("Copied", bound=nn.Module)


def copy_network(module: Copied, *, forget: bool = False) -> Copied:
    """A deep copy of ``module``.

    A tensor that the last forward pass left in an attribute (features for a hint loss) is part of an autograd graph:
    the copy has its value, in the same memory, or None with ``forget``, so that it keeps no activations alive.
    Raises InputError for lazy layers and naming an attribute that cannot be copied (a lock, an open file).
    """
    check_complete(module)
    memo: dict[int, Any] = {}
    for _, value, _ in kept(module):
        if isinstance(value, Tensor) and not value.is_leaf:
            memo[id(value)] = None if forget else value.detach()
    for owner in module.modules():
        for name, value in [*owner._parameters.items(), *owner._buffers.items()]:
            if value is not None and not value.is_leaf:
                found = value.detach().clone()
                memo[id(value)] = nn.Parameter(found) if name in owner._parameters else found
    before = dict(memo)
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # whatever the attribute's own class raises
        path, value = _culprit(module, before)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"{type(module).__name__} cannot be copied: its {path} is a {type(value).__name__} ({reason})"
        ) from error


def check_complete(module: nn.Module) -> None:
    """Raise InputError for lazy layers that have not seen their input yet."""
    for name, owner in module.named_modules():
        for value in (*owner._parameters.values(), *owner._buffers.values()):
            if value is not None and is_lazy(value):
                raise InputError(
                    f"{type(module).__name__}: the lazy layer {name!r} has no shape yet; "
                    "call the network once on a batch of images before it is handed over"
                )


def _culprit(module: nn.Module, memo: dict[int, Any]) -> tuple[str, Any]:
    """The first attribute that cannot be copied, and its value."""
    modules = {id(m): m for m in module.modules()}
    for prefix, owner in module.named_modules():
        for name, value in owner.__dict__.items():
            if name == "_modules":
                continue
            try:
                copy.deepcopy(value, {**memo, **modules})
            except Exception:
                return f"attribute {prefix}{'.' if prefix else ''}{name}", value
    return "class", type(module)
