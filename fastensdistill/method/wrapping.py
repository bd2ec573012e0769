"""Copy a network with K branches in its Conv2d and Linear layers, or say why that is impossible.

Looked at before anything is changed, on the network that was given: what cannot be wrapped is named.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastensdistill.errors import InputError
from fastensdistill.method.computed_weights import HOOKS, computed_by, originals
from fastensdistill.method.copying import check_complete, copy_network
from fastensdistill.method.rank_one_layer import RankOneLayer, become_ranked, channels
from fastensdistill.method.references import check_functions, kept
from fastensdistill.models.wrappers import unwrap

Layer = nn.Conv2d | nn.Linear


def ranked_copy(module: nn.Module, branches: int) -> nn.Module:
    """A copy of ``module``, every Conv2d and Linear in it a RankOneLayer of so many ``branches``.

    Layers that share a weight share their factors too, so that they stay one layer in the average. Raises InputError
    for what cannot be wrapped: attention layers, lazy and quantised ones, and weights that are used outside of a layer.
    """
    module = unwrap(module)
    check_copyable(module)
    layers = wrapped_layers(module)
    groups = tied_groups(module, layers)
    check_references(module, layers)
    copied = copy_network(module)
    found = {name: copied.get_submodule(name) for name in layers}
    for name, layer in found.items():
        become_ranked(layer, branches, name or type(module).__name__)  # type: ignore[arg-type]
    for first, *others in groups:
        for name in others:
            one, other = found[first], found[name]
            other.delta_r, other.delta_s = one.delta_r, one.delta_s
    return copied


def check_copyable(module: nn.Module) -> None:
    """Raise InputError for a network whose copy would not be what it is."""
    if not isinstance(module, nn.Module):
        raise InputError(f"a student is made of an nn.Module, not of a {type(module).__name__}")
    check_complete(module)
    check_functions(module)
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise InputError(f"parameter {name!r} has a gradient hook, which a copy would lose; "
                             "expected the hook to be registered on the student's own parameter")  # fmt: skip


def wrapped_layers(module: nn.Module) -> dict[str, Layer]:
    """The layers that get factors, by name; what lies inside of one is its own affair."""
    layers: dict[str, Layer] = {}
    inside: set[int] = set()
    for name, layer in module.named_modules():
        kind = type(layer)
        if isinstance(layer, nn.MultiheadAttention):
            raise InputError(f"MultiheadAttention {name!r} cannot be wrapped: its projections are not called as layers")
        if isinstance(layer, RankOneLayer):
            raise InputError(f"layer {name!r} has branches already: expected an ordinary network, not a student's")
        if ".quantized" in kind.__module__ or ".qat" in kind.__module__:
            raise InputError(f"layer {name!r} is a quantised {kind.__name__}: expected a network before quantisation")
        if isinstance(layer, Layer) and id(layer) not in inside:
            _check_layer(name, layer)
            layers[name] = layer
            inside.update(id(m) for m in layer.modules())
    return layers


def _check_layer(name: str, layer: Layer) -> None:
    kind, own = type(layer).__name__, originals(layer)
    if not own:
        raise InputError(f"layer {name!r} ({kind}) has no weight that is a parameter; expected one to wrap")
    computed = parametrize.is_parametrized(layer, "weight") or any(
        isinstance(hook, HOOKS) and computed_by(hook) == "weight" for hook in layer._forward_pre_hooks.values()
    )
    weight: Any = layer._parameters.get("weight")
    if not computed and weight is None:
        raise InputError(
            f"layer {name!r} ({kind}) computes its weight in a way that is not known; expected a parameter, or "
            "weight_norm, spectral_norm, pruning or a parametrisation of torch.nn.utils"
        )
    if not own[0].is_floating_point():
        raise InputError(f"layer {name!r} ({kind}) has a weight of {own[0].dtype}: expected a floating dtype")
    if computed:
        return
    cin, cout = channels(layer)
    groups, taps = getattr(layer, "groups", 1), getattr(layer, "kernel_size", ())
    if tuple(weight.shape) != (cout, cin // groups, *taps):
        raise InputError(f"layer {name!r} ({kind}) has a weight of shape {tuple(weight.shape)}; "
                         f"expected {(cout, cin // groups, *taps)}")  # fmt: skip


def tied_groups(module: nn.Module, layers: dict[str, Layer]) -> list[list[str]]:
    """Names of layers that share their weight. Raises InputError where a weight is shared with anything else."""
    names = {id(layer): name for name, layer in layers.items()}
    own = {id(p): name for name, layer in layers.items() for p in layer.parameters()}
    users: dict[int, list[tuple[str, str, bool]]] = defaultdict(list)  # layer or module, parameter, a layer's weight
    memory: dict[int, tuple[Tensor, str]] = {}
    inside = {id(m): names[id(layer)] for layer in layers.values() for m in layer.modules()}
    for prefix, owner in module.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            path = f"{prefix}.{name}" if prefix else name
            users[id(parameter)].append((inside.get(id(owner), prefix), path, id(owner) in names))
            other, there = memory.setdefault(parameter.data_ptr(), (parameter, path))
            if parameter.data_ptr() and other is not parameter and parameter.numel():
                raise InputError(f"parameters {there!r} and {path!r} share their memory without being one parameter; "
                                 "expected one Parameter for both, or copies")  # fmt: skip
    groups: list[list[str]] = []
    for key, shared in users.items():
        if len(shared) == 1 or key not in own:
            continue
        paths = " and ".join(repr(path) for _, path, _ in shared)
        kinds = {path.rpartition(".")[2] for _, path, _ in shared}
        if not all(plain for *_, plain in shared) or len(kinds) != 1 or kinds - {"weight", "bias"}:
            raise InputError(f"{paths} are one parameter, which is not the weight of Conv2d or Linear layers alone; "
                             "such a network cannot have branches")  # fmt: skip
        members = [name for name, _, _ in shared]
        if kinds == {"bias"}:
            if len({id(layers[name]._parameters.get("weight")) for name in members}) > 1:
                raise InputError(f"{paths} are one bias of layers with different weights; "
                                 "such a network cannot have branches")  # fmt: skip
        elif len({channels(layers[name]) for name in members}) > 1:
            raise InputError(f"{paths} are one weight of layers of different groups; "
                             "such a network cannot have branches")  # fmt: skip
        else:
            groups.append(members)
    return groups


def check_references(module: nn.Module, layers: dict[str, Layer]) -> None:
    """Raise InputError for a weight that the network keeps in an attribute: its forward would use the shared one."""
    weights = {id(p): f"{n}.{name}" for n, layer in layers.items() for name, p in layer.named_parameters()}
    for path, value, _ in kept(module):
        if id(value) in weights:
            raise InputError(
                f"{type(module).__name__}: attribute {path!r} is the parameter {weights[id(value)]!r}, of which every "
                "branch has its own; expected the layer to be called"
            )
