"""The networks that a step trains: forward, backward and update as a list of launches, outside autograd."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from fastensdistill.engine.parallel import average
from fastensdistill.engine.parameters import FlatParameters
from fastensdistill.engine.part_run import Execution
from fastensdistill.engine.passes import Pass
from fastensdistill.engine.slots import BranchSlots, PlainSlots
from fastensdistill.kernels.sgd import sgd
from fastensdistill.kernels.unfold import unfold_gradients
from fastensdistill.network.launch import Part, grad
from fastensdistill.network.nodes import Network


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
        execution: Execution,
    ):
        self.network, self.parameters = network, parameters
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
        self.training_pass = Pass(forward, backward, self.slots.weights, execution, self.sinks)

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
        logits = self.training_pass.forward(images, self.index)
        self.parameters.batches.add_(1)
        return logits

    def backward(self, seed: Tensor, add: bool = False) -> None:
        """All gradients from that of the logits; with ``add`` on top of an earlier micro-batch's."""
        self.training_pass.backward(seed, add)

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
