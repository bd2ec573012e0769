"""Networks that do what few do, each in its ``forward``: with the number of images, with several images, with names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.engine.cases import CLASSES
from tests.network.models import moved

CHANNELS, SIZE = 8, 6
FORWARDS: dict[str, tuple[type[nn.Module], Callable[[Any], None]]] = {}


class Odd(nn.Module):
    """A convolution and a linear layer; what is between them is another in every network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.head = nn.Linear(CHANNELS, CLASSES)

    def begin(self, x: Tensor) -> Tensor:
        return F.relu(self.stem(x))

    def end(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.between(self.begin(x)))

    def between(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def odd(name: str) -> Callable[[int], nn.Module]:
    """The network called ``name``, by its seed."""

    def made(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        kind, build = FORWARDS[name]
        network = kind()
        build(network)
        return moved(network, seed)

    return made


def between(**layers: Callable[[], Any]) -> Callable[[Callable], Callable]:
    """Register what the decorated function does in a network that has these ``layers`` too."""

    def build(network: nn.Module) -> None:
        for name, make in layers.items():
            setattr(network, name, make())

    def register(function: Callable) -> Callable:
        name = function.__name__
        FORWARDS[name] = type(name, (Odd,), {"between": function}), build
        return function

    return register


@between()
def by_an_eighth_of_the_images(self, x):
    """1 for fewer than eight."""
    return x * (1 + x.shape[0] // 8)


@between()
def by_whether_there_are_many(self, x):
    return x * 2 ** (x.shape[0] > 6)


@between()
def by_the_larger_of_two(self, x):
    return x * max(x.shape[0] // 64, 1)


@between()
def by_a_tensor_of_it(self, x):
    return x * torch.tensor(x.shape[0]).clamp(min=8)


@between()
def by_what_one_image_has(self, x):
    """The same for any number of images."""
    return x / (x.numel() / x.shape[0]) * 100


@between(grow=lambda: nn.Conv2d(4, CHANNELS, 1))
def reshaped_and_back(self, x):
    return self.grow(x.reshape(x.shape[0], x.numel() // x.shape[0] // 72, 12, 6).tanh())


@between(choose=lambda: nn.Linear(CHANNELS, 3), own=lambda: nn.Parameter(torch.randn(3, 8, 8, 1, 1)))
def a_weight_for_each_image(self, x):
    """Images as channel groups of one convolution; a parameter of five dimensions."""
    B = x.shape[0]
    weight = (self.choose(x.mean((2, 3))).sigmoid() @ self.own.flatten(1)).view(B * 8, 8, 1, 1)
    return F.conv2d(x.reshape(1, B * 8, 6, 6), weight, groups=B).view(B, 8, 6, 6)


@between()
def rolled_over_all(self, x):
    """One value of each image comes from the one before it, in most of them zero after the ReLU."""
    return x + x.roll(1)


@between()
def the_first_image(self, x):
    return x + x[:1]


@between()
def summed_over_images(self, x):
    return x.cumsum(0)


@between()
def by_the_largest(self, x):
    return x / (x.max() + 1)


@between(flatten=lambda: nn.BatchNorm2d(8), relu=lambda: nn.Conv2d(8, 8, 1), mean=lambda: nn.Conv2d(8, 8, 3),
         logits=lambda: nn.Conv2d(8, 8, 1))  # fmt: skip
def layers_called_as_operations(self, x):
    return self.logits(self.mean(self.relu(F.relu(self.flatten(x)))))


@between(norm=lambda: nn.BatchNorm1d(8 * SIZE * SIZE))
def normalised_flat(self, x):
    return self.norm(x.flatten(1)).unflatten(1, (8, SIZE, SIZE))


@between(cube=lambda: nn.Conv3d(1, 2, 3, padding=1))
def convolved_in_three_dimensions(self, x):
    return self.cube(x[:, None]).mean(1)


@between(own=lambda: nn.Parameter(torch.randn(8, 6, 4, 2)))
def filtered(self, x):
    return torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(self.own), s=(6, 6))


@between()
def positions_twice(self, x):
    found = x.argmax(1, keepdim=True)
    return x.sin() + x.gather(1, found) + found * 0.1


@between()
def masks_twice(self, x):
    small = x < 0.1
    return torch.where(small, 0.2 * x, x) + small * 0.3


@between()
def complex_twice(self, x):
    y = torch.fft.fft2(x)
    return (y * y.conj()).real * 0.01 + y.real * 0.1 + y.imag.sin()


@between()
def a_value_on_the_host(self, x):
    return x * float(x.mean())


@between()
def doubled_again_and_again(self, x):
    """Written out, 2^30 operations."""
    x = x.unflatten(1, (2, 4))
    for _ in range(30):
        x = x + 0.1 * x.sin()
    return x.flatten(1, 2)


class Both(NamedTuple):
    """What some networks return in training mode."""

    logits: Tensor
    others: Tensor


class WithOthers(Odd):
    """Returns a tuple of its own while it trains."""

    def forward(self, x: Tensor) -> Any:
        logits = self.end(self.begin(x))
        return Both(logits, logits.sin()) if self.training else logits
