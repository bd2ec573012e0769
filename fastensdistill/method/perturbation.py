"""Perturbations: nudge a batch to where the teachers disagree and the branches do not yet.

``PERTURBATIONS`` has a row for each, which both engines read: whom it evaluates, and what gradient their logits get.
Source: docs/method.md, "Perturbation"; Nam et al., ICML 2022 (tdiv, tdiv-sdiv) and NeurIPS 2021 (ods, confods).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastensdistill.errors import InputError, unknown
from fastensdistill.kernels.diversity_seed import diversity_seed, ods_seed, teacher_diversity_seed
from fastensdistill.kernels.operands import accumulator
from fastensdistill.kernels.perturb_step import perturb_step
from fastensdistill.method.modes import evaluating

Pair = tuple[int, int]
ByKind = Mapping[str, Tensor]
"""Logits (n, B, C) of teachers, "T", and of branches, "S"."""
Members = Callable[[Tensor, Sequence[int]], Tensor]
"""(images, members) → logits (n, B, C), in evaluation mode."""


class Perturbed(NamedTuple):
    """Perturbed images (B, channels, H, W), and the diversities that were ascended, scalars by name."""

    images: Tensor
    diversities: dict[str, Tensor]


class Direction(NamedTuple):
    """Where the images are to move, said by the logits."""

    grad_logits: dict[str, Tensor]  # (B, C) by member: the gradient of what is ascended
    diversities: dict[str, Tensor]  # scalars by name
    factor: Tensor | None = None  # (B,), by which an image's step is multiplied


class Row(NamedTuple):
    """A perturbation. The members of a drawn choice (a, b) are the teachers Ta and Tb and the branches Sa and Sb.

    Args:
        choices: (teachers, branches) → the choices (a, b), of which one is drawn for a batch. Branch k belongs to
            teacher k mod M, so Ta and Tb are teachers a mod M and b mod M.
        members: who is evaluated.
        differentiated: those of them through whose logits the images' gradient is taken.
        grad_logits: (logits (n, B, C) of the members that are teachers, "T", and branches, "S", in their order; the
            perturbation, to draw by its ``noise``) → the direction.
        move: instead of all that, (images (B, channels, H, W), the perturbation) → perturbed images.
    """

    choices: Callable[[int, int], list[Pair]] = lambda teachers, branches: []
    members: tuple[str, ...] = ()
    differentiated: tuple[str, ...] = ()
    grad_logits: Callable[[ByKind, Perturbation], Direction] | None = None
    move: Callable[[Tensor, Perturbation], Tensor] | None = None

    def evaluates(self, kind: str) -> bool:
        """Whether ``kind`` "T", teachers, or "S", the student's branches, are among the members."""
        return any(name[0] == kind for name in self.members)

    def needs_gradient(self, kind: str) -> bool:
        """Whether the images' gradient is taken through teachers, "T", or branches, "S"."""
        return any(name[0] == kind for name in self.differentiated)


def one_teacher(teachers: int, branches: int) -> list[Pair]:
    """A teacher drawn alone."""
    return [(m, m) for m in range(teachers)]


def pair_of_teachers(teachers: int, branches: int) -> list[Pair]:
    """Two teachers, in order."""
    return _differing(teachers, teachers)


def pair_of_branches(teachers: int, branches: int) -> list[Pair]:
    """Two branches whose teachers differ; for K = M these are the paper's M(M − 1) ordered pairs."""
    return _differing(branches, teachers)


def _differing(count: int, teachers: int) -> list[Pair]:
    return [(a, b) for a in range(count) for b in range(count) if a % teachers != b % teachers]


def gaussian(x: Tensor, perturbation: Perturbation) -> Tensor:
    """``clip(x + ε·N(0, 1), 0, 1)``; a seed's noise is the same however ``x`` lies in memory."""
    noise = torch.empty_like(x, memory_format=torch.channels_last).normal_(generator=perturbation.noise)
    return (x + perturbation.size * noise).clamp_(0, 1)


def ods(logits: ByKind, perturbation: Perturbation) -> Direction:
    """Output-diversified sampling: ascend ``Σ_c w_c softmax(z/τ)_c`` of one teacher, w uniform on [-1, 1]."""
    return confods(logits, perturbation)._replace(factor=None)


def confods(logits: ByKind, perturbation: Perturbation) -> Direction:
    """The same, the step of an image multiplied by ``max_c softmax(z/τ)_c``."""
    (z,) = logits["T"].to(accumulator(logits["T"].dtype))
    weights = torch.empty_like(z).uniform_(-1, 1, generator=perturbation.noise)
    gradient, confidence = ods_seed(z, weights, perturbation.temperature)
    return Direction({"Ta": gradient}, {}, confidence)


def tdiv(logits: ByKind, perturbation: Perturbation) -> Direction:
    """Ascend the disagreement of teachers a and b, ``mean_b −Σ_c sg(p_b)_c log(p_a)_c``, through a alone."""
    value, gradient = teacher_diversity_seed(logits["T"])
    return Direction({"Ta": gradient}, {"tdiv": value})


def tdiv_sdiv(logits: ByKind, perturbation: Perturbation) -> Direction:
    """Ascend TDiv − SDiv: where teachers a and b disagree and the branches that learn from them do not yet."""
    of_teachers, of_branches, grad_teacher, grad_branch = diversity_seed(logits["T"], logits["S"])
    return Direction({"Ta": grad_teacher, "Sa": grad_branch}, {"tdiv": of_teachers, "sdiv": of_branches})


PERTURBATIONS = {
    "none": Row(move=lambda x, perturbation: x),
    "gaussian": Row(move=gaussian),
    "ods": Row(one_teacher, ("Ta",), ("Ta",), ods),
    "confods": Row(one_teacher, ("Ta",), ("Ta",), confods),
    "tdiv": Row(pair_of_teachers, ("Ta", "Tb"), ("Ta",), tdiv),
    "tdiv-sdiv": Row(pair_of_branches, ("Ta", "Sa", "Tb", "Sb"), ("Ta", "Sa"), tdiv_sdiv),
}


class Perturbation:
    """One of :data:`PERTURBATIONS` by name, with its generators.

    ``pick`` (CPU) draws the choice of a batch, ``noise`` (the images' device) everything per image. ``size`` is the
    root mean square of a step over the values of an image, in pixels.

    Raises InputError for an unknown name and where fewer than two teachers or branches leave no pair.
    """

    def __init__(self, name: str, teachers: int, branches: int, *, size: float = 1 / 255, temperature: float = 4.0,
                 pick: torch.Generator, noise: torch.Generator):  # fmt: skip
        if name not in PERTURBATIONS:
            raise unknown("perturbation", name, PERTURBATIONS)
        self.row = PERTURBATIONS[name]
        if "Tb" in self.row.members and teachers < 2:
            raise InputError(f"perturbation {name!r} needs at least 2 teachers that can disagree, got {teachers}")
        if "Sb" in self.row.members and branches < 2:
            raise InputError(
                f"perturbation {name!r} needs a student of at least 2 branches, got {branches}: choose another, or none"
            )
        self.name, self.teachers, self.branches = name, teachers, branches
        self.size, self.temperature, self.pick, self.noise = size, temperature, pick, noise
        self.pairs = self.row.choices(teachers, branches)

    def choose(self) -> int:
        """Draws what is drawn once for a batch, an index into ``pairs``; 0, undrawn, where there are none."""
        return int(torch.randint(len(self.pairs), (), generator=self.pick)) if self.pairs else 0

    def __call__(self, x: Tensor, teachers: Members, student: nn.Module, micro_batches: int = 1) -> Perturbed:
        """``x`` perturbed as one batch: one choice for all images, taken in slices after one another."""
        return self.by_choice(self.choose(), x, teachers, student, micro_batches)

    def by_choice(
        self, number: int, x: Tensor, teachers: Members, student: nn.Module, micro_batches: int = 1
    ) -> Perturbed:
        """The same for the choice that :meth:`choose` gave."""
        pair = self.pairs[number] if self.pairs else None
        found = [self.perturb(images, teachers, student, pair) for images in x.chunk(micro_batches)]
        return found[0] if len(found) == 1 else joined(found)

    def differing(self) -> list[int]:
        """Choices among which every member that can be differentiated is, each once; [0] where there are none."""
        first: dict[int, int] = {}
        for number, (a, _) in enumerate(self.pairs):
            first.setdefault(a, number)
        return list(first.values()) or [0]

    def perturb(self, x: Tensor, teachers: Members, student: nn.Module, pair: Pair | None = None) -> Perturbed:
        """``x`` perturbed by plain PyTorch, for this choice.

        Only the members are evaluated, the student in evaluation mode, and gradients flow to the images alone.
        """
        if self.row.move:
            return Perturbed(self.row.move(x, self), {})
        assert pair is not None
        networks: Mapping[str, Members] = {"T": teachers, "S": student}

        def logits(x: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
            return {name: networks[name[0]](x, [self.member(name, pair)])[0] for name in names}

        with evaluating(student) if self.row.evaluates("S") else nullcontext():
            with torch.no_grad():
                constant = logits(x, [name for name in self.row.members if name not in self.row.differentiated])
            with torch.enable_grad():
                watched = x.detach().requires_grad_()
                found = logits(watched, self.row.differentiated)
                direction = self.direction(self.by_kind(constant | {name: z.detach() for name, z in found.items()}))
                gradients = [direction.grad_logits[name].to(z.dtype) for name, z in found.items()]
                (gradient,) = torch.autograd.grad(list(found.values()), [watched], gradients)
        return Perturbed(self.step(x, gradient[None], direction), direction.diversities)

    def member(self, name: str, pair: Pair) -> int:
        """The number of the teacher or branch that ``name`` is of this choice."""
        number = pair["ab".index(name[1])]
        return number % self.teachers if name[0] == "T" else number

    def by_kind(self, logits: Mapping[str, Tensor], kinds: str = "TS") -> dict[str, Tensor]:
        """Logits (B, C) by member, as a row takes them."""
        found = {kind: [logits[name] for name in self.row.members if name[0] == kind] for kind in kinds}
        return {kind: torch.stack(z) if len(z) > 1 else z[0][None] for kind, z in found.items() if z}

    def direction(self, logits: ByKind) -> Direction:
        """The row's own, for logits of its members."""
        assert self.row.grad_logits
        return self.row.grad_logits(logits, self)

    def step(self, x: Tensor, gradients: Tensor, direction: Direction) -> Tensor:
        """``clip(x + ε·√D·g/‖g‖, 0, 1)``; ``gradients`` (G, B, …) of the images add up to g."""
        length = self.size * math.sqrt(x[0].numel())  # L2, of a step whose root mean square is ``size``
        return perturb_step(x, gradients, length, confidence=direction.factor)


def joined(parts: Sequence[Perturbed]) -> Perturbed:
    """The micro-batches of a batch as one; diversities are means over its images, and all are equally large."""
    images, diversities = zip(*parts, strict=True)
    means = {name: torch.stack([values[name] for values in diversities]).mean(0) for name in diversities[0]}
    return Perturbed(torch.cat(images), means)
