"""Before a run: one small step of the fused engine against the reference engine, on the device that will train.

Compilers have turned correct kernels into wrong ones without a word, on one GPU and not on another. A step of a few
random images costs next to nothing beside a run. What is compared are directions: faults (a sign, a mask, a miscompiled
tile) turn them. Reduced precision may turn them four times as far as PyTorch's own in that precision does. The networks
given are left as they are. No kernel is compiled for a batch size (``kernels.launch.BATCH_SIZES``), so those
compared here are the run's own; sums of many rows, which so few images do without, are compared on their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastensdistill.config import DistillConfig, TeachConfig, TrainConfig
from fastensdistill.engine.common import ImageShape, precision_on
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.reference import ReferenceStep, TeachStep
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import runs_kernel
from fastensdistill.kernels.sums import add_rows
from fastensdistill.method.calls import call
from fastensdistill.method.copying import copy_network
from fastensdistill.method.modes import set_mode
from fastensdistill.method.perturbation import PERTURBATIONS
from fastensdistill.method.student import RankOneLayer, Student
from fastensdistill.method.teachers import Teachers

IMAGES = 16
# 1 − cosine of the two directions that is always allowed, and how often PyTorch's own in the same precision.
ALLOWED = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 1e-2}
MARGIN = 4
ROWS = (1, 37, 48)  # sets, rows and values that are added up
Config = TypeVar("Config", bound=TrainConfig)


class DisagreementError(InputError):
    """The fused engine computes something else than the reference engine on this device."""


def verify_distillation(
    student: Student, teachers: Teachers, config: DistillConfig, shape: ImageShape, num_classes: int
) -> dict[str, float]:
    """1 − cosine between the engines, of the perturbation and of the update. Raises DisagreementError above the limit.

    The student's factors are moved off one for the comparison, so that its branches differ.
    """
    moved = copy_network(student)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in [m for m in moved.modules() if isinstance(m, RankOneLayer)]:
            for factor in (layer.delta_r, layer.delta_s):
                factor.add_((0.1 * torch.randn(factor.shape, generator=generator)).to(factor))
    images, labels = _batch(moved, shape, num_classes, generator)
    plain = _undecayed(config)
    exact, own, other = (copy_network(moved) for _ in range(3))
    reference = ReferenceStep(exact, teachers, replace(plain, precision="fp32"), num_classes=num_classes)
    same = ReferenceStep(own, teachers, plain, num_classes=num_classes)
    fused = FusedStep(other, teachers, plain, image_shape=shape, capture=False)
    found, precision = {}, precision_on(config, images.device)
    verify_sums(images.device)
    perturbed = reference.perturb(images)
    if "Tb" in PERTURBATIONS[config.perturbation].members:  # nothing is drawn per image
        ascents = [[step.perturb(images).images - images] for step in (same, fused)]
        found["perturbation"] = _judge("perturbation", precision, [perturbed.images - images], *ascents)
    for step in (reference, same, fused):
        step.set_learning_rate(config.learning_rate)
        step.distil(perturbed, labels)
    found["update"] = _judge("update", precision, *(_changes(moved, after) for after in (exact, own, other)))
    return found


def verify_teaching(networks: Sequence[nn.Module], config: TeachConfig, shape: ImageShape) -> dict[str, float]:
    """1 − cosine between the engines of the update of all networks. Raises DisagreementError above the limit."""
    with torch.no_grad():
        images, _ = _batch(networks[0], shape, 2, torch.Generator())
        classes = call(set_mode(copy_network(networks[0]), False), images).shape[1]
    generator = torch.Generator().manual_seed(0)
    batches = [_batch(network, shape, classes, generator) for network in networks]
    images = batches[0][0]
    plain = _undecayed(config)
    before = nn.ModuleList(networks)
    exact, own, other = (copy_network(before) for _ in range(3))
    for step in (
        TeachStep(list(exact), replace(plain, precision="fp32")),
        TeachStep(list(own), plain),
        FusedTeachStep(list(other), plain, image_shape=shape, capture=False),
    ):
        step.set_learning_rate(config.learning_rate)
        step(batches)
    precision = precision_on(config, images.device)
    verify_sums(images.device)
    return {"update": _judge("update", precision, *(_changes(before, after) for after in (exact, own, other)))}


def verify_sums(device: torch.device) -> None:
    """Sums of rows by their kernel, where kernels run. Raises DisagreementError."""
    if runs_kernel(device.type, torch.float32):
        rows = torch.rand(ROWS, generator=torch.Generator().manual_seed(0)).to(device) - 0.5
        exact, own = rows.double().sum(1, keepdim=True), rows.sum(1, keepdim=True)
        _judge("sum of rows", "fp32", [exact], [own], [add_rows(rows, 1)])


def _undecayed(config: Config) -> Config:
    """In one part, and without weight decay, which is the same in both engines and would hide a small gradient."""
    return replace(config, weight_decay=0.0, micro_batches=1)


def _batch(
    network: nn.Module, shape: ImageShape, num_classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    device = next(network.parameters()).device
    # A colour for each image and each half of it: untrained networks tell images of plain noise apart too little.
    colours = torch.rand(IMAGES, shape[0], 2, 1, generator=generator).repeat_interleave(-(-shape[1] // 2), 2)
    images = 0.7 * colours[:, :, : shape[1]] + 0.25 * torch.rand(IMAGES, *shape, generator=generator) + 0.025
    labels = torch.randint(num_classes, (IMAGES,), generator=generator)
    return images.to(device, memory_format=torch.channels_last), labels.to(device)


def _changes(before: nn.Module, after: nn.Module) -> list[Tensor]:
    return [(a - b).detach() for a, b in zip(after.parameters(), before.parameters(), strict=True)]


def _apart(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """1 − cosine of two lists of tensors, each taken as one vector; 2 where either is not finite."""
    a, b = (torch.cat([t.flatten().double() for t in tensors]) for tensors in (one, other))
    cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    return 1 - cosine if cosine == cosine else 2.0


def _judge(what: str, precision: str, exact: list[Tensor], own: list[Tensor], fused: list[Tensor]) -> float:
    """1 − cosine of the fused engine's direction and the exact one, if PyTorch's own in the precision allows it."""
    found, allowed = _apart(exact, fused), max(ALLOWED[precision], MARGIN * _apart(exact, own))
    if found > allowed:
        raise DisagreementError(
            f"the fused engine's {what} is not the reference engine's on this device (1 − cosine {found:.1e}, at most "
            f"{allowed:.0e} for {precision}); use engine='reference' and report this"
        )
    return found
