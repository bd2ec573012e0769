"""The perturbation of a batch as a fixed list of launches: the members' logits, their gradient, the images'.

The slots of an architecture's weights are the teachers', written once, and then the branches' of a student of that
architecture, packed anew in every step that perturbs by them. The drawn pair selects slots on the device; launches
never change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastensdistill.engine.ensemble import Ensemble
from fastensdistill.engine.packed import TrainedWeights
from fastensdistill.engine.parameters import FlatParameters
from fastensdistill.engine.passes import Pass
from fastensdistill.engine.plain import PlainStudent
from fastensdistill.method.perturbation import Direction, Pair, Perturbation
from fastensdistill.network.launch import INPUT, Group, grad
from fastensdistill.network.nodes import Network
from fastensdistill.network.plan import drawn_groups, plan


def evaluated_branches(
    student: Network, teachers: Sequence[Network], parameters: FlatParameters, dtype: torch.dtype
) -> TrainedWeights:
    """The student's branches as a perturbation evaluates them, behind the slots of the teachers of its architecture."""
    (part,) = plan([student], [Group("")], "forward", 1).parts
    return TrainedWeights(part, parameters, dtype, sum(network.evaluated == part.network for network in teachers))


class FusedPerturbation:
    """Perturbs batches (B, H, W, C), for ``draw`` an index into ``choices``.

    Args:
        teachers: all of them, whose packed weights are read here.
        branches: packed weights of the branches of ``student``, where the perturbation evaluates any.
        choices: pairs (a, b) of the perturbation's whose teachers have the same two architectures.
    """

    def __init__(
        self,
        perturbation: Perturbation,
        teachers: Ensemble,
        branches: TrainedWeights | None,
        student: PlainStudent,
        batch: int,
        choices: Sequence[Pair],
    ):
        self.perturbation, self.teachers, self.branches = perturbation, teachers, branches
        members, differentiated = perturbation.row.members, perturbation.row.differentiated
        self.student, self.joint = student, branches is not None and student.groups < student.branches
        if branches and self.joint:  # one network has all branches: it runs as the first of those members
            self.branch_members = [name for name in members if name[0] == "S"]
            first, *others = self.branch_members
            members = tuple(name for name in members if name not in others)
            differentiated = (*differentiated, *([first] if perturbation.row.needs_gradient("S") else []))
            numbers = [[perturbation.member(name, pair) for name in self.branch_members] for pair in choices]
            self.drawn_branches = torch.tensor(numbers, device=branches.values.device)
        networks = [*teachers.networks, *([branches.part.network] if branches else [])]
        groups = drawn_groups(members, differentiated, lambda name: self._network(name, choices[0]))
        fusions = teachers.execution.fusions
        forward, backward = (plan(networks, groups, way, batch, fusions).parts for way in ("forward", "backward"))
        gradient = {part.network: part for part in backward}
        # Those without one first, as the reference engine draws, and before what the others keep for their gradient
        forward = tuple(sorted(forward, key=lambda part: part.network in gradient))
        self.passes: list[tuple[Pass, Tensor]] = []  # with the slots of their groups (choices, G)
        for part in forward:
            weights = teachers.weights.get(part.network) or branches  # those of a teacher's architecture hold both
            assert weights
            table = [[self._slot(group.name, pair) for group in part.groups] for pair in choices]
            index = torch.tensor(table, dtype=torch.int32, device=weights.values.device)
            self.passes.append((Pass(part, gradient.get(part.network), weights, teachers.execution), index))

    def _network(self, name: str, pair: Pair) -> int:
        """Index of the architecture of a member: the teachers' own, and behind them the student's."""
        return len(self.teachers.networks) if name[0] == "S" else self.perturbation.member(name, pair)

    def _slot(self, name: str, pair: Pair) -> int:
        member = self.perturbation.member(name, pair)
        if name[0] == "T":
            return self.teachers.slot(member)
        assert self.branches is not None
        return self.branches.first + (0 if self.joint else member)

    def refresh(self) -> None:
        """Pack the branches' weights: once before the first call of a step."""
        if self.branches:
            self.branches.refresh()

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
        """Of the members; the branches of a hydra are heads of one network, which gets the gradients of them all."""
        if not self.joint:
            return self.perturbation.direction(self.perturbation.by_kind(logits))
        first, drawn = self.branch_members[0], self.drawn_branches.index_select(0, draw)[0]
        branches = self.student.branch_logits(logits[first][None])
        chosen = {"S": branches.index_select(0, drawn)}
        direction = self.perturbation.direction(self.perturbation.by_kind(logits, "T") | chosen)
        gradients = torch.zeros_like(branches)
        for i, name in enumerate(self.branch_members):
            if name in direction.grad_logits:
                gradients.index_copy_(0, drawn[i : i + 1], direction.grad_logits[name][None].to(branches.dtype))
        of_network = self.student.group_logits(gradients)[0]
        return direction._replace(grad_logits=direction.grad_logits | {first: of_network})


def by_architecture(
    perturbation: Perturbation, teachers: Sequence[Network]
) -> tuple[list[list[Pair]], list[tuple[int, int]]]:
    """What can be drawn, sorted by the architectures of its teachers: lists of choices that share their launches.

    And for the i-th of the perturbation's pairs, in which list it is, and where in it.
    """
    lists: dict[tuple[Network, ...], list[Pair]] = {}
    places = []
    for pair in perturbation.pairs:
        key = tuple(teachers[member % perturbation.teachers] for member in pair)
        alike = lists.setdefault(key, [])
        places.append((list(lists).index(key), len(alike)))
        alike.append(pair)
    return list(lists.values()) or [[]], places
