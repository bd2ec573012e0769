"""Which engine trains a run, and why: one line for the user, decided before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from fastensdistill.config import DistillConfig, TeachConfig, TrainConfig
from fastensdistill.engine.common import ImageShape
from fastensdistill.engine.fused import FusedStep, check_networks
from fastensdistill.engine.memory import estimate, estimate_teaching
from fastensdistill.engine.parallel import alone, anyone, processes
from fastensdistill.engine.reference import ReferenceStep, TeachStep
from fastensdistill.engine.teach import FusedTeachStep, common_architecture
from fastensdistill.engine.verify import verify_distillation, verify_teaching
from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import HAS_TRITON
from fastensdistill.kernels.tiles import device_arch
from fastensdistill.method.student import Student
from fastensdistill.method.teachers import Teachers

Networks = Student | Sequence[nn.Module]
Built = TypeVar("Built", FusedStep, FusedTeachStep)
AnyStep = ReferenceStep | FusedStep | TeachStep | FusedTeachStep


def choose_engine(
    config: TrainConfig, trained: Networks, teachers: Teachers | None, device: torch.device, image_shape: ImageShape
) -> tuple[str, str]:
    """("fused" or "reference", why in one line) for a student with its teachers, or for networks that become teachers.

    ``config.engine`` "auto" is fused on a CUDA device for networks that it can run. Raises InputError where "fused" is
    asked for and cannot be: nothing falls back without having been allowed to. Of several processes, where one cannot,
    none does.
    """
    reason = anyone(_obstacle(config, trained, teachers, device, image_shape))
    if reason is not None:
        return "reference", reason
    return "fused", "asked for" if config.engine == "fused" else "every layer has a kernel"


def _obstacle(
    config: TrainConfig, trained: Networks, teachers: Teachers | None, device: torch.device, image_shape: ImageShape
) -> str | None:
    """Why the fused engine is not to be taken, or None."""
    if config.engine == "reference":
        return "asked for"
    if config.engine == "auto" and not _on_cuda(device):
        return f"no CUDA device, training on {device.type}"
    if config.engine == "auto" and not HAS_TRITON:
        return "Triton is not installed"
    try:
        if isinstance(trained, Student):
            assert isinstance(config, DistillConfig)
            assert teachers is not None
            check_networks(trained, teachers, image_shape, config.perturbation)
        else:
            common_architecture(trained, image_shape)
    except Exception as error:  # of other people's code, too
        if config.engine == "fused":
            raise InputError(f"engine='fused' cannot train this: {in_a_line(error)}; engine='reference' can") from error
        return in_a_line(error)
    return None


def _on_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def in_a_line(error: Exception) -> str:
    """What ``error`` says first, with its kind where that is no error of ours."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, InputError):
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def verified(config: TrainConfig, why: str, verify: Callable[[], dict[str, float]]) -> tuple[str, str]:
    """The fused engine if it computes here what the reference engine does, and the reason with what was measured.

    With ``engine="auto"`` a disagreement, or any error on the way there, means the reference engine; with "fused" it is
    raised.
    """
    trouble: str | None = None
    cause: Exception | None = None
    try:
        with alone():
            found = verify()
    except Exception as error:  # a compiler's, a driver's, a network's that cannot be copied: whatever it is, none runs
        trouble, cause = in_a_line(error), error
    trouble = anyone(trouble)  # all processes take the same engine
    if trouble is None:
        return "fused", f"{why}; checked against the reference engine, 1 − cosine {max(found.values()):.0e}"
    if config.engine == "fused":
        raise InputError(f"engine='fused' cannot be used on this device: {trouble}") from cause
    return "reference", trouble


def built(config: TrainConfig, why: str, build: Callable[[], Built]) -> tuple[Built | None, str]:
    """The fused step and ``why``; with ``engine="auto"`` None, and what kept it from being built.

    Several processes exchange their weights while they build, and none can turn back alone: there it is raised.
    """
    try:
        return build(), why
    except InputError as error:
        if config.engine == "fused" or processes() > 1:
            raise
        return None, in_a_line(error)


def distillation_step(
    student: Student, teachers: Teachers, config: DistillConfig, image_shape: ImageShape, num_classes: int
) -> tuple[ReferenceStep | FusedStep, str]:
    """The step of the chosen engine, and in a line which it is and why."""
    name, why = choose_engine(config, student, teachers, next(student.parameters()).device, image_shape)
    if name == "fused":
        name, why = verified(
            config, why, lambda: verify_distillation(student, teachers, config, image_shape, num_classes)
        )
    fused: FusedStep | None = None
    if name == "fused":
        fused, why = built(config, why, lambda: FusedStep(student, teachers, config, image_shape=image_shape))
    if fused:
        *frozen, own = fused.networks
        # Teachers of several architectures are counted as if all were like the one that keeps the most
        peak = max(
            estimate(
                teacher, own, len(frozen), 1 if fused.heads else student.branches, config.batch_size // processes(),
                config.perturbation, itemsize=fused.dtype.itemsize, parts=config.micro_batches,
            ).peak
            for teacher in set(frozen)
        )  # fmt: skip
        return fused, described(fused, peak, why)
    return ReferenceStep(student, teachers, config, num_classes=num_classes), f"reference engine: {why}"


def teaching_step(
    networks: Sequence[nn.Module], config: TeachConfig, image_shape: ImageShape
) -> tuple[TeachStep | FusedTeachStep, str]:
    """As :func:`distillation_step`, for networks that become teachers."""
    name, why = choose_engine(config, networks, None, next(networks[0].parameters()).device, image_shape)
    if name == "fused":
        name, why = verified(config, why, lambda: verify_teaching(networks, config, image_shape))
    fused: FusedTeachStep | None = None
    if name == "fused":
        fused, why = built(config, why, lambda: FusedTeachStep(networks, config, image_shape=image_shape))
    if fused:
        share = config.batch_size // processes()
        found = estimate_teaching(fused.network, len(networks), share, fused.dtype.itemsize, parts=config.micro_batches)
        return fused, described(fused, found.peak, why)
    return TeachStep(networks, config), f"reference engine: {why}"


def described(step: FusedStep | FusedTeachStep, peak: float, why: str) -> str:
    """The line about a fused step that takes ``peak`` bytes."""
    name = str(step.dtype).removeprefix("torch.")
    line = f"fused engine, {name}, about {peak / 2**30:.2f} GiB beside the training set: {why}"
    slower = "; some layers would be faster with the extension's CUDA convolutions, which were not built"
    return line + (slower if step.implementations.missing(device_arch(step.rate)) else "")
