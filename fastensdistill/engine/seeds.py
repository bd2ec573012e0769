"""Students of several seeds at once: more groups of the same launches, which share the teachers' packed weights.

S students of one architecture and kind, each with its own batch, drawn pair, weights, factors, statistics and momentum.
Of K branches each, S·K groups train in one launch, BatchNorm's statistics being over each student's own (Q = S sets of
K neighbours); the teachers see the S batches as one. Nothing goes from a student to another, so that each comes out as
``FusedStep`` alone trains it, but for the order in which kernels that see more work add up.

A joint launch of teachers and branches reads the same images on both sides, so there are none here. Losses, directions
and steps of the perturbation are small, and launched for each student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastensdistill.config import DistillConfig
from fastensdistill.engine.common import (
    ImageShape,
    Scalars,
    State,
    drawn_perturbation,
    drawn_state,
    load_drawn_state,
    loss_options,
)
from fastensdistill.engine.dispatch import Dispatch
from fastensdistill.engine.ensemble import Ensemble
from fastensdistill.engine.fused import check_networks, student_loss
from fastensdistill.engine.parallel import processes
from fastensdistill.engine.parameters import FlatParameters, function_tensors
from fastensdistill.engine.passes import Pass
from fastensdistill.engine.perturb import by_architecture, evaluated_branches
from fastensdistill.engine.plain import PlainHeads, plain_student
from fastensdistill.engine.probe import compared
from fastensdistill.engine.seeds_perturb import SeedsPerturbation
from fastensdistill.engine.step import Batch, CapturedStep, mean_of_micro_batches
from fastensdistill.engine.trained import TrainedPass
from fastensdistill.errors import InputError
from fastensdistill.method.arguments import checked_config, checked_student, checked_teachers
from fastensdistill.method.student import Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.network.nodes import Network
from fastensdistill.network.overlap import common_memory, trained_tensors
from fastensdistill.network.plan import branch_groups, plan
from fastensdistill.network.unplanned import modules_of
from fastensdistill.network.unseen import check_unseen, refusing

if TYPE_CHECKING:
    from fastensdistill.data.loader import DeviceLoader


def check_config(config: DistillConfig) -> None:
    """Raise InputError for settings under which seeds are trained one after another."""
    if config.sync_batch_norm or processes() > 1:
        raise InputError("several processes train the seeds one after another")


@refusing("the fused engine")
def check_students(
    students: Sequence[Student], teachers: Teachers, shape: ImageShape, perturbation: str = "tdiv-sdiv"
) -> list[Network]:
    """Traced networks of the teachers, in order, and last the one that all ``students`` share.

    Raises InputError for what ``FusedStep`` refuses, and for what can only be trained one after another: fewer than two
    students, students that differ or share memory, hydras, branches of a network that PyTorch computes parts of with
    parameters, teachers that run as their own modules, and teachers of several architectures that can be drawn.
    """
    if len(students) < 2:
        raise InputError(f"{len(students)} students given; expected at least 2 to train at once")
    first, *others = students
    plain = plain_student(first)
    if isinstance(plain, PlainHeads):
        raise InputError("hydra students are trained one after another: their branches are one network")
    networks = check_networks(first, teachers, shape, perturbation)
    own = networks[-1]
    for number, other in enumerate(others, 1):
        check_unseen(other)
        twin = plain_student(other)
        if (type(other), other.branches) != (type(first), first.branches):
            raise InputError(f"student {number} is of another kind or number of branches than student 0")
        if compared(twin.architecture(), shape, trains=True) != own:
            raise InputError(f"student {number} has another architecture than student 0")
        FlatParameters.check(twin.trained, own, twin.ranked)
    named = [pair for s, student in enumerate(students) for pair in trained_tensors(student, f"student {s}")]
    shared = common_memory(named)
    places = {tensor.data_ptr(): name for name, tensor in named if tensor.device.type != "meta"}
    for m, teacher in enumerate(teachers.networks):
        of_teacher = trained_tensors(teacher, f"teacher {m}")
        shared = shared or next(((places[t.data_ptr()], n) for n, t in of_teacher if t.data_ptr() in places), None)
    if shared:
        raise InputError(f"{shared[0]!r} and {shared[1]!r} share their memory; expected networks of their own")
    if first.branches > 1 and function_tensors(own)[0]:
        raise InputError("students are trained one after another whose network computes with parameters of no layer")
    if modules := modules_of(networks):
        number, why = next(iter(modules.items()))
        raise InputError(f"students are trained one after another with teacher {number}, which has no plan: {why}")
    return networks


class SeedsStep(CapturedStep):
    """One step of S students at once; of each what ``FusedStep`` does.

    ``step = SeedsStep(students, teachers, config, seeds, image_shape=…)``: ``seeds`` are the seeds that pairs and noise
    are drawn by, the student's in the place of ``config.seed``. ``step.train_on(loaders)`` takes a loader for each
    student and returns the scalars of ``FusedStep``, (S,) each. ``step.seeds[s]`` has the state of one of them, which
    a ``FusedStep`` of that seed can go on from, and the other way round. The students' parameters live in this
    object's buffers from the start; ``implementations``, ``captured`` and ``capture_error`` as for ``FusedStep``.
    Raises InputError for what is trained one after another (``check_students``, ``check_config``).
    """

    def __init__(
        self,
        students: Sequence[Student],
        teachers: Teachers | Sequence[nn.Module],
        config: DistillConfig,
        seeds: Sequence[int],
        *,
        image_shape: ImageShape,
        capture: bool = True,
        implementations: Dispatch | None = None,
        networks: list[Network] | None = None,
    ):
        """``networks`` are those that ``check_students`` has given; without them it is called."""
        self.students = [checked_student(student) for student in students]
        self.teachers, self.config = checked_teachers(teachers), checked_config(config, DistillConfig)
        if len(seeds) != len(self.students):
            raise InputError(f"{len(seeds)} seeds for {len(self.students)} students: expected as many")
        check_config(config)
        loss_options(config, self.students[0], len(self.teachers))
        self.networks = networks or check_students(self.students, self.teachers, image_shape, config.perturbation)
        self.image_shape, self.numbers = image_shape, tuple(seeds)
        super().__init__(config, self.students[0], len(self.students), capture, implementations)
        self.perturbations = [
            drawn_perturbation(replace(config, seed=seed), self.teachers, student)
            for seed, student in zip(seeds, self.students, strict=True)
        ]
        if len(by_architecture(self.perturbations[0], self.networks[:-1])[0]) > 1:
            raise InputError("seeds are trained one after another where teachers of several architectures are drawn")
        self.generators = [one.noise for one in self.perturbations]
        self.draw = torch.zeros(self.batches, dtype=torch.int64, device=self.device)
        self.plain = [plain_student(student) for student in self.students]
        self.branches, self.classes = self.plain[0].groups, self.plain[0].classes(self.networks[-1])
        trained = [plain.trained for plain in self.plain]
        self.adopt(FlatParameters(trained, self.networks[-1], self.plain[0].ranked), self.students)
        self.seeds = [OneSeed(self, number) for number in range(self.batches)]

    def _plan(self, images: int) -> None:
        *frozen, own = self.networks
        S, K, fusions = self.batches, self.branches, self.execution.fusions
        groups = [group for s in range(S) for group in branch_groups(K, 0, f"S{s}.")]
        (forward,), (backward,) = (plan([own], groups, way, images, fusions).parts for way in ("forward", "backward"))
        self.trained = TrainedPass(forward, backward, self.parameters, self.dtype, self.execution)
        needed = self.perturbations[0].row.evaluates("S")
        branches = evaluated_branches(own, frozen, self.parameters, self.dtype) if needed else None
        self.targets = Ensemble(frozen, self.dtype, self.device, self.execution, branches)
        self.targets.plan(S * images)
        for m, teacher in enumerate(self.teachers.networks):
            self.targets.write(m, teacher)
        self.perturbers = [SeedsPerturbation(self.perturbations, self.targets, branches, images)]

    def _launch_all(self, images: Tensor, labels: Tensor) -> Scalars:
        """The step on ``images`` (S, B, H, W, C): perturbation, targets, losses, update."""
        (perturber,) = self.perturbers
        perturber.refresh()
        perturbed, found = zip(
            *(perturber(x.contiguous(), self.draw) for x in images.chunk(self.micro_batches, 1)), strict=True
        )
        means = mean_of_micro_batches([list(scalars.values()) for scalars in found])
        losses = dict(zip(("loss", "loss_kd", "loss_ce"), self._train(perturbed, labels), strict=True))
        return losses | dict(zip(found[0], means, strict=True))

    def _gradients(self, images: Tensor, labels: Tensor, add: bool) -> list[Tensor]:
        targets = self.targets(images.flatten(0, 1)).unflatten(1, images.shape[:2])  # (M, S, b, classes)
        K = self.branches
        logits = self.trained.forward(images.repeat_interleave(K, 0) if K > 1 else images)
        found = [
            student_loss(targets[:, s].contiguous(), logits[s * K : (s + 1) * K], labels[s], self.config, student)
            for s, student in enumerate(self.students)
        ]
        *losses, grad_logits = zip(*found, strict=True)
        gradient = torch.cat(grad_logits)
        self.trained.backward(gradient / self.micro_batches if self.micro_batches > 1 else gradient, add)
        return [torch.stack(of_students) for of_students in losses]

    @torch.no_grad()
    def __call__(self, batches: Sequence[Batch], pairs: Sequence[tuple[int, int]] | None = None) -> Scalars:
        """One step on a batch for each student; ``pairs`` (a, b) instead of drawn ones."""
        self._check_count(batches, "batches")
        self.load(*batches)
        self.choose(pairs)
        return self._run()

    @torch.no_grad()
    def train_on(self, loaders: Sequence[DeviceLoader]) -> Scalars:
        """A step on the next batch of each student's own loader, read in the captured graph."""
        self._check_count(loaders, "loaders")
        self.advance(tuple(loaders))
        self.choose()
        return self._run(self.loaders)

    def _check_count(self, sources: Sequence[object], kind: str) -> None:
        if len(sources) != self.batches:
            raise InputError(f"{len(sources)} {kind} for {self.batches} students: expected as many")

    def choose(self, pairs: Sequence[tuple[int, int]] | None = None) -> None:
        """Draw for each student by its own generator on the host; the device sees numbers change."""
        for s, perturbation in enumerate(self.perturbations):
            choices = perturbation.pairs
            if pairs is not None and pairs[s] not in choices:
                raise InputError(f"pair {pairs[s]} is not among those that can be drawn, {choices}")
            number = perturbation.choose() if pairs is None else choices.index(pairs[s])
            self.draw[s].fill_(number)

    def passes(self) -> list[tuple[Pass, tuple[str, str]]]:
        names = "perturbation, forward", "perturbation, input gradient"
        perturbing = [(one, names) for perturber in self.perturbers for one in perturber.runs]
        return [*perturbing, *((one, ("distillation, teachers", "")) for one in self.targets.passes), *super().passes()]

    def state_dict(self) -> State:
        """The optimiser's state and generators of all students, each one's names behind its number."""
        return {f"{s}.{name}": value for s, one in enumerate(self.seeds) for name, value in one.state_dict().items()}

    def load_state_dict(self, state: State) -> None:
        for s, one in enumerate(self.seeds):
            start = f"{s}."
            own = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
            one.load_state_dict(own)


class OneSeed:
    """The state of one student of a :class:`SeedsStep`: that of a ``FusedStep`` which trains it alone."""

    def __init__(self, step: SeedsStep, number: int):
        self.step, self.number = step, number

    def _state(self) -> State:
        """Views of its optimiser's state; averages are moved as often for all."""
        return self.step.rule.state_of(self.number) | self.step.rule.shared_state()

    def set_learning_rate(self, rate: float) -> None:
        """That of all seeds, which have the same."""
        self.step.set_learning_rate(rate)

    def state_dict(self) -> State:
        """The optimiser's state and generators; weights and averages are the networks' own."""
        found = {name: tensor.clone() for name, tensor in self._state().items()}
        return found | drawn_state(self.step.perturbations[self.number])

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where :meth:`state_dict` was taken, or that of a step of either engine with this student alone."""
        for name, tensor in self._state().items():
            tensor.copy_(state[name]) if name in state else tensor.zero_()
        load_drawn_state(self.step.perturbations[self.number], dict(state))
