"""The launches of a forward pass: each op takes along what follows it, as far as ``FUSIONS`` lets it."""

from __future__ import annotations

from fastensdistill.network.build import BIT, FLOAT, INDEX, Builder, conv_kind
from fastensdistill.network.launch import (
    INPUT,
    Part,
    Step,
    after,
    drawn,
    index,
    mask,
    pooled,
    statistics,
    sums,
)
from fastensdistill.network.nodes import (
    Activation,
    Add,
    Affine,
    Conv,
    Dropout,
    Function,
    Gate,
    Layer,
    Linear,
    Logits,
    Node,
    Norm,
    Pad,
    Pool,
    ReLU,
)
from fastensdistill.network.on_load import Fusions, nothing

# What follows an op inside its own launch, in this order. "next" is a second output, relu(scale_shift(value)), for the
# block that comes after; "whole add" is one of a residual that is neither strided nor narrower.
FUSIONS: dict[str, tuple[str, ...]] = {
    "conv": ("add", "relu", "next", "sums"),
    "depthwise conv": ("activation", "sums"),
    "norm": ("add", "relu"),
    "activation": ("whole add",),
    "elementwise": ("add", "relu"),
}


class Forward(Builder):
    """The launches of ``part``'s forward pass, appended to it."""

    def __init__(self, part: Part, fusions: Fusions = nothing):
        super().__init__(part, fusions)
        self.done: set[str] = self.absorbed | set(self.on_load.norms)
        for shortcut in self.on_load.seconds.values():
            user = self.sole(shortcut.name)
            self.done.update([shortcut.name, *([user.name] if user and self.folded(user) else [])])
        self.summed: set[str] = set()
        C, H, W = self.network.nodes[0].shape
        self.buffer(INPUT, (part.batch, H, W, C), FLOAT, groups=1)
        for node in self.network.nodes:
            if node.name not in self.done:
                self.emit(node)
        self.finish_head()

    def emit(self, node: Node) -> None:
        """The launch that computes ``node``, and what it takes along."""
        if isinstance(node, Layer):
            self.convolution(node)
        elif isinstance(node, Affine):
            loads = all(isinstance(user, Conv | Linear) for user in self.network.consumers[node.name])
            if not loads or (self.head and self.head.source == node.name):
                self.follow("norm", node, [node.inputs[0]], [Step("affine", node.name)])
        elif isinstance(node, Norm) and self.part.training:
            self.statistics(node)
            if node not in (*self.on_load.norms.values(), *self.normed.values()):
                reads = [node.inputs[0], statistics(node.name)]
                self.follow("norm", node, reads, [Step("batch_norm", node.name)])
        elif isinstance(node, Norm):
            if node not in self.normed.values():
                self.follow("norm", node, [node.inputs[0]], [Step("scale_shift", node.name)])
        elif isinstance(node, Activation):
            reads, steps = self.activated(node)
            self.follow("activation", node, reads, steps)
        elif isinstance(node, ReLU):
            self.follow("elementwise", node, [node.inputs[0]], [Step("relu"), *self.bits(node)])
        elif isinstance(node, Add):
            first, second = node.inputs
            if self.view(first):
                first, second = second, first
            if self.view(first):
                self.follow("pad", self.network.by_name[first], [self.network.by_name[first].inputs[0]], [])
            self.follow("elementwise", node, [first], [self.addition(second)])
        elif isinstance(node, Pool):
            indices = [index(node.name)] if node.kind == "max" and self.part.gradient else []
            for name in indices:
                self.image_buffer(name, node.name, INDEX)
            self.follow("pool", node, [node.inputs[0]], [], writes=indices)
        elif isinstance(node, Pad) and not self.view(node.name):
            self.follow("pad", node, [node.inputs[0]], [])
        elif isinstance(node, Dropout):
            self.follow("dropout", node, [node.inputs[0]], [], writes=[self.drawn_buffer(node)])
        elif isinstance(node, Gate | Function):
            op = "gate" if isinstance(node, Gate) else "function"
            self.follow(op, node, list(dict.fromkeys(node.inputs)), [])
        elif isinstance(node, Logits):
            logits = self.buffer(node.name, (self.part.batch, node.shape[0]), FLOAT)
            self.launch("logits", node, [node.inputs[0]], [logits])

    def drawn_buffer(self, node: Dropout) -> str:
        """What a dropout multiplies by, which its gradient reads."""
        C, H, W = node.shape
        shape = {"value": (H, W, C), "channel": (1, 1, C), "image": (1, 1, 1)}[node.over]
        return self.buffer(drawn(node.name), (self.part.batch, *shape))

    def convolution(self, node: Layer) -> None:
        """A layer, with BatchNorm in its weights where that is possible, and what is done to its input as it reads."""
        kind = conv_kind(node)
        op, (reads, prologue) = f"{kind}conv", ([node.inputs[0]], []) if kind else self.loaded(node.inputs[0])
        user, value, steps = self.sole(node.name), node.name, [Step("bias")] if node.bias else []
        if user and self.folded(user):
            value, steps = user.name, [Step("bias")]
            self.done.add(user.name)
        steps += self.chain(value, FUSIONS.get(op, ()))
        self.done.add(node.name)
        for step in (step for step in steps if step.kind == "second"):
            reads.insert(1, self.network.by_name[step.arg].inputs[0])
        self.launch(op, node, reads, self.sums(steps), steps, prologue)

    def follow(self, op: str, node: Node, reads: list[str], steps: list[Step], writes: list[str] | None = None) -> None:
        """A launch that computes ``node`` by ``steps`` and takes along what it can."""
        fusions = FUSIONS.get(op, ())
        if steps and steps[0].kind in fusions:
            fusions = after(fusions, steps[0].kind)
        steps = [*steps, *self.chain(node.name, fusions)]
        self.launch(op, node, reads, [*(writes or []), *self.sums(steps)], steps)
        self.done.add(node.name)

    def sums(self, steps: list[Step]) -> list[str]:
        """The buffers of the sums among ``steps``."""
        return [self.sums_buffer(sums(step.arg), step.arg) for step in steps if step.kind == "sums"]

    def bits(self, relu: Node) -> list[Step]:
        """Keep where ``relu`` is open, if a gradient follows."""
        if not self.part.gradient:
            return []
        return [Step("bits", self.image_buffer(mask(relu.name), relu.name, BIT))]

    def view(self, value: str) -> bool:
        """Whether ``value`` is a zero-padded shortcut that the one addition which reads it can read in place."""
        return isinstance(self.network.by_name[value], Pad) and isinstance(self.sole(value), Add)

    def addition(self, operand: str) -> Step:
        """The residual ``operand``, or what a zero-padded shortcut is a view of."""
        node = self.network.by_name[operand]
        if isinstance(node, Pad) and self.view(operand):
            return Step("add", node.inputs[0], node.stride)
        return Step("add", operand)

    def other_operand(self, node: Node | None, value: str) -> Step | None:
        """The residual that makes ``node``, an addition, of ``value``; None if it is not computed yet."""
        if not isinstance(node, Add) or node.inputs[0] == node.inputs[1]:
            return None
        if shortcut := self.on_load.seconds.get(node.name):
            return Step("second", shortcut.name, shortcut.stride)
        step = self.addition(next(name for name in node.inputs if name != value))
        return step if step.arg in self.part.buffers else None

    def last_read(self, user: Node) -> bool:
        """Whether nobody needs the input of an activation but the launch that makes it: no gradient, no head."""
        return not self.part.gradient and user.name not in self.absorbed

    def chain(self, value: str, fusions: tuple[str, ...]) -> list[Step]:
        """The steps from ``value`` on: what is fused, what is stored, the second output, the sums."""
        steps: list[Step] = []
        while user := self.sole(value):
            residual = self.other_operand(user, value)
            add = "add" if "add" in fusions else "whole add"
            if residual and add in fusions and (add == "add" or self.whole(residual, value)):
                steps.append(residual)
                fusions = after(fusions, add)
            elif isinstance(user, ReLU) and user.name not in self.absorbed and "relu" in fusions:
                steps += [Step("relu"), *self.bits(user)]
                fusions = after(fusions, "relu")
            elif isinstance(user, ReLU | Activation) and self.last_read(user) and "activation" in fusions:
                steps.append(Step("activation", user.name))
                fusions = after(fusions, "activation")
            else:
                break
            self.done.add(user.name)
            value = user.name
        steps.append(Step("store", self.image_buffer(value, value)))
        users = self.network.consumers[value]
        norm = next((u for u in users if isinstance(u, Norm)), None)
        if norm is None:
            return steps
        relu = self.sole(norm.name)
        masked = any(step.kind == "bits" for step in steps)
        if self.part.training and "sums" in fusions:
            self.summed.add(norm.name)
            steps.append(Step("sums", norm.name))
        if self.part.training or masked or "next" not in fusions:
            return steps
        if isinstance(relu, ReLU) and relu.name not in self.absorbed:
            self.done.update((norm.name, relu.name))
            steps += [Step("scale_shift", norm.name), Step("relu"), *self.bits(relu)]
            steps.append(Step("store", self.image_buffer(relu.name, relu.name)))
        return steps

    def statistics(self, norm: Norm) -> None:
        """Finish the sums, made here if no launch before could: the batch's statistics, and the running ones moved."""
        channels = norm.shape[0]
        if norm.name not in self.summed:
            self.launch("norm sums", norm, [norm.inputs[0]], [self.sums_buffer(sums(norm.name), norm.name)])
        batch = self.buffer(statistics(norm.name), (2, channels), FLOAT, self.part.rows)
        self.launch("norm statistics", norm, [sums(norm.name)], [batch])

    def finish_head(self) -> None:
        """The last layer, with the pooling, ReLU and BatchNorm before it."""
        head = self.head
        if head is None:
            return
        reads, prologue = [head.source], []
        if head.norm and self.part.training:
            self.statistics(head.norm)
            reads.append(statistics(head.norm.name))
            prologue.append(Step("batch_norm", head.norm.name))
        elif head.norm:
            prologue.append(Step("scale_shift", head.norm.name))
        if head.relu:
            prologue.append(Step("relu"))
        N, linear = self.part.batch, head.linear
        writes = [
            self.buffer(linear.name, (N, linear.shape[0]), FLOAT),
            self.buffer(pooled(linear.name), (N, linear.in_channels), FLOAT),
        ]
        steps = [Step("bias")] if linear.bias else []
        self.launch("head", linear, reads, writes, steps, prologue)
