"""What a rehearsal uses on a CPU: a stand-in for captured graphs, and faults planted through the seams of a diagnosis.

Every fault sits in one launch of a student's backward pass, ``CULPRIT``. What finds and cures it is what a GPU runs.

    launch         its kernel's numbers are wrong, unless it is launched with 8 warps
    launch-dies    the process is killed in it, unless with 8 warps
    launch-hangs   it never ends, unless with 8 warps
    step           right alone, wrong inside the whole step
    captured       right when launched, wrong in a replay
    uncapturable   it raises while it is captured
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.gpu_run.remedies import replaced
from fastensdistill.engine import passes
from fastensdistill.engine.graph import Captured, Graphs, Results, warm_up
from fastensdistill.engine.part_run import PartRun
from fastensdistill.engine.passes import run_part
from fastensdistill.engine.planned_ops import OPS
from fastensdistill.kernels.launch import KernelLaunch, around_launches, kept_to_reference
from fastensdistill.network import launch as plan

CULPRIT = ("conv gradient", "groups.1.0.conv1")  # of ``tiny``, in training: 3x3 at stride 2, with BatchNorm's sums
RIGHT_WARPS = 8


class StandIn(Captured):
    """A capture that is none: it runs the body once more, and ``graph`` is an object whose replay runs it again."""

    capturing = False
    replaying: StandIn | None = None

    def _capture(self) -> None:
        warm_up(self.body, self.state, self.generators)
        tensors, seeds = self.state(), [generator.get_state() for generator in self.generators]
        before = [tensor.clone() for tensor in tensors]
        StandIn.capturing = True
        try:
            self.body()
            self.graph = self  # type: ignore[assignment]
        except RuntimeError as error:
            self.error = str(error)
            warnings.warn(f"the step could not be captured and is launched from Python: {error}", stacklevel=5)
            self.give_up()
        finally:  # what a capture records it does not run
            StandIn.capturing = False
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
            for generator, seed in zip(self.generators, seeds, strict=True):
                generator.set_state(seed)

    def replay(self) -> None:
        StandIn.replaying = self
        try:
            results = self.body()
        finally:
            StandIn.replaying = None
        self.names = list(results)
        self.results = torch.stack([value.float() for value in results.values()])


class StandInGraphs(Graphs):
    """``engine.graph.Graphs`` of stand-ins."""

    def __init__(self, state: Callable[[], Sequence[Tensor]], device: torch.device):
        self.state, self.device = state, device
        self.pool, self.made = object(), {}  # type: ignore[assignment]  # a stand-in for memory

    def prepare(self, key: Hashable, body: Callable[[], Results], generators: Sequence[torch.Generator]) -> Captured:
        made = self.made.setdefault(key, StandIn(body, self.state, generators, self.device, self.pool))
        made.prepare()
        if made.failed:
            for other in self.made.values():
                other.give_up()
        return made


def wrong(value: Tensor) -> Tensor:
    """With the sign of every third element changed."""
    flat = value.flatten().clone()
    flat[::3].neg_()
    return flat.view_as(value)


def is_culprit(launch: KernelLaunch) -> bool:
    """The kernel of ``CULPRIT``, told by what it is compiled for, as a launch does not know its node."""
    given = launch.arguments
    if launch.kernel.__name__ != "conv_data_gradient_kernel" or given["p_z"] is None:
        return False
    return (given["KERNEL"], given["STRIDE"]) == (3, 2) and launch.num_warps != RIGHT_WARPS


def spoils(launch: KernelLaunch, do: Callable[[KernelLaunch], None]) -> None:
    do(launch)
    if is_culprit(launch):
        launch.arguments["p_out"].copy_(wrong(launch.arguments["p_out"]))


def dies(launch: KernelLaunch, do: Callable[[KernelLaunch], None]) -> None:
    if is_culprit(launch):
        os.kill(os.getpid(), signal.SIGKILL)
    do(launch)


def hangs(launch: KernelLaunch, do: Callable[[KernelLaunch], None]) -> None:
    while is_culprit(launch):
        time.sleep(1)
    do(launch)


Spoil = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def in_steps(spoil: Spoil) -> Iterator[None]:
    """What ``CULPRIT`` writes first goes through ``spoil`` in whole steps, but never in the references' own."""

    op, node = CULPRIT
    right = OPS[op]

    def spoiled(run: PartRun, launch: plan.Launch) -> None:
        right(run, launch)
        oracle = kept_to_reference()
        if run.part.training and launch.node == node and not oracle:
            run.buffers[launch.writes[0]] = spoil(run.buffers[launch.writes[0]])

    def run_spoiled(*arguments: Any) -> None:
        OPS[op] = spoiled
        try:
            run_part(*arguments)
        finally:
            OPS[op] = right

    with replaced(passes, "run_part", run_spoiled):
        yield


def refuses(value: Tensor) -> Tensor:
    if StandIn.capturing:
        raise RuntimeError("operation not permitted when stream is capturing")
    return value


FAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "launch": lambda: around_launches(spoils),
    "launch-dies": lambda: around_launches(dies),
    "launch-hangs": lambda: around_launches(hangs),
    "step": lambda: in_steps(wrong),
    "captured": lambda: in_steps(lambda value: wrong(value) if StandIn.replaying else value),
    "uncapturable": lambda: in_steps(refuses),
}


@contextlib.contextmanager
def planted(names: Sequence[str]) -> Iterator[None]:
    """Within, the faults of these names; those that are not in ``FAULTS`` are planted elsewhere. Enter it first."""
    with contextlib.ExitStack() as stack:
        for name in names:
            if name in FAULTS:
                stack.enter_context(FAULTS[name]())
        yield
