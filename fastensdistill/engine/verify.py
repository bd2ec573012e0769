"""Before a run: one small step of the fused engine against the reference engine, on the device that will train.

Compilers have turned correct kernels into wrong ones without a word, on one GPU and not on another. A step of a few
random images costs next to nothing beside a run. What is compared are directions: faults (a sign, a mask, a miscompiled
tile) turn them. Reduced precision may turn them four times as far as PyTorch's own in that precision does. The networks
given are left as they are. No kernel is compiled for a batch size (``kernels.launch.BATCH_SIZES``), so those
compared here are the run's own; sums of many rows, which so few images do without, and AdamW's step are compared on
their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastensdistill.config import DistillConfig, TeachConfig, TrainConfig
from fastensdistill.engine.captured import CapturedReferenceStep, CapturedTeachStep
from fastensdistill.engine.common import ImageShape, precision_on
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.reference import ReferenceStep, TeachStep
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.errors import InputError
from fastensdistill.kernels.adamw import adamw
from fastensdistill.kernels.clip_factors import clip_factors
from fastensdistill.kernels.launch import references_only, runs_kernel
from fastensdistill.kernels.sums import add_rows
from fastensdistill.kernels.update import Average, Run, fields_of
from fastensdistill.method.calls import call
from fastensdistill.method.copying import copy_network
from fastensdistill.method.modes import set_mode
from fastensdistill.method.perturbation import PERTURBATIONS, Pair
from fastensdistill.method.student import RankOneLayer, Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.network.nodes import Network
from fastensdistill.network.unseen import generators_kept

IMAGES = 16
STEPS = 3  # of which the captured step replays two as they are and one that its capture has just made
# 1 − cosine of the two directions that is always allowed, and how often PyTorch's own in the same precision.
ALLOWED = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 1e-2}
MARGIN = 4
ROWS = (1, 37, 48)  # sets, rows and values that are added up
VALUES = 3001  # that AdamW moves
Config = TypeVar("Config", bound=TrainConfig)
Step = TypeVar("Step")


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
    images, labels = labelled(few_images(moved, shape, num_classes, generator), num_classes, config)
    plain = _undecayed(config)
    exact, own, other = (copy_network(moved) for _ in range(3))
    reference = ReferenceStep(exact, teachers, replace(plain, precision="fp32"), num_classes=num_classes)
    same = ReferenceStep(own, teachers, plain, num_classes=num_classes)
    fused = FusedStep(other, teachers, plain, image_shape=shape, capture=False)
    found: dict[str, float] = {}
    precision = precision_on(config, images.device)
    verify_sums(images.device)
    if config.optimizer == "adamw":
        verify_adamw(images.device)
    steps = reference, same, fused
    with generators_kept(teachers):
        perturbed = reference.perturb(images)
        pairs = "Tb" in PERTURBATIONS[config.perturbation].members  # nothing is drawn per image
        for pair in pairs_of_all(fused) if pairs else []:
            ascents = [[_seeded(step).perturb(images, pair).images - images] for step in steps]
            apart = _judge("perturbation", precision, *ascents)
            found["perturbation"] = max(apart, found.get("perturbation", 0.0))
        for step in steps:
            step.set_learning_rate(config.learning_rate)
            _seeded(step).distil(perturbed, labels)
    found["update"] = _judge("update", precision, *(_changes(moved, after) for after in (exact, own, other)))
    return found


def pairs_of_all(step: FusedStep) -> list[Pair]:
    """Pairs (a, b) of what can be drawn in which every architecture of a teacher is once the first, once the second."""
    perturbation, seen, found = step.perturbation, set[tuple[int, Network]](), list[Pair]()
    for pair in perturbation.pairs:
        new = {(i, step.networks[member % perturbation.teachers]) for i, member in enumerate(pair)} - seen
        seen |= new
        found += [pair] if new else []
    return found


def _seeded(step: Step) -> Step:
    """``step``, about to draw what the others draw, where a network drops values or draws in evaluation mode."""
    torch.manual_seed(0)
    return step


def verify_teaching(networks: Sequence[nn.Module], config: TeachConfig, shape: ImageShape) -> dict[str, float]:
    """1 − cosine between the engines of the update of all networks. Raises DisagreementError above the limit."""
    classes = class_count(networks[0], shape)
    generator = torch.Generator().manual_seed(0)
    batches = [labelled(few_images(network, shape, classes, generator), classes, config) for network in networks]
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
    if config.optimizer == "adamw":
        verify_adamw(images.device)
    return {"update": _judge("update", precision, *(_changes(before, after) for after in (exact, own, other)))}


def verify_captured_distillation(
    student: Student, teachers: Teachers, config: DistillConfig, shape: ImageShape, num_classes: int
) -> dict[str, float]:
    """1 − cosine between a few steps of the reference engine and the same ones captured, of what they change.

    Raises DisagreementError above the limit, and InputError where a capture fails.
    """
    config = _undecayed(config)
    launched, replayed = (copy_network(student) for _ in range(2))
    frozen = [copy_network(teachers) for _ in range(2)]
    one = ReferenceStep(launched, frozen[0], config, num_classes=num_classes)
    other = CapturedReferenceStep(replayed, frozen[1], config, num_classes=num_classes)
    generator = torch.Generator().manual_seed(0)
    few = (few_images(student, shape, num_classes, generator) for _ in range(STEPS))
    batches = [labelled(one, num_classes, config) for one in few]
    return {"update": _compare_captured(student, (launched, one), (replayed, other), batches, config)}


def verify_captured_teaching(networks: Sequence[nn.Module], config: TeachConfig, shape: ImageShape) -> dict[str, float]:
    """As :func:`verify_captured_distillation`, for networks that become teachers."""
    config, classes = _undecayed(config), class_count(networks[0], shape)
    before = nn.ModuleList(networks)
    launched, replayed = (copy_network(before) for _ in range(2))
    one, other = TeachStep(list(launched), config), CapturedTeachStep(list(replayed), config)
    generator = torch.Generator().manual_seed(0)
    few = ([few_images(own, shape, classes, generator) for own in networks] for _ in range(STEPS))
    batches = [([labelled(one, classes, config) for one in own],) for own in few]
    return {"update": _compare_captured(before, (launched, one), (replayed, other), batches, config)}


def _compare_captured(
    before: nn.Module, launched: tuple[nn.Module, Any], replayed: tuple[nn.Module, Any], batches: Sequence[Any],
    config: TrainConfig,
) -> float:  # fmt: skip
    changes = []
    with generators_kept(before), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a capture that fails is told in the error
        for network, step in (launched, replayed):
            torch.manual_seed(0)  # what networks draw
            step.set_learning_rate(config.learning_rate)
            for batch in batches:
                step(*batch)
            changes.append(_changes(before, network))
    step = replayed[1]
    if not step.captured:
        raise InputError(step.capture_error or "there is nothing to capture on this device")
    found, precision = _apart(*changes), precision_on(config, step.device)
    if found > ALLOWED[precision]:
        raise DisagreementError(
            f"replayed, the step is not what it is when it is launched (1 − cosine {found:.1e}, at most "
            f"{ALLOWED[precision]:.0e} for {precision})"
        )
    return found


def class_count(network: nn.Module, shape: ImageShape) -> int:
    """How many classes the logits of ``network`` have."""
    with torch.no_grad():
        images, _ = few_images(network, shape, 2, torch.Generator())
        return call(set_mode(copy_network(network), False), images).shape[1]


def verify_sums(device: torch.device) -> None:
    """Sums of rows by their kernel, where kernels run. Raises DisagreementError."""
    if runs_kernel(device.type, torch.float32):
        rows = torch.rand(ROWS, generator=torch.Generator().manual_seed(0)).to(device) - 0.5
        exact, own = rows.double().sum(1, keepdim=True), rows.sum(1, keepdim=True)
        _judge("sum of rows", "fp32", [exact], [own], [add_rows(rows, 1)])


def verify_adamw(device: torch.device) -> None:
    """A step of AdamW by its kernel, with clipping and an average, where kernels run. Raises DisagreementError."""
    if not runs_kernel(device.type, torch.float32):
        return
    drawn = torch.rand(4, VALUES, generator=torch.Generator().manual_seed(0)).to(device) + 0.01

    def changes(dtype: torch.dtype) -> list[Tensor]:
        p, m, s, g = drawn.to(dtype)
        before, average, scalar = p.clone(), p.clone(), p.new_ones(1)
        runs = fields_of([Run(0, VALUES - 5), Run(VALUES - 4, 4, decays=0)])
        adamw(
            p, m.clone(), s.clone(), g - 0.5, scalar[0], scalar, beta1=0.9, beta2=0.999, weight_decay=0.1,
            average=Average(average, scalar[0], 0.9), clip=clip_factors(g, most=1.0), runs=runs,
        )  # fmt: skip
        return [p - before, average - before]

    exact = changes(torch.float64)
    with references_only("adamw", "clip_factors"):
        own = changes(torch.float32)
    _judge("step of AdamW", "fp32", exact, own, changes(torch.float32))


def _undecayed(config: Config) -> Config:
    """In one part, by SGD alone, and without decay, which is the same in both engines and would hide a small gradient.

    AdamW makes whole steps of gradients that are nothing but rounding, and of these the direction is nobody's.
    """
    return replace(config, optimizer="sgd", weight_decay=0.0, micro_batches=1)


def few_images(
    network: nn.Module, shape: ImageShape, num_classes: int, generator: torch.Generator, count: int = IMAGES
) -> tuple[Tensor, Tensor]:
    """Images (``count``, channels, H, W), channels last, and labels, where ``network`` is."""
    device = next(network.parameters()).device
    # A colour for each image and each half of it: untrained networks tell images of plain noise apart too little.
    colours = torch.rand(count, shape[0], 2, 1, generator=generator).repeat_interleave(-(-shape[1] // 2), 2)
    images = 0.7 * colours[:, :, : shape[1]] + 0.25 * torch.rand(count, *shape, generator=generator) + 0.025
    labels = torch.randint(num_classes, (count,), generator=generator)
    return images.to(device, memory_format=torch.channels_last), labels.to(device)


def labelled(batch: tuple[Tensor, Tensor], classes: int, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """The batch with labels as those of a run of ``config`` are: probabilities where its images are mixed."""
    images, labels = batch
    if not (config.mixup or config.cutmix):
        return batch
    y = torch.nn.functional.one_hot(labels, classes).to(images.dtype)
    return images, 0.7 * y + 0.3 * y.roll(1, 0)


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
