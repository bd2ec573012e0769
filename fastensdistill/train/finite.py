"""Check that everything a run would save is finite, with one synchronisation per network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class NotFinite:
    """``NotFinite(networks)()`` names the first tensor that is not finite any more, "" where there is none.

    Parameters and buffers: a running variance may overflow while loss and weights are finite. What is not finite from
    the start, as a mask of -inf, is none of the training's doing.
    """

    def __init__(self, networks: Mapping[str, nn.Module]):
        self.networks = networks
        self.ignored = {(name, key) for name in networks for key in self._broken(name)}

    def __call__(self) -> str:
        for name in self.networks:
            found = [key for key in self._broken(name) if (name, key) not in self.ignored]
            if found:
                parameters = {key for key, _ in self.networks[name].named_parameters()}
                kind = "weights" if found[0] in parameters else "statistics"
                return f"the {kind} of {name} are not finite ({found[0]})"
        return ""

    def _broken(self, name: str) -> list[str]:
        tensors: dict[str, Tensor] = {
            key: value for key, value in self.networks[name].state_dict().items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }  # fmt: skip
        if not tensors:
            return []
        fine = torch.stack([torch.isfinite(value).all() for value in tensors.values()]).tolist()
        return [key for key, ok in zip(tensors, fine, strict=True) if not ok]
