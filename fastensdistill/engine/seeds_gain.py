"""What training several seeds at once is predicted to give over one after another: no measurement.

A step is the nodes of its captured graph, counted on the meta device. A planned launch takes the larger of its
arithmetic and its traffic, at the share of the device that it has programs for (``Gpu.node_time``): of a convolution or
linear layer one for every 128 x 64 values of its result, a weight gradient's and a memory-bound launch's as many as
there are multiprocessors, or one for 16,384 values. Weights are packed, un-folded and updated at the memory's rate;
every other node takes the least that one can. So what several students gain is fewer nodes, and fuller ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch

from fastensdistill.config import DistillConfig
from fastensdistill.engine.common import ImageShape
from fastensdistill.engine.dispatch import Dispatch
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.graph import gathered
from fastensdistill.engine.graph_nodes import GraphNodes
from fastensdistill.engine.memory import estimate, on_meta
from fastensdistill.engine.parallel import alone
from fastensdistill.engine.seeds import SeedsStep, check_students
from fastensdistill.kernels.tiles import assume_arch
from fastensdistill.method.copying import copy_network
from fastensdistill.method.student import STUDENTS, Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.models import create_model, image_size
from fastensdistill.network.gpu import HELD, Gpu
from fastensdistill.network.launch import Launch, Part
from fastensdistill.network.nodes import Layer

ENOUGH = 1.3  # times faster: from here on it pays to train seeds at once
TILE = 128 * 64  # values of a product's result that a program computes
STREAM = 2**14  # values that a program of a memory-bound launch goes through


class SeedsGain(NamedTuple):
    """Predicted seconds of a step of every seed, one after another and at once, and bytes at most of the latter."""

    seeds: int
    gpu: str
    apart: float
    together: float
    peak: float
    nodes: tuple[int, int]  # of the graph of one seed's step, and of that of all

    @property
    def ratio(self) -> float:
        """How many times faster they are at once."""
        return self.apart / self.together

    @property
    def worth_it(self) -> bool:
        """Whether that is enough to train them at once."""
        return self.ratio >= ENOUGH

    def __str__(self) -> str:
        one, every = self.nodes
        return (
            f"{self.seeds} seeds at once, predicted, not measured, on {self.gpu}: a step of each "
            f"{self.apart * 1e3:.2f} ms one after another ({self.seeds} x {one} graph nodes), "
            f"{self.together * 1e3:.2f} ms at once ({every} nodes), {self.ratio:.2f} times faster, "
            f"about {self.peak / 2**30:.2f} GiB: {'worth it' if self.worth_it else 'not worth it'} (from {ENOUGH} on)"
        )


class Work(NamedTuple):
    """Of one node."""

    flops: float
    nbytes: float
    programs: float


def work(part: Part, launch: Launch, gpu: Gpu) -> Work:
    """What a planned launch does, and by how many programs."""
    node = part.network.by_name.get(launch.node)
    groups = len(part.groups)
    if isinstance(node, Layer) and launch.flops:
        if "weight gradient" in launch.op:  # split over positions until the device is full
            return Work(launch.flops, launch.nbytes, gpu.multiprocessors)
        shape = node.in_shape if "gradient" in launch.op else node.shape
        return Work(launch.flops, launch.nbytes, max(1, groups * part.batch * prod(shape) / TILE))
    values = max((one.groups * prod(one.shape) for one in map(part.buffers.get, launch.writes) if one), default=1)
    return Work(launch.flops, launch.nbytes, max(1, values / STREAM))


def predicted_seconds(step: FusedStep | SeedsStep, batch: int, gpu: Gpu) -> tuple[float, int]:
    """Of a step of ``batch`` images a student, wherever ``step`` is; and the nodes of its graph."""
    with alone(), torch.no_grad(), assume_arch(gpu.arch):
        twin: Any = on_meta(step)
        twin.build((batch, *step.image_shape))
        with GraphNodes() as nodes:
            gathered(twin.body())
    sides = {id(turn.training): turn.evaluation for turn in twin.joint.turns if turn.joint} if twin.joint else {}
    joined = {id(launch) for launch in sides.values()}
    evaluation = twin.joint.evaluation.parts[0] if twin.joint else None
    planned: list[Work] = []
    for one, _ in twin.passes():
        for part in one.parts:
            for launch in part.launches:
                if id(launch) in joined:
                    continue
                found = work(part, launch, gpu)
                if evaluation is not None and id(launch) in sides:  # a joint launch does the work of both sides
                    found = Work(*map(sum, zip(found, work(evaluation, sides[id(launch)], gpu), strict=True)))
                planned.append(found)
    count = len(planned) * twin.micro_batches
    flat = twin.parameters
    groups = max(1, len(flat.deviations))
    # packed for two passes, both ways, and un-folded, for every branch; the update reads and writes three tensors
    weights = flat.values.numel() / flat.copies * 12 * groups + 32 * flat.values.numel()
    seconds = sum(gpu.node_time(*one) for one in planned) * twin.micro_batches + weights / (HELD * gpu.bandwidth)
    return seconds + max(0, nodes.total - count) * gpu.node_time(0, 0, 1), nodes.total


def seeds_gain(one: FusedStep, together: SeedsStep, batch: int, gpu: Gpu) -> SeedsGain:
    """The prediction for ``together``, with ``one`` of its students' steps, of ``batch`` images each."""
    single, nodes = predicted_seconds(one, batch, gpu)
    every, all_nodes = predicted_seconds(together, batch, gpu)
    S = together.batches
    return SeedsGain(S, gpu.name, S * single, every, estimate(together, batch).peak, (nodes, all_nodes))


def joint_seeds_gain(
    students: Sequence[Student], teachers: Teachers, config: DistillConfig, image_shape: ImageShape, gpu: Gpu
) -> SeedsGain:
    """The prediction for ``students`` of different seeds; they and the teachers are left as they are.

    Raises InputError, in one line, for what is trained one after another in any case.
    """
    networks = check_students(students, teachers, image_shape, config.perturbation)
    twins = [copy_network(student, meta=True) for student in students]
    frozen = copy_network(teachers, meta=True)
    device = next(students[0].parameters()).device
    options: dict[str, Any] = {"implementations": Dispatch.on(device)}
    numbers = range(len(students))
    together = SeedsStep(twins, frozen, config, numbers, image_shape=image_shape, networks=networks, **options)
    one = FusedStep(copy_network(students[0], meta=True), frozen, config, **options)
    one.train_as(networks)
    return seeds_gain(one, together, config.batch_size, gpu)


def predicted_for_model(
    model: str, seeds: int, teachers: int, branches: int, batch: int, gpu: Gpu,
    implementations: Dispatch | None = None, **settings: Any,
) -> SeedsGain:  # fmt: skip
    """The same for a ``model``, teachers and students alike, on 100 classes in bf16, as ``plan`` prints it."""
    config = DistillConfig(**{"precision": "bf16", "batch_size": batch, **settings})
    size = image_size(model)
    with torch.device("meta"):
        frozen = Teachers([create_model(model, 100) for _ in range(teachers)])
        students = [STUDENTS[config.student](create_model(model, 100), branches) for _ in range(seeds)]
        shape = 3, size, size
        together = SeedsStep(students, frozen, config, range(seeds), image_shape=shape, implementations=implementations)
        student = STUDENTS[config.student](create_model(model, 100), branches)
        one = FusedStep(student, frozen, config, image_shape=shape, implementations=implementations)
    return seeds_gain(one, together, batch, gpu)
