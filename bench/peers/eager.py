"""The distillation step in plain, eager PyTorch: as the authors' code runs it, and with the least work.

Both multiply activations by r and s, as every published BatchEnsemble layer does, and share one convolution call over
all branches. They take the student's parameters from ours, so that one step of each can be compared.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastensdistill.config import DistillConfig
from fastensdistill.method.student import LatentBE, RankOneLayer
from fastensdistill.method.teachers import Teachers


class ActivationLayer(nn.Module):
    """``s ∘ layer(r ∘ x)`` over activations of all branches, (k·B, ...)."""

    def __init__(self, wrapped: RankOneLayer):
        super().__init__()
        self.layer = copy.deepcopy(wrapped.layer)
        self.r = nn.Parameter(wrapped.r.detach().clone())
        self.s = nn.Parameter(wrapped.s.detach().clone())
        self.branches = list(range(len(self.r)))

    def forward(self, x: Tensor) -> Tensor:
        taps = (1, 1) if x.ndim == 4 else ()
        each = len(x) // len(self.branches)
        r = self.r[self.branches].repeat_interleave(each, 0).unflatten(1, (-1, *taps))
        s = self.s[self.branches].repeat_interleave(each, 0).unflatten(1, (-1, *taps))
        return self.layer(x * r) * s


class EagerStep:
    """``as_written``: all teachers and branches forward and backward in the perturbation, as the authors' code does."""

    def __init__(self, student: LatentBE, teachers: Teachers, config: DistillConfig, *, as_written: bool):
        self.config, self.as_written = config, as_written
        self.teachers = list(teachers.networks)
        self.network = copy.deepcopy(student.module)
        for name, m in list(self.network.named_modules()):
            if isinstance(m, RankOneLayer):
                parent = self.network.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], ActivationLayer(m))
        self.layers = [m for m in self.network.modules() if isinstance(m, ActivationLayer)]
        self.k = student.branches
        factors = [p for m in self.layers for p in (m.r, m.s)]
        own = {id(p) for p in factors}
        self.shared, self.factors = [p for p in self.network.parameters() if id(p) not in own], factors
        self.optimizer = torch.optim.SGD(
            [{"params": self.shared}, {"params": factors}], lr=config.learning_rate, momentum=config.momentum,
            nesterov=True,
        )  # fmt: skip

    def student(self, x: Tensor, branches: list[int]) -> Tensor:
        for m in self.layers:
            m.branches = branches
        return self.network(torch.cat([x] * len(branches))).unflatten(0, (len(branches), len(x)))

    def perturb(self, x: Tensor, a: int, b: int) -> Tensor:
        every = list(range(self.k))
        self.network.eval()
        watched = x.detach().requires_grad_()
        if self.as_written:
            t = torch.stack([teacher(watched) for teacher in self.teachers])
            s = self.student(watched, every)
            t_a, t_b, s_a, s_b = t[a], t[b].detach(), s[a], s[b].detach()
        else:
            with torch.no_grad():
                t_b, s_b = self.teachers[b](x), self.student(x, [b])[0]
            t_a, s_a = self.teachers[a](watched), self.student(watched, [a])[0]
        objective = F.cross_entropy(t_a, t_b.softmax(-1)) - F.cross_entropy(s_a, s_b.softmax(-1))
        (g,) = torch.autograd.grad(objective, watched)
        self.network.train()
        norm = g.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
        return (x + self.config.step_size * x[0].numel() ** 0.5 * g / norm).clamp(0, 1)

    def __call__(self, images: Tensor, labels: Tensor, pair: tuple[int, int]) -> Tensor:
        x = self.perturb(images, *pair)
        with torch.no_grad():
            targets = torch.stack([teacher(x) for teacher in self.teachers])
        logits = self.student(x, list(range(self.k)))
        tau = self.config.temperature
        loss = tau**2 * F.cross_entropy((logits / tau).flatten(0, 1), (targets / tau).softmax(-1).flatten(0, 1))
        decay = self.config.weight_decay / 2
        penalty = sum(p.square().sum() for p in self.shared)
        penalty = penalty + sum((p - 1).square().sum() for p in self.factors) / self.k
        self.optimizer.zero_grad()
        (loss + decay * penalty).backward()
        for p in self.factors:
            p.grad.mul_(self.k)
        self.optimizer.step()
        return loss.detach()
