"""All teachers, and all branches, in one network of grouped convolutions (``groups=G`` of cuDNN).

Activations are (B·G, C, H, W), image by image, in contiguous NCHW memory: (B, G·C, H, W) is the same memory, which the
convolutions and per-group BatchNorms take, so nothing is ever moved between groups. Branches enter as effective
weights ``s ⊗ W ⊗ r``; their shared BatchNorm is the ordinary one over B·K images.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.peers.eager import ActivationLayer, EagerStep, EagerTeach, replace_layers
from bench.setting import Problem, contiguous
from fastensdistill.method.student import RankOneLayer
from fastensdistill.models.layers import BatchNorm2d, Normalize


def side_by_side(x: Tensor, groups: int) -> Tensor:
    """(B·G, C, H, W) as (B, G·C, H, W)."""
    return x.view(len(x) // groups, groups * x.shape[1], *x.shape[2:])


class GroupedConv(nn.Module):
    def __init__(self, layers: Sequence[nn.Conv2d], weight: Any):
        super().__init__()
        self.groups, self.stride, self.padding = len(layers), layers[0].stride, layers[0].padding
        self.weight = weight  # (G, Co, Ci, k, k), or a function that gives it

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight() if callable(self.weight) else self.weight
        # flat and back: a 1x1 weight may carry the strides of channels_last, which the result would follow
        weight = weight.reshape(-1).view(-1, *weight.shape[2:])
        x = side_by_side(x, self.groups)
        y = F.conv2d(x, weight, None, self.stride, self.padding, 1, self.groups)
        return y.view(len(x) * self.groups, -1, *y.shape[2:])


class GroupedLinear(nn.Module):
    def __init__(self, groups: int, parameters: Any):
        super().__init__()
        self.groups, self.parameters_of = groups, parameters  # weights (G, Co, Ci) and biases (G, Co)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.parameters_of()
        x = x.view(-1, self.groups, x.shape[1]).transpose(0, 1)
        return (
            torch.baddbmm(bias[:, None].to(x.dtype), x, weight.transpose(1, 2).to(x.dtype))
            .transpose(0, 1)
            .flatten(0, 1)
        )


class GroupedNorm(nn.Module):
    """One BatchNorm over G·C channels: every group its own."""

    def __init__(self, layers: Sequence[nn.BatchNorm2d]):
        super().__init__()
        first = layers[0]
        self.groups = len(layers)
        self.norm = BatchNorm2d(self.groups * first.num_features, first.eps, first.momentum).to(first.weight)
        with torch.no_grad():
            for name, value in self.norm.state_dict().items():
                if value.dim():
                    value.copy_(torch.cat([layer.state_dict()[name] for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(side_by_side(x, self.groups)).view(x.shape)


def group(networks: Sequence[nn.Module], trained: bool = False) -> tuple[nn.Module, list[tuple[str, nn.Parameter]]]:
    """One network over all, and its parameters by name, each (G, ...) or, of norms, (G·C)."""
    one = copy.deepcopy(networks[0])
    named: list[tuple[str, nn.Parameter]] = []
    for name, module in list(one.named_modules()):
        layers: list[Any] = [network.get_submodule(name) for network in networks]
        replacement: nn.Module | None = None
        if isinstance(module, nn.Conv2d):
            weight = nn.Parameter(
                torch.stack([layer.weight.detach().contiguous() for layer in layers]), requires_grad=trained
            )
            replacement = GroupedConv(layers, weight)
            named.append((f"{name}.weight", weight))
        elif isinstance(module, nn.Linear):
            weight, bias = (
                nn.Parameter(torch.stack([getattr(layer, key).detach() for layer in layers]), requires_grad=trained)
                for key in ("weight", "bias")
            )
            replacement = GroupedLinear(len(layers), lambda weight=weight, bias=bias: (weight, bias))
            named += [(f"{name}.weight", weight), (f"{name}.bias", bias)]
        elif isinstance(module, nn.BatchNorm2d):
            replacement = GroupedNorm(layers)
            named += [(f"{name}.{key}", p) for key, p in replacement.norm.named_parameters()]
        elif isinstance(module, Normalize) and any(not torch.equal(layer.mean, module.mean) for layer in layers):
            raise NotImplementedError("networks that normalise images differently")
        if replacement is not None:
            parent, _, last = name.rpartition(".")
            setattr(one.get_submodule(parent), last, replacement)
    return one, named


def repeat(x: Tensor, groups: int) -> Tensor:
    """Every image once per group, (B·G, 3, H, W), contiguous."""
    return x.contiguous().repeat_interleave(groups, 0)


def by_group(logits: Tensor, groups: int) -> Tensor:
    """(B·G, C) → (G, B, C)."""
    return logits.unflatten(0, (-1, groups)).transpose(0, 1)


class GroupedStep(EagerStep):
    """The perturbation's single members run as in ``eager``: one network a call leaves nothing to group."""

    def __init__(self, problem: Problem):
        super().__init__(problem)
        self.together, _ = group(list(self.teachers.networks))
        contiguous(self.together.eval())
        self.branched: nn.Module | None = None
        if self.factors:
            # the same parameters and statistics, in another arrangement: modules are shared, not copied
            memo: dict[int, Any] = {id(t): t for t in (*self.network.parameters(), *self.network.buffers())}
            memo |= {id(m): m for m in self.network.modules() if isinstance(m, nn.BatchNorm2d)}
            kept = {id(m): m for m in self.network.modules() if isinstance(m, ActivationLayer)}
            self.branched = replace_layers(
                copy.deepcopy(self.network, memo | kept), ActivationLayer, self.grouped_layer
            )

    def grouped_layer(self, module: ActivationLayer) -> nn.Module:
        wrapped = RankOneLayer.__new__(RankOneLayer)
        nn.Module.__init__(wrapped)
        wrapped.layer, wrapped.delta_r, wrapped.delta_s, wrapped.groups = (
            module.layer, module.delta_r, module.delta_s, 1,
        )  # fmt: skip
        if isinstance(module.layer, nn.Conv2d):
            layers = [module.layer] * self.k
            return GroupedConv(layers, lambda: wrapped.effective(wrapped.r, wrapped.s)[0].contiguous())
        return GroupedLinear(self.k, lambda: wrapped.effective(wrapped.r, wrapped.s))

    def all_teachers(self, x: Tensor) -> Tensor:
        count = len(self.teachers)
        return by_group(self.together(repeat(x, count)), count)

    def branches(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        if self.branched is None or chosen is not None:
            return super().branches(x, chosen)
        self.branched.train(self.network.training)
        return by_group(self.branched(repeat(x, self.k)), self.k)


class GroupedTeach(EagerTeach):
    """M networks trained as one: their weights, statistics and batches side by side."""

    def __init__(self, problem: Problem):
        super().__init__(problem)
        self.originals = self.networks
        self.one, self.named = group(self.originals, trained=True)
        contiguous(self.one.train())
        self.optimizer.param_groups[0]["params"] = [p for _, p in self.named]

    def logits(self, images: Sequence[Tensor]) -> Sequence[Tensor]:
        count = len(images)
        x = torch.stack([x.contiguous() for x in images], 1).flatten(0, 1)
        return by_group(self.one(x), count).unbind()

    def state(self) -> dict[str, list[Tensor]]:
        """Taken apart again, network by network."""
        count, own = len(self.originals), dict(self.named)
        found: dict[str, list[Tensor]] = {"shared": [], "statistics": []}
        norms = {name: m.norm for name, m in self.one.named_modules() if isinstance(m, GroupedNorm)}
        for m, network in enumerate(self.originals):
            for name, p in network.named_parameters():
                value = own[name]
                found["shared"].append(value[m] if value.dim() > p.dim() else value.unflatten(0, (count, -1))[m])
            for name, _ in network.named_buffers():
                parent, _, last = name.rpartition(".")
                if last in ("running_mean", "running_var"):
                    found["statistics"].append(getattr(norms[parent], last).unflatten(0, (count, -1))[m])
        return found
