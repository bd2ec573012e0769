"""What a step trains: its passes in training mode, and the gradients of the flat parameters; no autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from fastensdistill.engine.packed import TrainedWeights
from fastensdistill.engine.parallel import average
from fastensdistill.engine.parameters import FlatParameters
from fastensdistill.engine.part_run import Execution, PartRun
from fastensdistill.engine.partials import left_to_unfold
from fastensdistill.engine.passes import Pass
from fastensdistill.kernels.layout import weight_partials
from fastensdistill.kernels.unfold import unfold_gradients
from fastensdistill.network.launch import Part, grad


class TrainedPass(Pass):
    """The pass of what is trained, the K branches of students or copies each on its own.

    Args:
        forward, backward: the parts of the plan that train it, a group per branch or copy.
        parameters: what is trained.
        dtype: of activations and packed weights.
    """

    weights: TrainedWeights

    def __init__(
        self, forward: Part, backward: Part, parameters: FlatParameters, dtype: torch.dtype, execution: Execution
    ):
        self.parameters = parameters
        # Of the layers of every branch or copy, as the kernels leave them: un-folding brings them to the parameters
        self.partials = left_to_unfold(backward, execution.implement, dtype, parameters.values.device)
        self.memory = parameters.layout.gradients(len(forward.groups), self.partials)
        self.layer_gradients = parameters.values.new_zeros(self.memory.size)
        gradients = {grad(name): self._written(name) for name in parameters.shapes}
        super().__init__(forward, backward, TrainedWeights(forward, parameters, dtype), execution, gradients)

    def _written(self, name: str) -> Tensor:
        """Where the gradient of a parameter is written: what needs no un-folding goes to the flat one at once.

        Of a weight it is (K, taps, Ci, Co), or with a first dimension more for partial results.
        """
        path, _, kind = name.rpartition(".")
        every, K = zip(self.parameters.layout.layers, self.memory.places, strict=True), self.memory.networks
        layer, place = next((pair for pair in every if pair[0].name == path), (None, None))
        if layer is None or place is None or (kind == "bias" and not self.parameters.ranked):
            return self.parameters.view(self.parameters.gradient, name)
        if kind == "bias":
            return self.layer_gradients[place.bias : place.bias + K * layer.out_channels].view(K, -1)
        several = weight_partials(self.layer_gradients, layer, place, K)
        several = several.view(place.splits, K, layer.taps, layer.in_channels, layer.out_channels)
        return several if path in self.partials else several[0]

    def refresh(self) -> None:
        """Pack the flat parameters: once before the first forward of a step."""
        self.weights.refresh()

    def begin(self, images: Tensor, weight_index: Tensor | None = None) -> PartRun:
        self.parameters.copy_means()
        return super().begin(images, weight_index)

    def end(self) -> Tensor:
        """The logits, once it has run: one more batch that moved the running statistics."""
        self.parameters.batches.add_(1)
        return super().end()

    def finish(self) -> None:
        """Un-fold the gradients and average them over processes: once, before the update."""
        flat = self.parameters
        deviations = flat.deviations if flat.ranked else None
        self.factor_gradients = unfold_gradients(
            self.layer_gradients, self.memory, flat.values, deviations, flat.layout, flat.gradient
        )
        if flat.ranked:
            average(self.factor_gradients)
        average(flat.gradient)
