"""The step in plain, eager PyTorch: as the authors' code runs it, and with the least work.

Branches share one convolution call over K·B images, r and s multiply activations, as every published BatchEnsemble
layer does. What the other peers do differently are the three methods ``teacher``, ``all_teachers`` and ``branches``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from bench.setting import Batch, Distillation, Problem, Teaching
from fastensdistill.method.student import RankOneLayer


class ActivationLayer(nn.Module):
    """``s ∘ layer(r ∘ x)`` over activations of all branches, (k·B, ...); r and s are one plus what is stored."""

    def __init__(self, wrapped: RankOneLayer):
        super().__init__()
        self.layer, self.delta_r, self.delta_s = wrapped.layer, wrapped.delta_r, wrapped.delta_s

    def forward(self, x: Tensor) -> Tensor:
        taps = (1, 1) if x.ndim == 4 else ()
        each = len(x) // len(self.delta_r)
        r = (1 + self.delta_r).repeat_interleave(each, 0).unflatten(1, (-1, *taps))
        s = (1 + self.delta_s).repeat_interleave(each, 0).unflatten(1, (-1, *taps))
        return self.layer(x * r.to(x.dtype)) * s.to(x.dtype)


def replace_layers(network: nn.Module, kind: type[nn.Module], build) -> nn.Module:
    """``build(module)`` in the place of every submodule of ``kind``; ``network`` itself is changed."""
    for name, module in list(network.named_modules()):
        if isinstance(module, kind):
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, build(module))
    return network


def statistics(network: nn.Module) -> list[Tensor]:
    return [b for name, b in network.named_buffers() if name.endswith(("running_mean", "running_var"))]


class EagerStep:
    """One distillation step. ``as_written``: all teachers and branches forward and backward in the perturbation, decay
    as a term of the loss, no autocast; else four forwards, decay by the optimiser, bf16 where the config says so."""

    def __init__(self, problem: Problem, *, as_written: bool = False):
        assert isinstance(problem, Distillation)
        self.config, self.as_written = problem.config, as_written
        self.teachers = problem.teachers
        self.k, self.mean_target = problem.student.branches, problem.student.kind == "single"
        self.network = replace_layers(problem.student.module, RankOneLayer, self.layer)
        own = dict(self.network.named_parameters())
        self.named_factors = {name: p for name, p in own.items() if name.rpartition(".")[2] in ("delta_r", "delta_s")}
        self.factors = list(self.named_factors.values())
        self.shared = [p for name, p in own.items() if name not in self.named_factors]
        self.device = self.shared[0].device
        self.members = [torch.tensor([m], device=self.device) for m in range(max(self.k, len(self.teachers)))]
        rate, decay = self.config.learning_rate, self.config.weight_decay
        groups: list[dict[str, Any]] = [{"params": self.shared, "weight_decay": decay}]
        if self.factors:
            groups.append({"params": self.factors, "lr": self.k * rate, "weight_decay": decay / self.k})
        if as_written:
            groups = [{"params": [*self.shared, *self.factors]}]
        self.optimizer = torch.optim.SGD(groups, lr=rate, momentum=self.config.momentum, nesterov=True, fused=True)

    def layer(self, wrapped: RankOneLayer) -> nn.Module:
        return ActivationLayer(wrapped)

    def teacher(self, x: Tensor, member: Any) -> Tensor:
        """``member`` is a number, as ``a`` and ``b`` are below, or what a peer passes in its place."""
        return self.teachers.networks[member](x)

    def all_teachers(self, x: Tensor) -> Tensor:
        return self.teachers(x)

    def branches(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Logits (k, B, C) of the chosen branches, or of all."""
        if not self.factors:
            return self.network(x)[None]
        if chosen is None:
            return self.network(torch.cat([x] * self.k)).unflatten(0, (self.k, len(x)))
        # detached, all of them: asked for the images' gradient, a compiled backward computes the parameters' too
        own = {name: p.detach() for name, p in self.network.named_parameters()}
        own |= {name: own[name].index_select(0, chosen) for name in self.named_factors}
        return functional_call(self.network, own, torch.cat([x] * len(chosen))).unflatten(0, (-1, len(x)))

    def pair_logits(self, x: Tensor, watched: Tensor, a: Any, b: Any) -> Sequence[Tensor]:
        """Of teachers and branches a and b, with a graph for a."""
        if self.as_written:
            t, s = torch.stack([teacher(watched) for teacher in self.teachers.networks]), self.branches(watched)
            return t[a], t[b].detach(), s[a], s[b].detach()
        with torch.no_grad():
            t_b, s_b = self.teacher(x, b), self.branches(x, self.members[b])[0]
        return self.teacher(watched, a), t_b, self.branches(watched, self.members[a])[0], s_b

    def perturb(self, x: Tensor, a: Any, b: Any) -> Tensor:
        self.network.eval()
        watched = x.detach().requires_grad_()
        with self.autocast():
            t_a, t_b, s_a, s_b = (self.real(z) for z in self.pair_logits(x, watched, a, b))
        objective = F.cross_entropy(t_a, t_b.softmax(-1)) - F.cross_entropy(s_a, s_b.softmax(-1))
        (g,) = torch.autograd.grad(objective, watched)
        norm = g.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
        return (x + self.config.step_size * x[0].numel() ** 0.5 * g / norm).clamp(0, 1)

    def autocast(self) -> torch.autocast:
        enabled = self.config.precision == "bf16" and not self.as_written
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def real(self, logits: Tensor) -> Tensor:
        return logits.float() if logits.dtype == torch.bfloat16 else logits

    def distil(self, x: Tensor) -> Tensor:
        self.network.train()
        with self.autocast():
            with torch.no_grad():
                targets = self.real(self.all_teachers(x))
            logits = self.real(self.branches(x))
        tau = self.config.temperature
        targets = (targets / tau).softmax(-1)
        targets = targets.mean(0, keepdim=True) if self.mean_target else targets
        loss = tau**2 * F.cross_entropy((logits / tau).flatten(0, 1), targets.flatten(0, 1))
        objective = loss
        if self.as_written:
            penalty = torch.stack([p.square().sum() for p in self.shared]).sum()
            for p in self.factors:
                penalty = penalty + p.square().sum() / self.k
            objective = loss + self.config.weight_decay / 2 * penalty
        self.optimizer.zero_grad(set_to_none=True)
        objective.backward()
        if self.as_written:
            for p in self.factors:
                assert p.grad is not None
                p.grad.mul_(self.k)
        self.optimizer.step()
        return loss.detach()

    def __call__(self, batch: Batch) -> Tensor | None:
        x = self.perturb(batch.images, *batch.pair) if self.config.perturbation == "tdiv-sdiv" else batch.images
        return self.distil(x)

    def state(self) -> dict[str, list[Tensor]]:
        """What a step changes, by kind, in the student's order."""
        return {"shared": [*self.shared], "factors": [*self.factors], "statistics": statistics(self.network)}


class EagerTeach:
    """M networks trained one after the other: cross-entropy, fused SGD, autocast."""

    def __init__(self, problem: Problem):
        assert isinstance(problem, Teaching)
        self.networks, self.config = problem.networks, problem.config
        self.parameters = [p for network in self.networks for p in network.parameters()]
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.SGD(
            self.parameters, lr=self.config.learning_rate, momentum=self.config.momentum, nesterov=True, fused=True,
            weight_decay=self.config.weight_decay,
        )  # fmt: skip

    def logits(self, images: Sequence[Tensor]) -> Sequence[Tensor]:
        return [network.train()(x) for network, x in zip(self.networks, images, strict=True)]

    def __call__(self, batch: Batch) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            logits = self.logits(batch.images)
        self.optimizer.zero_grad(set_to_none=True)
        losses = [
            F.cross_entropy(z.float() if z.dtype == torch.bfloat16 else z, y)
            for z, y in zip(logits, batch.labels, strict=True)
        ]
        torch.stack(losses).sum().backward()
        self.optimizer.step()

    def state(self) -> dict[str, list[Tensor]]:
        return {"shared": [*self.parameters], "statistics": [b for n in self.networks for b in statistics(n)]}
