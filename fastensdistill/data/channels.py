"""Grey images for colour networks: whether a data set has to be repeated to three channels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from fastensdistill.data.sources import Dataset
from fastensdistill.method.copying import copy_network
from fastensdistill.method.modes import evaluating

COLOURS = 3


def for_networks(data: Dataset, networks: Iterable[object]) -> Dataset:
    """``data`` as the ``networks`` take it: grey images are repeated to three channels where one of them needs three.

    Everything else stays; what does not fit is found by whoever calls the network. What is no module is passed over.
    """
    if data.channels == 1 and any(isinstance(n, nn.Module) and _needs_colour(n, data) for n in networks):
        return data.repeated(COLOURS)
    return data


def _needs_colour(network: nn.Module, data: Dataset) -> bool:
    """Whether the first layer takes three channels and the network does not make them of one itself."""
    taken = (getattr(module, "in_channels", None) for module in network.modules())
    if next((count for count in taken if isinstance(count, int) and count > 0), None) != COLOURS:
        return False
    place = next((p for p in network.parameters()), torch.empty(0))
    grey = torch.zeros(2, 1, *data.image_size, device=place.device)
    try:
        tried = copy_network(network, forget=True)  # a forward may leave something in the user's own
        with evaluating(tried), torch.no_grad():
            tried(grey)
    except Exception:  # whatever a network raises that meets another number of channels
        return True
    return False
