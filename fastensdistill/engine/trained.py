"""The networks that a step trains: forward, backward and update as a list of launches, outside autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from fastensdistill.engine.parallel import average, processes
from fastensdistill.engine.parameters import FlatParameters
from fastensdistill.engine.passes import Buffers, Implement, run_part
from fastensdistill.engine.slots import BranchSlots, PlainSlots
from fastensdistill.engine.weights import Weights
from fastensdistill.kernels.sgd import sgd
from fastensdistill.kernels.unfold import unfold_gradients
from fastensdistill.network.launch import INPUT, Launch, Part, grad, is_sums
from fastensdistill.network.nodes import Network


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


class Runner:
    """Runs parts and frees every buffer after its last reader, so that a captured graph's memory is used again."""

    watch: Callable[[Launch, Buffers], None] | None = None  # called after every launch, before anything is freed

    def __init__(self, precision: str, implement: Implement, synchronised: bool = False, parts: int = 1):
        """``parts``: how many passes a step makes over the trained networks, one per micro-batch."""
        self.precision, self.implement, self.synchronised, self.parts = precision, implement, synchronised, parts

    def __call__(
        self,
        part: Part,
        weights: Weights,
        slots: Tensor,
        buffers: Buffers,
        dead: Sequence[tuple[str, ...]],
        sinks: Mapping[str, Tensor] | None = None,
        add: bool = False,
    ) -> None:
        """``sinks``: where parameters' gradients are written (``run_part``), with ``add`` on top of what is there."""
        remaining = iter(dead)

        def after(launch: Launch) -> None:
            if self.synchronised:
                share_sums(launch, buffers)
            if self.watch:
                self.watch(launch, buffers)
            for name in next(remaining):
                buffers.pop(name, None)

        run_part(
            part, weights, slots, buffers, self.precision,
            after=after, implement=self.implement, updates=self.parts,
            sharers=processes() if self.synchronised else 1, sinks=sinks, add=add,
        )  # fmt: skip


def share_sums(launch: Launch, buffers: Buffers) -> None:
    """Replace the BatchNorm sums that ``launch`` wrote by their mean over processes.

    Divided by one process's count, as what follows does, that is the mean over everybody's images, in the statistics as
    in the gradient's two sums; every process has a batch of the same size.
    """
    for name in launch.writes:
        if is_sums(name):
            buffers[name] = buffers[name].sum(1, keepdim=True)
            average(buffers[name])


class Trained:
    """Copies of one architecture in training mode: a student's branches, or networks each on its own.

    Args:
        network: their architecture.
        forward, backward: the parts of the plan that train them; the groups of a student are its K branches.
        parameters: their parameters.
        dtype: of activations and packed weights.
    """

    def __init__(
        self,
        network: Network,
        forward: Part,
        backward: Part,
        parameters: FlatParameters,
        dtype: torch.dtype,
        run: Runner,
    ):
        self.network, self.parts, self.parameters, self.run = network, (forward, backward), parameters, run
        self.ranked = len(parameters.deviations) > 0
        K = len(forward.groups)
        self.slots: BranchSlots | PlainSlots = (
            BranchSlots(forward, parameters, dtype) if self.ranked else PlainSlots(forward, parameters, dtype)
        )
        self.index = torch.arange(K, dtype=torch.int32, device=parameters.device)
        # Layers' gradients as the kernels leave them, of every branch or copy, before they are un-folded
        self.gradients = parameters.values.new_zeros(K * parameters.layout.ranked)
        self.layers = {layer.name: layer for layer in parameters.layout.layers}
        self.sinks = {grad(name): self._sink(name) for name in parameters.shapes}
        output = network.output
        self.dead = dead_after(self.parts, [INPUT, output, grad(output), *self.sinks])
        self.buffers: Buffers = {}

    def _sink(self, name: str) -> Tensor:
        """Where a gradient is written: what needs no un-folding goes to the flat gradient at once."""
        path, _, kind = name.rpartition(".")
        layer = self.layers.get(path)
        if layer is None or (kind == "bias" and not self.ranked):
            return self.parameters.view(self.parameters.gradient, name)
        K, start = len(self.index), layer.weight if kind == "weight" else layer.bias
        shape = (layer.taps, layer.in_channels, layer.out_channels) if kind == "weight" else (layer.out_channels,)
        return self.gradients[K * start : K * (start + prod(shape))].view(K, *shape)

    def write(self) -> None:
        """Pack the flat parameters: once before the first forward of a step."""
        self.slots.write()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (K, N, classes) of ``images`` (1 or K, N, H, W, C); running statistics move."""
        self.buffers = {INPUT: images}
        self.run(self.parts[0], self.slots.weights, self.index, self.buffers, self.dead[0])
        self.parameters.batches.add_(1)
        return self.buffers[self.network.output]

    def backward(self, seed: Tensor, add: bool = False) -> None:
        """All gradients from that of the logits; with ``add`` on top of an earlier micro-batch's."""
        self.buffers[grad(self.network.output)] = seed
        self.run(self.parts[1], self.slots.weights, self.index, self.buffers, self.dead[1], self.sinks, add)
        self.buffers = {}

    def finish(self) -> None:
        """Un-fold the gradients and average them over processes: once, before the update."""
        parameters, deviations = self.parameters, self.parameters.deviations if self.ranked else None
        self.factor_gradients = unfold_gradients(
            self.gradients, parameters.values, deviations, parameters.layout, parameters.gradient
        )
        if self.ranked:
            average(self.factor_gradients)
        average(parameters.gradient)

    def update(self, rate: Tensor, momentum: float, decay: float) -> None:
        """Nesterov; r and s with K times the rate and 1/K of the decay (method of Nam et al., section 2)."""
        parameters = self.parameters
        with parameters.frozen_kept():
            sgd(
                parameters.values, parameters.momentum, parameters.gradient, rate,
                momentum=momentum, weight_decay=decay,
            )  # fmt: skip
            if self.ranked:
                K, moments = len(parameters.deviations), parameters.deviation_momentum
                sgd(
                    parameters.deviations, moments, self.factor_gradients, rate,
                    momentum=momentum, weight_decay=decay / K, scale=K,
                )  # fmt: skip
        del self.factor_gradients
