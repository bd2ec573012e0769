"""Passes: a part of a plan run forward and back, every buffer freed after its last reader.

So a captured graph's memory is used again, and the most that lives at once is what ``engine.memory`` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat

import torch
from torch import Tensor

from fastensdistill.engine.packed import PackedWeights
from fastensdistill.engine.parallel import average
from fastensdistill.engine.part_run import Buffers, Execution, PartRun
from fastensdistill.engine.planned_ops import OPS
from fastensdistill.network.launch import INPUT, Launch, Part, grad, is_sums

Dead = Sequence[tuple[str, ...]]  # names of buffers to be freed, launch by launch
NO_GRADIENTS: Mapping[str, Tensor] = {}


def dead_after(parts: Sequence[Part], kept: Iterable[str]) -> list[list[tuple[str, ...]]]:
    """Per part and launch, the buffers that no later launch of ``parts`` reads; ``kept`` are never among them."""
    seen = set(kept)
    dead: list[list[tuple[str, ...]]] = []
    for part in reversed(parts):
        of_part = []
        for launch in reversed(part.launches):
            names = tuple(dict.fromkeys(n for n in (*launch.reads, *launch.writes) if n not in seen))
            seen.update(names)
            of_part.append(names)
        dead.append(of_part[::-1])
    return dead[::-1]


def run_part(run: PartRun, dead: Dead | None = None) -> None:
    """Run the launches of ``run.part``; ``dead`` names the buffers to be freed after each, none if it is not given."""
    with run.multiplying():
        for launch, names in zip(run.part.launches, dead or repeat(()), strict=dead is not None):
            OPS[launch.op](run, launch)
            done(run, launch)
            for name in names:
                run.buffers.pop(name, None)


def done(run: PartRun, launch: Launch) -> None:
    """What follows a ``launch`` before anything is freed: its sums are shared, and who watches is told."""
    if run.execution.synchronised:
        share_sums(launch, run.buffers)
    if run.execution.watch:
        run.execution.watch(launch, run.buffers)


def share_sums(launch: Launch, buffers: Buffers) -> None:
    """Replace the BatchNorm sums that ``launch`` wrote by their mean over processes.

    Divided by one process's count, as what follows does, that is the mean over everybody's images, in the statistics as
    in the gradient's two sums; every process has a batch of the same size.
    """
    for name in launch.writes:
        if is_sums(name):
            buffers[name] = buffers[name].sum(1, keepdim=True)
            average(buffers[name])


class Pass:
    """A part of a plan, with its backward part where there is one, its packed weights, and what is freed when.

    ``forward`` leaves what ``backward`` reads in ``buffers``; of all else that a pass computes only its results stay.

    Args:
        forward, backward: parts of one network; the backward part's groups are the first of the forward part's.
        gradients: where parameters' gradients are written (:class:`~fastensdistill.engine.planned_ops.PartRun`).
    """

    def __init__(
        self,
        forward: Part,
        backward: Part | None,
        weights: PackedWeights,
        execution: Execution,
        gradients: Mapping[str, Tensor] = NO_GRADIENTS,
    ):
        self.parts = [forward] if backward is None else [forward, backward]
        self.weights, self.execution, self.gradients = weights, execution, gradients
        self.output, self.output_grad = forward.network.output, grad(forward.network.output)
        self.dead = dead_after(self.parts, [INPUT, grad(INPUT), self.output, self.output_grad, *gradients])
        self.buffers: Buffers = {}
        self.in_order = torch.arange(len(forward.groups), dtype=torch.int32, device=weights.values.device)

    def forward(self, images: Tensor, weight_index: Tensor | None = None) -> Tensor:
        """Logits (G, N, classes) of ``images`` (1 or G, N, H, W, C).

        ``weight_index`` int32 (G,) on the device: the slot of each group; if it is not given, group g has slot g.
        """
        run_part(self.begin(images, weight_index), self.dead[0])
        return self.end()

    def begin(self, images: Tensor, weight_index: Tensor | None = None) -> PartRun:
        """The run that :meth:`forward` makes of its part, for who launches it otherwise."""
        self.weight_index = self.in_order if weight_index is None else weight_index
        self.buffers = {INPUT: images}
        return PartRun(self.parts[0], self.weights, self.weight_index, self.buffers, self.execution)

    def end(self) -> Tensor:
        """The logits, once it has run; what no backward pass reads is let go."""
        logits = self.buffers[self.output]
        if len(self.parts) == 1:
            self.buffers = {}
        return logits

    def backward(self, grad_logits: Tensor, add: bool = False) -> Buffers:
        """What the gradient of the logits of the backward part's groups leads to, under the plan's names.

        ``grad_logits`` (G, N, classes); with ``add``, parameters' gradients go on top of what is there.
        """
        backward, buffers = self.parts[1], self.buffers
        self.buffers = {}
        buffers[self.output_grad] = grad_logits
        index = self.weight_index[: len(backward.groups)]
        run_part(PartRun(backward, self.weights, index, buffers, self.execution, self.gradients, add), self.dead[1])
        return buffers
