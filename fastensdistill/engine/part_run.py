"""What an op of a plan is given to run with: the weights, the buffers, and how launches run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastensdistill.engine.packed import PackedWeights
from fastensdistill.network.launch import Launch, Part, Step, grad, statistics
from fastensdistill.network.nodes import Layer, Node
from fastensdistill.network.on_load import Fusions, nothing

Buffers = dict[str, Any]
Implement = Callable[[Part, Launch, Callable[..., Any]], Callable[..., Any]]


def kernels_themselves(part: Part, launch: Launch, op: Callable[..., Any]) -> Callable[..., Any]:
    """The choice of implementations that changes nothing."""
    return op


class Execution:
    """How launches run, the same for all passes of a step.

    Args:
        precision: how float32 is multiplied, "ieee" or "tf32".
        implement: (part, launch, convolution op) → what computes it, with the op's arguments and results.
        synchronised: BatchNorm's sums are means over all processes.
        micro_batches: how often a step runs the networks it trains; all together move the running statistics as far as
            one run would.
        fusions: what convolutions are planned to take in as they load; ``implement`` has to compute that.
    """

    watch: Callable[[Launch, Buffers], None] | None = None  # called after every launch, before anything is freed

    def __init__(
        self,
        precision: str = "ieee",
        implement: Implement = kernels_themselves,
        synchronised: bool = False,
        micro_batches: int = 1,
        fusions: Fusions = nothing,
    ):
        self.precision, self.implement = precision, implement
        self.synchronised, self.micro_batches, self.fusions = synchronised, micro_batches, fusions


@dataclass
class PartRun:
    """One run of a part: what its launches read, and where they write.

    Args:
        weights: of a part with the same network and mode. In training mode its running statistics are moved in place.
        weight_index: int32 (G,) on the device, the slot of each group; in training mode 0, 1, …, G − 1.
        buffers: in a forward run "input" (1 or G, N, H, W, C), pixels in [0, 1]; in a backward run what the forward run
            left, and "NAME.grad" (G, N, classes) float32 with the output's name. Results are added under the plan's
            names: logits (G, N, classes), "input.grad" (G, N, H, W, C), "PARAMETER.grad" (G, …) of layers and (Q, C) of
            BatchNorm, as PyTorch lays them out, all float32.
        gradients: where parameters' gradients are written instead, by buffer name: of weights (G, taps, Ci, Co), of a
            linear layer (G, 1, H·W·C, Co), the rest as in ``buffers``.
        add: on top of what is there.
    """

    part: Part
    weights: PackedWeights
    weight_index: Tensor
    buffers: Buffers
    execution: Execution = field(default_factory=Execution)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    add: bool = False

    def __post_init__(self) -> None:
        self.groups, self.precision = len(self.part.groups), self.execution.precision

    def node(self, name: str) -> Node:
        return self.part.network.by_name[name]

    def layer(self, launch: Launch) -> Layer:
        node = self.node(launch.node)
        assert isinstance(node, Layer)
        return node

    def implementation(self, launch: Launch, op: Callable[..., Any]) -> Callable[..., Any]:
        return self.execution.implement(self.part, launch, op)

    def read(self, name: str) -> Tensor:
        """The part's share of a buffer: its first groups."""
        return self.buffers[name][: self.groups]

    def write(self, steps: tuple[Step, ...], *values: Tensor | None) -> None:
        """Name an op's results, in the order of the steps that store them."""
        for step, value in zip(steps, values, strict=True):
            self.buffers[step.arg] = value

    def gradient(self, parameter: str) -> Tensor | None:
        """Where the gradient of ``parameter`` is to be written, if not into a buffer of its own."""
        return self.gradients.get(grad(parameter))

    def scale_shift(self, name: str) -> tuple[Tensor, Tensor]:
        """Of an evaluation-mode BatchNorm or of the image, a row per group."""
        scale, shift = self.weights.scale_shift[name]
        if self.part.training:  # slot g is group g's
            return scale[: self.groups], shift[: self.groups]
        return scale.index_select(0, self.weight_index), shift.index_select(0, self.weight_index)

    def statistics(self, norm: str) -> dict[str, Tensor]:
        batch = self.buffers[statistics(norm)]
        return {"mean": batch.mean, "inv_std": batch.inv_std}

    def count(self, norm: str) -> int:
        """Values per channel of one set of groups."""
        _, H, W = self.node(norm).shape
        return self.part.batch * H * W * self.groups // self.part.sets
