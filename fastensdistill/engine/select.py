"""Which engine trains a run, and why, decided before anything is built.

    planned     fused engine: every layer of every network is launched by a plan
    mixed       fused engine: some teachers run as their own modules inside of its graph
    captured    reference engine, its step captured as CUDA graphs
    eager       reference engine, as it is

``auto`` takes the first of these tiers that can train the networks on this device, and says what stood in the way of
those before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import nn

from fastensdistill.config import DistillConfig, TeachConfig, TrainConfig
from fastensdistill.engine import proof
from fastensdistill.engine.captured import CapturedReferenceStep, CapturedTeachStep
from fastensdistill.engine.common import ImageShape, loss_options
from fastensdistill.engine.covered import covered
from fastensdistill.engine.dispatch import PREDICTED, Dispatch
from fastensdistill.engine.fused import FusedStep, check_networks
from fastensdistill.engine.memory import estimate
from fastensdistill.engine.parallel import alone, anyone, processes
from fastensdistill.engine.reference import ReferenceStep, TeachStep
from fastensdistill.engine.teach import FusedTeachStep, common_architecture
from fastensdistill.engine.trial import Trial, try_distillation, try_teaching
from fastensdistill.engine.verify import (
    verify_captured_distillation,
    verify_captured_teaching,
    verify_distillation,
    verify_teaching,
)
from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import HAS_TRITON
from fastensdistill.kernels.tiles import device_arch
from fastensdistill.method.student import Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.network.plan import Plan

Networks = Student | Sequence[nn.Module]
Fused = FusedStep | FusedTeachStep
CapturedStep = CapturedReferenceStep | CapturedTeachStep
AnyStep = ReferenceStep | FusedStep | TeachStep | FusedTeachStep
Errors = dict[str, float]
SLOWER = "some layers would be faster with the extension's CUDA convolutions, which were not built"
PLANNED = "every operation is planned"


class EngineChoice(NamedTuple):
    """Which engine trains, and why; ``str(choice)`` is the line for the user."""

    name: str
    """fused, captured or reference."""
    reason: str
    dtype: str = ""
    """Of a fused step's activations."""
    peak: float = 0.0
    """Bytes that a step takes beside the training set, as ``engine.memory`` or ``engine.trial`` estimates them."""
    advice: str = ""
    share: str = ""
    """Of the work that kernels of ours do, in words."""
    modules: int = 0
    """Teachers that run as their own modules in a fused step."""

    @property
    def tier(self) -> str:
        """planned, mixed, captured or eager."""
        of_fused = "mixed" if self.modules else "planned"
        return {"fused": of_fused, "captured": "captured", "reference": "eager"}[self.name]

    def __str__(self) -> str:
        memory = f"about {self.peak / 2**30:.2f} GiB beside the training set" if self.peak else ""
        tier = self.tier if self.name == "fused" else ""  # the others' name says it
        parts = f"{self.name} engine", tier, self.dtype, self.share, memory
        head = ", ".join(part for part in parts if part)
        return f"{head}: {self.reason}" + (f"; {self.advice}" if self.advice else "")


class Attempts(NamedTuple):
    """How the steps of one run are tried and built, from the fastest on."""

    verify_fused: Callable[[], Errors]
    fused: Callable[[], Fused]
    try_captured: Callable[[], Trial]
    verify_captured: Callable[[], Errors]
    captured: Callable[[], CapturedStep]
    eager: Callable[[], ReferenceStep | TeachStep]


def choose_engine(
    config: TrainConfig, trained: Networks, teachers: Teachers | None, device: torch.device, image_shape: ImageShape
) -> EngineChoice:
    """The engine to begin with, for a student with its teachers, or for networks that become teachers.

    ``config.engine`` "auto" is fused on a CUDA device for networks that it can run, and captured for others. Raises
    InputError where "fused" is asked for and cannot be: nothing falls back without having been allowed to. Of several
    processes, where one cannot, none does.
    """
    if config.engine in ("reference", "captured"):
        return EngineChoice(config.engine, "asked for")
    if config.engine == "auto" and not _on_cuda(device):
        return EngineChoice("reference", no_cuda(device))
    obstacle = anyone(_obstacle(config, trained, teachers, image_shape))
    if obstacle is not None:
        return EngineChoice("captured", obstacle)
    return EngineChoice("fused", "asked for" if config.engine == "fused" else PLANNED)


def no_cuda(device: torch.device) -> str:
    """The reason for the reference engine on another ``device`` than a GPU."""
    return f"no CUDA device, training on {device.type}"


def _obstacle(config: TrainConfig, trained: Networks, teachers: Teachers | None, image_shape: ImageShape) -> str | None:
    """Why the fused engine is not to be taken, or None."""
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
            raise InputError(
                f"engine='fused' cannot train this: {in_a_line(error)}; engine='auto' finds one that can"
            ) from error
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


def checked(config: TrainConfig, choice: EngineChoice, check: Callable[[], Errors], otherwise: str) -> EngineChoice:
    """The engine of ``choice`` if it computes here what the reference engine does, with what was measured as a reason.

    A disagreement, or any error on the way there, means the engine ``otherwise``; where this one was asked for, it is
    raised.
    """
    trouble: str | None = None
    cause: Exception | None = None
    found: Errors = {}
    try:
        with alone():
            found = check()
    except Exception as error:  # a compiler's, a driver's, a network's that cannot be copied: whatever it is, none runs
        trouble, cause = in_a_line(error), error
    trouble = anyone(trouble)  # all processes take the same engine
    if trouble is None:
        measured = f"; checked against the reference engine, 1 − cosine {max(found.values()):.0e}" if found else ""
        return choice._replace(reason=f"{choice.reason}{measured}")
    if config.engine == choice.name:
        where = "on this device" if choice.name == "fused" else "here"
        raise InputError(f"engine={choice.name!r} cannot be used {where}: {trouble}") from cause
    reason = trouble if choice.name == "fused" else f"{choice.reason}; nor can its step be captured: {trouble}"
    return EngineChoice(otherwise, reason)


def build_step(
    config: TrainConfig, choice: EngineChoice, device: torch.device, attempts: Attempts
) -> tuple[AnyStep, EngineChoice]:
    """The step of the chosen engine, or of the next one that can train here; and the choice that this comes to.

    Kernels that may only run once they have been proven on ``device`` are proven first, by all processes together.
    """
    if choice.name == "fused":
        proof.trouble(device)
        choice = checked(config, choice, attempts.verify_fused, _next(device))
    if choice.name == "fused":
        fused, choice = _fused(config, choice, device, attempts.fused)
        if fused is not None:
            return fused, choice
    if choice.name == "captured":
        captured, choice = _captured(config, choice, device, attempts)
        if captured is not None:
            return captured, choice
    return attempts.eager(), choice


def _next(device: torch.device) -> str:
    """The engine that trains here what the fused one does not."""
    return "captured" if _on_cuda(device) else "reference"


def _fused(
    config: TrainConfig, choice: EngineChoice, device: torch.device, build: Callable[[], Fused]
) -> tuple[Fused | None, EngineChoice]:
    """With ``engine="auto"`` an error of ours while it is built means another engine. Several processes exchange their
    weights there, and none can turn back alone: it is raised."""
    try:
        step = build()
    except InputError as error:
        if config.engine == "fused" or processes() > 1:
            raise
        return None, EngineChoice(_next(device), in_a_line(error))
    wanted = Dispatch(step.implementations.table, PREDICTED)
    advice = proof.advice(device) or (SLOWER if wanted.missing(device_arch(step.rate)) else "")
    dtype, (peak, share) = str(step.dtype).removeprefix("torch."), expected(step, config.batch_size // processes())
    modules = step.modules if isinstance(step, FusedStep) else {}
    if modules:
        about = _about_modules(modules, len(step.networks) - 1)
        choice = choice._replace(reason=f"{about}; {choice.reason.replace(PLANNED, 'all else is planned')}")
    choice = choice._replace(dtype=dtype, peak=peak, advice=advice, modules=len(modules), share=share)
    return step, choice


def _about_modules(modules: Mapping[int, str], teachers: int) -> str:
    """How many teachers are planned, and which run as their own modules, with the reason of the first."""
    first, numbers = next(iter(modules)), ", ".join(map(str, modules))
    several = len(modules) > 1
    which = f"teachers {numbers} run as their own modules" if several else f"teacher {numbers} runs as its own module"
    why = f"{first}: {modules[first]}" if several else modules[first]
    return f"{teachers - len(modules)} of {teachers} teachers planned, {which} ({why})"


def _captured(
    config: TrainConfig, choice: EngineChoice, device: torch.device, attempts: Attempts
) -> tuple[CapturedStep | None, EngineChoice]:
    found: list[Trial] = []

    def check() -> Errors:
        found.append(attempts.try_captured())
        if found[0].reads:
            raise InputError(found[0].reads[0])
        return attempts.verify_captured() if _on_cuda(device) else {}

    choice = checked(config, choice, check, "reference")
    if choice.name != "captured":
        return None, choice
    note = "" if _on_cuda(device) else f", but every operation is launched from Python: {no_cuda(device)}"
    peak = found[0].peak(config.batch_size // processes(), config.micro_batches)
    why = "" if config.engine == "captured" else "no fused step: "
    return attempts.captured(), choice._replace(reason=f"{why}{choice.reason}{note}", peak=peak)


def expected(step: Fused, batch: int) -> tuple[float, str]:
    """Bytes that ``step`` will take at most, and what share of its work our own kernels do, in words, with the
    modules whose memory is not among it.

    0 and "" where that cannot be told, which is no reason not to train.
    """
    try:
        found = estimate(step, batch)
    except Exception:  # of a network that can be copied, but not on the meta device
        return 0.0, ""
    missing = ", ".join(line.partition(":")[0] for line in found.uncounted)
    memory = f", memory without the activations of {missing}" if missing else ""
    return found.peak, f"{covered([Plan(found.parts)]).flops:.0%} of its FLOPs by own kernels{memory}"


def distillation_step(
    student: Student, teachers: Teachers, config: DistillConfig, image_shape: ImageShape, num_classes: int
) -> tuple[ReferenceStep | FusedStep, EngineChoice]:
    """The step of the chosen engine, and the choice."""
    device = next(student.parameters()).device
    loss_options(config, student, len(teachers))  # raises, for every engine alike, before any is looked at
    choice = choose_engine(config, student, teachers, device, image_shape)
    about = student, teachers, config, image_shape, num_classes
    attempts = Attempts(
        lambda: verify_distillation(*about),
        lambda: FusedStep(student, teachers, config, image_shape=image_shape),
        lambda: try_distillation(*about),
        lambda: verify_captured_distillation(*about),
        lambda: CapturedReferenceStep(student, teachers, config, num_classes=num_classes),
        lambda: ReferenceStep(student, teachers, config, num_classes=num_classes),
    )
    step, choice = build_step(config, choice, device, attempts)
    return cast("ReferenceStep | FusedStep", step), choice


def teaching_step(
    networks: Sequence[nn.Module], config: TeachConfig, image_shape: ImageShape
) -> tuple[TeachStep | FusedTeachStep, EngineChoice]:
    """As :func:`distillation_step`, for networks that become teachers."""
    device = next(networks[0].parameters()).device
    choice = choose_engine(config, networks, None, device, image_shape)
    attempts = Attempts(
        lambda: verify_teaching(networks, config, image_shape),
        lambda: FusedTeachStep(networks, config, image_shape=image_shape),
        lambda: try_teaching(networks, config, image_shape),
        lambda: verify_captured_teaching(networks, config, image_shape),
        lambda: CapturedTeachStep(networks, config),
        lambda: TeachStep(networks, config),
    )
    step, choice = build_step(config, choice, device, attempts)
    return cast("TeachStep | FusedTeachStep", step), choice
