"""The fused step: the whole of a distillation step as one fixed list of launches, captured once as a CUDA graph.

    evaluation slots of the branches ← flat parameters            only for TDiv − SDiv
    perturbation: forward, gradients of the logits, of the input  images → perturbed images
    training slots of the branches ← flat parameters
    distillation: teachers forward, branches forward, loss        → ∂loss/∂logits
    backward, un-fold, (mean over processes), update              flat parameters ← flat parameters

Micro-batches go through the perturbation one after another, and then each through distillation and backward; slots are
written, gradients un-folded and weights updated once for the whole batch.

Teachers and branches are groups of the same launches; in distillation too, where those evaluate and these train: where
their architecture is the same, a layer is one launch with two sides (``engine.joint``). The backward pass is written
out; autograd sees nothing. A step reads the images, the labels, the index of the drawn pair and the learning rate from
tensors that never move, and the noise from a generator the graph knows: one captured graph serves the whole run, or one
per pair of architectures that drawn teachers have. ``train_on`` puts the reading and augmentation of the batch into
the graph too. Ops allocate their results; inside a capture these come from a pool that the graphs share, at the same
addresses in every replay, and since each buffer is freed after its last reader the pool is as large as
``engine.memory`` says beforehand.
Source of the step: Nam et al., ICML 2022.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from fastensdistill.engine.joint import joint_pass
from fastensdistill.engine.module_check import planned_or_module
from fastensdistill.engine.parameters import FlatParameters
from fastensdistill.engine.passes import Pass
from fastensdistill.engine.perturb import FusedPerturbation, by_architecture, evaluated_branches
from fastensdistill.engine.plain import plain_student
from fastensdistill.engine.probe import compared
from fastensdistill.engine.step import CapturedStep, mean_of_micro_batches
from fastensdistill.engine.trained import TrainedPass
from fastensdistill.errors import InputError
from fastensdistill.kernels.distillation_loss import Loss, distillation_loss
from fastensdistill.method.arguments import checked_config, checked_student, checked_teachers
from fastensdistill.method.perturbation import PERTURBATIONS, Perturbed
from fastensdistill.method.student import Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.network.nodes import Network
from fastensdistill.network.plan import plan
from fastensdistill.network.unplanned import modules_of
from fastensdistill.network.unseen import check_unseen, refusing

if TYPE_CHECKING:
    from fastensdistill.data.loader import DeviceLoader


@refusing("the fused engine")
def check_networks(
    student: Student, teachers: Teachers, shape: ImageShape, perturbation: str = "tdiv-sdiv"
) -> list[Network]:
    """Traced networks of the teachers, in order, and of the student last.

    A teacher that cannot be planned runs as its own module; ``network.unplanned.modules_of`` says which, and why. Of
    the teachers a gradient with respect to the images is asked only where the ``perturbation`` needs one.

    Raises InputError for what the engine cannot run, or would run as something else: an operation of the student that
    cannot be traced or planned, hooks, dropout in the student, a teacher that can neither be planned nor captured
    (``engine.module_check``) or that the student shares weights with.
    """
    check_unseen(student)
    for container in (teachers, teachers.networks):
        check_unseen(container, within=False)
    plain, gradient = plain_student(student), PERTURBATIONS[perturbation].needs_gradient("T")
    dtype = next(student.parameters()).dtype
    networks = [
        planned_or_module(teacher, shape, f"teacher {m}", gradient=gradient, dtype=dtype)
        for m, teacher in enumerate(teachers.networks)
    ]
    try:
        networks.append(compared(plain.architecture(), shape, trains=True))
    except InputError as error:
        raise InputError(f"the student: {error}") from error
    plan([networks[-1]], plain.training_groups(), "backward", 1)
    FlatParameters.check(plain.trained, networks[-1], plain.ranked)
    trained = {p.data_ptr(): name for name, p in student.named_parameters() if p.device.type != "meta"}
    for m, teacher in enumerate(teachers.networks):
        shared = next((trained[p.data_ptr()] for p in teacher.parameters() if p.data_ptr() in trained), None)
        if shared:
            raise InputError(f"the student's parameter {shared!r} is teacher {m}'s too; expected networks of their own")
    return networks


def student_loss(targets: Tensor, logits: Tensor, labels: Tensor, config: DistillConfig, student: Student) -> Loss:
    """loss, loss_kd, loss_ce and the gradient of the logits (K, B, C) of ``student``'s branches."""
    return distillation_loss(targets, logits, labels, **loss_options(config, student, len(targets)))


class FusedStep(CapturedStep):
    """One step of distillation as a fixed list of launches; the interface of ``ReferenceStep``.

    ``step = FusedStep(student, teachers, config)``, then ``step(images, labels)`` for images (B, channels, H, W) in
    [0, 1], float32, and labels int64 (B,) or probabilities (B, classes), always of one shape. Set the learning rate
    with :meth:`set_learning_rate` before a step. Returns scalars on the device: loss (without weight decay), loss_kd,
    loss_ce and, where the perturbation ascends them, tdiv and sdiv. On a CUDA device the first call captures the graph
    (``capture=False`` launches every op from Python instead); ``captured`` says whether that worked, ``capture_error``
    why not.

    From the first step (or from the start, with ``image_shape`` (channels, H, W) given) the student's parameters and
    running statistics live in this object's buffers: do not move or cast the student any more. The teachers' weights
    are copied at the first step. Parameters that do not require gradients stay as they are, to the bit.
    ``implementations`` names what computes each convolution (``engine.dispatch``). Of several processes each takes
    BatchNorm's statistics over its own images; with ``config.sync_batch_norm`` over those of all (one all-reduce per
    layer and direction).
    Raises InputError for networks and students that only the reference engine can train: each architecture is compared
    with its module once, on two random images.
    """

    def __init__(
        self,
        student: Student,
        teachers: Teachers | Sequence[nn.Module],
        config: DistillConfig,
        *,
        image_shape: ImageShape | None = None,
        capture: bool = True,
        implementations: Dispatch | None = None,
    ):
        self.student, self.teachers = checked_student(student), checked_teachers(teachers)
        self.config = checked_config(config, DistillConfig)
        loss_options(self.config, self.student, len(self.teachers))  # raises for weights that do not fit
        super().__init__(config, student, 1, capture, implementations)
        self.perturbation = drawn_perturbation(config, self.teachers, student)
        self.generators = [self.perturbation.noise]
        self.draw = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.networks: list[Network] = []  # the teachers' and, last, the student's, once an image's shape is known
        if image_shape:
            self.train_as(check_networks(self.student, self.teachers, image_shape, config.perturbation))

    @property
    def image_shape(self) -> ImageShape:
        """(channels, H, W) of the images that the networks were traced with."""
        return self.networks[-1].nodes[0].shape

    @property
    def modules(self) -> dict[int, str]:
        """Which teachers run as their own modules, and why they are not planned."""
        return modules_of(self.networks)

    @refusing("the fused engine")
    def train_as(self, networks: list[Network]) -> None:
        """Take over the student's parameters; ``networks`` are its teachers' architectures and, last, its own."""
        self.plain = plain_student(self.student)
        self.classes = self.plain.classes(networks[-1])
        self.adopt(self.plain.take_over(networks[-1]), [self.student])
        self.networks = networks

    def _plan(self, images: int) -> None:
        if not self.networks:
            _, _, H, W, C = self.images.shape
            self.train_as(check_networks(self.student, self.teachers, (C, H, W), self.config.perturbation))
        *frozen, own = self.networks
        groups, fusions = self.plain.training_groups(), self.execution.fusions
        (forward,), (backward,) = (plan([own], groups, way, images, fusions).parts for way in ("forward", "backward"))
        self.trained = TrainedPass(forward, backward, self.parameters, self.dtype, self.execution)
        needed = self.perturbation.row.evaluates("S")
        branches = evaluated_branches(own, frozen, self.parameters, self.dtype) if needed else None
        self.targets = Ensemble(frozen, self.dtype, self.device, self.execution, branches)
        self.targets.plan(images)
        for m, teacher in enumerate(self.teachers.networks):
            self.targets.write(m, teacher)
        self.joint = joint_pass(self.targets.passes, self.trained) if self.implementations.joint else None
        lists, self.places = by_architecture(self.perturbation, frozen)
        self.perturbers = [
            FusedPerturbation(self.perturbation, self.targets, branches, self.plain, images, choices)
            for choices in lists
        ]
        self.perturber = self.perturbers[0]

    def _launch_all(self, images: Tensor, labels: Tensor) -> Scalars:
        perturbed, scalars = self._perturb(images)
        return self._distil(perturbed, labels) | scalars

    def _perturb(self, images: Tensor) -> tuple[Sequence[Tensor], Scalars]:
        """The micro-batches of ``images`` (1, B, H, W, C), perturbed, and the diversities."""
        self.perturber.refresh()
        micro_batches = images[0].chunk(self.micro_batches)
        perturbed, found = zip(*(self.perturber(x, self.draw) for x in micro_batches), strict=True)
        means = mean_of_micro_batches([list(scalars.values()) for scalars in found])
        return [x[None] for x in perturbed], dict(zip(found[0], means, strict=True))

    def _distil(self, images: Sequence[Tensor], labels: Tensor) -> Scalars:
        """The update on perturbed micro-batches."""
        return dict(zip(("loss", "loss_kd", "loss_ce"), self._train(images, labels), strict=True))

    def _gradients(self, images: Tensor, labels: Tensor, add: bool) -> list[Tensor]:
        targets, logits = self._forward(images)
        self.branch_logits = logits = self.plain.branch_logits(logits)
        *losses, grad_logits = student_loss(targets, logits, labels[0], self.config, self.student)
        grad_logits = self.plain.group_logits(grad_logits)
        self.trained.backward(grad_logits / self.micro_batches if self.micro_batches > 1 else grad_logits, add)
        return losses

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of the teachers, and of the groups that train: of their architecture last, together with these."""
        joint = self.joint
        if joint is None:
            return self.targets(images[0]), self.trained.forward(images)
        outputs = {run: run.forward(images) for run in self.targets.passes if run is not joint.evaluation}
        outputs[joint.evaluation], logits = joint.forward(images)
        return self.targets.in_order([outputs[run] for run in self.targets.passes]), logits

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor, pair: tuple[int, int] | None = None) -> Scalars:
        """One step; ``pair`` (a, b) instead of a drawn one."""
        self.load((images, labels))
        self.choose(pair)
        return self._run()

    @torch.no_grad()
    def train_on(self, loader: DeviceLoader) -> Scalars:
        """A step on the loader's next batch. The captured graph contains the reading, the crops and the flips."""
        self.advance((loader,))
        self.choose()
        return self._run(self.loaders)

    @torch.no_grad()
    def perturb(self, images: Tensor, pair: tuple[int, int] | None = None) -> Perturbed:
        """The first half of a step, not captured; ``pair`` (a, b) instead of a drawn one."""
        self.load((images, None))
        self.choose(pair)
        perturbed, scalars = self._perturb(self.images)
        x = torch.cat(tuple(perturbed), 1)[0].permute(0, 3, 1, 2)
        return Perturbed(x, scalars)

    @torch.no_grad()
    def distil(self, perturbed: Perturbed, labels: Tensor) -> Scalars:
        """The second half, not captured, on images that are perturbed already."""
        self.load((perturbed.images, labels))
        return self._distil(self.images.chunk(self.micro_batches, 1), self.labels) | perturbed.diversities

    def passes(self) -> list[tuple[Pass, tuple[str, str]]]:
        names = "perturbation, forward", "perturbation, input gradient"
        perturbing = [(one, names) for perturber in self.perturbers for one, _ in perturber.passes]
        return [*perturbing, *((one, ("distillation, teachers", "")) for one in self.targets.passes), *super().passes()]

    def choose(self, pair: tuple[int, int] | None = None) -> None:
        """Draw by the host's generator, as the reference engine does; the device sees one number change.

        Where teachers differ in architecture, the choice also decides which launches run: one graph per pair of these.
        """
        choices = self.perturbation.pairs
        if pair is not None and pair not in choices:
            raise InputError(f"pair {pair} is not among those that can be drawn, {choices}")
        number = self.perturbation.choose() if pair is None else choices.index(pair)
        if choices:
            which, place = self.places[number]
            self.perturber = self.perturbers[which]
            self.draw.fill_(place)

    def _key(self) -> FusedPerturbation:
        return self.perturber

    def variants(self) -> Iterator[None]:
        drawn, place = self.perturber, self.draw.clone()
        self.draw.zero_()  # a place that every list of choices has
        try:
            for perturber in self.perturbers:
                self.perturber = perturber
                yield
        finally:
            self.perturber = drawn
            self.draw.copy_(place)

    @property
    def averages(self) -> list[nn.Module]:
        self.check_traced()
        return super().averages

    def _state(self) -> State:
        self.check_traced()
        return super()._state()

    def check_traced(self) -> None:
        """Raise InputError as long as no image's shape is known, by which networks are traced."""
        if not self.networks:
            raise InputError("the step has not seen an image; give image_shape=(channels, H, W) when creating it")

    def state_dict(self) -> State:
        """The optimiser's state and generators, as the reference engine's; weights and averages are their own."""
        return super().state_dict() | drawn_state(self.perturbation)

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        load_drawn_state(self.perturbation, state)
