"""Probabilities of a network, a student or an ensemble on a whole split."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastensdistill.data.loader import EvaluationSet
from fastensdistill.method.modes import evaluating
from fastensdistill.method.student import Student
from fastensdistill.method.teachers import Teachers


@torch.no_grad()
def predict(network: nn.Module, images: EvaluationSet, batch_size: int = 500) -> Tensor:
    """Probabilities (E, N, C), float32 on the images' device: E members of an ensemble, 1 for a single network.

    In evaluation mode, whatever mode the network is in; it is put back afterwards.
    """
    members = isinstance(network, Student | Teachers)
    parts = []
    with evaluating(network):
        for batch in images.batches(batch_size):
            logits = network(batch)
            parts.append((logits if members else logits.unsqueeze(0)).float().softmax(-1))
    return torch.cat(parts, dim=1)
