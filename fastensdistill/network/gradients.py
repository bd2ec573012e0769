"""How gradients go on in a backward pass: which are added, which wait, what is done to one before it is stored.

``missing`` counts, per value, the gradients by its readers that have not come yet; ``waiting`` holds those that came
and were stored apart. The launch that brings the last one adds them, applies the ReLU's mask and so on, and stores the
sum.
"""

from __future__ import annotations

from fastensdistill.network.build import ACTIVATION, FLOAT, Builder
from fastensdistill.network.launch import (
    INPUT,
    Part,
    Step,
    after,
    grad,
    grad_sums,
    mask,
    statistics,
    waiting,
)
from fastensdistill.network.nodes import Activation, Add, Affine, Conv, Node, Norm, Pad, ReLU
from fastensdistill.network.on_load import Fusions, nothing

# What follows an op inside its own launch, in this order; of two "add" one can be used.
FUSIONS: dict[str, tuple[str, ...]] = {
    "conv gradient": ("add", "mask", "scale", "add", "sums"),
    "depthwise conv gradient": ("add", "mask", "scale", "add", "sums"),
    "norm gradient": ("add",),
    "activation gradient": ("sums",),
    "elementwise gradient": ("add", "mask", "scale", "add", "sums"),
}


class Gradients(Builder):
    """The gradients of a network's values while a backward pass is planned."""

    needed: set[str]

    def __init__(self, part: Part, fusions: Fusions = nothing):
        super().__init__(part, fusions)
        readers = [name for node in self.network.nodes for name in node.inputs]
        self.missing = {name: readers.count(name) for name in self.network.by_name}
        self.waiting: dict[str, list[Step]] = {name: [] for name in self.missing}
        self.gradient: dict[str, str] = {}
        self.second: dict[str, Step] = {}  # of an activation's value, what is to be added to that
        self.done: set[str] = set(self.absorbed)
        self.summed: set[str] = set()
        self.unfinished: list[str] = []  # values with more gradients than the launch that came last could add

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
        kind = steps[0].kind if steps else ""
        kind = "mask" if kind == "open" else kind
        if kind in fusions:
            fusions = after(fusions, kind)
        if op == "activation gradient" and node.name not in self.normed:
            fusions = ()  # sums are about what it reads
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
                name = self.buffer(self.free_name(value, others), shape)
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
                    reads = list(dict.fromkeys([*reads, norm.inputs[0], statistics(norm.name)]))
                    writes.append(self.sums_buffer(grad_sums(norm.name), norm.name))
                break
            self.done.add(producer.name)
            value = producer.inputs[0]
        self.launch(op, node, reads, writes, steps, prologue)
        while self.unfinished:
            self.add_up(self.unfinished.pop())

    @staticmethod
    def free_name(value: str, others: list[Step]) -> str:
        """A buffer for one more gradient of ``value`` that waits, beside ``others``."""
        taken, number = {step.arg for step in others}, len(others)
        while waiting(value, number) in taken:
            number += 1
        return waiting(value, number)

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
        if len(self.waiting[value]) == 1 and self.whole(gradient, value) and value != INPUT:
            self.gradient[value] = self.waiting[value].pop().arg
        else:
            self.add_up(value)

    def spread(self, op: str, node: Node, reads: list[str], writes: list[str] | None = None) -> None:
        """A launch that computes the gradients of all of a node's inputs which are needed, each a buffer of its own."""
        needed = [(i, value) for i, value in enumerate(node.inputs) if value in self.needed]
        if len(needed) == 1:
            ((i, value),) = needed
            self.deliver(op, node, value, reads, [Step("input", str(i))] if len(node.inputs) > 1 else [], writes)
            return
        steps: list[Step] = []
        found: list[tuple[str, Step]] = []
        for i, value in needed:
            others = [*self.waiting[value], *(step for other, step in found if other == value)]
            name = self.image_buffer(self.free_name(value, others), value)
            steps += [Step("input", str(i)), Step("store", name)]
            found.append((value, Step("add", name)))
        self.launch(op, node, reads, [*(writes or [])], steps)
        for value, step in found:
            self.pass_on(value, step)

    def add_up(self, value: str) -> None:
        """Sum the gradients of ``value`` that wait, two at a time; the last two an activation's gradient may add."""
        gradients = self.waiting[value]
        activated = isinstance(self.network.by_name[value], Activation)
        if activated and len(gradients) == 2 and all(self.whole(step, value) for step in gradients):
            self.gradient[value], self.second[value] = gradients[0].arg, gradients[1]
            gradients.clear()
            return
        self.missing[value] = 1
        first = next((step for step in gradients if self.whole(step, value)), None)
        if first is None:
            first = gradients.pop(0)
            pads = (user for user in self.network.consumers[value] if isinstance(user, Pad))
            node = next(pad for pad in pads if pad.stride == first.stride)
            self.deliver("pad gradient", node, value, [first.arg])
        else:
            gradients.remove(first)
            self.deliver("elementwise gradient", self.network.by_name[value], value, [first.arg])
