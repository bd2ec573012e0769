"""A shared body and K heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastensdistill.errors import InputError
from fastensdistill.method.base import Student, check_branch_count
from fastensdistill.method.calls import call
from fastensdistill.method.computed_weights import originals, take_hooks, write
from fastensdistill.method.copying import copy_network
from fastensdistill.method.modes import set_mode
from fastensdistill.method.shared_weight import SharedWeight
from fastensdistill.method.wrapping import check_copyable, check_references, tied_groups
from fastensdistill.models.wrappers import unwrap


class MultiHead(nn.Module):
    """K copies of a linear layer, applied to the same features: (B, Cin) → (K·B, Cout).

    Stacked along the batch, so that what follows in the network (a log-softmax over dimension 1) is done to each head's
    logits as it is to the wrapped network's.

    It answers for the layer's attributes; ``weight`` and ``bias`` have no one value and refuse to be computed with.
    """

    active: tuple[int, ...]

    def __init__(self, layer: nn.Linear, branches: int, where: str = "head"):
        super().__init__()
        heads = [copy_network(layer) for _ in range(branches)]
        for head in heads[1:]:  # equal heads would part only through their teachers: start them apart
            _start_apart(head, layer)
        self.heads, self.where = nn.ModuleList(heads), where
        self.active = tuple(range(branches))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            heads = self.__dict__.get("_modules", {}).get("heads")
            if name.startswith("__") or not heads:
                raise
            if name in ("weight", "bias"):
                own = originals(heads[0], name)
                if not own:
                    return None
                shape = (heads[0].out_features, heads[0].in_features)[: 2 if name == "weight" else 1]
                return SharedWeight.of(shape, own[0], f"{self.where}.{name}", len(heads))
            return getattr(heads[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.cat([self.heads[k](*args, **kwargs) for k in self.active])


@torch.no_grad()
def _start_apart(head: nn.Linear, layer: nn.Linear) -> None:
    """A weight of its own at random, of the same scale as ``layer``'s."""
    scale = layer.weight.std()
    if head._parameters.get("weight") is not None:
        head.reset_parameters()
        head.weight.mul_(scale / head.weight.std())
        return
    plain = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None).to(head.weight)
    values = {"weight": plain.weight * (scale / plain.weight.std())}
    write(head, take_hooks(head), values if head.bias is None else values | {"bias": plain.bias})


class Hydra(Student):
    """A shared body and K heads: the last Linear layer of a copy of ``module``, K times, each started at random.

    Source: Tran et al., "Hydra: preserving ensemble diversity for model distillation", 2020.
    Raises InputError where the module's last Conv2d or Linear is not a Linear that ends it.
    """

    kind = "hydra"

    def __init__(self, module: nn.Module, branches: int):
        super().__init__()
        self.branches = branches = check_branch_count(branches)
        module = unwrap(module)
        check_copyable(module)
        layers = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        if not layers or not isinstance(layers[-1][1], nn.Linear):
            raise InputError(f"hydra needs a network that ends in a Linear layer; {type(module).__name__} does not")
        name, last = layers[-1]
        if tied_groups(module, {name: last}):
            raise InputError(f"hydra: the weight of {name!r} is shared with another layer, but there are K of it")
        check_references(module, {name: last})
        self.module = copy_network(module)
        become_heads(self.module.get_submodule(name), branches, name or type(module).__name__)

    def branch(self, k: int) -> nn.Module:
        """One ordinary network of the wrapped class, with head ``k``, in evaluation mode, sharing nothing."""
        self._chosen([k])
        network = set_mode(copy_network(self.module, forget=True), False)
        for m in [m for m in network.modules() if isinstance(m, MultiHead)]:
            head = m.heads[k]
            m.__class__, m.__dict__ = type(head), head.__dict__  # type: ignore[assignment]
        return network

    def forward(self, x: Tensor, branches: Sequence[int] | None = None) -> Tensor:
        chosen = self._chosen(branches)
        self.check(x)
        for m in self.module.modules():
            if isinstance(m, MultiHead):
                m.active = chosen
        logits = call(self.module, x, self._named())
        if logits.ndim != 2 or len(logits) != len(chosen) * len(x):
            raise InputError(
                f"hydra: {type(self.module).__name__} returned {tuple(logits.shape)}, expected "
                f"({len(chosen) * len(x)}, classes); its last Linear layer must be the end of the network"
            )
        return logits.unflatten(0, (len(chosen), len(x)))


def become_heads(layer: nn.Module, branches: int, where: str) -> None:
    """Turn ``layer`` into K heads, wherever it is referred to."""
    inner = object.__new__(type(layer))
    inner.__dict__ = layer.__dict__
    layer.__dict__ = {}
    layer.__class__ = MultiHead
    MultiHead.__init__(layer, inner, branches, where)  # type: ignore[arg-type]
