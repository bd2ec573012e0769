"""The launches of a backward pass: nodes in reverse, each gradient going as far as ``FUSIONS`` lets it.

``missing`` counts, per value, the readers whose gradient has not come yet; ``waiting`` holds those that came and were
stored apart. The launch that brings the last one adds them, applies the ReLU's mask and so on, and stores the sum.
"""

from __future__ import annotations

from math import prod

from fastensdistill.network.build import ACTIVATION, FLOAT, Builder
from fastensdistill.network.forward import Forward
from fastensdistill.network.launch import (
    INPUT,
    Part,
    Step,
    after,
    coefficients,
    grad,
    grad_sums,
    index,
    mask,
    pooled,
    statistics,
    waiting,
)
from fastensdistill.network.nodes import Add, Affine, Conv, Layer, Linear, Node, Norm, Pad, Pool, ReLU
from fastensdistill.network.on_load import Fusions, nothing

# What follows an op inside its own launch, in this order; of two "add" one can be used.
FUSIONS: dict[str, tuple[str, ...]] = {
    "conv gradient": ("add", "mask", "scale", "add", "sums"),
    "norm gradient": ("add",),
    "elementwise gradient": ("add", "mask", "scale", "add", "sums"),
}


class Backward(Builder):
    """The launches of ``part``'s backward pass, appended to it."""

    def __init__(self, part: Part, forward: Part, fusions: Fusions = nothing):
        """Plan the gradient of ``forward``'s first groups; ``part`` receives the launches."""
        super().__init__(part, fusions)
        Forward(forward, fusions)
        part.buffers.update(forward.buffers)
        self.needed = self.find_needed()
        self.missing = {name: len(users) for name, users in self.network.consumers.items()}
        self.waiting: dict[str, list[Step]] = {name: [] for name in self.missing}
        self.gradient: dict[str, str] = {}
        self.done: set[str] = self.head.absorbed
        self.summed: set[str] = set()
        self.taken: set[str] = set()  # 1x1 convolutions whose data gradient is part of another one's
        self.unfinished: list[str] = []  # values with more gradients than the launch that came last could add
        self.head_gradient()
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

    def convolution(self, node: Layer, gradient: str) -> None:
        """The gradients of a layer's input and of its parameters, where they are wanted."""
        source, through, behind = node.inputs[0], [], []
        if norm := self.on_load.gradients.get(node.name):
            through = [Step("norm_gradient", norm.name)]
            behind = [norm.inputs[0], coefficients(norm.name)]
        if source in self.needed and not self.is_joined(node):
            flat = isinstance(node, Linear) and node.in_shape[1:] != (1, 1)
            op = "flat gradient" if flat else "conv gradient"
            steps, reads = [], [gradient]
            if (shortcut := self.on_load.joined.get(node.name)) and shortcut.name in self.gradient:
                steps = [Step("second", shortcut.name, shortcut.stride)]
                reads.append(self.gradient[shortcut.name])
                self.missing[source] -= 1
                self.taken.add(shortcut.name)
            self.deliver(op, node, source, [*reads, *behind], steps, prologue=through)
        if self.part.gradient == "parameters":
            reads, prologue = self.loaded(source)
            reads = [reads[0], gradient, *reads[1:], *behind]
            self.launch("weight gradient", node, reads, self.parameter_buffers(node), prologue=[*prologue, *through])

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
            rows = self.buffer(coefficients(node.name), (3, node.shape[0]), FLOAT, self.part.sets)
            self.launch("norm coefficients", node, [sums, batch], [rows, *writes])
            self.gradient[source] = gradient
        elif source in self.needed:
            self.deliver("norm gradient", node, source, reads, writes=writes)
        else:
            self.launch("norm gradient", node, reads, writes)

    def head_gradient(self) -> None:
        """From the gradient of the logits to what the head read."""
        head, N = self.head, self.part.batch
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

    def deliver(
        self,
        op: str,
        node: Node,
        value: str,
        reads: list[str],
        steps: list[Step] | None = None,
        writes: list[str] | None = None,
        prologue: list[Step] | None = None,
    ) -> None:
        """A launch that computes one reader's gradient of ``value`` (from ``steps`` on) and goes on from there."""
        steps, writes, fusions = [*(steps or [])], [*(writes or [])], FUSIONS.get(op, ())
        if steps and steps[0].kind != "second":
            fusions = after(fusions, "mask" if steps[0].kind == "open" else steps[0].kind)
        while True:
            self.missing[value] -= 1
            others = self.waiting[value]
            # BatchNorm's gradient adds whole ones only; the other kernels read strided and wider ones too
            ready = [step for step in others if op != "norm gradient" or self.whole(step, value)]
            if ready and not self.missing[value] and "add" in fusions:
                steps.append(ready[-1])
                others.remove(ready[-1])
                fusions = after(fusions, "add")
            if self.missing[value] or others:
                stride = 1 if steps else self.grid(op, node)
                C, H, W = self.network.by_name[value].shape
                shape = (self.part.batch, -(-H // stride), -(-W // stride), C)
                name = self.buffer(waiting(value, len(others)), shape)
                steps.append(Step("store", name, stride))
                others.append(Step("add", name, stride))
                if not self.missing[value]:
                    self.unfinished.append(value)
                break
            producer = self.network.by_name[value]
            if isinstance(producer, ReLU) and "mask" in fusions:
                steps.append(self.mask(value))
                fusions = after(fusions, "mask")
            elif isinstance(producer, Affine) or (isinstance(producer, Norm) and not self.part.training):
                if not self.folded(producer):
                    if "scale" not in fusions:
                        steps.append(self.complete(value))
                        break
                    steps.append(Step("scale", value))
                    fusions = after(fusions, "scale")
            else:
                steps.append(self.complete(value))
                norm = self.norm_behind(value)
                if norm and "sums" in fusions:
                    self.summed.add(norm.name)
                    steps.append(Step("sums", norm.name))
                    reads = [*reads, norm.inputs[0], statistics(norm.name)]
                    writes.append(self.sums_buffer(grad_sums(norm.name), norm.name))
                break
            self.done.add(producer.name)
            value = producer.inputs[0]
        self.launch(op, node, reads, writes, steps, prologue)
        while self.unfinished:
            self.add_up(self.unfinished.pop())

    def grid(self, op: str, node: Node) -> int:
        """The stride at which a gradient that waits may be stored: a 1x1 convolution's is 0 between those positions.

        Only where a reader is still to come whose own gradient has a value at every position to add it to, and in
        evaluation mode: the gradient of a training-mode BatchNorm adds whole ones only.
        """
        if op != "conv gradient" or not isinstance(node, Conv) or node.kernel > 1 or node.padding or self.part.training:
            return 1
        later = self.network.nodes[: self.network.nodes.index(node)]
        readers = (user for user in self.network.consumers[node.inputs[0]] if user in later)
        strided = (isinstance(user, Pad) or (isinstance(user, Conv) and user.kernel < user.stride) for user in readers)
        return 1 if all(strided) else node.stride

    def mask(self, relu: str) -> Step:
        """Keep a gradient where ``relu`` was open: by its bits or, where it was not computed apart, by its input."""
        norm = self.on_load.norms.get(relu)
        return Step("open", norm.name) if norm else Step("mask", mask(relu))

    def complete(self, value: str) -> Step:
        """Store the whole gradient of ``value``."""
        bits = FLOAT if value == INPUT else ACTIVATION
        self.gradient[value] = self.image_buffer(grad(value), value, bits)
        return Step("store", self.gradient[value])

    def norm_behind(self, value: str) -> Norm | None:
        """The training-mode BatchNorm whose output has the same gradient as ``value``."""
        if not self.part.training:
            return None
        node = self.network.by_name[value]
        if isinstance(node, Norm):
            return node
        operands = [self.network.by_name[name] for name in node.inputs if isinstance(node, Add)]
        return next((norm for norm in operands if isinstance(norm, Norm) and self.sole(norm.name)), None)

    def pass_on(self, value: str, gradient: Step) -> None:
        """A gradient that is ``value``'s as it stands, or belongs at its every ``stride``-th position: no launch."""
        if value not in self.needed:
            return
        self.missing[value] -= 1
        self.waiting[value].append(gradient)
        if self.missing[value]:
            return
        if len(self.waiting[value]) == 1 and self.whole(gradient, value):
            self.gradient[value] = self.waiting[value].pop().arg
        else:
            self.add_up(value)

    def whole(self, gradient: Step, value: str) -> bool:
        """Whether the gradient has ``value``'s shape; that of a zero-padded shortcut may be strided, and is wider."""
        shape = self.part.buffers[gradient.arg].shape
        return gradient.stride == 1 and shape[-1] == self.network.by_name[value].shape[0]

    def add_up(self, value: str) -> None:
        """Sum the gradients of ``value`` that wait, two at a time."""
        self.missing[value] = 1
        gradients = self.waiting[value]
        first = next((step for step in gradients if self.whole(step, value)), None)
        if first is None:
            first = gradients.pop(0)
            pads = (user for user in self.network.consumers[value] if isinstance(user, Pad))
            node = next(pad for pad in pads if pad.stride == first.stride)
            self.deliver("pad gradient", node, value, [first.arg])
        else:
            gradients.remove(first)
            self.deliver("elementwise gradient", self.network.by_name[value], value, [first.arg])
