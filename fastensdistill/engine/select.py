"""Which engine trains a run, and why, decided before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from fastensdistill.config import DistillConfig, TeachConfig, TrainConfig
from fastensdistill.engine import proof
from fastensdistill.engine.common import ImageShape
from fastensdistill.engine.dispatch import PREDICTED, Dispatch
from fastensdistill.engine.fused import FusedStep, check_networks
from fastensdistill.engine.memory import estimate
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
SLOWER = "some layers would be faster with the extension's CUDA convolutions, which were not built"


class EngineChoice(NamedTuple):
    """Which engine trains, and why; ``str(choice)`` is the line for the user."""

    name: str
    """fused or reference."""
    reason: str
    dtype: str = ""
    """Of a fused step's activations."""
    peak: float = 0.0
    """Bytes that a fused step takes beside the training set, as ``engine.memory`` estimates them."""
    advice: str = ""

    def __str__(self) -> str:
        memory = f"about {self.peak / 2**30:.2f} GiB beside the training set" if self.peak else ""
        head = ", ".join(part for part in (f"{self.name} engine", self.dtype, memory) if part)
        return f"{head}: {self.reason}" + (f"; {self.advice}" if self.advice else "")


def choose_engine(
    config: TrainConfig, trained: Networks, teachers: Teachers | None, device: torch.device, image_shape: ImageShape
) -> EngineChoice:
    """The engine for a student with its teachers, or for networks that become teachers.

    ``config.engine`` "auto" is fused on a CUDA device for networks that it can run. Raises InputError where "fused" is
    asked for and cannot be: nothing falls back without having been allowed to. Of several processes, where one cannot,
    none does.
    """
    obstacle = anyone(_obstacle(config, trained, teachers, device, image_shape))
    if obstacle is not None:
        return EngineChoice("reference", obstacle)
    return EngineChoice("fused", "asked for" if config.engine == "fused" else "every layer has a kernel")


def no_cuda(device: torch.device) -> str:
    """The reason for the reference engine on another ``device`` than a GPU."""
    return f"no CUDA device, training on {device.type}"


def _obstacle(
    config: TrainConfig, trained: Networks, teachers: Teachers | None, device: torch.device, image_shape: ImageShape
) -> str | None:
    """Why the fused engine is not to be taken, or None."""
    if config.engine == "reference":
        return "asked for"
    if config.engine == "auto" and not _on_cuda(device):
        return no_cuda(device)
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


def verified(config: TrainConfig, choice: EngineChoice, verify: Callable[[], dict[str, float]]) -> EngineChoice:
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
        measured = f"checked against the reference engine, 1 − cosine {max(found.values()):.0e}"
        return choice._replace(reason=f"{choice.reason}; {measured}")
    if config.engine == "fused":
        raise InputError(f"engine='fused' cannot be used on this device: {trouble}") from cause
    return EngineChoice("reference", trouble)


def fused_step(
    config: TrainConfig,
    choice: EngineChoice,
    device: torch.device,
    verify: Callable[[], dict[str, float]],
    build: Callable[[], Built],
) -> tuple[Built | None, EngineChoice]:
    """The fused step where it is chosen and has been verified, else None; and the choice that this comes to.

    Kernels that may only run once they have been proven on ``device`` are proven first, by all processes together.

    With ``engine="auto"`` an error of ours while it is built means the reference engine. Several processes exchange
    their weights there, and none can turn back alone: it is raised.
    """
    if choice.name == "fused":
        proof.trouble(device)
        choice = verified(config, choice, verify)
    if choice.name == "reference":
        return None, choice
    try:
        step = build()
    except InputError as error:
        if config.engine == "fused" or processes() > 1:
            raise
        return None, EngineChoice("reference", in_a_line(error))
    wanted = Dispatch(step.implementations.table, PREDICTED)
    advice = proof.advice(device) or (SLOWER if wanted.missing(device_arch(step.rate)) else "")
    dtype, peak = str(step.dtype).removeprefix("torch."), expected_peak(step, config.batch_size // processes())
    return step, choice._replace(dtype=dtype, peak=peak, advice=advice)


def expected_peak(step: FusedStep | FusedTeachStep, batch: int) -> float:
    """Bytes that ``step`` will take at most; 0 where that cannot be told, which is no reason not to train."""
    try:
        return estimate(step, batch).peak
    except Exception:  # of a network that can be copied, but not on the meta device
        return 0.0


def distillation_step(
    student: Student, teachers: Teachers, config: DistillConfig, image_shape: ImageShape, num_classes: int
) -> tuple[ReferenceStep | FusedStep, EngineChoice]:
    """The step of the chosen engine, and the choice."""
    device = next(student.parameters()).device
    step, choice = fused_step(
        config,
        choose_engine(config, student, teachers, device, image_shape),
        device,
        lambda: verify_distillation(student, teachers, config, image_shape, num_classes),
        lambda: FusedStep(student, teachers, config, image_shape=image_shape),
    )
    return step or ReferenceStep(student, teachers, config, num_classes=num_classes), choice


def teaching_step(
    networks: Sequence[nn.Module], config: TeachConfig, image_shape: ImageShape
) -> tuple[TeachStep | FusedTeachStep, EngineChoice]:
    """As :func:`distillation_step`, for networks that become teachers."""
    device = next(networks[0].parameters()).device
    step, choice = fused_step(
        config,
        choose_engine(config, networks, None, device, image_shape),
        device,
        lambda: verify_teaching(networks, config, image_shape),
        lambda: FusedTeachStep(networks, config, image_shape=image_shape),
    )
    return step or TeachStep(networks, config), choice
