"""Students: one network learning from M teachers through K branches (method §1).

Every student takes images (B, channels, H, W) in [0, 1] and returns logits (K, B, C), branch by branch:

| class           | branches share                                | tested as                                  |
|-----------------|-----------------------------------------------|--------------------------------------------|
| `Single`        | there is one                                  | itself                                     |
| `BatchEnsemble` | all but a rank-one factor per layer           | an ensemble of K branches                  |
| `LatentBE`      | the same                                      | one network, the average of the branches   |
| `Hydra`         | all but the last linear layer                 | an ensemble of K heads                     |
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fastensdistill.errors import InputError
from fastensdistill.method.calls import call


class RankOneLayer(nn.Module):
    """A Conv2d or Linear with the effective weight ``W_k = s_k ⊗ W ⊗ r_k`` and bias ``s_k ∘ b`` in branch k.

    ``r`` (K, Cin) and ``s`` (K, Cout) are stored as deviations from one, ``delta_r`` and ``delta_s``, so that weight
    decay pulls them towards one and no precision is lost near it. Input and output stack the active branches along
    the batch: (len(active)·B, ...).
    """

    active: tuple[int, ...]

    def __init__(self, layer: nn.Conv2d | nn.Linear, branches: int):
        super().__init__()
        self.layer = layer
        self.groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        cin = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
        cout = layer.weight.shape[0]
        self.delta_r = nn.Parameter(layer.weight.new_zeros(branches, cin))
        self.delta_s = nn.Parameter(layer.weight.new_zeros(branches, cout))
        self.active = tuple(range(branches))

    @property
    def r(self) -> Tensor:
        return 1 + self.delta_r

    @property
    def s(self) -> Tensor:
        return 1 + self.delta_s

    def effective(self, r: Tensor, s: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights (k, *weight.shape) and biases (k, Cout) for factors r (k, Cin) and s (k, Cout)."""
        weight, bias, k, g = self.layer.weight, self.layer.bias, len(r), self.groups
        taps = (1,) * (weight.ndim - 2)
        scale = s.view(k, g, -1, 1, *taps) * r.view(k, g, 1, -1, *taps)
        folded = weight.unflatten(0, (g, -1)) * scale
        return folded.flatten(1, 2), None if bias is None else s * bias

    def forward(self, x: Tensor) -> Tensor:
        if self.active == tuple(range(len(self.delta_r))):
            weights, biases = self.effective(self.r, self.s)
        else:
            # indexing with a list would wait for the device
            r, s = (torch.stack([delta[k] for k in self.active]) for delta in (self.delta_r, self.delta_s))
            weights, biases = self.effective(1 + r, 1 + s)
        # One call per branch: no pass over activations is spent on r or s, forward or backward.
        outputs = [
            self.apply_weight(x_k, weights[k], None if biases is None else biases[k])
            for k, x_k in enumerate(x.chunk(len(self.active)))
        ]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if type(self.layer).forward is nn.Linear.forward:
            return F.linear(x, weight, bias)
        if isinstance(self.layer, nn.Conv2d) and type(self.layer).forward is nn.Conv2d.forward:
            return self.layer._conv_forward(x, weight, bias)
        replaced = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return functional_call(self.layer, replaced, (x,))  # a subclass with a forward of its own

    def merged(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """An ordinary copy of the wrapped layer that holds ``weight`` and ``bias``."""
        layer = copy.deepcopy(self.layer)
        with torch.no_grad():
            layer.weight.copy_(weight)
            if bias is not None and layer.bias is not None:
                layer.bias.copy_(bias)
        return layer

    def extra_repr(self) -> str:
        return f"branches={len(self.delta_r)}"


class Student(nn.Module):
    """What the trainer needs of a student. ``forward(x, branches=[a, b])`` evaluates only those branches."""

    kind: str
    branches: int
    module: nn.Module

    def forward(self, x: Tensor, branches: Sequence[int] | None = None) -> Tensor:
        raise NotImplementedError

    def deployed(self) -> nn.Module:
        """What is tested, validated and shipped: an ordinary network, or the student itself, as an ensemble."""
        return self

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Parameter groups for SGD; the learning rate of each is the schedule's times ``lr_scale`` (method §2)."""
        return [{"params": list(self.parameters()), "lr_scale": 1.0, "weight_decay": weight_decay}]

    def penalty(self) -> Tensor:
        """``L_WD``: half the squared norm of all parameters; deviations of r and s count 1/K (method §2)."""
        groups = self.parameter_groups(1.0)
        return sum((g["weight_decay"] * p.square().sum() for g in groups for p in g["params"]), torch.tensor(0.0)) / 2

    def _named(self) -> str:
        return f"the student's {type(self.module).__name__}"

    def _chosen(self, branches: Sequence[int] | None) -> tuple[int, ...]:
        chosen = tuple(range(self.branches)) if branches is None else tuple(branches)
        if not chosen or any(not 0 <= k < self.branches for k in chosen):
            raise InputError(f"branches={list(chosen)}: expected indices from 0 to {self.branches - 1}")
        return chosen


class Single(Student):
    """A plain network with the student's interface: logits (1, B, C). The student of plain distillation."""

    kind = "single"

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.branches = module, 1

    def forward(self, x: Tensor, branches: Sequence[int] | None = None) -> Tensor:
        self._chosen(branches)
        return call(self.module, x, self._named()).unsqueeze(0)

    def deployed(self) -> nn.Module:
        return self.module


class BatchEnsemble(Student):
    """K branches over one set of weights: every Conv2d and Linear of a copy of ``module`` gets factors r and s.

    BatchNorm is shared, statistics included: in training mode they are taken over all branches together.
    Source: Wen et al., "BatchEnsemble", ICLR 2020; Nam et al., ICML 2022, section 3.

    Raises InputError for ``branches`` < 1, for a module without Conv2d and Linear layers, and for attention layers,
    whose projections are not called as layers.
    """

    kind = "batch-ensemble"

    def __init__(self, module: nn.Module, branches: int):
        super().__init__()
        _check_branches(branches)
        self.branches = branches
        self.module = _replace(copy.deepcopy(module), _wrap_with(branches))
        if not self.layers():
            raise InputError(f"{type(module).__name__} has no Conv2d or Linear layer for {self.kind} to wrap")

    def layers(self) -> list[RankOneLayer]:
        return [m for m in self.module.modules() if isinstance(m, RankOneLayer)]

    def forward(self, x: Tensor, branches: Sequence[int] | None = None) -> Tensor:
        chosen = self._chosen(branches)
        for layer in self.layers():
            layer.active = chosen
        logits = call(self.module, torch.cat([x] * len(chosen)) if len(chosen) > 1 else x, self._named())
        if len(logits) != len(chosen) * len(x):
            raise InputError(
                f"{self._named()} returned {tuple(logits.shape)} for {len(chosen)} branches of {len(x)} images; "
                "expected a row for each"
            )
        return logits.unflatten(0, (len(chosen), len(x)))

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        # ½‖δ‖²/K in the loss and a gradient multiplied by K is plain SGD at K times the rate and 1/K the decay.
        factors = [p for layer in self.layers() for p in (layer.delta_r, layer.delta_s)]
        own = {id(p) for p in factors}
        shared = [p for p in self.parameters() if id(p) not in own]
        k = self.branches
        return [
            {"params": shared, "lr_scale": 1.0, "weight_decay": weight_decay},
            {"params": factors, "lr_scale": float(k), "weight_decay": weight_decay / k},
        ]

    def average(self) -> nn.Module:
        """One ordinary network of the wrapped class: ``W ∘ (s̄ ⊗ r̄)``, bias ``s̄ ∘ b``, BatchNorm as it stands.

        In evaluation mode, whatever mode the student is in; it shares nothing with the student.
        """

        def merge(layer: RankOneLayer) -> nn.Module:
            weight, bias = layer.effective(layer.r.mean(0, keepdim=True), layer.s.mean(0, keepdim=True))
            return layer.merged(weight[0], None if bias is None else bias[0])

        return self._merge(merge)

    def average_effective_weights(self) -> nn.Module:
        """One ordinary network whose weights are the mean of the branches' weights: ``mean_k(s_k ⊗ W ⊗ r_k)``.

        The mean of products, where :meth:`average` (the paper's) takes the product of means.
        """

        def merge(layer: RankOneLayer) -> nn.Module:
            weight, bias = layer.effective(layer.r, layer.s)
            return layer.merged(weight.mean(0), None if bias is None else bias.mean(0))

        return self._merge(merge)

    @torch.no_grad()
    def _merge(self, merge: Callable[[RankOneLayer], nn.Module]) -> nn.Module:
        # Straight after training its first use would otherwise change the running statistics
        return _replace(copy.deepcopy(self.module), lambda m: merge(m) if isinstance(m, RankOneLayer) else None).eval()


class LatentBE(BatchEnsemble):
    """The paper's student: trained as a BatchEnsemble, tested and shipped as the average of its branches."""

    kind = "latent-be"

    def deployed(self) -> nn.Module:
        return self.average()


class MultiHead(nn.Module):
    """K copies of a linear layer, applied to the same features: (B, Cin) → (K·B, Cout).

    Stacked along the batch, so that what follows in the network (a log-softmax over dimension 1) is done to each head's
    logits as it is to the wrapped network's.
    """

    active: tuple[int, ...]

    def __init__(self, layer: nn.Linear, branches: int):
        super().__init__()
        heads = [copy.deepcopy(layer) for _ in range(branches)]
        for head in heads[1:]:  # equal heads would part only through their teachers: start them apart
            head.reset_parameters()
            with torch.no_grad():
                head.weight.mul_(layer.weight.std() / head.weight.std())
        self.heads = nn.ModuleList(heads)
        self.active = tuple(range(branches))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.heads[k](x) for k in self.active])


class Hydra(Student):
    """A shared body and K heads: the last Linear layer of a copy of ``module``, K times, each started at random.

    Source: Tran et al., "Hydra: preserving ensemble diversity for model distillation", 2020.
    Raises InputError where the module's last Conv2d or Linear is not a Linear that ends it.
    """

    kind = "hydra"

    def __init__(self, module: nn.Module, branches: int):
        super().__init__()
        _check_branches(branches)
        self.branches = branches
        layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        if not layers or not isinstance(layers[-1], nn.Linear):
            raise InputError(f"hydra needs a network that ends in a Linear layer; {type(module).__name__} does not")
        last = layers[-1]
        heads = MultiHead(last, branches)
        name = next(n for n, m in module.named_modules() if m is last)
        self.module = copy.deepcopy(module)
        copied = self.module.get_submodule(name)
        self.module = _replace(self.module, lambda m: heads if m is copied else None)

    def forward(self, x: Tensor, branches: Sequence[int] | None = None) -> Tensor:
        chosen = self._chosen(branches)
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


STUDENTS: dict[str, Callable[[nn.Module, int], Student]] = {
    "single": lambda module, branches: Single(module),
    "batch-ensemble": BatchEnsemble,
    "latent-be": LatentBE,
    "hydra": Hydra,
}


@torch.no_grad()
def reestimate_batch_norm(network: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Replace every BatchNorm's running statistics by the equally weighted mean over ``batches`` of images; in place.

    The paper leaves BatchNorm as training left it; this is the usual remedy for weight averages of other kinds.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    modes = {m: m.training for m in network.modules()}
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    seen = 0
    for images in batches:
        seen += 1
        for norm in norms:
            norm.momentum = 1.0 / seen
        network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for m, training in modes.items():
        m.training = training
    if not seen:
        raise InputError("re-estimating BatchNorm needs at least one batch of images, got none")
    return network


def _check_branches(branches: int) -> None:
    if not isinstance(branches, int) or branches < 1:
        raise InputError(f"branches={branches!r}: expected an integer of at least 1")


def _wrap_with(branches: int) -> Callable[[nn.Module], nn.Module | None]:
    def wrap(module: nn.Module) -> nn.Module | None:
        if isinstance(module, nn.MultiheadAttention):
            raise InputError("MultiheadAttention cannot be wrapped: expected a convolutional network")
        if isinstance(module, nn.Conv2d | nn.Linear):
            return RankOneLayer(module, branches)
        return None

    return wrap


def _replace(root: nn.Module, substitute: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Swap every module for which ``substitute`` returns one, wherever it is used; ``root`` itself included."""
    done: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if module not in done:
            new = substitute(module)
            done[module] = module if new is None else new
            if new is None:
                for name, child in module.named_children():
                    setattr(module, name, visit(child))
        return done[module]

    return visit(root)
