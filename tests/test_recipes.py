"""Every setting of a recipe × the engines × resumption: all engines train alike, and each goes on bit for bit."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastensdistill.config import TeachConfig, TrainConfig
from fastensdistill.data import Dataset, DeviceLoader, Split, choose_augment
from fastensdistill.data.presets import switches
from fastensdistill.engine.captured import CapturedReferenceStep, CapturedTeachStep
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.reference import ReferenceStep, TeachStep
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.models.preresnet import PreResNet
from fastensdistill.network.nodes import Network
from fastensdistill.network.trace import trace
from tests.compare import check_close
from tests.engine.cases import CLASSES, setting
from tests.engine.recorded_graph import recorded
from tests.engine.updates import averages
from tests.network.models import moved

SIZE, BATCH, STEPS = 8, 4, 4
BOTH: dict[str, dict[str, Any]] = {  # settings of teach and distill
    "defaults": {},
    "augment none": {"augment": "none"},
    "augment strong": {"augment": "strong"},
    "resized crop": {"resized_crop": (0.3, 1.0), "flip": True},
    "TrivialAugment": {"trivial_augment": True},
    "cutout": {"cutout": 3},
    "erasing": {"erasing": 0.5},
    "mixup": {"mixup": 0.4},
    "cutmix": {"cutmix": 1.0},
    "mixup and cutmix, in parts": {"mixup": 0.4, "cutmix": 1.0, "micro_batches": 2},
    "label smoothing": {"label_smoothing": 0.1},
    "label smoothing, mixup": {"label_smoothing": 0.1, "mixup": 0.4},
    "all": {"augment": "strong", "mixup": 0.2, "cutmix": 1.0, "erasing": 0.2},
}  # fmt: skip
DISTILL: dict[str, dict[str, Any]] = {  # of distill alone; every student also learns from labels
    "perturbed, all": {**BOTH["all"], "perturbation": "tdiv-sdiv"},
    "standardised logits": {"standardize_logits": True},
    "weights, one-to-one": {"teacher_weights": (1.0, 3.0)},
    "weights, mean": {"teacher_weights": (0.0, 1.0), "target": "mean", "standardize_logits": True},
}
RATES = (0.05, 0.025, 0.0, 0.04)  # of schedules nothing else reaches a step
"""A learning rate for each step."""


def dataset() -> Dataset:
    rng = np.random.default_rng(3)
    images, labels = rng.integers(0, 256, (11, SIZE, SIZE, 3), dtype=np.uint8), rng.integers(0, CLASSES, 11)
    split = Split(images, labels)
    return Dataset("noise", split, split, split, tuple("abcde"), (0.5,) * 3, (0.25,) * 3)


def loader(config: TrainConfig, seed: int) -> DeviceLoader:
    """What the trainer makes, in float64."""
    data, generator = dataset(), torch.Generator().manual_seed(seed)
    return DeviceLoader(
        data.train, BATCH, device="cpu", generator=generator, augment=choose_augment(data, **switches(config)),
        dtype=torch.float64, classes=CLASSES,
    )  # fmt: skip


@dataclass
class Run:
    """A step, the networks that it trains and the loaders that it reads."""

    step: Any
    networks: list[nn.Module]
    loaders: list[DeviceLoader]
    single: bool  # takes one loader, not a list

    def go(self, first: int, last: int) -> list[dict[str, Tensor]]:
        """These steps; their scalars."""
        told = []
        for rate in RATES[first:last]:
            self.step.set_learning_rate(rate)
            told.append(self.step.train_on(self.loaders[0] if self.single else self.loaders))
        return told

    def state(self) -> dict[str, Any]:
        """What a checkpoint has of it."""
        return copy.deepcopy({
            "networks": [network.state_dict() for network in self.networks],
            "averages": [network.state_dict() for network in getattr(self.step, "averages", [])],
            "step": self.step.state_dict(),
            "loaders": [loader.state_dict() for loader in self.loaders],
        })  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        for kind, owners in (
            ("networks", self.networks),
            ("averages", getattr(self.step, "averages", [])),
            ("loaders", self.loaders),
        ):
            assert len(owners) == len(state[kind])
            for owner, saved in zip(owners, state[kind], strict=True):
                owner.load_state_dict(saved)
        self.step.load_state_dict(state["step"])

    def values(self) -> dict[str, Tensor]:
        """All that it has changed, by name."""
        trained = {f"{i} {k}": v for i, own in enumerate(self.networks) for k, v in own.state_dict().items()}
        draws = {f"loader {i}": own.generator.get_state() for i, own in enumerate(self.loaders)}
        return {
            **trained,
            **self.step.state_dict(),
            **(averages(self.step) if hasattr(self.step, "averages") else {}),
            **draws,
        }


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return moved(PreResNet(CLASSES, blocks=(1,), in_planes=4), seed)


@functools.cache
def traced() -> Network:
    """The architecture of all networks here: once, what each step would compare it with its modules for."""
    return trace(network(0), (3, SIZE, SIZE))


USUAL = {"batch_size": BATCH, "alpha": 0.7, "perturbation": "none", "teacher": network, "student": network}


def distilling(engine: str, settings: dict[str, Any], replayed: bool = True) -> Run:
    """A run of distillation; the perturbation, unless a row has one, is none: no other setting changes it."""
    student, teachers, config = setting(**USUAL | settings)
    step: Any
    if engine == "fused":
        step = FusedStep(student, teachers, config)
        step.train_as([traced()] * (len(teachers) + 1))
    else:
        kind = ReferenceStep if engine == "reference" else CapturedReferenceStep
        step = kind(student, teachers, config, num_classes=CLASSES)
    if engine == "captured" and replayed:
        recorded(step, {"the student": student.module, "the teachers": teachers})
    return Run(step, [student], [loader(config, 5)], True)


def teaching(engine: str, settings: dict[str, Any], replayed: bool = True) -> Run:
    networks = [network(20 + m).double() for m in range(2)]
    config = TeachConfig(members=2, batch_size=BATCH, seed=7, **settings)
    step: Any
    if engine == "fused":
        step = FusedTeachStep(networks, config, image_shape=(3, SIZE, SIZE))
    else:
        step = (TeachStep if engine == "reference" else CapturedTeachStep)(networks, config)
    if engine == "captured" and replayed:
        recorded(step, {f"network {m}": own for m, own in enumerate(networks)})
    return Run(step, networks, [loader(config, 5 + m) for m in range(2)], False)


ROWS = [
    *(pytest.param(partial(distilling, settings=row), id=f"distill, {name}") for name, row in (BOTH | DISTILL).items()),
    *(pytest.param(partial(teaching, settings=row), id=f"teach, {name}") for name, row in BOTH.items()),
]


@pytest.mark.parametrize("make", ROWS)
def test_engines_agree_and_each_goes_on_bit_for_bit(make: Callable[..., Run], monkeypatch):
    """Captured steps are replayed, and go on launched one by one."""
    monkeypatch.setattr("fastensdistill.engine.teach.compared", lambda *_, **__: traced())
    runs = {engine: make(engine) for engine in ("reference", "captured", "fused")}
    told, saved = {}, {}
    for engine, run in runs.items():
        told[engine] = run.go(0, STEPS // 2)
        saved[engine] = run.state()
        told[engine] += run.go(STEPS // 2, STEPS)
    expected = runs["reference"].values()
    for engine, tolerance in (("captured", 0.0), ("fused", 1e-9)):
        for scalars, of_them in zip(told["reference"], told[engine], strict=True):
            assert scalars.keys() == of_them.keys()
            for name, value in scalars.items():
                check_close(f"{engine}: {name}", of_them[name], value, tolerance)
        found = runs[engine].values()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            check_close(f"{engine}: {name}", found[name].double(), value.double(), tolerance)
    for engine, run in runs.items():
        resumed = make(engine, replayed=False)
        resumed.load(saved[engine])
        resumed.go(STEPS // 2, STEPS)
        found = resumed.values()
        for name, value in run.values().items():
            assert torch.equal(found[name], value), f"{engine}, resumed: {name}"
