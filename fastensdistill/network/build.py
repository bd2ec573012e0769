"""What the forward and the backward planner share: buffers, launches with their bytes, and the shape of the head."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from fastensdistill.errors import InputError
from fastensdistill.network.launch import Buffer, Launch, Part, Step, grad, statistics
from fastensdistill.network.nodes import Affine, Conv, Layer, Linear, Node, Norm, Pool, ReLU
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


def find_head(part: Part) -> Head:
    """The launch at the end of ``part``'s network. Raises ``InputError`` where the last layer is not linear."""
    network, by_name = part.network, part.network.by_name
    linear = by_name[network.output]
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


class Builder:
    """Collects the launches of one part."""

    def __init__(self, part: Part, fusions: Fusions = nothing):
        self.part, self.network = part, part.network
        self.head = find_head(part)
        self.on_load = find_on_load(part, fusions, self.head.absorbed)

    def sole(self, value: str) -> Node | None:
        """The one node that reads ``value``, if there is exactly one."""
        return self.network.sole(value)

    def folded(self, node: Node | None) -> bool:
        """Whether this BatchNorm goes into the weights of the convolution before it."""
        return self.part.folded(node)

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
        """What a convolution of ``source`` reads, the main buffer first, and its prologue."""
        node = self.network.by_name[source]
        if isinstance(node, Affine):
            return [node.inputs[0]], [Step("affine", source)]
        if norm := self.on_load.norms.get(source):
            return [norm.inputs[0], statistics(norm.name)], [Step("batch_norm", norm.name), Step("relu")]
        return [source], []

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
        if isinstance(node, Layer):
            weighted = grad(node.parameters[0]) in writes  # the head's gradient makes both
            macs = node.macs * (2 if weighted and op != "weight gradient" else 1)
            nbytes = 0.0 if op == "weight gradient" else prod(node.weight_shape) * self.groups * ACTIVATION / 8
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
        user = self.sole(node.name) if op in ("conv", "conv gradient") else None
        self.part.launches.append(
            Launch(
                op, node.name, tuple(reads), tuple(writes), tuple(prologue or ()), tuple(epilogue),
                user.name if user and self.folded(user) else "", flops, nbytes,
            )
        )  # fmt: skip
