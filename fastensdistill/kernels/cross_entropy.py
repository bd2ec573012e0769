"""Cross-entropy with labels and its gradient, in plain PyTorch.

For q = softmax(z) over C classes, labels y, probabilities or one-hot for a class, and label smoothing ε

    y' = (1 − ε) · y + ε / C
    row = − Σ_c y'_c · log q_c                ∂row / ∂z = q · Σ_c y'_c − y'

as ``torch.nn.functional.cross_entropy`` has it. What an op computes in the place of these is tested against them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(log_q: Tensor, labels: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Each row's value (..., B) and ∂row/∂z (..., B, C), from ``log_q`` (..., B, C), the logarithm of q.

    ``labels`` are int64 (..., B), classes from 0 to C − 1, or probabilities (..., B, C) of any floating dtype; their
    leading axes are those of ``log_q`` or broadcast to them. ``smoothing`` is ε, 0 to 1.
    """
    q, C = log_q.exp(), log_q.shape[-1]
    if labels.is_floating_point():
        y = labels.to(log_q.dtype)
        y = (1 - smoothing) * y + smoothing / C if smoothing else y
        return -(y * log_q).sum(-1), q * y.sum(-1, keepdim=True) - y
    index = labels.expand(log_q.shape[:-1]).unsqueeze(-1)
    rows = -log_q.gather(-1, index)
    gradient = q.scatter_add_(-1, index, torch.full_like(rows, smoothing - 1))
    if smoothing:
        rows = (1 - smoothing) * rows - smoothing * log_q.mean(-1, keepdim=True)
        gradient = gradient - smoothing / C
    return rows.squeeze(-1), gradient
