"""Teachers and branches in evaluation mode: their weight slots, the targets of a batch, and its perturbation.

Per architecture there is one set of slots: the teachers' own, written once, then one per branch of a student of that
architecture, written at the start of every step that perturbs by them. Which of them run is a matter of slot indices,
gathered on the device from a table by the number that was drawn: the launches never change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastensdistill.engine.heads import Heads, join, split
from fastensdistill.engine.packed import PackedWeights, TrainedWeights
from fastensdistill.engine.parameters import FlatParameters
from fastensdistill.engine.part_run import Execution
from fastensdistill.engine.passes import Pass
from fastensdistill.method.perturbation import Direction, Pair, Perturbation
from fastensdistill.method.teachers import Teachers
from fastensdistill.network.launch import INPUT, Group, Part, grad
from fastensdistill.network.nodes import Network
from fastensdistill.network.plan import plan


class Slots:
    """Evaluation weights of all networks, by architecture.

    ``networks`` are the teachers' and, last, the student's, whose K branches have slots too once they are asked for, or
    its ``heads``, all in one.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        teachers: Teachers,
        dtype: torch.dtype,
        device: torch.device,
        heads: Heads | None = None,
    ):
        self.networks, self.teachers, self.dtype, self.device = networks, teachers, dtype, device
        self.heads = heads
        self.weights: dict[Network, PackedWeights] = {}
        self.branches: TrainedWeights | None = None

    def members(self, network: Network) -> list[int]:
        """The teachers of one architecture; slot i is the i-th of them."""
        return [m for m, own in enumerate(self.networks[:-1]) if own == network]

    def add(self, part: Part, parameters: FlatParameters | None = None) -> PackedWeights:
        """The slots that ``part`` runs with; given the student's ``parameters``, its branches' follow the teachers'."""
        weights: PackedWeights
        if part.network not in self.weights:
            members = self.members(part.network)
            if parameters and part.network == self.networks[-1]:
                weights = self.branches = TrainedWeights(part, parameters, self.dtype, len(members))
            else:
                weights = PackedWeights(part, len(members), self.dtype, self.device)
            for slot, m in enumerate(members):
                weights.write(slot, self.teachers.networks[m].state_dict())
            self.weights[part.network] = weights
        return self.weights[part.network]


class Targets:
    """Logits of all M teachers, (M, B, classes)."""

    def __init__(self, parts: Sequence[Part], slots: Slots, execution: Execution):
        self.passes: list[tuple[Pass, Tensor]] = []  # with the slots of their groups
        order: list[int] = []
        for part in parts:
            members = slots.members(part.network)
            order += members
            index = torch.arange(len(members), dtype=torch.int32, device=slots.device)
            self.passes.append((Pass(part, None, slots.add(part), execution), index))
        # Teachers of one architecture run together; put them back into their own order
        self.order = torch.tensor(order, device=slots.device).argsort() if order != sorted(order) else None

    def __call__(self, x: Tensor) -> Tensor:
        outputs = [run.forward(x[None], index) for run, index in self.passes]
        logits = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return logits if self.order is None else logits.index_select(0, self.order)


class FusedPerturbation:
    """The perturbation of a batch (B, H, W, C), for ``draw`` an index into ``choices``.

    ``choices`` (a, b) are of the branches, whose teachers are a mod M and b mod M, or of the teachers; the first
    teachers of all choices have one architecture, and so have the second ones.
    """

    def __init__(
        self,
        perturbation: Perturbation,
        slots: Slots,
        parameters: FlatParameters,
        batch: int,
        execution: Execution,
        choices: Sequence[tuple[int, int]] = (),
    ):
        self.perturbation, self.slots, self.choices = perturbation, slots, choices
        row = perturbation.row
        members = list(row.members)
        self.heads = slots.heads if row.evaluates("S") else None
        if self.heads:  # one network has them all
            members.remove("Sb")
            self.pairs = torch.tensor(self.choices, device=slots.device)
        networks = list(slots.networks)
        groups = [Group(n, self._network(n), gradient="input" if n in row.differentiated else None) for n in members]
        self.passes: list[tuple[Pass, Tensor]] = []  # with the slots of their groups (choices, G)
        forward, backward = (plan(networks, groups, way, batch).parts for way in ("forward", "backward"))
        gradient = {part.network: part for part in backward}
        for first in forward:
            second = gradient.get(first.network)
            weights = slots.add(first, parameters if any(group.name == "Sa" for group in first.groups) else None)
            table = [[self._slot(group.name, choice) for group in first.groups] for choice in self.choices]
            index = torch.tensor(table, dtype=torch.int32, device=slots.device)
            self.passes.append((Pass(first, second, weights, execution), index))

    def _network(self, name: str) -> int:
        """Index of the architecture of a group."""
        if name[0] == "S":
            return len(self.slots.networks) - 1
        return self.perturbation.member(name, self.choices[0])

    def _slot(self, name: str, choice: tuple[int, int]) -> int:
        member = self.perturbation.member(name, choice)
        if name[0] == "T":
            return self.slots.members(self.slots.networks[member]).index(member)
        assert self.slots.branches is not None
        return self.slots.branches.first + (0 if self.heads else member)

    def write(self) -> None:
        """Pack the branches' weights: once before the first call of a step."""
        if self.slots.branches:
            self.slots.branches.refresh()

    def __call__(self, x: Tensor, draw: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Perturbed images, and the diversities by name. ``draw`` is int64 (1,) on the device."""
        if self.perturbation.row.move:
            return self.perturbation.row.move(x.permute(0, 3, 1, 2), self.perturbation).permute(0, 2, 3, 1), {}
        logits: dict[str, Tensor] = {}
        for run, table in self.passes:
            found = run.forward(x[None], table.index_select(0, draw)[0])
            logits |= dict(zip((group.name for group in run.parts[0].groups), found, strict=True))
        direction = self._direction(logits, draw)
        gradients = []
        for run, _ in self.passes:
            for backward in run.parts[1:]:
                grad_logits = torch.stack([direction.grad_logits[group.name] for group in backward.groups])
                gradients.append(run.backward(grad_logits)[grad(INPUT)])
        gradient = torch.cat(gradients) if len(gradients) > 1 else gradients[0]
        return self.perturbation.step(x, gradient, direction), direction.diversities

    def _direction(self, logits: dict[str, Tensor], draw: Tensor) -> Direction:
        """Of the members; of a hydra's branches, which are heads of one network, that network has the gradient."""
        if self.heads is None:
            return self.perturbation.direction(self.perturbation.by_kind(logits))
        heads, drawn = split(logits["Sa"][None], self.heads.K), self.pairs.index_select(0, draw)[0]
        branches = {"S": heads.index_select(0, drawn)}
        direction = self.perturbation.direction(self.perturbation.by_kind(logits, "T") | branches)
        grad_heads = torch.zeros_like(heads)
        for name in [name for name in direction.grad_logits if name[0] == "S"]:
            which = "ab".index(name[1])
            grad_branch = direction.grad_logits[name][None].to(heads.dtype)
            grad_heads.index_copy_(0, drawn[which : which + 1], grad_branch)
        return direction._replace(grad_logits=direction.grad_logits | {"Sa": join(grad_heads)[0]})


def by_architecture(perturbation: Perturbation, slots: Slots) -> tuple[list[list[Pair]], list[Pair]]:
    """What can be drawn, sorted by the architectures of its teachers: lists of choices that share their launches.

    And for the i-th of the perturbation's pairs, in which list it is, and where in it.
    """
    lists: dict[tuple[Network, ...], list[Pair]] = {}
    places = []
    for choice in perturbation.pairs:
        key = tuple(slots.networks[member % perturbation.teachers] for member in choice)
        own = lists.setdefault(key, [])
        places.append((list(lists).index(key), len(own)))
        own.append(choice)
    return list(lists.values()) or [[]], places
