"""What a network references besides parameters, buffers and submodules: lists, dictionaries, closures, features.

Replacing a layer where it is registered leaves such references at the old one, and copying a network leaves functions
at the network they were written for. Both are wrong without a word, so they are looked for.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fastensdistill.errors import InputError

REGISTERED = ("_parameters", "_buffers", "_modules")
DEPTH = 6  # of containers in one another; deeper ones are not looked into
PLAIN = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType, types.BuiltinFunctionType)


def kept(module: nn.Module, *, plain: bool = False) -> Iterator[tuple[str, Any, bool]]:
    """(path, value, whether a function holds it) of all that ``module`` and its submodules keep in plain attributes.

    A function's own values are those of its closure and its defaults: copying the network does not copy them. Numbers,
    text and the like are among them only with ``plain``.
    """
    for prefix, owner in module.named_modules():
        start = f"{prefix}." if prefix else ""
        seen: set[int] = set()
        for name, value in list(owner.__dict__.items()):
            if name not in REGISTERED:
                yield from _inside(f"{start}{name}", value, False, seen, DEPTH, plain)


def _inside(
    path: str, value: Any, held: bool, seen: set[int], depth: int, plain: bool = False
) -> Iterator[tuple[str, Any, bool]]:
    if isinstance(value, PLAIN):
        if plain:
            yield path, value, held
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    yield path, value, held
    if depth == 0 or isinstance(value, Tensor | nn.Module):
        return
    for name, inner, function in _parts(value):
        yield from _inside(f"{path}{name}", inner, held or function, seen, depth - 1, plain)


def _parts(value: Any) -> Iterator[tuple[str, Any, bool]]:
    """(name, part, whether a function holds it) of a container, a function or an object."""
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part, False) for key, part in list(value.items()))
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"[{i}]", part, False) for i, part in enumerate(list(value)))
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield f" (its {name})", cell.cell_contents, True
            except ValueError:  # not assigned yet
                continue
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        yield from ((f" (its default {i})", part, True) for i, part in enumerate(defaults))
    elif isinstance(value, types.MethodType):
        yield "", value.__self__, False
    elif isinstance(value, functools.partial):
        yield from ((f" ({i})", part, False) for i, part in enumerate((value.func, *value.args)))
        yield from ((f" ({name})", part, False) for name, part in value.keywords.items())
    elif hasattr(value, "__dict__"):
        yield from ((f".{name}", part, False) for name, part in list(vars(value).items()))


def check_functions(module: nn.Module) -> None:
    """Raise InputError for a function that holds a part of the network: in a copy it would go on using the original."""
    own: dict[int, str] = {id(m): name or type(m).__name__ for name, m in module.named_modules()}
    own |= {id(t): name for name, t in [*module.named_parameters(), *module.named_buffers()]}
    for path, value, held in kept(module):
        if held and id(value) in own:
            raise InputError(
                f"{type(module).__name__}: the function at {path} holds {own[id(value)]!r} of the network that was "
                "given, and would use that one in a copy; expected a method of the network, or none"
            )
