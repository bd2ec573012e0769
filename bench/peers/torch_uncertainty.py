"""BatchEnsemble convolutions of torch-uncertainty; the rest as in ``eager``.

Its layers run every estimator they have, so the perturbation evaluates all branches. Its linear layer has a bias per
estimator, which is another model than the paper's ``s ∘ b``: the classifier stays ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.peers.eager import ActivationLayer, EagerStep
from fastensdistill.method.student import RankOneLayer


class Convolution(nn.Module):
    """The library's layer around our parameters, whose factors are stored as deviations from one."""

    def __init__(self, wrapped: RankOneLayer):
        super().__init__()
        from torch_uncertainty.layers import BatchConv2d

        layer = wrapped.layer
        assert isinstance(layer, nn.Conv2d)
        self.layer, self.delta_r, self.delta_s = layer, wrapped.delta_r, wrapped.delta_s
        one = BatchConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, num_estimators=len(wrapped.delta_r),
            stride=layer.stride, padding=layer.padding, bias=False,
        )  # fmt: skip
        one.conv.weight = layer.weight
        del one.r_group, one.s_group
        self.one = [one]  # in a list, so that its parameters are not counted twice

    def forward(self, x: Tensor) -> Tensor:
        self.one[0].r_group, self.one[0].s_group = 1 + self.delta_r, 1 + self.delta_s
        return self.one[0](x)


class LibraryStep(EagerStep):
    def layer(self, wrapped: RankOneLayer) -> nn.Module:
        return Convolution(wrapped) if isinstance(wrapped.layer, nn.Conv2d) else ActivationLayer(wrapped)

    def branches(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        every = super().branches(x)
        return every if chosen is None else every.index_select(0, torch.as_tensor(chosen))
