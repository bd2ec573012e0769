"""What is measured: a network, a method, a batch, M = K; and the same networks and images for everybody.

The arithmetic and the traffic of a setting are its plan's (``fastensdistill.network.plan``), nobody else's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastensdistill.config import DistillConfig, TeachConfig, TrainConfig
from fastensdistill.method.student import LatentBE, Single, Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.models import create_model
from fastensdistill.network.gpu import Gpu
from fastensdistill.network.launch import Launch, Part
from fastensdistill.network.plan import Plan, plan, plan_step, teach_groups
from fastensdistill.network.trace import trace

# method → student, perturbation
METHODS = {
    "kd": ("single", "none"),
    "latentbe": ("latent-be", "none"),
    "tdiv-sdiv": ("latent-be", "tdiv-sdiv"),
    "teach": (None, None),
}
TITLES = {"kd": "KD", "latentbe": "LatentBE", "tdiv-sdiv": "LatentBE + TDiv−SDiv", "teach": "teacher training"}
DISTIL = ("kd", "latentbe", "tdiv-sdiv")

# name → model and its arguments, image size; the last is for the smoke runs and for checks in float64
NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {
    **{n: (n, {}, 32) for n in ("wrn28_1", "wrn28_2", "wrn28_4", "wrn28_10", "resnet32", "resnet32x2", "resnet32x4")},
    "scaled": ("preresnet", {}, 32),
    "tiny": ("preresnet", {"blocks": (1, 1), "in_planes": 4, "widen": 2}, 8),
    "narrow": ("preresnet", {"blocks": (1, 1), "in_planes": 16}, 8),  # the least that wgmma kernels cover
    "tiny-resnet": ("resnet", {"blocks": (1, 1), "in_planes": 4}, 8),
    **{f"{name}-{size}": (name, {}, size) for name in ("mobilenet_v2", "densenet121") for size in (32, 64)},
}
CLASSES = 100


@dataclass(frozen=True)
class Setting:
    """``members`` is M = K. ``model`` overrides the arguments of the network's model (scaling in depth, width)."""

    network: str = "tiny"
    method: str = "tdiv-sdiv"
    batch: int = 4
    members: int = 2
    branches: int | None = None
    model: tuple[tuple[str, Any], ...] = ()

    @property
    def size(self) -> int:
        return NETWORKS[self.network][2]

    @property
    def k(self) -> int:
        return 1 if self.method == "kd" else self.branches or self.members

    @property
    def images(self) -> int:
        """Base images of a step: B, whatever M and K; teachers in training have a batch each."""
        return self.batch * (self.members if self.method == "teach" else 1)

    def build(self) -> nn.Module:
        name, arguments, _ = NETWORKS[self.network]
        return create_model(name, CLASSES, **(arguments | dict(self.model)))

    @cached_property
    def plans(self) -> list[Plan]:
        """Of the step's passes."""
        with torch.device("meta"):  # a network's initial values take as long as all the rest
            network = trace(self.build(), (3, self.size, self.size))
        if self.method == "teach":
            return [plan([network], groups, way, self.batch) for groups, way in teach_groups(self.members).values()]
        perturbation = METHODS[self.method][1]
        assert perturbation is not None
        return [*plan_step(network, network, self.members, self.k, self.batch, perturbation).values()]

    @cached_property
    def parts(self) -> list[Part]:
        """The step's plan."""
        return [part for one in self.plans for part in one.parts]

    @property
    def shared(self) -> int:
        """Joint launches, each of which two parts have."""
        return len(self.launches) - sum(len(one.launches) for one in self.plans)

    @property
    def launches(self) -> list[Launch]:
        """All of the step, with the FLOPs and bytes that it cannot do without."""
        return [launch for part in self.parts for launch in part.launches]

    @property
    def flops(self) -> int:
        return sum(launch.flops for launch in self.launches)

    @property
    def nbytes(self) -> float:
        return sum(launch.nbytes for launch in self.launches)

    def least_time(self, gpu: Gpu) -> float:
        """Seconds: every launch at the larger of its arithmetic's and its traffic's time."""
        return sum(gpu.least_time(launch) for launch in self.launches)

    def describe(self) -> dict[str, Any]:
        own = {"network": self.network, "method": self.method, "batch": self.batch, "members": self.members}
        return own | {"branches": self.k, "classes": CLASSES, "image_size": self.size} | dict(self.model)


@dataclass
class Batch:
    """Images (B, 3, H, W) in [0, 1] and labels (B,), or lists of M of them; the pair (a, b) for who does not draw."""

    images: Any
    labels: Any
    pair: tuple[int, int]


@dataclass
class Problem:
    """What a step of ``setting`` trains: a ``Distillation`` or a ``Teaching``."""

    setting: Setting
    config: TrainConfig

    @property
    def modules(self) -> list[nn.Module]:
        raise NotImplementedError

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.setting.size, self.setting.size

    def copy(self, dtype: torch.dtype | None = None, precision: str | None = None) -> Self:
        """Networks of its own, in ``dtype``; a step's ``precision`` changed in the config."""
        other = copy.deepcopy(self)
        for module in other.modules:
            module.to(dtype or next(module.parameters()).dtype)
        other.config.precision = precision or other.config.precision
        return other


@dataclass
class Distillation(Problem):
    """A student with its teachers."""

    config: DistillConfig
    student: Student
    teachers: Teachers

    @property
    def modules(self) -> list[nn.Module]:
        return [self.student, self.teachers]


@dataclass
class Teaching(Problem):
    """Networks that are trained side by side, as teachers."""

    config: TeachConfig
    networks: list[nn.Module]

    @property
    def modules(self) -> list[nn.Module]:
        return self.networks


def channels_last(module: nn.Module) -> None:
    """Convolutions' weights in the layout that the reference and the peers compute in."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's stubs lack it


def contiguous(module: nn.Module) -> None:
    """Weights in the layout of a new network, which the fused engine and convolutions with groups are given."""
    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # PyTorch's stubs lack it


def make(setting: Setting, device: torch.device) -> Problem:
    """The same weights every time on a kind of device, in float32 and channels_last: branches that differ, and
    BatchNorm statistics of random images."""
    torch.manual_seed(0)
    images = torch.rand(16, 3, setting.size, setting.size)
    with device:  # WRN-28-4 takes a second to draw on a CPU
        networks = [setting.build() for _ in range(setting.members + 1)]
    for network in networks:
        settle(network.to(device), images.to(device))
        channels_last(network)
    if setting.method == "teach":
        return Teaching(setting, TeachConfig(learning_rate=0.01, members=setting.members), networks[:-1])
    kind, perturbation = METHODS[setting.method]
    assert kind is not None
    assert perturbation is not None
    config = DistillConfig(learning_rate=0.01, student=kind, branches=setting.k, perturbation=perturbation)
    teachers = Teachers(networks[:-1])
    if kind == "single":
        return Distillation(setting, config, Single(networks[-1]), teachers)
    student = LatentBE(networks[-1], setting.k).to(device)
    channels_last(student)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in student.layers():
            for factor in (layer.delta_r, layer.delta_s):
                factor.copy_(0.1 * torch.randn(factor.shape, generator=generator))
    return Distillation(setting, config, student, teachers)


@torch.no_grad()
def settle(network: nn.Module, images: Tensor) -> None:
    """Running statistics as after training: those of images. Left at 0 and 1, evaluation mode would be another net."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    network.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def batches(
    setting: Setting, count: int, device: torch.device, pairs: Sequence[tuple[int, int]], dtype: torch.dtype
) -> list[Batch]:
    """Random ones, the same every time."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for i in range(count):
        shape = (setting.members if setting.method == "teach" else 1, setting.batch, 3, setting.size, setting.size)
        images = [
            x.to(device, dtype).to(memory_format=torch.channels_last) for x in torch.rand(shape, generator=generator)
        ]
        labels = [*torch.randint(CLASSES, shape[:2], generator=generator).to(device)]
        if setting.method != "teach":
            images, labels = images[0], labels[0]
        found.append(Batch(images, labels, pairs[i % len(pairs)]))
    return found


def drawn_pairs(setting: Setting, seed: int, count: int) -> list[tuple[int, int]]:
    """The pairs that the engines draw from ``seed``."""
    m, k = setting.members, setting.k
    pairs = [(a, b) for a in range(k) for b in range(k) if a % m != b % m]
    if setting.method != "tdiv-sdiv":
        return [(0, 0)] * count
    generator = torch.Generator().manual_seed(seed)
    return [pairs[int(torch.randint(len(pairs), (), generator=generator))] for _ in range(count)]
