"""Perturbations: nudge a batch to where the teachers disagree and the branches do not yet (method §3).

Each returns images of the same shape, clipped to [0, 1]. ``teachers(x, members)`` and ``student(x, branches)`` give
logits (n, B, C); only the members that count are evaluated, in evaluation mode, and gradients flow to x alone.
Source: Nam et al., ICML 2022, section 4 (tdiv, tdiv-sdiv); Nam et al., NeurIPS 2021 (ods, confods).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastensdistill.errors import InputError, unknown
from fastensdistill.kernels.diversity_seed import diversity_seed, ods_seed, teacher_diversity_seed
from fastensdistill.kernels.perturb_step import perturb_step
from fastensdistill.method.modes import evaluating

PERTURBATIONS = ("none", "gaussian", "ods", "confods", "tdiv", "tdiv-sdiv")
NEED_GRADIENT = ("ods", "confods", "tdiv", "tdiv-sdiv")
"""Those that ascend the teachers' outputs."""
Members = Callable[[Tensor, Sequence[int]], Tensor]


class Perturbed(NamedTuple):
    """Perturbed images (B, channels, H, W), and the diversities that were ascended (scalars), where there are any."""

    images: Tensor
    tdiv: Tensor | None = None
    sdiv: Tensor | None = None


def gaussian(x: Tensor, std: float, generator: torch.Generator | None = None) -> Perturbed:
    """``clip(x + std·N(0, 1), 0, 1)``."""
    noise = torch.empty_like(x).normal_(generator=generator)
    return Perturbed((x + std * noise).clamp_(0, 1))


def ods(x: Tensor, teacher: Members, member: int, weights: Tensor, temperature: float, size: float,
        confident: bool = False) -> Perturbed:  # fmt: skip
    """Output-diversified sampling: ascend ``Σ_c w_c softmax(z/τ)_c`` of one teacher, weights (B, C) in [-1, 1].

    With ``confident`` (ConfODS) the step of an image is multiplied by ``max_c softmax(z/τ)_c``.
    """
    with _watched(x) as watched:
        logits = teacher(watched, [member])[0]
        seed, confidence = ods_seed(logits.detach(), weights, temperature)
        gradient = _input_gradients([logits], [seed], watched)
    return Perturbed(perturb_step(x, gradient, step_length(x, size), confidence=confidence if confident else None))


def tdiv(x: Tensor, teachers: Members, pair: tuple[int, int], size: float) -> Perturbed:
    """Ascend the disagreement of teachers a and b, ``mean_b −Σ_c sg(p_b)_c log(p_a)_c``, through a alone."""
    a, b = pair
    with torch.no_grad():
        t_b = teachers(x, [b])[0]
    with _watched(x) as watched:
        t_a = teachers(watched, [a])[0]
        divergence, seed = teacher_diversity_seed(torch.stack([t_a.detach(), t_b]))
        gradient = _input_gradients([t_a], [seed], watched)
    return Perturbed(perturb_step(x, gradient, step_length(x, size)), divergence)


def tdiv_sdiv(x: Tensor, teachers: Members, student: Members, pair: tuple[int, int], branches: tuple[int, int],
              size: float) -> Perturbed:  # fmt: skip
    """Ascend TDiv − SDiv: where teachers a and b disagree and the branches that learn from them do not yet."""
    with torch.no_grad():
        t_b, s_b = teachers(x, [pair[1]])[0], student(x, [branches[1]])[0]
    with _watched(x) as watched:
        t_a, s_a = teachers(watched, [pair[0]])[0], student(watched, [branches[0]])[0]
        teacher_div, student_div, seed_t, seed_s = diversity_seed(
            torch.stack([t_a.detach(), t_b]), torch.stack([s_a.detach(), s_b])
        )
        gradient = _input_gradients([t_a, s_a], [seed_t, seed_s], watched)
    return Perturbed(perturb_step(x, gradient, step_length(x, size)), teacher_div, student_div)


class Perturbation:
    """One of :data:`PERTURBATIONS` by name, drawing its random choices itself.

    ``pick`` (CPU) draws the pair or teacher of a batch, ``noise`` (the images' device) everything per image.
    The pair (a, b) is drawn over the K branches whose teachers differ, which for K = M are the paper's M(M−1) ordered
    pairs; branch k belongs to teacher k mod M. Without branches (tdiv) it is drawn over the teachers.

    Raises InputError for an unknown name and where fewer than two teachers or branches leave no pair.
    """

    def __init__(self, name: str, teachers: int, branches: int, *, size: float = 1 / 255, temperature: float = 4.0,
                 pick: torch.Generator, noise: torch.Generator):  # fmt: skip
        if name not in PERTURBATIONS:
            raise unknown("perturbation", name, PERTURBATIONS)
        if name in ("tdiv", "tdiv-sdiv") and teachers < 2:
            raise InputError(f"perturbation {name!r} needs at least 2 teachers that can disagree, got {teachers}")
        if name == "tdiv-sdiv" and branches < 2:
            raise InputError(
                f"perturbation {name!r} needs a student of at least 2 branches, got {branches}: choose another, or none"
            )
        self.name, self.teachers, self.branches = name, teachers, branches
        self.size, self.temperature, self.pick, self.noise = size, temperature, pick, noise
        if name in ("ods", "confods"):
            self.pairs = [(m, m) for m in range(teachers)]  # a teacher drawn alone
        else:
            count = {"tdiv": teachers, "tdiv-sdiv": branches}.get(name, 0)
            self.pairs = [(a, b) for a in range(count) for b in range(count) if a % teachers != b % teachers]

    def __call__(self, x: Tensor, teachers: Members, student: nn.Module, num_classes: int, parts: int = 1) -> Perturbed:
        """``x`` perturbed as one batch: one pair or teacher for all images, taken in ``parts`` after one another."""
        number = self.choose()
        found = [self._part(chunk, teachers, student, num_classes, number) for chunk in x.chunk(parts)]
        return found[0] if len(found) == 1 else join(found)

    def choose(self) -> int:
        """Draws what is drawn once for a batch, an index into ``pairs``; 0, undrawn, where there are none."""
        return int(torch.randint(len(self.pairs), (), generator=self.pick)) if self.pairs else 0

    def _part(self, x: Tensor, teachers: Members, student: nn.Module, num_classes: int, number: int) -> Perturbed:
        if self.name == "none":
            return Perturbed(x)
        if self.name == "gaussian":
            return gaussian(x, self.size, self.noise)
        a, b = self.pairs[number]
        if self.name in ("ods", "confods"):
            weights = torch.empty(len(x), num_classes, dtype=x.dtype, device=x.device)
            weights.uniform_(-1, 1, generator=self.noise)
            return ods(x, teachers, a, weights, self.temperature, self.size, self.name == "confods")
        if self.name == "tdiv":
            return tdiv(x, teachers, (a, b), self.size)
        with evaluating(student):
            return tdiv_sdiv(x, teachers, student, (a % self.teachers, b % self.teachers), (a, b), self.size)


def join(parts: Sequence[Perturbed]) -> Perturbed:
    """The parts of a batch as one; diversities are means over its images, and parts equally large."""

    def mean(values: list[Tensor | None]) -> Tensor | None:
        given = [v for v in values if v is not None]
        return torch.stack(given).mean(0) if given else None

    images, tdivs, sdivs = zip(*parts, strict=True)
    return Perturbed(torch.cat(images), mean(list(tdivs)), mean(list(sdivs)))


def step_length(x: Tensor, size: float) -> float:
    """``ε·√D``: the L2 length of a step whose root mean square over the D values of an image is ``size``."""
    return size * math.sqrt(x[0].numel())


@contextmanager
def _watched(x: Tensor) -> Iterator[Tensor]:
    with torch.enable_grad():
        yield x.detach().requires_grad_()


def _input_gradients(outputs: list[Tensor], seeds: list[Tensor], x: Tensor) -> Tensor:
    """The sum of the outputs' input gradients, as one group (1, B, ...). Weight gradients are never computed."""
    (gradient,) = torch.autograd.grad(outputs, [x], [s.to(o.dtype) for s, o in zip(seeds, outputs, strict=True)])
    return gradient.unsqueeze(0)
