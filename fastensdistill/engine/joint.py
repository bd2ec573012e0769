"""Two forward passes of one network as one: a teacher's groups in evaluation mode, a student's in training mode.

Their launches run in the order of ``network.join``, each pass with its own weights and buffers. A turn of both is what
``Execution.implement_joint`` has for it, one launch; where that has none for these two (a table names another
implementation for one side, which knows no such launch), they are launched one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from fastensdistill.engine.part_run import Op, PartRun
from fastensdistill.engine.passes import Dead, Pass, done
from fastensdistill.engine.planned_ops import OPS, conv_arguments, head_arguments, write_conv, write_head
from fastensdistill.kernels.grouped_conv import grouped_conv
from fastensdistill.kernels.head import head
from fastensdistill.network.join import Turn, join
from fastensdistill.network.launch import Launch

Arguments = Callable[[PartRun, Launch], dict[str, Any]]
CALLS: dict[str, tuple[Op, Arguments, Callable[[PartRun, Launch, Any], None]]] = {
    "conv": (grouped_conv, conv_arguments, write_conv),
    "head": (head, head_arguments, write_head),
}
"""Of the ops that can be joint: what computes one side, with what arguments, and what stores its results."""


class JointPass:
    """The forward passes ``evaluation`` and ``training``, of one network, run together."""

    def __init__(self, evaluation: Pass, training: Pass):
        self.evaluation, self.training = evaluation, training
        self.turns = join(evaluation.parts[0], training.parts[0])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (G, N, classes) of ``images`` (1, N, H, W, C) of the evaluation pass, and of the training pass."""
        runs = self.evaluation.begin(images), self.training.begin(images)
        with runs[0].multiplying():
            run_together(self.turns, *runs, (self.evaluation.dead[0], self.training.dead[0]))
        return self.evaluation.end(), self.training.end()


def run_together(
    turns: Iterable[Turn], evaluation: PartRun, training: PartRun, dead: tuple[Dead, Dead] | None = None
) -> None:
    """Run the ``turns`` of two parts; ``dead`` names the buffers to be freed after each launch of either, if given."""
    runs = evaluation, training
    names = [iter(of_part) for of_part in dead or ()]
    for turn in turns:
        if not (turn.joint and run_joint(turn, *runs)):
            for run, launch in zip(runs, turn, strict=True):
                if launch:
                    OPS[launch.op](run, launch)
        for run, launch in zip(runs, turn, strict=True):
            if launch:
                done(run, launch)
        for run, launch, gone in zip(runs, turn, names, strict=False):
            for name in next(gone) if launch else ():
                run.buffers.pop(name, None)


def run_joint(turn: Turn, evaluation: PartRun, training: PartRun) -> bool:
    """Run both sides of a ``turn`` as one launch; False, and nothing is done, where there is none for them."""
    first, second = turn
    assert first
    assert second
    op, arguments, write = CALLS[first.op]
    joint = training.execution.implement_joint((evaluation.part, first), (training.part, second), op)
    results = joint(arguments(evaluation, first), arguments(training, second))
    if results is None:
        return False
    for run, launch, result in zip((evaluation, training), (first, second), results, strict=True):
        write(run, launch, result)
    return True


def joint_pass(evaluations: Iterable[Pass], training: Pass) -> JointPass | None:
    """``training`` with the pass of its network (but for dropout) among ``evaluations``, if there is one."""
    network = training.parts[0].network.evaluated
    return next((JointPass(one, training) for one in evaluations if one.parts[0].network == network), None)
