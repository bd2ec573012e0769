"""The layers of our own networks: normalisation inside the model, the paper's BatchNorm, its initialisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Standard deviation of a unit normal truncated at ±2; dividing by it restores the wanted variance.
_TRUNCATED_STD = 0.87962566103423978


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel: the first layer of every model, so that a model takes pixels in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        # One channel would be broadcast to three without a word.
        torch._assert(x.shape[1] == self.mean.shape[1], "the images' channels are not those of mean and std")
        return (x - self.mean) / self.std


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose running variance follows the *biased* batch variance, as in the authors' code.

    PyTorch's own multiplies the batch variance by n/(n-1) before it enters the running estimate; everything else is
    the same, and so is the state dict. Source: docs/method.md, Recipe.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.track_running_stats):
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        assert self.num_batches_tracked is not None
        unbiased = self.running_var.clone()  # a copy: autograd keeps what F.batch_norm is given
        y = F.batch_norm(x, self.running_mean, unbiased, self.weight, self.bias, True, self.momentum, self.eps)
        # unbiased = (1-m)·running + m·var·n/(n-1)  →  (1-m)·running + m·var
        n = x.numel() // x.shape[1]
        with torch.no_grad():
            self.running_var.mul_((1 - self.momentum) / n).add_(unbiased, alpha=(n - 1) / n)
            self.num_batches_tracked += 1
        return y


class PadShortcut(nn.Module):
    """``x[:, :, ::stride, ::stride]`` with zero channels appended: the parameter-free shortcut of CIFAR ResNets."""

    def __init__(self, stride: int, new_channels: int):
        super().__init__()
        self.stride, self.new_channels = stride, new_channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def initialize(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw weights of convolutions and linear layers from a truncated normal of variance 2/fan_in; biases are 0.

    Source: docs/method.md, Recipe.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
            std = (2.0 / fan_in) ** 0.5 / _TRUNCATED_STD
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution with padding 1 and without bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
