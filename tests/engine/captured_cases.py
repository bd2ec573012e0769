"""Networks that the captured step is tried on, and layers that a graph cannot hold."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.engine.cases import CLASSES
from tests.network.models import moved


class Inverted(nn.Module):
    """MobileNetV2's block: to more channels, depthwise, back; ReLU6."""

    def __init__(self, inner: int = 12):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(6, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(inplace=True),
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(True),
            nn.Conv2d(inner, 6, 1, bias=False), nn.BatchNorm2d(6),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Dense(nn.Module):
    """DenseNet's layer: what it computes beside what it was given."""

    def __init__(self, channels: int, growth: int = 3):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, F.dropout(self.conv(F.relu(self.norm(x))), 0.2, self.training)], 1)


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(channels, CLASSES)]


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, CLASSES))


def inverted() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), Inverted(), Inverted(), *_head(6))


def dense() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Dense(4), Dense(7), nn.AvgPool2d(2), *_head(10))


KINDS: dict[str, Callable[[], nn.Module]] = {"plain": plain, "inverted": inverted, "dense": dense}


def of_kind(kind: str, planted: str = "") -> Callable[[int], nn.Module]:
    """(seed) → a network of :data:`KINDS`, the same for every call, with a layer :class:`Planted` behind the first."""

    def create(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        network = KINDS[kind]()
        assert isinstance(network, nn.Sequential)
        if planted:
            network.insert(1, Planted(planted))
        return moved(network, seed)

    return create


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:  # type: ignore[override]
        return d if d.sum().item() < 1e9 else -d


class Planted(nn.Module):
    """Passes on what it gets, by way of the host; ``kind`` says how."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.calls = kind, 0

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.kind)(x)

    def item(self, x: Tensor) -> Tensor:
        return x if x.sum().item() < 1e9 else -x

    def condition(self, x: Tensor) -> Tensor:
        return x if x.sum() < 1e9 else -x

    def nonzero(self, x: Tensor) -> Tensor:
        return x + 0 * len(x.nonzero())

    def unique(self, x: Tensor) -> Tensor:
        return x + 0 * len(x.detach().unique())

    def mask(self, x: Tensor) -> Tensor:
        return x + 0 * len(x[x > 0])

    def written_mask(self, x: Tensor) -> Tensor:
        x, positive = x.clone(), x > 0
        x[positive] = x[positive]
        return x

    def equal(self, x: Tensor) -> Tensor:
        return x if torch.equal(x, x) else -x

    def to_cpu(self, x: Tensor) -> Tensor:
        return x + 0 * x.detach().cpu().mean().to(x)

    def numpy(self, x: Tensor) -> Tensor:
        return x + 0 * float(x.detach().numpy().mean())

    def tolist(self, x: Tensor) -> Tensor:
        return x + 0 * x.detach().flatten()[:2].tolist()[0]

    def constant(self, x: Tensor) -> Tensor:
        return x * torch.tensor([1.0], dtype=x.dtype, device=x.device)

    def counter(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x if self.calls else -x

    def python_random(self, x: Tensor) -> Tensor:
        return x if random.random() < 2 else -x

    def backward(self, x: Tensor) -> Tensor:
        return _Backward.apply(x)  # type: ignore[no-any-return]

    # What waits for nothing

    def fill(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[x > 1e9] = 0.0
        return x

    def scalar(self, x: Tensor) -> Tensor:
        return x * torch.tensor(1.0)

    def noise(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.1, self.training)


READING = {
    "item": "item()", "condition": "a condition", "nonzero": "nonzero()", "unique": "unique()",
    "mask": "a mask as an index", "written_mask": "a mask as an index", "equal": "torch.equal()", "to_cpu": "cpu()",
    "numpy": "numpy()", "tolist": "tolist()", "constant": "makes a tensor of values on the host",
    "counter": "changes its attribute 'calls' in Python", "python_random": "draws from Python's generator",
    "backward": "the backward pass, in _BackwardBackward reads values on the host by item()",
}  # fmt: skip
"""Of :class:`Planted`, what keeps a step from being captured, and what is said of it."""
STAYING = ("fill", "scalar", "noise")
