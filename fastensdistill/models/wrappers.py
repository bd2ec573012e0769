"""Wrappers that change how a network runs and not what it computes."""

from __future__ import annotations

from typing import Any

from torch import nn


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside torch.compile's, DataParallel's, DistributedDataParallel's and AveragedModel's wrappers."""
    while True:
        kind = type(network)
        averaged = (kind.__module__, kind.__name__) == ("torch.optim.swa_utils", "AveragedModel")
        wrapped = averaged or isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel)
        inner: Any = getattr(network, "module" if wrapped else "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return network
        network = inner


def unwrap_inside(network: nn.Module) -> nn.Module:
    """:func:`unwrap` of ``network`` and, in place, of every layer in it."""
    network = unwrap(network)
    for module in network.modules():
        for name, child in module._modules.items():
            if child is not None and unwrap(child) is not child:
                module._modules[name] = unwrap(child)
    return network
