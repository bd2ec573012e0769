"""Layers whose weight is computed: parametrisations, and the hooks of weight_norm, spectral_norm and pruning.

What such a layer multiplies by is read with :func:`refresh` and set with :func:`write`. A weight is set through its
parametrisation where that can express it (weight norm, pruning with its mask), so that the layer keeps its keys; where
it cannot (spectral norm, orthogonal), the parametrisation goes and an ordinary parameter holds the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)


def computed_by(hook: Any) -> str:
    """The name of the tensor that one of the HOOKS computes."""
    return hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name


def take_hooks(layer: nn.Module) -> dict[int, Any]:
    """The hooks that compute weight and bias, taken off the layer: it is called with other ones now."""
    hooks = layer._forward_pre_hooks
    return {i: hooks.pop(i) for i in list(hooks) if isinstance(hooks[i], HOOKS) and computed_by(hooks[i]) in NAMES}


NAMES = ("weight", "bias")


def originals(layer: nn.Module, name: str = "weight") -> list[nn.Parameter]:
    """The parameters that the layer's ``weight`` is, or is computed from."""
    starts = (f"{name}_", f"parametrizations.{name}.")
    return [p for n, p in layer.named_parameters() if n == name or n.startswith(starts)]


def refresh(layer: nn.Module, hooks: Sequence[Any]) -> None:
    """Compute what ``hooks`` compute before every forward pass."""
    for hook in hooks:
        hook(layer, ())


@torch.no_grad()
def write(layer: nn.Module, hooks: dict[int, Any], values: dict[str, Tensor]) -> None:
    """Make ``values`` the layer's weight and bias; its ``hooks`` are put back, or removed for good."""
    layer._forward_pre_hooks.update(hooks)
    for hook in hooks.values():
        if isinstance(hook, SpectralNorm):
            remove_spectral_norm(layer, hook.name)
    for name, value in values.items():
        own = [hook for hook in hooks.values() if computed_by(hook) == name and not isinstance(hook, SpectralNorm)]
        if parametrize.is_parametrized(layer, name):
            _write_parametrized(layer, name, value)
        elif own:
            for hook in own:
                _invert(layer, hook, value)
            refresh(layer, own)
        else:
            getattr(layer, name).copy_(value)


def _invert(layer: nn.Module, hook: Any, value: Tensor) -> None:
    name = computed_by(hook)
    if isinstance(hook, WeightNorm):
        getattr(layer, f"{name}_g").copy_(torch.norm_except_dim(value, 2, hook.dim))
        getattr(layer, f"{name}_v").copy_(value)
    else:
        getattr(layer, f"{name}_orig").copy_(value)  # the mask keeps what was kept


def _write_parametrized(layer: nn.Module, name: str, value: Tensor) -> None:
    try:
        setattr(layer, name, value)  # by its right_inverse
        fits = torch.allclose(getattr(layer, name), value, rtol=1e-5, atol=1e-6 * float(value.abs().max()))
    except Exception:  # whatever a parametrisation raises that has no inverse, or none for this value
        fits = False
    if not fits:
        _bake(layer)
        getattr(layer, name).copy_(value)


def _bake(layer: nn.Module) -> None:
    """Every parametrised tensor as an ordinary one. PyTorch's own removal would take the class's property from all
    networks that this one was copied from."""
    lists: Any = layer.parametrizations
    values = {name: getattr(layer, name) for name in lists}
    kinds = {name: any(isinstance(t, nn.Parameter) for t in lists[name].parameters(recurse=False)) for name in lists}
    trained = {name: any(p.requires_grad for p in lists[name].parameters(recurse=False)) for name in lists}
    layer.__class__ = parametrize.type_before_parametrizations(layer)
    del layer._modules["parametrizations"]
    for name, value in values.items():
        if kinds[name]:
            layer.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=trained[name]))
        else:
            layer.register_buffer(name, value.detach().clone())
