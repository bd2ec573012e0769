"""Averages of trained networks over time, as the reference engine moves them.

    e ← e + w · (p − e)        w = max(1 − ema_decay, 9 / (10 + t))        t: updates before this one

That is a decay of min(ema_decay, (1 + t) / (10 + t)), which forgets the first weights soon, however large it becomes.
Source: Polyak and Juditsky, 1992; the beginning is that of TensorFlow's ExponentialMovingAverage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastensdistill.engine.common import State
from fastensdistill.kernels.operands import accumulator
from fastensdistill.kernels.update import average_weight
from fastensdistill.method.copying import copy_network
from fastensdistill.method.modes import set_mode
from fastensdistill.network.overlap import load_state


def averaged(network: nn.Module) -> nn.Module:
    """A copy of ``network``, from whose values its average starts: in evaluation mode, not to be trained."""
    average = set_mode(copy_network(network, forget=True), False)
    if next(network.parameters()).device.type != "meta":
        load_state(average, network.state_dict())  # an expanded buffer gets memory of its own
    return average.requires_grad_(False)


class Averages:
    """Averages of ``networks``, in their order, statistics of BatchNorm included; none with a ``decay`` of None.

    A network's parameters may move in memory; buffers that are not floating-point are copied.
    """

    def __init__(self, networks: Sequence[nn.Module], decay: float | None):
        self.networks, self.decay = networks, decay
        self.modules = [] if decay is None else [averaged(network) for network in networks]
        like = next(networks[0].parameters())
        self.updates = torch.zeros((), dtype=accumulator(like.dtype), device=like.device)

    @torch.no_grad()
    def move(self) -> None:
        """One update, after that of the networks."""
        if self.decay is None:
            return
        weight = average_weight(self.updates, self.decay)
        averages, values = [], []
        for network, average in zip(self.networks, self.modules, strict=True):
            for value, own in zip(_tensors(network), _tensors(average), strict=True):
                if own.is_floating_point():
                    averages.append(own)
                    values.append(value)
                else:
                    own.copy_(value)
        steps = torch._foreach_sub(values, averages)
        torch._foreach_mul_(steps, weight.to(averages[0].dtype))
        torch._foreach_add_(averages, steps)
        self.updates.add_(1)

    def tensors(self) -> list[Tensor]:
        """All that :meth:`move` changes."""
        return [] if self.decay is None else [*(t for own in self.modules for t in _tensors(own)), self.updates]

    def state_dict(self) -> State:
        """How many updates there were; the averages are networks of their own."""
        return {} if self.decay is None else {"updates": self.updates}

    def load_state_dict(self, state: State) -> None:
        """The way back from :meth:`state_dict`."""
        self.updates.copy_(state["updates"]) if "updates" in state else self.updates.zero_()


def _tensors(network: nn.Module) -> list[Tensor]:
    return [t.detach() for t in (*network.parameters(), *network.buffers())]
