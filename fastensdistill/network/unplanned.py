"""A network that no plan covers, among those that are planned: its own module computes it, as a part of one launch.

    module            INPUT → logits and, where a gradient follows, what autograd has recorded
    module gradient   grad(logits), that record → grad(INPUT)

What its plan leaves out (operations, hooks that compute weights) nobody has to know: ``engine.module_pass`` calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastensdistill.network.launch import INPUT, Buffer, Launch, Part, grad, recorded
from fastensdistill.network.nodes import Input, Logits, Network, Shape

OUTPUT = "logits"


@dataclass(frozen=True, eq=False)
class Unplanned(Network):
    """An architecture of its own, equal to itself alone: what its module computes is not known. Evaluated only.

    ``name`` is what errors call its module, ``reason`` why it cannot be planned, ``products`` how many
    multiply-accumulates of convolutions and matrices one image takes.
    """

    name: str = ""
    reason: str = ""
    products: int = 0

    @property
    def macs(self) -> int:
        """As counted while its module ran."""
        return self.products

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def unplanned(shape: Shape, classes: int, name: str, reason: str, products: int) -> Unplanned:
    """A network from images of ``shape`` (C, H, W) to ``classes`` logits."""
    nodes = Input(INPUT, (), shape), Logits(OUTPUT, (INPUT,), (classes, 1, 1))
    return Unplanned(nodes, OUTPUT, name=name, reason=reason, products=products)


def modules_of(networks: Sequence[Network]) -> dict[int, str]:
    """Which of ``networks`` run as their own modules, and why."""
    return {i: network.reason for i, network in enumerate(networks) if isinstance(network, Unplanned)}


def launch_module(part: Part, direction: str) -> None:
    """Append the one launch of ``part``, of an :class:`Unplanned` network."""
    (C, H, W), classes = part.network.nodes[0].shape, part.network.by_name[OUTPUT].shape[0]
    images, logits = (part.batch, H, W, C), (part.batch, classes)
    flops = 2 * part.network.macs * part.batch * len(part.groups)  # of either: no weight has a gradient
    record = (recorded(OUTPUT),) if part.gradient else ()
    if direction == "forward":
        part.buffers |= {INPUT: Buffer(images, 32, 1), OUTPUT: Buffer(logits, 32, len(part.groups))}
        part.launches.append(Launch("module", OUTPUT, (INPUT,), (OUTPUT, *record), flops=flops))
    else:
        part.buffers |= {grad(INPUT): Buffer(images, 32, len(part.groups))}
        reads = grad(OUTPUT), *record
        part.launches.append(Launch("module gradient", OUTPUT, reads, (grad(INPUT),), flops=flops))
