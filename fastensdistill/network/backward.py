"""The launches of a backward pass: nodes in reverse, each gradient going as far as ``network.gradients`` lets it."""

from __future__ import annotations

from math import prod

from fastensdistill.network.build import FLOAT, Head, conv_kind
from fastensdistill.network.forward import Forward
from fastensdistill.network.gradients import Gradients
from fastensdistill.network.launch import (
    Part,
    Step,
    coefficients,
    drawn,
    grad,
    grad_sums,
    index,
    pooled,
    statistics,
)
from fastensdistill.network.nodes import (
    Activation,
    Add,
    Affine,
    Dropout,
    Function,
    Gate,
    Layer,
    Linear,
    Node,
    Norm,
    Pad,
    Pool,
    ReLU,
)
from fastensdistill.network.on_load import Fusions, nothing


class Backward(Gradients):
    """The launches of ``part``'s backward pass, appended to it."""

    def __init__(self, part: Part, forward: Part, fusions: Fusions = nothing):
        """Plan the gradient of ``forward``'s first groups; ``part`` receives the launches."""
        super().__init__(part, fusions)
        Forward(forward, fusions)
        part.buffers.update(forward.buffers)
        self.needed = self.find_needed()
        self.taken: set[str] = set()  # 1x1 convolutions whose data gradient is part of another one's
        if self.head:
            self.head_gradient(self.head)
        else:
            self.logits_gradient(self.network.by_name[self.network.output])
        for node in reversed(self.network.nodes):
            if node.name in self.needed and node.name not in self.done:
                self.emit(node, self.gradient[node.name])

    def find_needed(self) -> set[str]:
        """Values whose gradient is read: for that of the image all, for those of parameters what depends on one."""
        needed: set[str] = set()
        for node in self.network.nodes:
            wanted = self.part.gradient == "input" or node.parameters or needed.intersection(node.inputs)
            needed.update([node.name] if wanted else [])
        return needed

    def emit(self, node: Node, gradient: str) -> None:
        """What brings the gradient of ``node``'s value to its inputs and its parameters."""
        source = node.inputs[0] if node.inputs else ""
        if isinstance(node, Layer):
            self.convolution(node, gradient)
        elif isinstance(node, Norm) and self.part.training:
            self.norm(node, gradient)
        elif isinstance(node, Norm) and self.folded(node):
            self.pass_on(source, Step("add", gradient))
        elif isinstance(node, ReLU):
            self.deliver("elementwise gradient", node, source, [gradient], [self.mask(node.name)])
        elif isinstance(node, Norm | Affine):
            self.deliver("elementwise gradient", node, source, [gradient], [Step("scale", node.name)])
        elif isinstance(node, Add):
            for operand in node.inputs:
                self.pass_on(operand, Step("add", gradient))
        elif isinstance(node, Pool):
            reads = [gradient, *([index(node.name)] if node.kind == "max" else [])]
            self.deliver("pool gradient", node, source, reads)
        elif isinstance(node, Pad):
            self.pass_on(source, Step("add", gradient, node.stride))
        elif isinstance(node, Activation):
            self.activation(node, gradient)
        elif isinstance(node, Dropout):
            self.deliver("dropout gradient", node, source, [gradient, drawn(node.name)])
        elif isinstance(node, Gate):
            self.spread("gate gradient", node, [gradient, *dict.fromkeys(node.inputs)])
        elif isinstance(node, Function):
            trained = node.trained if self.part.gradient == "parameters" else ()
            shapes = zip(trained, node.tensors, strict=False)
            writes = [self.buffer(grad(name), shape, FLOAT, self.part.sets) for name, shape in shapes]
            self.spread("function gradient", node, [gradient, *dict.fromkeys(node.inputs)], writes)

    def activation(self, node: Activation, gradient: str) -> None:
        """The gradient of an activation's input, or of the result of the BatchNorm that it takes in."""
        reads, steps = self.activated(node)
        norm, add = self.normed.get(node.name), self.second.get(node.name)
        value = norm.name if norm else node.inputs[0]
        self.deliver("activation gradient", node, value, [gradient, *reads], [*([add] if add else []), *steps])

    def logits_gradient(self, node: Node) -> None:
        """From the gradient of the logits to what they are."""
        logits = self.buffer(grad(node.name), (self.part.batch, node.shape[0]), FLOAT)
        self.done.add(node.name)
        self.deliver("logits gradient", node, node.inputs[0], [logits])

    def convolution(self, node: Layer, gradient: str) -> None:
        """The gradients of a layer's input and of its parameters, where they are wanted."""
        source, through, behind, kind = node.inputs[0], [], [], conv_kind(node)
        if norm := self.on_load.gradients.get(node.name):
            through = [Step("norm_gradient", norm.name)]
            behind = [norm.inputs[0], coefficients(norm.name)]
        if source in self.needed and not self.is_joined(node):
            flat = isinstance(node, Linear) and node.in_shape[1:] != (1, 1)
            op = "flat gradient" if flat else f"{kind}conv gradient"
            steps, reads = [], [gradient]
            if (shortcut := self.on_load.joined.get(node.name)) and shortcut.name in self.gradient:
                steps = [Step("second", shortcut.name, shortcut.stride)]
                reads.append(self.gradient[shortcut.name])
                self.missing[source] -= 1
                self.taken.add(shortcut.name)
            self.deliver(op, node, source, [*reads, *behind], steps, prologue=through)
        if self.part.gradient == "parameters":
            reads, prologue = ([source], []) if kind else self.loaded(source)
            reads = [reads[0], gradient, *reads[1:], *behind]
            prologue = [*prologue, *through]
            self.launch(f"{kind}weight gradient", node, reads, self.parameter_buffers(node), prologue=prologue)

    def is_joined(self, node: Layer) -> bool:
        """Whether another convolution's data gradient takes this one's in, or will: it comes later if it stands first.

        If it stands behind this one it was there first, and had taken this one's in if that was known then.
        """
        order = self.network.nodes
        mains = [main for main, shortcut in self.on_load.joined.items() if shortcut is node]
        later = [main for main in mains if order.index(self.network.by_name[main]) < order.index(node)]
        return bool(later) or node.name in self.taken

    def parameter_buffers(self, node: Layer) -> list[str]:
        """Buffers for the gradients of a layer's parameters."""
        writes = [self.buffer(grad(f"{node.name}.weight"), (prod(node.weight_shape),), FLOAT)]
        if node.bias:
            writes.append(self.buffer(grad(f"{node.name}.bias"), (node.shape[0],), FLOAT))
        return writes

    def norm(self, node: Norm, gradient: str) -> None:
        """The gradients of a training-mode BatchNorm's input, scale and shift, after their sums."""
        source, sums, batch = node.inputs[0], grad_sums(node.name), statistics(node.name)
        if node.name not in self.summed:
            self.sums_buffer(sums, node.name)
            self.launch("norm sums gradient", node, [gradient, source, batch], [sums])
        writes = [self.buffer(grad(name), (node.shape[0],), FLOAT, self.part.sets) for name in node.parameters]
        reads = [gradient, source, sums, batch]
        if self.on_load.gradients.get(source) is node:
            rows = self.buffer(coefficients(node.name), (3, node.shape[0]), FLOAT, self.part.rows)
            self.launch("norm coefficients", node, [sums, batch], [rows, *writes])
            self.gradient[source] = gradient
        elif source in self.needed:
            self.deliver("norm gradient", node, source, reads, writes=writes)
        else:
            self.launch("norm gradient", node, reads, writes)

    def head_gradient(self, head: Head) -> None:
        """From the gradient of the logits to what the head read."""
        N = self.part.batch
        linear = head.linear
        logits = self.buffer(grad(linear.name), (N, linear.shape[0]), FLOAT)
        reads, writes = [logits, head.source], []
        if self.part.gradient == "parameters":
            reads.append(pooled(linear.name))
            writes = self.parameter_buffers(linear)
        prologue = [Step("relu")] if head.relu else []
        if head.norm:
            kind = "batch_norm" if self.part.training else "scale_shift"
            prologue = [Step(kind, head.norm.name), *prologue]
        if head.norm and self.part.training:
            name, gradient = head.norm.name, self.image_buffer(grad(head.norm.name), head.norm.name)
            self.summed.add(name)
            steps = [Step("store", gradient), Step("sums", name)]
            writes.append(self.sums_buffer(grad_sums(name), name))
            reads.append(statistics(name))
            self.launch("head gradient", linear, reads, writes, steps, prologue)
            self.norm(head.norm, gradient)
        else:
            self.deliver("head gradient", linear, head.source, reads, writes=writes, prologue=prologue)
