"""Networks that no plan covers: they ask what they are given, which recording answers otherwise."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from tests.engine.cases import network
from tests.network.models import moved


class Standardised(nn.Conv2d):
    """A known layer with a forward of its own, which standardises the weight."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias, padding=1)


class Odd(nn.Module):
    """Python that asks the type and the size of what it is given; ``then`` does what a test wants to see."""

    def __init__(self, then=None, classes: int = 5):
        super().__init__()
        self.conv, self.bn, self.own = Standardised(3, 6, 3), nn.BatchNorm2d(6), nn.Parameter(torch.rand(6, 1, 1))
        self.act, self.classifier, self.then = Then(then), nn.Linear(6, classes), then

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Proxy) and len(x) > 0:
            x = x.sin()
        x = self.act(self.bn(self.conv(x)) * self.own)
        return self.classifier(x.mean((2, 3)))


class Then(nn.Module):
    """``then`` behind a function with a kink that no ReLU has."""

    def __init__(self, then=None):
        super().__init__()
        self.then, self.seen = then, 0
        self.register_buffer("count", torch.zeros(2, dtype=torch.float64))
        self.history: list[int] = []
        self.noise = torch.Generator() if then is own_generator else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardshrink(x, 0.01)
        return x if self.then is None else self.then(self, x)


def odd(seed: int, then=None, **options) -> nn.Module:
    torch.manual_seed(seed)
    return moved(Odd(then, **options), seed)


def some_unplanned(seed: int) -> nn.Module:
    """Teacher 1 is no plan's, the others are of the student's architecture."""
    return odd(seed) if seed == 11 else network(seed)


def in_order(self, x):
    """Wants its images contiguous."""
    return x.view(len(x), -1).view(x.shape)


def overwriting(self, x):
    return x.mul_(1.5)


def dropping(self, x):
    return F.dropout(x, 0.5, True)


def branching(self, x):
    return x if x.mean() > 0 else -x


class BranchingBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient if gradient.sum() > 0 else gradient * 2


def branching_back(self, x):
    return BranchingBack.apply(x)


def counting(self, x):
    self.seen += 1
    return x


def counting_in_a_buffer(self, x):
    self.count += 1
    return x


def listing(self, x):
    self.history.append(len(x))
    return x


def rebinding(self, x):
    self.mean = 0.9 * getattr(self, "mean", 0.0) + 0.1 * x.mean()
    return x


def set_by_the_first(self, x):
    if not hasattr(self, "mean"):
        self.mean = x.mean().detach()
    return x - self.mean


def drawing_on_the_host(self, x):
    return x * random.random()


def own_generator(self, x):
    return x * torch.rand((), generator=self.noise)


def without_gradient(self, x):
    return x.detach()
