"""What the forward and the backward planner share: buffers, launches with their bytes, and the shape of the head."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from fastensdistill.errors import InputError
from fastensdistill.network.launch import Buffer, Launch, Part, Step, grad, statistics
from fastensdistill.network.nodes import (
    Activation,
    Affine,
    Conv,
    Function,
    GeneralConv,
    Layer,
    Linear,
    Logits,
    Node,
    Norm,
    Pool,
    ReLU,
)
from fastensdistill.network.on_load import Fusions, find_on_load, nothing

ACTIVATION, FLOAT, BIT, INDEX = 16, 32, 1, 8  # bits per element


@dataclass(frozen=True)
class Head:
    """The network's last linear layer and what its launch takes in from ``source`` on: BatchNorm, ReLU, global mean."""

    linear: Linear
    pool: Pool | None
    relu: ReLU | None
    norm: Norm | None
    source: str

    @property
    def absorbed(self) -> set[str]:
        """The nodes of this launch."""
        return {node.name for node in (self.linear, self.pool, self.relu, self.norm) if node}


def find_head(part: Part) -> Head | None:
    """The launch at the end of ``part``'s network; None where its logits are made otherwise.

    Raises ``InputError`` where the last node is neither linear nor :class:`Logits`.
    """
    network, by_name = part.network, part.network.by_name
    linear = by_name[network.output]
    if isinstance(linear, Logits):
        return None
    if not isinstance(linear, Linear):
        raise InputError(f"the network ends in {linear.name!r}, a {type(linear).__name__}; expected a linear layer")
    pool = relu = norm = None
    node = by_name[linear.inputs[0]]
    if isinstance(node, Pool) and node.is_global and network.sole(node.name):
        pool, node = node, by_name[node.inputs[0]]
    if isinstance(node, ReLU) and network.sole(node.name):
        relu, node = node, by_name[node.inputs[0]]
        per_channel = pool is not None or node.shape[1:] == (1, 1)
        if isinstance(node, Norm) and network.sole(node.name) and per_channel and not part.folded(node):
            norm, node = node, by_name[node.inputs[0]]
    return Head(linear, pool, relu, norm, node.name)


def conv_kind(node: Layer) -> str:
    """What stands before "conv", "conv gradient" and "weight gradient" in a layer's ops."""
    if not isinstance(node, GeneralConv):
        return ""
    return "depthwise " if node.depthwise else "general "


class Builder:
    """Collects the launches of one part."""

    def __init__(self, part: Part, fusions: Fusions = nothing):
        self.part, self.network = part, part.network
        self.head = find_head(part)
        self.absorbed = self.head.absorbed if self.head else set[str]()
        self.on_load = find_on_load(part, fusions, self.absorbed)
        # By the name of an activation, the BatchNorm that its launch takes in
        self.normed = {node.name: norm for norm in self.network.norms if (node := self.activation_of(norm))}

    def sole(self, value: str) -> Node | None:
        """The one node that reads ``value``, if there is exactly one."""
        return self.network.sole(value)

    def folded(self, node: Node | None) -> bool:
        """Whether this BatchNorm goes into the weights of the convolution before it."""
        return self.part.folded(node)

    def activation_of(self, norm: Norm) -> Activation | None:
        """The activation behind ``norm`` if nothing else reads that and no weights carry it."""
        user = self.sole(norm.name)
        return user if isinstance(user, Activation) and not self.folded(norm) else None

    @property
    def groups(self) -> int:
        """How many networks run together."""
        return len(self.part.groups)

    def buffer(self, name: str, shape: tuple[int, ...], bits: int = ACTIVATION, groups: int | None = None) -> str:
        """Note a buffer and return its name. ``shape`` is of one share, of which there are ``groups``."""
        self.part.buffers[name] = Buffer(shape, bits, self.groups if groups is None else groups)
        return name

    def image_buffer(self, name: str, node: str, bits: int = ACTIVATION) -> str:
        """A buffer with the shape of ``node``'s value, for all images."""
        C, H, W = self.network.by_name[node].shape
        return self.buffer(name, (self.part.batch, H, W, C), bits)

    def sums_buffer(self, name: str, norm: str) -> str:
        """Partial sums of two kinds per group and channel; the number of rows is the kernel's affair."""
        return self.buffer(name, (2, self.network.by_name[norm].shape[0]), FLOAT)

    def loaded(self, source: str) -> tuple[list[str], list[Step]]:
        """What a dense convolution of ``source`` reads, the main buffer first, and its prologue."""
        node = self.network.by_name[source]
        if isinstance(node, Affine):
            return [node.inputs[0]], [Step("affine", source)]
        if norm := self.on_load.norms.get(source):
            return [norm.inputs[0], statistics(norm.name)], [Step("batch_norm", norm.name), Step("relu")]
        return [source], []

    def activated(self, node: Activation) -> tuple[list[str], list[Step]]:
        """What an activation reads, and its steps: with the BatchNorm before it where it takes that in."""
        step = Step("activation", node.name)
        norm = self.normed.get(node.name)
        if norm is None:
            return [node.inputs[0]], [step]
        if self.part.training:
            return [norm.inputs[0], statistics(norm.name)], [Step("batch_norm", norm.name), step]
        return [norm.inputs[0]], [Step("scale_shift", norm.name), step]

    def whole(self, read: Step, value: str) -> bool:
        """Whether what a step adds has ``value``'s shape; that of a zero-padded shortcut may be strided, and wider."""
        shape = self.part.buffers[read.arg].shape
        return read.stride == 1 and shape[-1] == self.network.by_name[value].shape[0]

    def launch(
        self,
        op: str,
        node: Node,
        reads: list[str],
        writes: list[str],
        epilogue: list[Step] | None = None,
        prologue: list[Step] | None = None,
    ) -> None:
        """Append a launch; the buffers that its steps read and write are added to ``reads`` and ``writes``.

        Its bytes are those of its buffers and, for a layer, of the packed weights, which the weight gradient alone
        does not read. A 1x1 convolution with stride 2 skips three of four positions of its main input; where there is
        a second source, its buffer is read second.
        """
        epilogue, macs, share = epilogue or [], 0, [1.0, 1.0]
        residuals = [(s.arg, 1 / s.stride**2) for s in epilogue if s.kind == "add" and "gradient" not in op]
        residuals += [(s.arg, 1.0) for s in epilogue if s.kind == "mask" or (s.kind == "add" and "gradient" in op)]
        writes = [*writes, *(s.arg for s in epilogue if s.kind in ("store", "bits"))]
        nbytes = 0.0
        if op == "elementwise gradient":  # a sum of gradients of whatever node's value
            pass
        elif isinstance(node, Function):
            macs = node.macs(self.network.in_shapes(node))
            macs *= 3 if "gradient" in op else 1  # which computes it again, and two products for each of its own
            nbytes = sum(map(prod, node.tensors)) * self.part.sets * FLOAT / 8
        elif isinstance(node, Layer):
            alone = op.endswith("weight gradient")
            weighted = grad(node.parameters[0]) in writes  # the head's gradient makes both
            macs = node.macs * (2 if weighted and not alone else 1)
            nbytes = 0.0 if alone else prod(node.weight_shape) * self.groups * ACTIVATION / 8
            if isinstance(node, Conv) and op in ("conv", "weight gradient"):
                share[0] = min(1.0, node.kernel / node.stride) ** 2
        for step in (step for step in epilogue if step.kind == "second"):
            other = self.network.by_name[step.arg]
            assert isinstance(other, Conv)
            macs += other.macs
            nbytes += prod(other.weight_shape) * self.groups * ACTIVATION / 8
            share[1] = 1.0 if "gradient" in op else 1 / step.stride**2
        moved = [*zip(reads, share, strict=False), *((name, 1.0) for name in (*reads[2:], *writes)), *residuals]
        reads = [*reads, *(name for name, _ in residuals)]
        for name, part in moved:
            held = self.part.buffers[name]
            nbytes += part * Buffer(held.shape, held.bits, min(held.groups, self.groups)).nbytes
        flops = 2 * macs * self.part.batch * self.groups
        user = self.sole(node.name) if op.endswith(("conv", "conv gradient")) else None
        self.part.launches.append(
            Launch(
                op, node.name, tuple(reads), tuple(writes), tuple(prologue or ()), tuple(epilogue),
                user.name if user and self.folded(user) else "", flops, nbytes,
            )
        )  # fmt: skip
