"""A hydra as one plain network: K heads on the same features are one linear layer with K·C outputs.

Row k·C + c of its weight is row c of head k, and logits (1, B, K·C) are those of the branches (K, B, C) in another
order, so that body and heads run as a single group of the ordinary launches.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from fastensdistill.engine.parameters import FlatParameters, View
from fastensdistill.errors import InputError
from fastensdistill.method.student import Hydra, MultiHead


def split(logits: Tensor, K: int) -> Tensor:
    """(1, B, K·C) → (K, B, C)."""
    return logits[0].unflatten(1, (K, -1)).transpose(0, 1).contiguous()


def join(seed: Tensor) -> Tensor:
    """(K, B, C) → (1, B, K·C)."""
    return seed.transpose(0, 1).flatten(1)[None]


def substituted(root: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """``root`` with the module at ``path`` replaced; every module that does not contain it is shared, not copied."""
    name, _, rest = path.partition(".")
    clone = copy.copy(root)
    clone._modules = dict(root._modules)
    child = root.get_submodule(name)
    clone._modules[name] = substituted(child, rest, new) if rest else new
    return clone


class Heads:
    """The heads of ``student`` in one layer of ``module``, a plain network that shares everything else with it.

    Raises InputError where the heads are the whole network.
    """

    def __init__(self, student: Hydra):
        found = [(name, m) for name, m in student.module.named_modules() if isinstance(m, MultiHead)]
        (self.path, self.heads), self.K = found[0], student.branches
        if not self.path:
            raise InputError("the student consists of nothing but its heads; expected a network below them")
        first = self.heads.heads[0]
        assert isinstance(first, nn.Linear)
        self.layer = nn.utils.skip_init(  # an initialisation would draw from everybody's generator
            nn.Linear, first.in_features, self.K * first.out_features, bias=first.bias is not None,
            device=first.weight.device, dtype=first.weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            for name, parameter in self.layer.named_parameters():
                heads = [head.get_parameter(name) for head in self.heads.heads]
                parameter.copy_(torch.cat(tuple(heads))).requires_grad_(any(head.requires_grad for head in heads))
        self.module = substituted(student.module, self.path, self.layer)

    def tie(self) -> None:
        """Make the heads' parameters views of the one layer's, wherever its memory is by now."""
        for name, parameter in self.layer.named_parameters():
            for head, rows in zip(self.heads.heads, parameter.data.chunk(self.K), strict=True):
                head.get_parameter(name).data = rows

    def hold(self, parameters: FlatParameters) -> None:
        """Make the heads' parameters those that ``parameters`` asks whether they are frozen, instead of the layer's."""
        layer = {id(parameter): name for name, parameter in self.layer.named_parameters()}
        heads = list(enumerate(self.heads.heads))
        parameters.held = [
            (head.get_parameter(layer[id(p)]), partial(self._rows, view, k)) if head is not None else (p, view)
            for p, view in parameters.held
            for k, head in (heads if id(p) in layer else [(0, None)])
        ]
        parameters.follow()

    def _rows(self, view: View, k: int, flat: Tensor) -> Tensor:
        return view(flat).chunk(self.K)[k]

    def by_head(self, momenta: dict[str, Tensor]) -> dict[str, Tensor]:
        """Values by the plain network's parameter names → by the student's."""
        own = dict(momenta)
        for name, _ in self.layer.named_parameters():
            for k, rows in enumerate(own.pop(f"{self.path}.{name}").chunk(self.K)):
                own[f"{self.path}.heads.{k}.{name}"] = rows
        return own
