"""Wrappers that change how a network runs and not what it computes."""

from __future__ import annotations

from torch import nn


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside torch.compile's, DataParallel's, DistributedDataParallel's and AveragedModel's wrappers."""
    while True:
        if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel) or (
            type(network).__name__ == "AveragedModel" and type(network).__module__ == "torch.optim.swa_utils"
        ):
            network = network.module  # type: ignore[assignment]
        elif isinstance(network, nn.Module) and isinstance(network._modules.get("_orig_mod"), nn.Module):
            network = network._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return network


def unwrap_inside(network: nn.Module) -> nn.Module:
    """:func:`unwrap` of ``network`` and, in place, of every layer in it."""
    network = unwrap(network)
    for module in network.modules():
        for name, child in module._modules.items():
            if child is not None and unwrap(child) is not child:
                module._modules[name] = unwrap(child)
    return network
