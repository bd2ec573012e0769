"""Before a run: one small step of the fused engine against the reference engine, on the device that will train.

Compilers have turned correct kernels into wrong ones without a word, on one GPU and not on another. A step of eight random
images costs next to nothing beside a run; what is compared are directions, since reduced precision moves lengths little
and faults (a sign, a mask, a miscompiled tile) turn a direction. The networks given are left as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastensdistill.config import DistillConfig, TeachConfig, TrainConfig
from fastensdistill.engine.fused import FusedStep, ImageShape
from fastensdistill.engine.reference import ReferenceStep, TeachStep
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.errors import InputError
from fastensdistill.method.student import BatchEnsemble, Student
from fastensdistill.method.teachers import Teachers

IMAGES = 8
PAIR_DRAWN = ("tdiv", "tdiv-sdiv")
# 1 − cosine of the two directions; right kernels stay far below, a fault of one layer is far above.
ALLOWED = {"fp32": 1e-3, "tf32": 5e-2, "bf16": 0.2}
Config = TypeVar("Config", bound=TrainConfig)


class DisagreementError(InputError):
    """The fused engine computes something else than the reference engine on this device."""


def verify_distillation(
    student: Student, teachers: Teachers, config: DistillConfig, shape: ImageShape, num_classes: int
) -> dict[str, float]:
    """1 − cosine between the engines, of the perturbation and of the update. Raises DisagreementError above the limit.

    The student's factors are moved off one for the comparison, so that its branches differ.
    """
    moved = copy.deepcopy(student)
    generator = torch.Generator().manual_seed(0)
    if isinstance(moved, BatchEnsemble):
        with torch.no_grad():
            for layer in moved.layers():
                for factor in (layer.delta_r, layer.delta_s):
                    factor.add_((0.1 * torch.randn(factor.shape, generator=generator)).to(factor))
    images, labels = _batch(moved, shape, num_classes, generator)
    plain = _undecayed(config)
    one, other = copy.deepcopy(moved), copy.deepcopy(moved)
    reference = ReferenceStep(one, teachers, replace(plain, precision="fp32"), num_classes=num_classes)
    fused = FusedStep(other, teachers, plain, image_shape=shape, capture=False)
    found = {}
    perturbed = reference.perturb(images)
    if config.perturbation in PAIR_DRAWN:
        found["perturbation"] = _apart([perturbed.images - images], [fused.perturb(images).images - images])
    for step in (reference, fused):
        step.set_learning_rate(config.learning_rate)
        step.distil(perturbed, labels)
    found["update"] = _apart(_changes(moved, one), _changes(moved, other))
    return _judge(found, config)


def verify_teaching(networks: Sequence[nn.Module], config: TeachConfig, shape: ImageShape) -> dict[str, float]:
    """1 − cosine between the engines of the update of all networks. Raises DisagreementError above the limit."""
    with torch.no_grad():
        classes = copy.deepcopy(networks[0]).eval()(_batch(networks[0], shape, 2, torch.Generator())[0]).shape[1]
    generator = torch.Generator().manual_seed(0)
    batches = [_batch(network, shape, classes, generator) for network in networks]
    plain = _undecayed(config)
    one, other = copy.deepcopy(list(networks)), copy.deepcopy(list(networks))
    reference = TeachStep(one, replace(plain, precision="fp32"))
    fused = FusedTeachStep(other, plain, image_shape=shape, capture=False)
    for step in (reference, fused):
        step.set_learning_rate(config.learning_rate)
        step(batches)
    changes: Callable[[list[nn.Module]], list[Tensor]] = lambda after: [  # noqa: E731
        change for b, a in zip(networks, after, strict=True) for change in _changes(b, a)
    ]
    return _judge({"update": _apart(changes(one), changes(other))}, config)


def _undecayed(config: Config) -> Config:
    """Without weight decay, which is the same in both engines and would hide a small gradient."""
    return replace(config, weight_decay=0.0)


def _batch(
    network: nn.Module, shape: ImageShape, num_classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    device = next(network.parameters()).device
    images = torch.rand(IMAGES, *shape, generator=generator) * 0.9 + 0.05
    labels = torch.randint(num_classes, (IMAGES,), generator=generator)
    return images.to(device, memory_format=torch.channels_last), labels.to(device)


def _changes(before: nn.Module, after: nn.Module) -> list[Tensor]:
    return [(a - b).detach() for a, b in zip(after.parameters(), before.parameters(), strict=True)]


def _apart(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """1 − cosine of two lists of tensors, each taken as one vector; 2 where either is not finite."""
    a, b = (torch.cat([t.flatten().double() for t in tensors]) for tensors in (one, other))
    cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    return 1 - cosine if cosine == cosine else 2.0


def _judge(found: dict[str, float], config: TrainConfig) -> dict[str, float]:
    worst = max(found, key=lambda name: found[name])
    if found[worst] > ALLOWED[config.precision]:
        raise DisagreementError(
            f"the fused engine's {worst} is not the reference engine's on this device (1 − cosine {found[worst]:.1e}, "
            f"at most {ALLOWED[config.precision]:.0e} for {config.precision}); use engine='reference' and report this"
        )
    return found
