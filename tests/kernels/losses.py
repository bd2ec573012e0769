"""The distillation loss as docs/method.md defines it, from torch.nn.functional and autograd, and labels for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def definition(
    teacher: Tensor, branch: Tensor, labels: Tensor, temperature: float, alpha: float, target: str,
    label_smoothing: float = 0.0, standardize_logits: bool = False, teacher_weights: Sequence[float] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, its two terms and the gradient in float64, from torch.nn.functional and autograd."""
    t, s = teacher.double(), branch.double().requires_grad_()
    labels = labels.double() if labels.is_floating_point() else labels
    M, K = len(t), len(s)
    w = torch.tensor(teacher_weights or [1.0] * M, dtype=torch.float64)
    v = w[torch.arange(K) % M]
    v = v / v.mean() if target == "one-to-one" else torch.ones(K)

    def scaled(z: Tensor) -> Tensor:
        if standardize_logits:
            z = (z - z.mean(-1, keepdim=True)) / (1e-7 + torch.std(z, dim=-1, keepdim=True))
        return z / temperature

    kd, ce = [], []
    for k in range(K):
        p = F.softmax(scaled(t[k % M]), 1)
        if target == "mean":
            p = torch.stack([w[m] / w.sum() * F.softmax(scaled(t[m]), 1) for m in range(M)]).sum(0)
        kd.append(temperature**2 * v[k] * F.cross_entropy(scaled(s[k]), p))
        ce.append(F.cross_entropy(s[k], labels, label_smoothing=label_smoothing))
    loss_kd, loss_ce = torch.stack(kd).mean(), torch.stack(ce).mean()
    loss = (1 - alpha) * loss_ce + alpha * loss_kd
    (gradient,) = torch.autograd.grad(loss, s)
    return loss.detach(), loss_kd.detach(), loss_ce.detach(), gradient


def soft(labels: Tensor, C: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Probabilities, some of them 0."""
    g = torch.Generator().manual_seed(C)
    y = (torch.rand(len(labels), C, generator=g, dtype=torch.float64) - 0.5).relu() + 3 * F.one_hot(labels, C)
    return (y / y.sum(1, keepdim=True)).to(dtype)
