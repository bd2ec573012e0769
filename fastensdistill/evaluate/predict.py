"""Probabilities of a network, a student or an ensemble on a whole split."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastensdistill.data.loader import EvaluationSet, check_batch_size
from fastensdistill.data.sources import Dataset, Split
from fastensdistill.engine.checks import check_images, check_pixels
from fastensdistill.errors import InputError
from fastensdistill.method.calls import call, device_of, not_about_images, refused
from fastensdistill.method.inspection import check_values
from fastensdistill.method.modes import evaluating
from fastensdistill.method.outputs import check_logits, in_unit_interval
from fastensdistill.method.student import Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.models.wrappers import unwrap
from fastensdistill.train.progress import advance


@torch.no_grad()
def predict(network: nn.Module, images: EvaluationSet | Split | Tensor, batch_size: int = 500) -> Tensor:
    """Probabilities (E, N, C), float32 on the network's device: E members of an ensemble, 1 for a single network.

    ``images`` are a split of a data set or a tensor (N, channels, H, W) of a floating dtype in [0, 1]; they are given
    to the network on its device and in its dtype. ``network`` returns logits as ``method.outputs.logits_of`` finds
    them. In evaluation mode, whatever mode the network is in; it is put back afterwards, and the images stay as they
    are. Raises InputError for anything else, for no images, and for what a network returns that is no logits.
    """
    if not isinstance(network, nn.Module):
        raise InputError(f"network is a {type(network).__name__}; expected an nn.Module; load_network reads files")
    check_values(network, "network")
    batches = _batches(images, device_of(network), batch_size)
    network = unwrap(network)
    parts = []
    with evaluating(network):
        for i, batch in enumerate(batches):
            logits = _logits(network, batch)
            if i == 0:
                check_logits(logits, type(network).__name__)
                if in_unit_interval(logits):  # a sigmoid's? The graph says
                    with torch.enable_grad():
                        check_logits(_logits(network, batch[:2]), type(network).__name__)
            parts.append(logits.float().softmax(-1))
            advance(len(batch))
    return torch.cat(parts, dim=1)


def _batches(images: Any, device: torch.device, batch_size: int) -> Any:
    check_batch_size(batch_size)
    if isinstance(images, Split):
        images = EvaluationSet(images, device)
    elif isinstance(images, Dataset):
        raise InputError("images are a Dataset; expected a split of it, such as data.test")
    elif not isinstance(images, EvaluationSet):
        check_images(images)
        if len(images):
            check_pixels(images)
    if not len(images):
        raise InputError("no images to predict; expected at least one")
    if isinstance(images, EvaluationSet):
        return images.batches(batch_size)
    return (batch.to(device) for batch in images.split(int(batch_size)))


def _logits(network: nn.Module, batch: Tensor) -> Tensor:
    """(E, B, C). One image alone goes through twice where the network takes several only (``squeeze`` in it)."""
    members = isinstance(network, Student | Teachers)
    try:
        logits = network(batch) if members else call(network, batch).unsqueeze(0)
    except Exception as error:
        if len(batch) == 1 and not isinstance(error, MemoryError | torch.OutOfMemoryError):
            return _logits(network, batch.repeat(2, 1, 1, 1))[:, :1]
        if not_about_images(error):
            raise
        raise refused(type(network).__name__, network, batch, error) from error
    if logits.ndim != 3 or logits.shape[1] != len(batch):
        if len(batch) == 1:
            return _logits(network, batch.repeat(2, 1, 1, 1))[:, :1]
        found = tuple(logits.shape if members else logits.shape[1:])
        raise InputError(
            f"{type(network).__name__} returns {found} for {len(batch)} images; expected logits ({len(batch)}, classes)"
        )
    return logits
