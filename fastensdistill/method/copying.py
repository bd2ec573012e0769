"""Copy networks without sharing anything, even if they keep tensors from their last forward pass."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastensdistill.errors import InputError
from fastensdistill.method.references import kept

Copied = TypeVar("Copied", bound=nn.Module)


def copy_network(module: Copied, *, forget: bool = False, meta: bool = False, name: str = "") -> Copied:
    """A deep copy of ``module``, which errors call ``name``; its parameters require gradients as those of ``module``.

    A tensor that the last forward pass left in an attribute (features for a hint loss) is part of an autograd graph:
    the copy has its value, in the same memory, or None with ``forget``, so that it keeps no activations alive. With
    ``meta``, the copy's parameters and buffers are on the meta device: they take no memory.
    Raises InputError for lazy layers and naming an attribute that cannot be copied (a lock, an open file).
    """
    check_complete(module, name)
    memo: dict[int, Any] = {}
    for _, value, _ in kept(module):
        if isinstance(value, Tensor) and not value.is_leaf:
            memo[id(value)] = None if forget else value.detach()
    for owner in module.modules():
        for own, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None and (meta or not tensor.is_leaf):
                found = torch.empty_like(tensor, device="meta") if meta else tensor.detach().clone()
                memo[id(tensor)] = nn.Parameter(found, tensor.requires_grad) if own in owner._parameters else found
    before = dict(memo)
    try:
        with torch.no_grad():  # a script module's copy would be part of a graph
            copied = copy.deepcopy(module, memo)
    except Exception as error:  # whatever the attribute's own class raises
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        culprit = _culprit(module, before)
        why = f"its attribute {culprit[0]} is a {type(culprit[1]).__name__} ({reason})" if culprit else reason
        raise InputError(f"{error_name(module, name)} cannot be copied: {why}") from error
    if isinstance(module, torch.jit.ScriptModule):
        for parameter, given in zip(copied.parameters(), module.parameters(), strict=True):
            parameter.requires_grad_(given.requires_grad)
    return copied


def error_name(module: nn.Module, name: str = "") -> str:
    """What errors call a network: ``name``, where there is one, and its class."""
    own = type(module).__name__
    return f"{name} ({own})" if name else own


def check_complete(module: nn.Module, name: str = "") -> None:
    """Raise InputError for lazy layers that have not seen their input yet."""
    for path, owner in module.named_modules():
        for value in (*owner._parameters.values(), *owner._buffers.values()):
            if value is not None and is_lazy(value):
                raise InputError(
                    f"{error_name(module, name)}: the lazy layer {path!r} has no shape yet; "
                    "call the network once on a batch of images before it is handed over"
                )


def _culprit(module: nn.Module, memo: dict[int, Any]) -> tuple[str, Any] | None:
    """The first attribute that cannot be copied, and its value; None where it is the class's own way to copy."""
    modules = {id(m): m for m in module.modules()}
    for prefix, owner in module.named_modules():
        for name, value in owner.__dict__.items():
            if name == "_modules":
                continue
            try:
                copy.deepcopy(value, {**memo, **modules})
            except Exception:
                return f"{prefix}{'.' if prefix else ''}{name}", value
    return None
