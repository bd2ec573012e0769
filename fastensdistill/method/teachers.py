"""Teachers: M frozen networks of one task, each with its own architecture and normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastensdistill.errors import InputError
from fastensdistill.method.modes import evaluating


class Teachers(nn.Module):
    """M frozen networks, in evaluation mode for good. ``teachers(x, members=[a, b])`` evaluates only those.

    ``networks`` take images (B, channels, H, W) in [0, 1], so each normalises them in its own way, and return logits
    (B, C) with the same C. Their parameters stop requiring gradients; ``train()`` leaves them in evaluation mode.
    """

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        if isinstance(networks, nn.Module):
            raise InputError(f"teachers are one {type(networks).__name__}: expected a sequence of networks")
        if not networks:
            raise InputError("no teachers given: expected at least one network")
        for i, network in enumerate(networks):
            if not isinstance(network, nn.Module):
                raise InputError(
                    f"teacher {i} is a {type(network).__name__}: expected an nn.Module; load_teachers reads files"
                )
        self.networks = nn.ModuleList(networks)
        self.requires_grad_(False)
        self.eval()

    def __len__(self) -> int:
        return len(self.networks)

    def train(self, mode: bool = True) -> Teachers:
        return super().train(False)

    def forward(self, x: Tensor, members: Sequence[int] | None = None) -> Tensor:
        chosen = range(len(self)) if members is None else members
        return torch.stack([self.networks[m](x) for m in chosen])

    def check(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        """Raise InputError unless every teacher turns an image (channels, H, W) into ``num_classes`` logits."""
        for i, network in enumerate(self.networks):
            self.check_output(network, f"teacher {i}", image_shape, (1, num_classes))

    @staticmethod
    @torch.no_grad()
    def check_output(
        network: nn.Module, name: str, image_shape: tuple[int, int, int], expected: tuple[int, ...]
    ) -> None:
        """Raise InputError unless one image (channels, H, W) gives logits of the ``expected`` shape."""
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        try:
            with evaluating(network):
                shape = tuple(network(torch.zeros(1, *image_shape, device=device)).shape)
        except (RuntimeError, AssertionError) as error:
            first = str(error).splitlines()[0]
            raise InputError(f"{name} does not take images of shape {image_shape}: {first}") from error
        if shape != expected:
            raise InputError(
                f"{name} returns {shape[-1] if len(shape) == len(expected) else shape} values per image; "
                f"the data has {expected[-1]} classes"
            )
