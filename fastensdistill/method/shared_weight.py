"""The stand-in that a network gets when it reads the weight of a wrapped layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastensdistill.errors import InputError

_PROPERTIES = ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu", "is_meta", "requires_grad", "is_leaf")
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "get_device",
    "__len__", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor",
    "requires_grad_",
)  # fmt: skip
ALLOWED: set[Callable] = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES), *(getattr(Tensor, name) for name in _METHODS),
    torch.is_floating_point, torch.is_complex, torch.numel, torch.zeros_like, torch.ones_like, torch.empty_like,
}  # fmt: skip


class SharedWeight(Tensor):
    """Shape, dtype and device of a wrapped layer's weight. It has K values and not one: computing raises InputError."""

    path: str
    branches: int

    @classmethod
    def of(cls, shape: Sequence[int], like: Tensor, path: str, branches: int) -> Tensor:
        """A stand-in of ``shape`` with the dtype and device of ``like``, for the parameter at ``path``."""
        found: Any = like.detach().new_empty(()).expand(tuple(shape)).as_subclass(cls)
        found.requires_grad_(like.requires_grad)
        found.path, found.branches = path, branches
        return found

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in ALLOWED:
            result = super().__torch_function__(func, types, args, kwargs or {})
            return result.as_subclass(Tensor) if isinstance(result, cls) else result
        if func in (Tensor.to, Tensor.type_as) and not isinstance(args[0], cls):
            return func(args[0], torch.empty(0, dtype=args[1].dtype, device=args[1].device))
        own = next((a for a in _flat((args, kwargs or {})) if isinstance(a, cls)), None)
        path, branches = (own.path, own.branches) if own is not None else ("weight", 0)
        raise InputError(
            f"{path} is computed with outside its layer, where each of {branches} branches has a value of its own; "
            "expected the layer to be called"
        )


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [x for part in value for x in _flat(part)] if isinstance(value, list | tuple) else [value]
