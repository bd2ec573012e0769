"""What a student is to the fused engine: plain networks of one architecture, a class for each kind of student.

| student       | its architecture is that of    | groups in a pass | its networks, as validated            |
|---------------|--------------------------------|------------------|---------------------------------------|
| Single        | its module                     | 1                | itself                                |
| BatchEnsemble | a branch                       | K, a branch each | the K branches                        |
| LatentBE      | a branch                       | K, a branch each | the average, then the K branches      |
| Hydra         | its module, K·C outputs wide   | 1                | none: the heads are one layer of one  |

A hydra's K heads on the same features are one linear layer with K·C outputs: row k·C + c of its weight is row c of head
k, so that body and heads run as a single group of the ordinary launches.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastensdistill.engine.common import State, state_of
from fastensdistill.engine.parameters import FlatParameters, View
from fastensdistill.errors import InputError
from fastensdistill.method.rank_one_layer import mixed_factors
from fastensdistill.method.student import BatchEnsemble, Hydra, LatentBE, MultiHead, Single, Student
from fastensdistill.network.fold import fold_branches
from fastensdistill.network.launch import Group
from fastensdistill.network.nodes import Network
from fastensdistill.network.plan import branch_groups


class PlainStudent:
    """A network that is trained as it is; what students of other kinds are instead, their classes say.

    Attributes:
        trained: the module whose parameters are trained, with a plain network's layers.
        ranked: whether these layers have rank-one factors, K of each.
        groups: how many groups it is in a pass, with the logits of ``branches`` / ``groups`` branches each.
        deployed: how many of its networks are what is deployed; the last K of them are its branches.
    """

    ranked = False
    trained: nn.Module

    def __init__(self, student: Any):
        self.student, self.branches = student, student.branches
        self.trained = student.module
        self.groups = self.deployed = 1

    def architecture(self) -> nn.Module:
        """A plain network, to be traced."""
        return self.trained

    def take_over(self, network: Network) -> FlatParameters:
        """The parameters of what is trained, which the student's own are views of from here on."""
        return FlatParameters([self.trained], network, self.ranked)

    def training_groups(self) -> list[Group]:
        """Its groups of the pass that trains it, where BatchNorm's statistics are over all of them."""
        return branch_groups(self.groups)

    def classes(self, network: Network) -> int:
        """Of a branch, given the traced architecture."""
        return network.by_name[network.output].shape[0] * self.groups // self.branches

    def branch_logits(self, logits: Tensor) -> Tensor:
        """Logits (K, B, C) of the branches from those of the groups."""
        return logits

    def group_logits(self, logits: Tensor) -> Tensor:
        """Back: logits of the groups, or gradients of theirs, from those of the branches."""
        return logits

    def states(self) -> list[State]:
        """State dicts of its networks; what they share is the student's own memory.

        Raises InputError for a student that is not made of plain networks which share an architecture.
        """
        return [state_of(self.student.module)]

    def mixed(self, weights: Tensor) -> list[State]:
        """State dicts of the networks that have the branches' factors mixed by rows of ``weights`` (P, K).

        Raises InputError for a student whose branches have no factors.
        """
        raise InputError(f"a {self.student.kind} student has no factors to mix")


class PlainBranches(PlainStudent):
    """K branches that differ by the rank-one factors of their layers."""

    ranked = True

    def __init__(self, student: BatchEnsemble):
        super().__init__(student)
        self.groups = self.deployed = student.branches

    def architecture(self) -> nn.Module:
        average: nn.Module = self.student.average()
        return average

    def states(self) -> list[State]:
        return list(fold_branches(state_of(self.student.module), self.branches))

    def mixed(self, weights: Tensor) -> list[State]:
        state = state_of(self.student.module)
        for name, value in state.items():
            if name.endswith((".delta_r", ".delta_s")):
                state[name] = mixed_factors(value, weights)
        return list(fold_branches(state, len(weights)))


class PlainAverage(PlainBranches):
    """The same, of which the average is deployed: the branch whose factors are the mean ones."""

    def __init__(self, student: LatentBE):
        super().__init__(student)
        self.deployed = 1

    def states(self) -> list[State]:
        K = self.branches
        if K == 1:  # it is its own average
            return super().states()
        unit = torch.eye(K, dtype=torch.float64)
        return self.mixed(torch.cat([unit.mean(0, keepdim=True), unit]))


class PlainHeads(PlainStudent):
    """K heads as one layer of a network that shares everything else with the student.

    Raises InputError where the heads are the whole network.
    """

    def __init__(self, student: Hydra):
        super().__init__(student)
        named = student.module.named_modules()
        self.path, self.heads = next((name, m.heads) for name, m in named if isinstance(m, MultiHead))
        if not self.path:
            raise InputError("the student consists of nothing but its heads; expected a network below them")
        first: Any = self.heads[0]
        self.layer = nn.utils.skip_init(  # an initialisation would draw from everybody's generator
            nn.Linear, first.in_features, self.branches * first.out_features, bias=first.bias is not None,
            device=first.weight.device, dtype=first.weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            for name, parameter in self.layer.named_parameters():
                heads = [head.get_parameter(name) for head in self.heads]
                parameter.copy_(torch.cat(tuple(heads))).requires_grad_(any(head.requires_grad for head in heads))
        self.trained = substituted(student.module, self.path, self.layer)

    def take_over(self, network: Network) -> FlatParameters:
        parameters = super().take_over(network)
        names = {id(parameter): name for name, parameter in self.layer.named_parameters()}
        views: list[tuple[nn.Parameter, View]] = []  # each head's in place of the layer's: it may be frozen on its own
        for parameter, view in parameters.views:
            if name := names.get(id(parameter)):
                for k, (head, rows) in enumerate(zip(self.heads, parameter.data.chunk(self.branches), strict=True)):
                    head.get_parameter(name).data = rows
                    views.append((head.get_parameter(name), partial(self._rows, view, k)))
            else:
                views.append((parameter, view))
        parameters.views = views
        parameters.follow()
        return parameters

    def _rows(self, view: View, k: int, flat: Tensor) -> Tensor:
        return view(flat).chunk(self.branches)[k]

    def branch_logits(self, logits: Tensor) -> Tensor:
        """(1, B, K·C) → (K, B, C)."""
        return logits[0].unflatten(1, (self.branches, -1)).transpose(0, 1).contiguous()

    def group_logits(self, logits: Tensor) -> Tensor:
        """(K, B, C) → (1, B, K·C)."""
        return logits.transpose(0, 1).flatten(1)[None]

    def states(self) -> list[State]:
        raise InputError("a hydra student is not made of plain networks that share an architecture")


KINDS: list[tuple[type[Student], type[PlainStudent]]] = [
    (Single, PlainStudent), (LatentBE, PlainAverage), (BatchEnsemble, PlainBranches), (Hydra, PlainHeads),
]  # fmt: skip


def plain_student(student: Student) -> PlainStudent:
    """What ``student`` is to the engine. Raises InputError for one of another kind than those above."""
    for kind, plain in KINDS:
        if isinstance(student, kind):
            return plain(student)
    raise InputError(f"no plan covers a student of the kind {type(student).__name__}")


def substituted(root: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """``root`` with the module at ``path`` replaced; every module that does not contain it is shared, not copied."""
    name, _, rest = path.partition(".")
    clone = copy.copy(root)
    clone._modules = dict(root._modules)
    child = root.get_submodule(name)
    clone._modules[name] = substituted(child, rest, new) if rest else new
    return clone
