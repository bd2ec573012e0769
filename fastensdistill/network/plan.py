"""The plan of a pass: which launches, over which groups, with which fusions. ``RULES`` says how they are chosen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from fastensdistill.errors import InputError, unknown
from fastensdistill.method.perturbation import PERTURBATIONS
from fastensdistill.network.backward import Backward
from fastensdistill.network.forward import Forward
from fastensdistill.network.join import running, turns
from fastensdistill.network.launch import Group, Launch, Part
from fastensdistill.network.nodes import Network
from fastensdistill.network.on_load import Fusions, nothing
from fastensdistill.network.unplanned import Unplanned, launch_module


@dataclass(frozen=True)
class Plan:
    """Parts are independent of one another; within a part the launches run in order (``join`` says what they share)."""

    parts: tuple[Part, ...]

    @property
    def launches(self) -> list[Launch]:
        """Of all parts, as they run: one for a layer of two parts that share it."""
        return [turn.launch for parts in running(self.parts) for turn in turns(parts)]

    @property
    def flops(self) -> int:
        """Of convolutions and linear layers, two per multiply-accumulate, for the whole batch."""
        return sum(launch.flops for launch in self.launches)


def plan(
    networks: Sequence[Network], groups: Sequence[Group], direction: str, batch: int, fusions: Fusions = nothing
) -> Plan:
    """The launches of one pass of ``batch`` images.

    Args:
        networks: traced architectures; equal ones count as one. In evaluation mode they are without dropout.
        groups: who runs, in which mode and to what end. A backward pass takes the forward pass's list and plans for
            the groups that ask for a gradient.
        direction: "forward" or "backward".
        fusions: what the implementation of each convolution takes in as it loads; the same for both directions.

    Raises:
        InputError: statistics shared in a way no launch can, a network that does not end in a linear layer or logits.
    """
    if direction not in ("forward", "backward"):
        raise unknown("direction", direction, ["forward", "backward"])
    modes = [network.evaluated for network in networks], list(networks)
    together: dict[tuple[int, bool], list[Group]] = {}
    for group in groups:
        training = group.statistics is not None
        first = modes[training].index(modes[training][group.network])
        together.setdefault((first, training), []).append(group)
    parts = []
    for (index, training), members in together.items():
        ordered = tuple(sorted(members, key=lambda group: group.gradient is None))
        name = f"network {index}, {'training' if training else 'evaluation'}"
        part = Part(name, modes[training][index], ordered, batch)
        check(part)
        if direction == "forward":
            if isinstance(part.network, Unplanned):
                launch_module(part, direction)
            else:
                Forward(part, fusions)
            parts.append(part)
        elif part.gradient:
            backward = replace(part, groups=tuple(g for g in ordered if g.gradient), launches=[], buffers={})
            if isinstance(part.network, Unplanned):
                launch_module(backward, direction)
            else:
                Backward(backward, part, fusions)
            parts.append(backward)
    return Plan(tuple(parts))


def check(part: Part) -> None:
    """Raise InputError for groups that no part can run together."""
    names = ", ".join(group.name for group in part.groups)
    if part.training:
        each = len(part.groups) // part.sets
        labels = [group.statistics for group in part.groups]
        if labels != [label for label in dict.fromkeys(labels) for _ in range(each)]:
            raise InputError(f"{names} share {part.sets} sets of BatchNorm statistics; expected sets of as many "
                             "neighbours each")  # fmt: skip
    if part.training and len({group.gradient for group in part.groups}) > 1:
        raise InputError(f"{names} train together; expected all of them to ask for the parameters' gradient, or none")


Passes = dict[str, tuple[list[Group], str]]


def branch_groups(branches: int, network: int = 0, student: str = "S") -> list[Group]:
    """The branches of a student in training, which share BatchNorm's statistics."""
    return [Group(f"{student}{k + 1}", network, student, "parameters") for k in range(branches)]


def drawn_groups(members: Iterable[str], differentiated: Collection[str], network: Callable[[str], int]) -> list[Group]:
    """The members that a perturbation evaluates; through the ``differentiated`` goes the images' gradient.

    ``network`` gives the index of a member's network.
    """
    return [Group(name, network(name), gradient="input" if name in differentiated else None) for name in members]


def step_groups(teachers: int, branches: int, perturbation: str = "tdiv-sdiv") -> Passes:
    """The passes of one distillation step, name → groups and direction (docs/method.md, Perturbation).

    Network 0 is the teachers', network 1 the student's.
    """
    if perturbation not in PERTURBATIONS:
        raise unknown("perturbation", perturbation, PERTURBATIONS)
    row = PERTURBATIONS[perturbation]
    drawn = drawn_groups(row.members, row.differentiated, lambda name: 1 if name[0] == "S" else 0)
    distillation = [*(Group(f"T{m + 1}", 0) for m in range(teachers)), *branch_groups(branches, 1)]
    before: Passes = {
        "perturbation, forward": (drawn, "forward"),
        "perturbation, input gradient": (drawn, "backward"),
    }
    return (before if drawn else {}) | {
        "distillation, forward": (distillation, "forward"),
        "distillation, backward": (distillation, "backward"),
    }


def teach_groups(members: int) -> Passes:
    """The passes of one step that trains teachers side by side, each with statistics of its own."""
    groups = [Group(f"T{m + 1}", 0, f"T{m + 1}", "parameters") for m in range(members)]
    return {"forward": (groups, "forward"), "backward": (groups, "backward")}


def plan_step(
    teacher: Network,
    student: Network,
    teachers: int,
    branches: int,
    batch: int,
    perturbation: str = "tdiv-sdiv",
    fusions: Fusions = nothing,
) -> dict[str, Plan]:
    """The plans of the passes of ``step_groups``, for teachers of one architecture."""
    passes = step_groups(teachers, branches, perturbation)
    return {name: plan([teacher, student], groups, way, batch, fusions) for name, (groups, way) in passes.items()}
