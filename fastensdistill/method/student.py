"""Students: one network learning from M teachers through K branches (docs/method.md, Student).

Every student takes images (B, channels, H, W) in [0, 1] and returns logits (K, B, C), branch by branch:

| class           | branches share                                | tested as                                  |
|-----------------|-----------------------------------------------|--------------------------------------------|
| `Single`        | there is one                                  | itself                                     |
| `BatchEnsemble` | all but a rank-one factor per layer           | an ensemble of K branches                  |
| `LatentBE`      | the same                                      | one network, the average of the branches   |
| `Hydra`         | all but the last linear layer                 | an ensemble of K heads                     |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from fastensdistill.errors import InputError
from fastensdistill.method.base import Single, Student, check_branch_count
from fastensdistill.method.calls import call
from fastensdistill.method.copying import copy_network
from fastensdistill.method.hydra import Hydra, MultiHead
from fastensdistill.method.modes import set_mode
from fastensdistill.method.rank_one_layer import RankOneLayer, mixed_factors
from fastensdistill.method.wrapping import ranked_copy

__all__ = [
    "STUDENTS", "BatchEnsemble", "Hydra", "LatentBE", "MultiHead", "RankOneLayer", "Single", "Student",
    "reestimate_batch_norm",
]  # fmt: skip
Merged = tuple[Tensor, Tensor | None]


class BatchEnsemble(Student):
    """K branches over one set of weights: every Conv2d and Linear of a copy of ``module`` gets factors r and s.

    BatchNorm is shared, statistics included: in training mode they are taken over all branches together.
    Source: Wen et al., "BatchEnsemble", ICLR 2020; Nam et al., ICML 2022; docs/method.md, Student.

    Everything else is shared: BatchNorm, embeddings, tables, and convolutions of other kinds (Conv1d, Conv3d,
    ConvTranspose2d). Layers that share a weight share their factors. The module given is left as it is.

    Raises InputError for ``branches`` < 1, for a module without Conv2d and Linear layers, and for one that cannot have
    branches: see :func:`fastensdistill.method.wrapping.ranked_copy`.
    """

    kind = "batch-ensemble"

    def __init__(self, module: nn.Module, branches: int):
        super().__init__()
        self.branches = branches = check_branch_count(branches)
        self.module = ranked_copy(module, branches)
        if not self.layers():
            raise InputError(f"{type(module).__name__} has no Conv2d or Linear layer for {self.kind} to wrap")

    def layers(self) -> list[RankOneLayer]:
        """The wrapped layers, in the order of the network."""
        return [m for m in self.module.modules() if isinstance(m, RankOneLayer)]

    def forward(self, x: Tensor, branches: Sequence[int] | None = None) -> Tensor:
        chosen = self._chosen(branches)
        self.check(x)
        layers = self.layers()
        for layer in layers:
            layer.active, layer.images = chosen, len(x)
        try:
            logits = call(self.module, torch.cat([x] * len(chosen)) if len(chosen) > 1 else x, self._named())
        finally:
            for layer in layers:
                layer.images = None
        if len(logits) != len(chosen) * len(x):
            raise InputError(
                f"{self._named()} returned {tuple(logits.shape)} for {len(chosen)} branches of {len(x)} images; "
                "expected a row for each"
            )
        return logits.unflatten(0, (len(chosen), len(x)))

    def factors(self) -> list[nn.Parameter]:
        every = {id(p): p for layer in self.layers() for p in (layer.delta_r, layer.delta_s)}  # tied ones once
        return list(every.values())

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        # ½‖δ‖²/K in the loss and a gradient multiplied by K is plain SGD at K times the rate and 1/K the decay.
        factors = self.factors()
        own = {id(p) for p in factors}
        shared = [p for p in self.parameters() if id(p) not in own]
        k = self.branches
        return [
            {"params": shared, "lr_scale": 1.0, "weight_decay": weight_decay},
            {"params": factors, "lr_scale": float(k), "weight_decay": weight_decay / k},
        ]

    def branch(self, k: int) -> nn.Module:
        """One ordinary network of the wrapped class: branch ``k``, in evaluation mode, sharing nothing."""
        self._chosen([k])
        return self._merge(lambda layer: _only(layer.effective(layer.r[k : k + 1], layer.s[k : k + 1])))

    def average(self) -> nn.Module:
        """One ordinary network of the wrapped class: ``W ∘ (s̄ ⊗ r̄)``, bias ``s̄ ∘ b``, BatchNorm as it stands.

        In evaluation mode, whatever mode the student is in; it shares nothing with the student. Layers with weight
        norm or pruning keep it; spectral norm and parametrisations that cannot express the average give way to an
        ordinary weight.
        """
        return self._merge(
            lambda layer: _only(layer.effective(layer.r.mean(0, keepdim=True), layer.s.mean(0, keepdim=True)))
        )

    @torch.no_grad()
    def mixed(self, weights: Tensor) -> BatchEnsemble:
        """A student of P branches whose factors are mixtures of this one's: ``r_p = Σ_k w[p, k] r_k``, s alike.

        ``weights`` are (P, K), rows that sum to one: the row 1/K gives the average, the unit rows the branches, other
        rows the networks between them, and beyond them where a weight is negative (docs/method.md, Averaging). In
        evaluation mode; it shares nothing with this student. Raises InputError for other weights.
        """
        rows = weights.double()
        if rows.ndim != 2 or rows.shape[1] != self.branches or not len(rows):
            raise InputError(f"weights of shape {tuple(weights.shape)}: expected (points, {self.branches})")
        if not bool(((rows.sum(1) - 1).abs() < 1e-5).all()):
            raise InputError("weights: expected rows that sum to one")
        mixed = BatchEnsemble.__new__(BatchEnsemble)
        Student.__init__(mixed)
        mixed.branches, mixed.checked = len(rows), set(self.checked)
        mixed.module = copy_network(self.module, forget=True)
        for layer in mixed.layers():
            for name in ("delta_r", "delta_s"):
                delta = getattr(layer, name)
                setattr(layer, name, nn.Parameter(mixed_factors(delta, weights), delta.requires_grad))
            layer.active = tuple(range(len(rows)))
        set_mode(mixed, False)
        return mixed

    def average_effective_weights(self) -> nn.Module:
        """One ordinary network whose weights are the mean of the branches' weights: ``mean_k(s_k ⊗ W ⊗ r_k)``.

        The mean of products, where :meth:`average` (the paper's) takes the product of means.
        """

        def merge(layer: RankOneLayer) -> Merged:
            weight, bias = layer.effective(layer.r, layer.s)
            return weight.mean(0), None if bias is None else bias.mean(0)

        return self._merge(merge)

    @torch.no_grad()
    def _merge(self, merge: Callable[[RankOneLayer], Merged]) -> nn.Module:
        # In evaluation mode: straight after training its first use would otherwise change the running statistics
        network = set_mode(copy_network(self.module, forget=True), False)
        layers = [m for m in network.modules() if isinstance(m, RankOneLayer)]
        for layer in layers:
            layer.compute()
        values = [merge(layer) for layer in layers]  # all before the first is written: some may share a weight
        for layer, value in zip(layers, values, strict=True):
            layer.become_merged(*value)
        return network


def _only(values: Merged) -> Merged:
    weight, bias = values
    return weight[0], None if bias is None else bias[0]


class LatentBE(BatchEnsemble):
    """The paper's student: trained as a BatchEnsemble, tested and shipped as the average of its branches."""

    kind = "latent-be"

    def deployed(self) -> nn.Module:
        return self.average()


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
    seen = 0
    try:
        for images in batches:
            if not seen:  # nothing is lost where there are no batches
                set_mode(network, False)
                for norm in norms:
                    norm.reset_running_stats()
                    norm.train()
            seen += 1
            for norm in norms:
                norm.momentum = 1.0 / seen
            network(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for m, training in modes.items():
            m.training = training
    if not seen:
        raise InputError("re-estimating BatchNorm needs at least one batch of images, got none")
    return network
