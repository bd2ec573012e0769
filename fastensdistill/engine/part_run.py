"""What an op of a plan is given to run with: the weights, the buffers, and how launches run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastensdistill.engine.common import cudnn_tf32
from fastensdistill.engine.packed import PackedWeights
from fastensdistill.kernels.grouped_conv import grouped_conv
from fastensdistill.kernels.head import head
from fastensdistill.kernels.joint_conv import joint_conv
from fastensdistill.kernels.joint_head import joint_head
from fastensdistill.kernels.operands import accumulator
from fastensdistill.network.launch import INPUT, Launch, Part, Step, grad, statistics
from fastensdistill.network.nodes import Layer, Node
from fastensdistill.network.on_load import Fusions, nothing

Buffers = dict[str, Any]
Op = Callable[..., Any]
Implement = Callable[[Part, Launch, Op], Op]
Side = tuple[Part, Launch]  # of a joint launch
JointOp = Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[Any, Any] | None]
"""Arguments of an op of the evaluation side and of the training side → the results of both; None: not together."""

JOINT: dict[Op, JointOp] = {grouped_conv: joint_conv, head: joint_head}
"""An op → the one launch for two sides of it."""


def kernels_themselves(part: Part, launch: Launch, op: Op) -> Op:
    """The choice of implementations that changes nothing."""
    return op


def kernels_together(evaluation: Side, training: Side, op: Op) -> JointOp:
    """The same for a joint launch."""
    return JOINT[op]


class Execution:
    """How launches run, the same for all passes of a step.

    Args:
        precision: how float32 is multiplied, "ieee" or "tf32".
        implement: (part, launch, convolution op) → what computes it, with the op's arguments and results.
        implement_joint: ((part, launch) of the evaluation side, of the training side, op) → what computes both.
        synchronised: BatchNorm's sums are means over all processes.
        micro_batches: how often a step runs the networks it trains; all together move the running statistics as far as
            one run would.
        fusions: what convolutions are planned to take in as they load; ``implement`` has to compute that.
    """

    # Called after every launch, before anything is freed; after a joint one for either side with its own buffers
    watch: Callable[[Launch, Buffers], None] | None = None

    def __init__(
        self,
        precision: str = "ieee",
        implement: Implement = kernels_themselves,
        synchronised: bool = False,
        micro_batches: int = 1,
        fusions: Fusions = nothing,
        implement_joint: Callable[[Side, Side, Op], JointOp] = kernels_together,
    ):
        self.precision, self.implement, self.implement_joint = precision, implement, implement_joint
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

    def multiplying(self) -> AbstractContextManager[None]:
        """Inside, PyTorch's own convolutions multiply float32 as the run does."""
        return cudnn_tf32(self.precision == "tf32")

    def node(self, name: str) -> Node:
        return self.part.network.by_name[name]

    def layer(self, launch: Launch) -> Layer:
        node = self.node(launch.node)
        assert isinstance(node, Layer)
        return node

    def implementation(self, launch: Launch, op: Op) -> Op:
        return self.execution.implement(self.part, launch, op)

    def read(self, name: str) -> Tensor:
        """The part's share of a buffer: its first groups. Of the image, a copy for each in the activations' dtype."""
        if name == INPUT:
            image: Tensor = self.buffers[name].to(self.weights.dtype)
            return image.expand(self.groups, *image.shape[1:]).contiguous()
        return self.buffers[name][: self.groups]

    def write(self, steps: tuple[Step, ...], *values: Tensor | None) -> None:
        """Name an op's results, in the order of the steps that store them; the image's gradient is float32."""
        for step, value in zip(steps, values, strict=True):
            if step.arg == grad(INPUT) and value is not None:
                value = value.to(accumulator(value.dtype))
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
