"""What is trained, in flat tensors: one for all parameters, one for their momentum, and so on.

The modules' own parameters and running statistics become views of these tensors, so that validation, checkpoints and
averaging always see the current weights, nothing is ever copied back, and an update is a few launches in all.
Several copies of one architecture lie side by side, [copies, *shape] per parameter, which is how a launch over groups
reads them. Order: weight and bias of every layer (that of ``Layout``), BatchNorm scales, BatchNorm shifts, then what
PyTorch computes with (the parameters of ``Function`` nodes), each once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fastensdistill.errors import InputError
from fastensdistill.kernels.layout import Layout
from fastensdistill.network.nodes import Function, GeneralConv, Layer, Linear, Network, Norm
from fastensdistill.network.overlap import common_memory, trained_tensors

View = Callable[[Tensor], Tensor]


@dataclass
class NormWeights:
    """A training-mode BatchNorm's own tensors, (Q, C) each; the running estimates are moved in place by a pass.

    ``center``, about which sums are taken, is the running mean by group, (1 or G, C): a copy where Q is neither.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    copied: Tensor | None = None

    @property
    def center(self) -> Tensor:
        return self.running_mean if self.copied is None else self.copied


def flat_layout(network: Network, slots: int = 1) -> Layout:
    """Where the layers of ``network`` lie, and the packed weights of so many ``slots``."""
    norms = 2 * sum(norm.shape[0] for norm in network.norms)
    return Layout.build(
        [(layer.name, layer.weight_shape, layer.bias) for layer in network.layers],
        plain=norms + sum(prod(shape) for shape in function_tensors(network)[0].values()),
        slots=slots,
        positions={layer.name: prod(layer.in_shape[1:]) for layer in network.layers if isinstance(layer, Linear)},
        channel_groups={layer.name: layer.groups for layer in network.layers if isinstance(layer, GeneralConv)},
    )


def function_tensors(network: Network) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of the parameters and of the buffers that ``Function`` nodes compute with, by name, each once."""
    parameters: dict[str, tuple[int, ...]] = {}
    constants: dict[str, tuple[int, ...]] = {}
    for node in network.nodes:
        if isinstance(node, Function):
            count = len(node.trained)
            parameters |= zip(node.trained, node.tensors[:count], strict=True)
            constants |= zip(node.constants, node.tensors[count:], strict=True)
    return parameters, constants


def paths(network: Network, ranked: bool) -> dict[str, str]:
    """A plain network's parameter names, layers first, in the flat order → the names in the module that is trained."""
    inner = ".layer" if ranked else ""
    named = {
        name: f"{layer.name}{inner}.{name.rpartition('.')[2]}" for layer in network.layers for name in layer.parameters
    }
    names = [f"{norm.name}.{kind}" for kind in ("weight", "bias") for norm in network.norms]
    return named | {name: name for name in (*names, *function_tensors(network)[0])}


class FlatParameters:
    """Parameters, momentum, gradients and running statistics of ``modules``, which share the architecture ``network``.

    With ``ranked``, their layers are wrapped with rank-one factors, ``branches`` of each; these are kept as deviations
    from one, [copies · branches, factors], a module's rows one after the other. Constructing it moves the modules'
    storage here: moving or casting them afterwards would part them from it.
    Raises InputError for parameters that the network does not contain, and for tied ones.
    """

    branches = 1  # of a module: how many factors a layer has

    def __init__(self, modules: Sequence[nn.Module], network: Network, ranked: bool):
        self.network, self.copies, self.ranked = network, len(modules), ranked
        self.paths = paths(network, ranked)
        self.check(modules[0], network, ranked)
        like = next(modules[0].parameters())
        self.device, self.dtype = like.device, like.dtype
        self.layout = flat_layout(network)
        self.shapes = {name: tuple(modules[0].get_parameter(path).shape) for name, path in self.paths.items()}
        self.offsets = dict(zip(self.shapes, accumulate(map(prod, self.shapes.values()), initial=0), strict=False))
        norms = [norm.name for norm in network.norms]
        channels = [norm.shape[0] for norm in network.norms]
        self.norm_offsets = dict(zip(norms, accumulate(channels, initial=0), strict=False))  # in running statistics
        self.values, self.momentum, self.gradient = (self._zeros(self.layout.size) for _ in range(3))
        self.running_mean, self.running_var = (self._zeros(sum(channels)) for _ in range(2))
        eps = [torch.full((self.copies * norm.shape[0],), norm.eps, dtype=self.dtype) for norm in network.norms]
        self.eps = torch.cat([*eps, torch.zeros(0, dtype=self.dtype)]).to(self.device)  # as the running statistics
        self.batches = torch.zeros(len(norms), self.copies, dtype=torch.int64, device=self.device)
        self.buffers = [dict(module.named_buffers(remove_duplicate=False)) for module in modules]
        for i, module in enumerate(modules):
            self._adopt(i, module)
        # Every parameter, and how to find it in a tensor like ``values`` or like ``deviations``
        self.views: list[tuple[nn.Parameter, View]] = [
            (module.get_parameter(path), partial(self._part, name, i))
            for name, path in self.paths.items()
            for i, module in enumerate(modules)
        ]
        self.factor_views: list[tuple[nn.Parameter, View]] = []
        self.deviations = self.deviation_momentum = like.new_zeros(0)
        self.factors: dict[str, tuple[int, int]] = {}
        if ranked:
            self._adopt_factors(modules)
        self.center_index = self._means_by_branch()
        self.centers = self.running_mean.new_zeros(len(self.center_index))
        self.flags: list[bool] = []
        self.follow()

    @staticmethod
    def check(module: nn.Module, network: Network, ranked: bool) -> None:
        """Raise InputError for a parameter that no layer of ``network`` has, and where none is to be trained."""
        known = set(paths(network, ranked).values())
        if ranked:
            known |= {f"{layer.name}.{kind}" for layer in network.layers for kind in ("delta_r", "delta_s")}
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for name in parameters:
            if name not in known:
                raise InputError(f"parameter {name!r} is in none of the layers that were traced")
        for name in paths(network, ranked).values():
            if name not in parameters:
                raise InputError(f"{name!r} is no parameter, so it cannot be trained; expected an nn.Parameter")
        for name in function_tensors(network)[0]:
            owner = name.rpartition(".")[0]
            if owner in network.by_name and isinstance(network.by_name[owner], Layer | Norm):
                raise InputError(f"{name!r} is a layer's and is computed with elsewhere too; expected one of these")
        for norm in (node.name for node in network.nodes if isinstance(node, Norm)):
            if getattr(module.get_submodule(norm), "num_batches_tracked", None) is None:
                raise InputError(f"BatchNorm {norm!r} counts no batches; expected num_batches_tracked")
        shared = common_memory(trained_tensors(module))
        if shared:
            raise InputError(f"parameters {shared[0]!r} and {shared[1]!r} are tied; expected memory of their own")
        if not any(parameter.requires_grad for parameter in parameters.values()):
            raise InputError("no parameter requires gradients; expected some of them to be trained")

    def state(self) -> list[Tensor]:
        """Everything a step changes."""
        return [
            self.values, self.momentum, self.deviations, self.deviation_momentum, self.running_mean,
            self.running_var, self.batches,
        ]  # fmt: skip

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(self.copies * count, dtype=self.dtype, device=self.device)

    def view(self, flat: Tensor, name: str) -> Tensor:
        """(copies, *shape) of the parameter ``name`` in one of the flat buffers."""
        start, shape = self.copies * self.offsets[name], self.shapes[name]
        return flat[start : start + self.copies * prod(shape)].view(self.copies, *shape)

    def norm_view(self, flat: Tensor, norm: Norm) -> Tensor:
        """(copies, C) of a BatchNorm in the running mean or variance."""
        start, C = self.copies * self.norm_offsets[norm.name], norm.shape[0]
        return flat[start : start + self.copies * C].view(self.copies, C)

    def by_branch(self, start: int, values: int) -> Tensor:
        """(copies · branches, values): where each branch has what begins at ``start`` in a flat tensor of one copy."""
        of_copies = self.copies * start + torch.arange(self.copies * values).view(self.copies, values)
        return of_copies.repeat_interleave(self.branches, 0)

    def norm_weights(self, norm: Norm) -> NormWeights:
        scale, shift = (self.view(self.values, f"{norm.name}.{kind}") for kind in ("weight", "bias"))
        mean, var = (self.norm_view(flat, norm) for flat in (self.running_mean, self.running_var))
        if not len(self.centers):
            return NormWeights(scale, shift, mean, var)
        rows, C = self.copies * self.branches, norm.shape[0]
        at = rows * self.norm_offsets[norm.name]
        return NormWeights(scale, shift, mean, var, self.centers[at : at + rows * C].view(rows, C))

    def _means_by_branch(self) -> Tensor:
        """Which running mean each branch has of every BatchNorm, (copies · branches, C) one BatchNorm after the other.

        Empty where all branches are of one module, or each is a module.
        """
        if self.copies == 1 or self.branches == 1:
            return torch.zeros(0, dtype=torch.int64, device=self.device)
        rows = [self.by_branch(self.norm_offsets[norm.name], norm.shape[0]).flatten() for norm in self.network.norms]
        return torch.cat([*rows, torch.zeros(0, dtype=torch.int64)]).to(self.device)

    def copy_means(self) -> None:
        """Copy the running means for who reads them by branch: once before a pass in training mode."""
        if len(self.centers):
            torch.index_select(self.running_mean, 0, self.center_index, out=self.centers)

    @torch.no_grad()
    def _adopt(self, i: int, module: nn.Module) -> None:
        for name, path in self.paths.items():
            move(module.get_parameter(path), self.view(self.values, name)[i])
        for j, norm in enumerate(self.network.norms):
            owner: Any = module.get_submodule(norm.name)
            for kind, flat in (("running_mean", self.running_mean), ("running_var", self.running_var)):
                view = self.norm_view(flat, norm)[i]
                setattr(owner, kind, view.copy_(getattr(owner, kind)))
            owner.num_batches_tracked = self.batches[j, i].copy_(owner.num_batches_tracked)

    @torch.no_grad()
    def _adopt_factors(self, modules: Sequence[nn.Module]) -> None:
        K = self.branches = len(modules[0].get_parameter(f"{self.network.layers[0].name}.delta_r"))
        self.deviations, self.deviation_momentum = (
            torch.zeros(self.copies * K, self.layout.factors, dtype=self.dtype, device=self.device) for _ in range(2)
        )
        for layer in self.layout.layers:
            for kind, start, n in (("r", layer.r, layer.inputs), ("s", layer.s, layer.out_channels)):
                name = f"{layer.name}.delta_{kind}"
                self.factors[name] = (start, n)
                for i, module in enumerate(modules):
                    factor, view = module.get_parameter(name), partial(self._factor, name, i)
                    self.factor_views.append((factor, view))
                    move(factor, view(self.deviations))

    def _factor(self, name: str, i: int, flat: Tensor) -> Tensor:
        start, n = self.factors[name]
        return flat[i * self.branches : (i + 1) * self.branches, start : start + n]

    def _part(self, name: str, i: int, flat: Tensor) -> Tensor:
        return self.view(flat, name)[i]

    def follow(self) -> bool:
        """Take in which parameters require gradients; whether that has changed since the last call."""
        flags = [parameter.requires_grad for parameter, _ in (*self.views, *self.factor_views)]
        changed, self.flags = flags != self.flags, flags
        return changed


def move(parameter: nn.Parameter, view: Tensor) -> None:
    """Make ``parameter`` the memory of ``view``, with its value."""
    view.copy_(parameter)
    parameter.data = view
