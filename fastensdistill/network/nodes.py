"""The typed list a network becomes: one dataclass per kind of layer, each naming its inputs and its output's shape.

A node and the value it computes share one name: the path of its module, or of the operation where there is no module.
Shapes are (C, H, W) of one image; a flattened value keeps the shape it had before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

from fastensdistill.network.costs import expression_macs

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Node:
    """A value of the network and how it comes about: ``inputs`` are names, ``shape`` is the value's."""

    name: str
    inputs: tuple[str, ...]
    shape: Shape

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the trainable tensors, as in the module's state dict."""
        return ()


@dataclass(frozen=True)
class Input(Node):
    """The image, in [0, 1]."""


@dataclass(frozen=True)
class Affine(Node):
    """``(x - mean) / std`` per channel, from the buffers ``name.mean`` and ``name.std``."""


@dataclass(frozen=True)
class Layer(Node):
    """A node with a weight and perhaps a bias (Co,)."""

    in_shape: Shape
    bias: bool

    @property
    def parameters(self) -> tuple[str, ...]:
        """Weight and, where there is one, bias."""
        return (f"{self.name}.weight", *([f"{self.name}.bias"] if self.bias else []))

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(Co, Ci) or (Co, Ci, kernel, kernel), as the state dict has it."""
        return self.shape[0], prod(self.in_shape)

    @property
    def in_channels(self) -> int:
        """Ci: what one tap of the weight multiplies."""
        return self.weight_shape[1]

    @property
    def taps(self) -> int:
        """Positions of the input that one of the output sees."""
        return prod(self.weight_shape[2:])

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return prod(self.shape[1:]) * prod(self.weight_shape)


@dataclass(frozen=True)
class Conv(Layer):
    """Square, zero-padded convolution with weight (Co, Ci, kernel, kernel)."""

    kernel: int
    stride: int
    padding: int

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(Co, Ci, kernel, kernel)."""
        return self.shape[0], self.in_shape[0], self.kernel, self.kernel


@dataclass(frozen=True)
class PointConv(Conv):
    """A linear layer over the channels at every position: a 1x1 convolution with weight (Co, Ci)."""

    kernel: int = 1
    stride: int = 1
    padding: int = 0

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(Co, Ci)."""
        return self.shape[0], self.in_shape[0]


Pair = tuple[int, int]
"""Of rows and of columns."""


@dataclass(frozen=True)
class GeneralConv(Layer):
    """A zero-padded convolution with channel groups, dilation or a rectangular window, (Co, Ci / groups, *kernel).

    Output channel o multiplies the input channels of its group, o // (Co / groups).
    """

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(Co, Ci / groups, *kernel)."""
        return self.shape[0], self.in_shape[0] // self.groups, *self.kernel

    @property
    def depthwise(self) -> bool:
        """Whether every channel is a group of its own."""
        return self.groups == self.in_shape[0] == self.shape[0]


@dataclass(frozen=True)
class Linear(Layer):
    """Linear layer over all C·H·W values of its input, weight (Co, C·H·W)."""


@dataclass(frozen=True)
class Norm(Node):
    """BatchNorm; ``unbiased`` says which variance enters the running estimate (PyTorch's own: the unbiased one)."""

    eps: float
    momentum: float
    unbiased: bool

    @property
    def parameters(self) -> tuple[str, ...]:
        """Scale and shift."""
        return f"{self.name}.weight", f"{self.name}.bias"


@dataclass(frozen=True)
class ReLU(Node):
    """ReLU, whose gradient needs one bit per value."""


@dataclass(frozen=True)
class Activation(Node):
    """Another function of each value, whose gradient needs its input: ``kind`` of ``kernels.activation``."""

    kind: str


@dataclass(frozen=True)
class Gate(Node):
    """An image times one value per channel: inputs are (C, H, W) and (C, 1, 1)."""


@dataclass(frozen=True)
class Dropout(Node):
    """In training, 0 with probability ``p`` and else divided by 1 − p (unless it is not ``scaled``).

    Drawn for every "value", every "channel" of an image, or every "image" (stochastic depth): ``over``. The module
    drops values in this ``layout`` (``network.expression``).
    """

    p: float
    over: str
    scaled: bool = True
    layout: str = "image"


@dataclass(frozen=True)
class Function(Node):
    """What PyTorch computes: an ``expression`` over the inputs and over tensors of the module.

    ``layouts`` say what the expression takes each input as, ``layout`` what it returns (``network.expression``).
    ``trained`` and ``constants`` are the module's parameters and buffers that occur in it, by name, and ``tensors``
    their shapes, in that order.
    """

    expression: Any
    layouts: tuple[str, ...]
    layout: str
    trained: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    tensors: tuple[tuple[int, ...], ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        """The trained tensors."""
        return self.trained

    def macs(self, in_shapes: tuple[Shape, ...]) -> int:
        """Multiply-accumulates for one image, for inputs of these shapes."""
        n = len(self.trained)
        trained = tuple(zip(self.trained, self.tensors[:n], strict=True))
        fixed = tuple(zip(self.constants, self.tensors[n:], strict=True))
        return expression_macs(self.expression, self.layouts, in_shapes, trained, fixed)


@dataclass(frozen=True)
class Logits(Node):
    """The end of a network that does not end in a linear layer: its (C, 1, 1) input is the logits."""


@dataclass(frozen=True)
class Add(Node):
    """Sum of two values of one shape."""


@dataclass(frozen=True)
class Pool(Node):
    """``kind`` "max" or "avg" over windows, or "adaptive": the mean over the windows that give the output's size."""

    kind: str
    in_shape: Shape
    kernel: int = 0
    stride: int = 0
    padding: int = 0

    @property
    def is_global(self) -> bool:
        """Whether it is the mean over the whole image."""
        return self.kind == "adaptive" and self.shape[1:] == (1, 1)


@dataclass(frozen=True)
class Pad(Node):
    """``x[:, :, ::stride, ::stride]`` with zero channels appended: the shortcut without parameters."""

    in_shape: Shape
    stride: int


@dataclass(frozen=True)
class Network:
    """Nodes in the order they are computed. Two modules of one architecture give equal networks."""

    nodes: tuple[Node, ...]
    output: str

    @cached_property
    def by_name(self) -> dict[str, Node]:
        """Every node by its own name."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The nodes that have weights."""
        return tuple(node for node in self.nodes if isinstance(node, Layer))

    @cached_property
    def norms(self) -> tuple[Norm, ...]:
        """Every BatchNorm."""
        return tuple(node for node in self.nodes if isinstance(node, Norm))

    @cached_property
    def consumers(self) -> dict[str, tuple[Node, ...]]:
        """Per value the nodes that read it."""
        return {value.name: tuple(n for n in self.nodes if value.name in n.inputs) for value in self.nodes}

    def sole(self, value: str) -> Node | None:
        """The one node that reads ``value``, if there is exactly one."""
        users = self.consumers[value]
        return users[0] if len(users) == 1 and value != self.output else None

    @cached_property
    def evaluated(self) -> Network:
        """As in evaluation mode, without Dropout nodes: what read one reads its input. Itself, where there are none."""
        instead: dict[str, str] = {}
        nodes = []
        for node in self.nodes:
            inputs = tuple(instead.get(name, name) for name in node.inputs)
            if isinstance(node, Dropout):
                instead[node.name] = inputs[0]
            else:
                nodes.append(node if inputs == node.inputs else replace(node, inputs=inputs))
        return Network(tuple(nodes), instead.get(self.output, self.output)) if instead else self

    def in_shapes(self, node: Node) -> tuple[Shape, ...]:
        """The shapes of the inputs of ``node``."""
        return tuple(self.by_name[name].shape for name in node.inputs)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward pass of one image; F, its FLOPs, is twice that."""
        functions = (node for node in self.nodes if isinstance(node, Function))
        return sum(layer.macs for layer in self.layers) + sum(node.macs(self.in_shapes(node)) for node in functions)
