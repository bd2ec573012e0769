"""Students that tests share, and the networks that they are merged into by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastensdistill.method.student import LatentBE, Student
from tests.untyped import untyped


def merged(student: LatentBE, weights: Tensor) -> nn.Module:
    """The plain network at ``weights`` (K,) of the branches, its state dict merged tensor by tensor."""
    network, state = student.average(), student.module.state_dict()
    own = network.state_dict()
    for name in own:
        path, kind = name.rsplit(".", 1)
        if f"{path}.delta_r" in state:
            r, s = ((weights[:, None] * (1 + state[f"{path}.delta_{factor}"])).sum(0) for factor in "rs")
            value = state[f"{path}.layer.{kind}"]
            own[name] = s * value if kind == "bias" else torch.einsum("o,oi...,i->oi...", s, value, r)
        else:
            own[name] = state[name]
    network.load_state_dict(own)
    return network


class Quadrants(nn.Module):
    """Tells which quadrant of an image (3, 8, 8) is the brightest, by two layers with nothing between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 8, bias=False), nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.conv.weight.zero_()
            for i in range(4):
                y, x = divmod(i, 2)
                self.conv.weight[i, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = 1 / 48
            self.linear.weight.copy_(20 * torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).flatten(1))


def pull_apart(student: Student, branch: int) -> None:
    """Turn the signs of what ``branch`` passes from one layer of its :class:`Quadrants` to the next.

    It computes what it did, and its average with another branch nothing at all.
    """
    module = untyped(student.module)
    with torch.no_grad():
        module.conv.delta_s[branch] = module.linear.delta_r[branch] = -2
