"""Teachers and branches in evaluation mode: their weight slots, the targets of a batch, and its perturbation.

Per architecture there is one set of slots: the teachers' own, written once, then one per branch of a student of that
architecture, written at the start of every step that perturbs by them. Which of them run is a matter of slot indices,
gathered on the device from a table by the number that was drawn: the launches never change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastensdistill.config import DistillConfig
from fastensdistill.engine.heads import Heads, join, split
from fastensdistill.engine.parameters import FlatParameters
from fastensdistill.engine.part_run import Execution
from fastensdistill.engine.passes import Pass
from fastensdistill.engine.slots import BranchSlots
from fastensdistill.engine.weights import Weights
from fastensdistill.kernels.diversity_seed import diversity_seed, ods_seed, teacher_diversity_seed
from fastensdistill.kernels.perturb_step import perturb_step
from fastensdistill.method.perturbation import Perturbation, gaussian, step_length
from fastensdistill.method.teachers import Teachers
from fastensdistill.network.launch import INPUT, Group, Part, grad
from fastensdistill.network.nodes import Network
from fastensdistill.network.plan import PERTURBED, plan


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
        self.weights: dict[Network, Weights] = {}
        self.branches: BranchSlots | None = None

    def members(self, network: Network) -> list[int]:
        """The teachers of one architecture; slot i is the i-th of them."""
        return [m for m, own in enumerate(self.networks[:-1]) if own == network]

    def add(self, part: Part, parameters: FlatParameters | None = None) -> Weights:
        """The slots that ``part`` runs with; given the student's ``parameters``, its branches' follow the teachers'."""
        if part.network not in self.weights:
            members = self.members(part.network)
            if parameters and part.network == self.networks[-1]:
                self.branches = BranchSlots(part, parameters, self.dtype, len(members))
                weights = self.branches.weights
            else:
                weights = Weights(part, len(members), self.dtype, self.device)
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
        config: DistillConfig,
        perturbation: Perturbation,
        slots: Slots,
        parameters: FlatParameters,
        batch: int,
        execution: Execution,
        choices: Sequence[tuple[int, int]] = (),
    ):
        self.config, self.noise, self.slots = config, perturbation.noise, slots
        self.choices, self.teachers = choices, perturbation.teachers
        drawn = PERTURBED[config.perturbation]
        self.heads = slots.heads if "Sa" in drawn else None
        if self.heads:  # one network has them all
            drawn = [name for name in drawn if name != "Sb"]
            self.pairs = torch.tensor(self.choices, device=slots.device)
        networks = list(slots.networks)
        groups = [Group(n, self._network(n), gradient="input" if n[1] == "a" else None) for n in drawn]
        self.passes: list[tuple[Pass, Tensor]] = []  # with the slots of their groups (choices, G)
        forward, backward = (plan(networks, groups, way, batch).parts for way in ("forward", "backward"))
        gradient = {part.network: part for part in backward}
        for first in forward:
            second = gradient.get(first.network)
            weights = slots.add(first, parameters if any(group.name == "Sa" for group in first.groups) else None)
            table = [[self._slot(group.name, choice) for group in first.groups] for choice in self.choices]
            index = torch.tensor(table, dtype=torch.int32, device=slots.device)
            self.passes.append((Pass(first, second, weights, execution), index))

    def _member(self, name: str, choice: tuple[int, int]) -> int:
        return choice[0] if name[1] == "a" else choice[1]

    def _network(self, name: str) -> int:
        """Index of the architecture of a group."""
        if name[0] == "S":
            return len(self.slots.networks) - 1
        return self._member(name, self.choices[0]) % self.teachers

    def _slot(self, name: str, choice: tuple[int, int]) -> int:
        member = self._member(name, choice)
        if name[0] == "T":
            teacher = member % self.teachers
            return self.slots.members(self.slots.networks[teacher]).index(teacher)
        assert self.slots.branches is not None
        return self.slots.branches.first + (0 if self.heads else member)

    def write(self) -> None:
        """Pack the branches' weights: once before the first call of a step."""
        if self.slots.branches:
            self.slots.branches.write()

    def __call__(self, x: Tensor, draw: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Perturbed images, and the diversities by name. ``draw`` is int64 (1,) on the device."""
        if self.config.perturbation == "none":
            return x, {}
        if self.config.perturbation == "gaussian":
            noisy = gaussian(x.permute(0, 3, 1, 2), self.config.step_size, self.noise).images
            return noisy.permute(0, 2, 3, 1), {}
        logits: dict[str, Tensor] = {}
        for run, table in self.passes:
            found = run.forward(x[None], table.index_select(0, draw)[0])
            logits |= dict(zip((group.name for group in run.parts[0].groups), found, strict=True))
        seeds, scalars, confidence = self._seeds(logits, draw)
        gradients = []
        for run, _ in self.passes:
            for backward in run.parts[1:]:
                seed = torch.stack([seeds[group.name] for group in backward.groups])
                gradients.append(run.backward(seed)[grad(INPUT)])
        gradient = torch.cat(gradients) if len(gradients) > 1 else gradients[0]
        length = step_length(x, self.config.step_size)
        return perturb_step(x, gradient, length, confidence=confidence), scalars

    def _seeds(
        self, logits: dict[str, Tensor], draw: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
        """Gradients in the logits of the drawn members, the diversities, and ConfODS's factor."""
        name = self.config.perturbation
        if name in ("ods", "confods"):
            weights = torch.empty_like(logits["Ta"]).uniform_(-1, 1, generator=self.noise)
            seed, confidence = ods_seed(logits["Ta"], weights, self.config.temperature)
            return {"Ta": seed}, {}, confidence if name == "confods" else None
        teachers = torch.stack([logits["Ta"], logits["Tb"]])
        if name == "tdiv":
            tdiv, seed = teacher_diversity_seed(teachers)
            return {"Ta": seed}, {"tdiv": tdiv}, None
        if self.heads:
            every, pair = split(logits["Sa"][None], self.heads.K), self.pairs.index_select(0, draw)[0]
            tdiv, sdiv, seed_t, seed_s = diversity_seed(teachers, every.index_select(0, pair))
            seed_s = join(torch.zeros_like(every).index_copy_(0, pair[:1], seed_s[None].to(every.dtype)))[0]
            return {"Ta": seed_t, "Sa": seed_s}, {"tdiv": tdiv, "sdiv": sdiv}, None
        branches = torch.stack([logits["Sa"], logits["Sb"]])
        tdiv, sdiv, seed_t, seed_s = diversity_seed(teachers, branches)
        return {"Ta": seed_t, "Sa": seed_s}, {"tdiv": tdiv, "sdiv": sdiv}, None


Pair = tuple[int, int]


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
