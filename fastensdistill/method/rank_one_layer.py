"""A layer of K branches, ``W_k = s_k ⊗ W ⊗ r_k``, which replaces an ordinary Conv2d or Linear."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrize

from fastensdistill.errors import InputError
from fastensdistill.method.computed_weights import originals, refresh, take_hooks, write
from fastensdistill.method.shared_weight import SharedWeight


class RankOneLayer(nn.Module):
    """A Conv2d or Linear with the effective weight ``W_k = s_k ⊗ W ⊗ r_k`` and bias ``s_k ∘ b`` in branch k.

    ``r`` (K, Cin) and ``s`` (K, Cout) are stored as deviations from one, ``delta_r`` and ``delta_s``, so that weight
    decay pulls them towards one and no precision is lost near it; in a frozen layer they are frozen too. Input and
    output stack the active branches along the batch: (len(active)·B, ...), branch by branch.

    Made by :func:`become_ranked`, it is an instance of the layer's class too and answers for its attributes. ``weight``
    and ``bias`` have no one value here: they tell their shape, dtype and device, and refuse to be computed with. The
    layer's own hooks run once for each branch. Raises InputError for an input that does not begin with the batch.
    """

    active: tuple[int, ...]
    images: int | None  # per branch, while the student's forward runs

    def __init__(self, layer: nn.Conv2d | nn.Linear, branches: int, where: str = ""):
        nn.Module.__init__(self)  # not that of the layer's class, which may stand beside this one
        self.layer, self.where, self.images = layer, where or type(layer).__name__, None
        self.groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        cin, cout = channels(layer)
        own = originals(layer)
        trained = any(p.requires_grad for p in own)
        self.delta_r, self.delta_s = (
            nn.Parameter(own[0].new_zeros(branches, n), requires_grad=trained) for n in (cin, cout)
        )
        self.computing = take_hooks(layer)
        self.active = tuple(range(branches))

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name.startswith("__") or "layer" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self._modules["layer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise InputError(f"{self.where}.{name} is set in a student of {len(self.delta_r)} branches; "
                             f"expected the network to be changed before it is wrapped")  # fmt: skip
        nn.Module.__setattr__(self, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> RankOneLayer:
        memo[id(self)] = new = _empty(_plain_class(self.layer))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (_plain_class(self.layer),), self.__dict__.copy()

    @property
    def weight(self) -> Tensor:
        """A stand-in with the weight's shape, dtype and device: it has a value per branch, and refuses arithmetic."""
        g, taps = self.groups, getattr(self.layer, "kernel_size", ())
        shape = (self.delta_s.shape[1], self.delta_r.shape[1] // g, *taps)
        return SharedWeight.of(shape, originals(self.layer)[0], f"{self.where}.weight", len(self.delta_r))

    @property
    def bias(self) -> Tensor | None:
        """As :attr:`weight`; None without a bias."""
        own = originals(self.layer, "bias")
        return SharedWeight.of(own[0].shape, own[0], f"{self.where}.bias", len(self.delta_r)) if own else None

    @property
    def r(self) -> Tensor:
        """Factors of the inputs, (K, Cin)."""
        return 1 + self.delta_r

    @property
    def s(self) -> Tensor:
        """Factors of the outputs, (K, Cout)."""
        return 1 + self.delta_s

    def effective(self, r: Tensor, s: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights (k, *weight.shape) and biases (k, Cout) for factors r (k, Cin) and s (k, Cout)."""
        weight, bias, k, g = self.layer.weight, self.layer.bias, len(r), self.groups
        taps = (1,) * (weight.ndim - 2)
        scale = s.view(k, g, -1, 1, *taps) * r.view(k, g, 1, -1, *taps)
        folded = weight.unflatten(0, (g, -1)) * scale
        return folded.flatten(1, 2), None if bias is None else s * bias

    def has_computed_weight(self) -> bool:
        """Whether the layer's weight is computed before each use: by weight norm, pruning, a parametrisation."""
        return bool(self.computing) or parametrize.is_parametrized(self.layer)

    def compute(self) -> None:
        """Bring a weight that hooks compute up to date."""
        refresh(self.layer, list(self.computing.values()))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.compute()
        n = len(self.active)
        if self.active == tuple(range(len(self.delta_r))):
            weights, biases = self.effective(self.r, self.s)
        else:
            # indexing with a list would wait for the device
            r, s = (torch.stack([delta[k] for k in self.active]) for delta in (self.delta_r, self.delta_s))
            weights, biases = self.effective(1 + r, 1 + s)
        # One call per branch: no pass over activations is spent on r or s, forward or backward.
        parts = [self.chunks(value, n) for value in args]
        named = {name: self.chunks(value, n) for name, value in kwargs.items()}
        outputs = [
            self.apply_weight(
                weights[k], None if biases is None else biases[k],
                *(part[k] for part in parts), **{name: part[k] for name, part in named.items()},
            )
            for k in range(n)
        ]  # fmt: skip
        if not all(isinstance(output, Tensor) for output in outputs):
            raise InputError(f"{self.where} returns a {type(outputs[0]).__name__}; expected a tensor to join branches")
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def chunks(self, value: Any, n: int) -> Any:
        """What each of ``n`` branches gets of an argument."""
        if not isinstance(value, Tensor) or n == 1:
            return [value] * n
        found = len(value) if value.ndim else 0
        if not torch.jit.is_tracing() and (not found or found % (n * (self.images or 1))):
            images = "the batch" if self.images is None else f"a batch of {self.images}"
            raise InputError(
                f"layer {self.where!r} got an input of shape {tuple(value.shape)}; a student of branches needs inputs "
                f"that begin with {n} branches times {images}, branch by branch"
            )
        return value.chunk(n)

    def apply_weight(self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward pass with another weight and bias."""
        layer = self.layer
        if len(args) + len(kwargs) == 1 and not has_hooks(layer) and "forward" not in layer.__dict__:
            x = args[0] if args else kwargs.get("input")
            if type(layer).forward is nn.Linear.forward and x is not None:
                return F.linear(x, weight, bias)
            if isinstance(layer, nn.Conv2d) and type(layer).forward is nn.Conv2d.forward and x is not None:
                return layer._conv_forward(x, weight, bias)
        replaced = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        if all(name in layer._parameters for name in replaced):
            return functional_call(layer, replaced, args, kwargs)
        with holding(layer, replaced):
            return layer(*args, **kwargs)

    def become_merged(self, weight: Tensor, bias: Tensor | None) -> None:
        """Turn into the ordinary layer that holds ``weight`` and ``bias``, wherever this one is referred to."""
        layer = self.layer
        write(layer, self.computing, {"weight": weight} if bias is None else {"weight": weight, "bias": bias})
        _rebind(layer, layer, self)
        kind, state = type(layer), layer.__dict__
        self.__class__, self.__dict__ = kind, state  # type: ignore[assignment]

    def extra_repr(self) -> str:
        return f"branches={len(self.delta_r)}"


def channels(layer: nn.Conv2d | nn.Linear) -> tuple[int, int]:
    """Inputs and outputs of a layer."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    return layer.in_features, layer.out_features


def mixed_factors(deviations: Tensor, weights: Tensor) -> Tensor:
    """Deviations (P, C) of factors mixed by rows of ``weights`` (P, K) that sum to one, from those (K, C) of branches.

    A product and a sum, which no setting of matrix products rounds to TF32.
    """
    return (weights.to(deviations)[:, :, None] * deviations).sum(1)


def has_hooks(layer: nn.Module) -> bool:
    """Whether anything was registered to run before or after the layer."""
    return bool(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    )  # fmt: skip


@contextmanager
def holding(layer: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """``layer`` with ``tensors`` in the place of what it computes or holds under their names."""
    kind, parameters = type(layer), dict(layer._parameters)
    before = {name: layer.__dict__[name] for name in tensors if name in layer.__dict__}
    layer.__class__ = parametrize.type_before_parametrizations(layer)
    for name, tensor in tensors.items():
        layer._parameters.pop(name, None)
        layer.__dict__[name] = tensor
    try:
        yield
    finally:
        for name in tensors:
            layer.__dict__.pop(name, None)
        layer.__dict__.update(before)
        layer._parameters.clear()
        layer._parameters.update(parameters)
        layer.__class__ = kind


def become_ranked(layer: nn.Conv2d | nn.Linear, branches: int, where: str) -> None:
    """Turn ``layer`` into a RankOneLayer around itself, wherever it is referred to: lists and methods follow."""
    inner = object.__new__(type(layer))
    inner.__dict__ = layer.__dict__
    _rebind(inner, layer, inner)
    layer.__dict__ = {}
    layer.__class__ = ranked_class(_plain_class(inner))  # type: ignore[assignment]
    RankOneLayer.__init__(layer, inner, branches, where)  # type: ignore[arg-type]


def _rebind(layer: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Methods that ``layer`` keeps in attributes (a replaced forward) and that are bound to ``old``."""
    for name, value in layer.__dict__.items():
        if isinstance(value, types.MethodType) and value.__self__ is old:
            layer.__dict__[name] = types.MethodType(value.__func__, new)


@cache
def ranked_class(kind: Any) -> type[RankOneLayer]:
    """RankOneLayer that is a ``kind`` too, for ``isinstance(layer, nn.Conv2d)`` in a network's own code."""
    return type(f"RankOne{kind.__name__}", (RankOneLayer, kind), {"__module__": __name__})


def _plain_class(layer: nn.Module) -> Any:
    """Its class, without what a parametrisation made of it."""
    return parametrize.type_before_parametrizations(layer)


def _empty(kind: Any) -> RankOneLayer:
    wanted = ranked_class(kind)
    return wanted.__new__(wanted)
