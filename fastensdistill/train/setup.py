"""Prepare a run: choose its device, move networks there, and check that processes get equal shares of a batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from fastensdistill.config import DistillConfig, TrainConfig
from fastensdistill.data.augment import Augment
from fastensdistill.data.sources import Dataset
from fastensdistill.engine import parallel
from fastensdistill.engine.common import ImageShape
from fastensdistill.engine.select import EngineChoice
from fastensdistill.errors import InputError
from fastensdistill.method.arguments import checked_student, checked_teachers
from fastensdistill.method.branch_check import check_branches
from fastensdistill.method.calls import dtype_of, habits_of
from fastensdistill.method.inspection import check_network, check_values
from fastensdistill.method.modes import channels_last
from fastensdistill.method.perturbation import PERTURBATIONS
from fastensdistill.method.student import Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.models.wrappers import unwrap

Placed = TypeVar("Placed", bound=nn.Module)


def place(network: Placed, device: torch.device) -> Placed:
    """On the device, weights stored channels last, which is how the batches come, unless it was seen not to bear it."""
    network = network.to(device)
    if any(habits.contiguous for habits in habits_of(network)):
        return network
    return channels_last(network)


def check_arguments(data: Any, out: Any, augment: Any) -> None:
    """Raise InputError for what a trainer cannot use as such."""
    if not isinstance(data, Dataset):
        raise InputError(
            f"data is a {type(data).__name__}; expected a Dataset, or the name or path of one: an .npz of arrays, or a "
            "folder of class folders"
        )
    if not isinstance(out, str | os.PathLike | None):
        raise InputError(f"out is a {type(out).__name__}; expected the path of a folder, or None")
    if not isinstance(augment, Augment | None):
        raise InputError(f"augment is a {type(augment).__name__}; expected an Augment, or None for what suits the data")


def ready_student(
    student: Any, config: DistillConfig, device: torch.device, shape: ImageShape, classes: int
) -> tuple[Student, list[str]]:
    """The student on the device, and what to say of it. Raises InputError for one that cannot be trained."""
    student = checked_student(student)
    check_values(student, "student")
    check_branches(student, shape)
    ascended = config.perturbation if PERTURBATIONS[config.perturbation].needs_gradient("S") else ""
    expected = [student.branches, classes]
    notes = check_network(student, "student", shape, expected, device, trained=True, ascended=ascended)
    return place(student, device), notes


def ready_teachers(
    teachers: Any, config: DistillConfig, device: torch.device, shape: ImageShape, classes: int
) -> tuple[Teachers, list[str]]:
    """Copies of the teachers in float32 on the device, and what to say of them. InputError for any that do not fit."""
    given = checked_teachers(teachers)
    own = Teachers(given.networks) if given is teachers else given
    notes = list(given.notes)
    ascended = config.perturbation if PERTURBATIONS[config.perturbation].needs_gradient("T") else ""
    for i, network in enumerate(own.networks):
        name = f"teacher {i}"
        check_values(network, name)
        dtype = dtype_of(network)
        usual = torch.get_default_dtype()  # float32, but for whoever computes in float64 throughout
        if dtype != usual:
            network.to(usual)
            notes.append(f"{name} ({type(network).__name__}) is of {dtype}: a copy of it in {usual} is used")
        notes += check_network(network, name, shape, [classes], device, ascended=ascended)
        place(network, device)
    return own, notes


def ready_networks(
    networks: Sequence[nn.Module], device: torch.device, shape: ImageShape, classes: int
) -> tuple[list[nn.Module], list[str]]:
    """Networks that are to become teachers on the device, and what to say of them."""
    given, notes = [unwrap(network) for network in networks], []
    for i, network in enumerate(given):
        notes += check_network(network, f"teacher {i}", shape, [classes], device, trained=True)
    return [place(network, device) for network in given], notes


def check_shares(config: TrainConfig) -> None:
    """Raise InputError for a batch that cannot be shared out equally, to processes and then to micro-batches."""
    count = parallel.processes()
    if config.batch_size % count:
        raise InputError(f"batch_size={config.batch_size} for {count} processes: expected a multiple of {count}")
    if config.batch_size // count % config.micro_batches:
        own, parts = config.batch_size // count, config.micro_batches
        raise InputError(f"{own} images of a batch for each of {count} processes in micro_batches={parts}: "
                         "expected equal parts")  # fmt: skip


def check_tf32(config: TrainConfig, device: torch.device) -> None:
    """Raise InputError for tensor cores' float32 on a device that has none."""
    if config.precision == "tf32" and device.type == "cpu":
        raise InputError("precision='tf32' on a CPU: expected auto, fp32 or bf16; tf32 is tensor cores' float32")


def check_statistics(config: TrainConfig, engine: EngineChoice) -> None:
    """Raise InputError where several processes are to share BatchNorm's statistics and the engine cannot."""
    if config.sync_batch_norm and parallel.processes() > 1 and engine.name != "fused":
        raise InputError(f"sync_batch_norm needs the fused engine, which was not chosen ({engine})")


@contextmanager
def enough_values(config: TrainConfig) -> Iterator[None]:
    """Say what to do where BatchNorm meets a part of a batch with one value per channel, which PyTorch refuses."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"batch_size={config.batch_size} in micro_batches={config.micro_batches} leaves BatchNorm one value per "
            "channel to normalise by; expected more images in each part, or larger ones"
        ) from error


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one; of ``torchrun``'s processes each takes its own, and so for ``cuda``.

    Raises InputError for a device that is not there, and for one GPU that several processes would share.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    local, here = os.environ.get("LOCAL_RANK"), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if parallel.launched() > 1 and name.startswith("cuda") and torch.cuda.is_available():
        if name == "cuda" and local is not None:
            name = f"cuda:{local}"
            if int(local) >= torch.cuda.device_count():
                raise InputError(f"{here} processes on a machine with {torch.cuda.device_count()} GPUs: expected a GPU "
                                 "for each, or device='cpu'")  # fmt: skip
        elif here > 1:
            raise InputError(f"device {name!r} for {here} processes: expected 'cuda' or 'auto', so each has its own")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise InputError(f"device {name!r}: expected auto, cpu, or cuda, which may have a number (cuda:1)")
        torch.empty(0, device=device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # events, streams and graphs are the current device's
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def seeded(seed: int, create: Callable[[], Placed]) -> Placed:
    """What ``create`` returns with PyTorch's generator seeded, which is put back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create()
