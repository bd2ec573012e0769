"""Before a step is captured: copies of its networks take small ones, watched for what a graph cannot hold.

Their memory is looked at too. Most of it is activations, as many as there are images: from two batch sizes follows that
of the run. On whatever device the networks are; they are left as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastensdistill.config import DistillConfig, TeachConfig
from fastensdistill.engine.captured import CapturedReferenceStep, CapturedTeachStep
from fastensdistill.engine.common import ImageShape
from fastensdistill.engine.host_reads import HostReads
from fastensdistill.engine.memory import LiveHere
from fastensdistill.engine.parallel import alone
from fastensdistill.engine.verify import IMAGES, class_count, few_images
from fastensdistill.method.copying import copy_network
from fastensdistill.method.student import Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.network.unseen import generators_kept

Batches = Sequence[tuple[Tensor, Tensor]]


class Trial(NamedTuple):
    """What small steps showed."""

    reads: list[str]
    """What keeps the step from being captured, a line each."""
    stays: int
    """Bytes of weights, statistics, momentum."""
    small: int
    large: int
    """Bytes that live at most within a step of ``IMAGES`` images, and of twice as many."""

    def peak(self, batch: int, micro_batches: int = 1) -> float:
        """About how many bytes a step of ``batch`` images takes."""
        per_image = max(0, self.large - self.small) / IMAGES
        return max(0.0, self.stays + self.small + per_image * (batch / micro_batches - IMAGES))


def try_distillation(
    student: Student, teachers: Teachers, config: DistillConfig, shape: ImageShape, num_classes: int
) -> Trial:
    """Of the step of :class:`~fastensdistill.engine.captured.CapturedReferenceStep`."""
    student, teachers = copy_network(student, forget=True), copy_network(teachers, forget=True)
    config = replace(config, micro_batches=1)
    with alone():
        step = CapturedReferenceStep(student, teachers, config, num_classes=num_classes, capture=False)
    named = {"the student": student.module} | {f"teacher {m}": own for m, own in enumerate(teachers.networks)}
    generator = torch.Generator().manual_seed(0)
    return _tried(step, named, lambda n: [few_images(student, shape, num_classes, generator, n)])


def try_teaching(networks: Sequence[nn.Module], config: TeachConfig, shape: ImageShape) -> Trial:
    """Of the step of :class:`~fastensdistill.engine.captured.CapturedTeachStep`."""
    classes = class_count(networks[0], shape)
    networks = [copy_network(network, forget=True) for network in networks]
    with alone():
        step = CapturedTeachStep(networks, replace(config, micro_batches=1), capture=False)
    named = {f"network {m}": own for m, own in enumerate(networks)}
    generator = torch.Generator().manual_seed(0)
    return _tried(step, named, lambda n: [few_images(own, shape, classes, generator, n) for own in networks])


def _tried(
    step: CapturedReferenceStep | CapturedTeachStep, named: Mapping[str, nn.Module], batches: Callable[[int], Batches]
) -> Trial:
    reads, live = HostReads(named, step.device), LiveHere()
    every = nn.ModuleList(named.values())

    @contextlib.contextmanager
    def watched() -> Iterator[None]:
        with reads, live:
            yield

    peaks = []
    with alone(), generators_kept(every), torch.enable_grad():
        # Networks are looked at by others too when they are first called
        for images, around in ((IMAGES, contextlib.nullcontext), (IMAGES, watched), (2 * IMAGES, lambda: live)):
            step.bodies.images, step.bodies.around = [], around
            step.bodies.load(batches(images))
            live.take_peak()
            step.run_all()
            peaks.append(live.take_peak())
    state = step.bodies.state() + [p for own in step.bodies.others for p in own.parameters()]
    return Trial(reads.found, sum(tensor.nbytes for tensor in state), *peaks[1:])
