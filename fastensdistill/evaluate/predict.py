"""Probabilities of a network, a student or an ensemble on a whole split."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastensdistill.data.loader import EvaluationSet, check_batch_size
from fastensdistill.data.sources import Split
from fastensdistill.errors import InputError
from fastensdistill.method.modes import evaluating
from fastensdistill.method.student import Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.train.progress import advance


@torch.no_grad()
def predict(network: nn.Module, images: EvaluationSet | Split | Tensor, batch_size: int = 500) -> Tensor:
    """Probabilities (E, N, C), float32 on the images' device: E members of an ensemble, 1 for a single network.

    ``images`` are a split of a data set, which goes to the network's device, or a tensor (N, channels, H, W) of a
    floating dtype in [0, 1] on it. In evaluation mode, whatever mode the network is in; it is put back afterwards.
    Raises InputError for anything else, and for no images.
    """
    if isinstance(images, Split):
        images = EvaluationSet(images, next((p.device for p in network.parameters()), torch.device("cpu")))
    if isinstance(images, EvaluationSet):
        batches = images.batches(batch_size)
    elif isinstance(images, Tensor) and images.ndim == 4 and images.is_floating_point():
        check_batch_size(batch_size)
        batches = iter(images.split(batch_size))
    else:
        found = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"images are {found}; expected a split, or a floating tensor (N, channels, H, W) in [0, 1]")
    if not len(images):
        raise InputError("no images to predict; expected at least one")
    members = isinstance(network, Student | Teachers)
    parts = []
    with evaluating(network):
        for batch in batches:
            logits = network(batch)
            parts.append((logits if members else logits.unsqueeze(0)).float().softmax(-1))
            advance(len(batch))
    return torch.cat(parts, dim=1)
