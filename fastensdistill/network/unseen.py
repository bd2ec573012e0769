"""What recording a network's operations cannot show: hooks, parametrisations, replaced methods.

A plan that left these out would train or evaluate another network without a word, so each is refused by name.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as every_module
from torch.nn.utils import parametrize

from fastensdistill.errors import InputError

HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}
TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
DTYPES = (torch.float32, torch.float64)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Inside, whatever is raised that is no ``InputError`` becomes one: a line that begins with ``what``."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # user code runs here, on values that it may not expect
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "without a reason")
        raise InputError(f"{what}: {type(error).__name__}: {reason}") from error


@contextmanager
def generators_kept(module: nn.Module) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's global generators afterwards as before, on the CPU and the module's device."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def check_unseen(module: nn.Module, *, within: bool = True) -> None:
    """Raise ``InputError`` naming the layer of ``module`` that does something besides its recorded operations.

    Without ``within``, of a container, only for ``module`` itself.
    """
    for attribute, name in HOOKS.items():
        if getattr(every_module, f"_global{attribute}", None):
            raise InputError(f"{name} is registered for every module; the fused engine would not call it")
    for path, layer in module.named_modules() if within else [("", module)]:
        why = _peculiar(layer)
        if why:
            place = f"module {path!r}" if path else "the outermost module"
            raise InputError(f"{type(module).__name__}: {place}: {why}")
    if within:
        _check_tensors(module)


def _peculiar(layer: nn.Module) -> str:
    """What ``layer`` does that its operations do not tell; "" for nothing."""
    for attribute, name in HOOKS.items():
        if getattr(layer, attribute, None):
            return f"has {name}; the fused engine would not call it"
    if parametrize.is_parametrized(layer):
        assert isinstance(layer.parametrizations, nn.ModuleDict)
        names = ", ".join(map(repr, layer.parametrizations))
        return f"its {names} is parametrised; the fused engine trains only plain weights"
    if type(layer).__call__ is not nn.Module.__call__:
        return f"{type(layer).__name__} has a __call__ of its own; the fused engine would not use it"
    for name, value in vars(layer).items():
        if callable(value) and hasattr(type(layer), name) and name != "_compiled_call_impl":
            return f"its {name!r} was replaced on this one object; the fused engine would not use it"
    return ""


def _check_tensors(module: nn.Module) -> None:
    """Raise ``InputError`` for tensors with hooks, and for those that are not all of one dtype on one device."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    numbers = [(name, t) for name, t in tensors if t.is_floating_point() or t.is_complex()]
    for name, tensor in numbers:
        first_name, first = numbers[0]
        if any(getattr(tensor, attribute, None) for attribute in TENSOR_HOOKS):
            why = f"{name!r} has a hook on its gradient; the fused engine would not call it"
        elif tensor.dtype not in DTYPES:
            why = f"{name!r} is {tensor.dtype}; the fused engine expects float32"
        elif (tensor.dtype, tensor.device) != (first.dtype, first.device):
            why = f"{name!r} is {tensor.dtype} on {tensor.device}, but {first_name!r} {first.dtype} on {first.device}"
        else:
            continue
        raise InputError(f"{type(module).__name__}: {why}")
