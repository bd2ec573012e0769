"""What a run needs before its first step: a device of its own, networks on it, shares that come out even."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from fastensdistill.config import TrainConfig
from fastensdistill.engine import parallel
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.select import AnyStep
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.errors import InputError

Placed = TypeVar("Placed", bound=nn.Module)


def place(network: Placed, device: torch.device) -> Placed:
    """On the device, weights stored channels last, which is how the batches come."""
    return network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def check_shares(config: TrainConfig) -> None:
    """Raise InputError for a batch that cannot be shared out equally, to processes and then to micro-batches."""
    count = parallel.processes()
    if config.batch_size % count:
        raise InputError(f"batch_size={config.batch_size} for {count} processes: expected a multiple of {count}")
    if config.batch_size // count % config.micro_batches:
        own, parts = config.batch_size // count, config.micro_batches
        raise InputError(f"{own} images of a batch for each of {count} processes in micro_batches={parts}: "
                         "expected equal parts")  # fmt: skip


def check_statistics(config: TrainConfig, step: AnyStep, engine: str) -> None:
    """Raise InputError where several processes are to share BatchNorm's statistics and the engine cannot."""
    if config.sync_batch_norm and parallel.processes() > 1 and not isinstance(step, FusedStep | FusedTeachStep):
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
