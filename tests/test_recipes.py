"""Every setting of a recipe × the engines × resumption: all engines train alike, and each goes on bit for bit."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastensdistill.config import DistillConfig, TeachConfig, TrainConfig
from fastensdistill.data import Dataset, DeviceLoader, Split, choose_augment
from fastensdistill.data.presets import switches
from fastensdistill.engine.captured import CapturedReferenceStep, CapturedTeachStep
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.reference import ReferenceStep, TeachStep
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.models.preresnet import PreResNet
from fastensdistill.network.nodes import Network
from fastensdistill.network.trace import trace
from fastensdistill.train.setup import seeded
from fastensdistill.train.stop import Interrupted
from fastensdistill.train.teach import TeachTrainer
from fastensdistill.train.trainer import Trainer
from tests.compare import check_close
from tests.engine.cases import CLASSES, setting
from tests.engine.recorded_graph import recorded
from tests.engine.updates import averages
from tests.network.models import moved
from tests.networks import tiny
from tests.runs import StopAt, make
from tests.runs import dataset as quadrants

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
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1, "beta1": 0.8},
    "average over time": {"ema_decay": 0.3},
    "clipping": {"clip_norm": 0.05},
    "norms and biases spared": {"decay_norm_and_bias": False, "weight_decay": 0.1},
    "all": {
        "augment": "strong", "erasing": 0.2, "mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1, "optimizer": "adamw",
        "ema_decay": 0.3, "clip_norm": 0.05, "decay_norm_and_bias": False, "weight_decay": 0.1,
    },
}  # fmt: skip
DISTILL: dict[str, dict[str, Any]] = {  # of distill alone
    "factors' rate": {"factor_rate": 0.3},
    "standardised logits": {"standardize_logits": True},
    "each branch the mean": {"target": "mean"},
    "weights, one-to-one": {"teacher_weights": (1.0, 3.0)},
    "weights, mean": {"teacher_weights": (0.0, 1.0), "target": "mean", "standardize_logits": True},
    "perturbed, all": {
        **BOTH["all"], "perturbation": "tdiv-sdiv", "factor_rate": 0.3, "standardize_logits": True, "target": "mean",
        "teacher_weights": (0.2, 0.8),
    },
}  # fmt: skip
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
            "averages": [network.state_dict() for network in self.step.averages],
            "step": self.step.state_dict(),
            "loaders": [loader.state_dict() for loader in self.loaders],
        })  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        for kind, owners in (
            ("networks", self.networks),
            ("averages", self.step.averages),
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


def trainer(kind: str, out: Path, resume: bool = False) -> Trainer:
    """A run with every setting, by the fused engine."""
    shared = {**BOTH["all"], "epochs": 3, "batch_size": 8, "engine": "fused", "schedule": "step", "milestones": (0.5,)}
    if kind == "distill":
        more = {k: v for k, v in DISTILL["perturbed, all"].items() if k not in shared}
        return make(out=out, resume=resume, learning_rate=0.01, alpha=0.7, **shared, **more)
    networks = [seeded(i, lambda: tiny(4)) for i in range(2)]
    config = TeachConfig(members=2, learning_rate=0.01, device="cpu", **shared)
    return TeachTrainer(networks, quadrants(), config, out=out, resume=resume, quiet=True)


@pytest.mark.parametrize("kind", ["distill", "teach"])
def test_a_run_with_every_setting_is_stopped_and_resumed_bit_for_bit(kind, tmp_path):
    whole = trainer(kind, tmp_path / "whole").fit()
    stopped = trainer(kind, tmp_path / "stopped")
    StopAt(stopped, 7)
    with pytest.raises(Interrupted):
        stopped.fit()
    resumed = trainer(kind, tmp_path / "stopped", resume=True).fit()
    assert whole.engine.name == resumed.engine.name == "fused"
    files = sorted(file.name for file in (tmp_path / "whole").glob("*.safetensors"))
    assert any(name.startswith("ema") for name in files)
    assert files == sorted(file.name for file in (tmp_path / "stopped").glob("*.safetensors"))
    for name in files:
        one, two = (load_file(tmp_path / folder / name) for folder in ("whole", "stopped"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name


def test_the_table_has_every_setting_of_a_recipe():
    """A new setting of training needs a row, or a reason here why none of its values can differ between engines."""
    elsewhere = {
        "epochs", "learning_rate", "warmup_epochs", "schedule", "milestones", "gamma", "seed",  # of the trainer
        "device", "engine", "precision",
        "pad", "momentum", "beta2", "sync_batch_norm", "members",  # tests of the update, of several processes
        "student", "branches", "perturbation", "step_size", "temperature", "alpha", "batch_size",  # tests/engine
    }  # fmt: skip
    told = {name for row in (*BOTH.values(), *DISTILL.values()) for name in row}
    assert {f.name for config in (TeachConfig, DistillConfig) for f in fields(config)} <= told | elsewhere
