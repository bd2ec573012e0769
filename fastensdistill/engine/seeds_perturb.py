"""The perturbation of several students' batches at once: the members of all are groups of the same launches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastensdistill.engine.ensemble import Ensemble
from fastensdistill.engine.packed import TrainedWeights
from fastensdistill.engine.passes import Pass
from fastensdistill.method.perturbation import PERTURBATIONS, Pair, Perturbation
from fastensdistill.network.launch import INPUT, Group, Part, grad
from fastensdistill.network.plan import plan


class SeedsPerturbation:
    """Perturbs batches (S, B, H, W, C), for ``draw`` int64 (S,) on the device: each student's index into the pairs.

    Args:
        perturbations: of each student, the same but for their generators. Teachers that are drawn together have the
            same architectures, whichever are drawn.
        teachers: all of them, whose packed weights are read here.
        branches: packed weights of all students' branches, where the perturbation evaluates any.
        batch: B.
    """

    def __init__(
        self, perturbations: Sequence[Perturbation], teachers: Ensemble, branches: TrainedWeights | None, batch: int
    ):
        self.perturbations, self.teachers, self.branches = perturbations, teachers, branches
        self.one, self.pairs = perturbations[0], perturbations[0].pairs
        row = self.one.row
        networks = [*teachers.networks, *([branches.part.network] if branches else [])]
        groups = [
            Group(f"{name}.{s}", self._network(name), gradient="input" if name in row.differentiated else None)
            for s in range(len(perturbations))
            for name in row.members
        ]
        fusions = teachers.execution.fusions
        forward, backward = (plan(networks, groups, way, batch, fusions).parts for way in ("forward", "backward"))
        gradient = {part.network: part for part in backward}
        self.runs: list[Pass] = []
        self.slots: list[Tensor] = []  # int32 (choices, G) of each run
        self.students: list[Tensor] = []  # int64 (G,): whose group it is
        for part in sorted(forward, key=lambda part: part.network in gradient):  # as ``FusedPerturbation`` has them
            weights = teachers.weights.get(part.network) or branches
            assert weights
            self.runs.append(Pass(part, gradient.get(part.network), weights, teachers.execution))
            named = [group.name.rsplit(".", 1) for group in part.groups]
            device = weights.values.device
            table = [[self._slot(name, int(s), pair) for name, s in named] for pair in self.pairs]
            self.slots.append(torch.tensor(table, dtype=torch.int32, device=device))
            self.students.append(torch.tensor([int(s) for _, s in named], device=device))

    def _network(self, name: str) -> int:
        """Index of the architecture of a member: the teachers' own, and behind them the student's."""
        return len(self.teachers.networks) if name[0] == "S" else self.one.member(name, self.pairs[0])

    def _slot(self, name: str, student: int, pair: Pair) -> int:
        member = self.one.member(name, pair)
        if name[0] == "T":
            return self.teachers.slot(member)
        assert self.branches is not None
        return self.branches.first + student * self.branches.parameters.branches + member

    def refresh(self) -> None:
        """Pack the branches' weights: once before the first call of a step."""
        if self.branches:
            self.branches.refresh()

    def __call__(self, x: Tensor, draw: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Perturbed images, and the diversities (S,) by name."""
        row = self.one.row
        if row is PERTURBATIONS["none"]:
            return x, {}
        every = list(zip(x, self.perturbations, strict=True))
        if row.move:
            moved = [row.move(images.permute(0, 3, 1, 2), one).permute(0, 2, 3, 1) for images, one in every]
            return torch.stack(moved), {}
        logits: dict[str, Tensor] = {}
        for run, table, students in zip(self.runs, self.slots, self.students, strict=True):
            slots = table.gather(0, draw.index_select(0, students)[None])[0]
            found = run.forward(x.index_select(0, students), slots)
            logits |= dict(zip(names(run.parts[0]), found, strict=True))
        directions = [
            one.direction(one.by_kind({name: logits[f"{name}.{s}"] for name in row.members}))
            for s, one in enumerate(self.perturbations)
        ]
        gradients = []  # of each run (S, groups of a student, B, H, W, C)
        for run in self.runs:
            for backward in run.parts[1:]:
                pairs = [name.rsplit(".", 1) for name in names(backward)]
                grad_logits = torch.stack([directions[int(s)].grad_logits[name] for name, s in pairs])
                gradients.append(run.backward(grad_logits)[grad(INPUT)].unflatten(0, (len(x), -1)))
        together = torch.cat(gradients, 1) if len(gradients) > 1 else gradients[0]
        steps = [
            one.step(images, of_one, direction)
            for (images, one), of_one, direction in zip(every, together, directions, strict=True)
        ]
        diversities = {
            name: torch.stack([one.diversities[name] for one in directions]) for name in directions[0].diversities
        }
        return torch.stack(steps), diversities


def names(part: Part) -> list[str]:
    """Of a part's groups."""
    return [group.name for group in part.groups]
