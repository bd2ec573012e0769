"""The reference engine: a training step in plain PyTorch, on any device, as docs/method.md writes it.

Everything faster is tested against these two classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastensdistill.config import DistillConfig, TeachConfig, TrainConfig
from fastensdistill.engine.averages import Averages
from fastensdistill.engine.checks import (
    FirstBatch,
    check_class_count,
    check_columns,
    check_images,
    check_labels,
    check_micro_batches,
)
from fastensdistill.engine.common import (
    Scalars,
    State,
    autocast,
    drawn_perturbation,
    drawn_state,
    float32_products,
    load_drawn_state,
    loss_options,
    slower_statistics,
)
from fastensdistill.engine.optimizer import Optimizer
from fastensdistill.engine.parallel import same_start
from fastensdistill.errors import InputError
from fastensdistill.kernels.distillation_loss import distillation_loss
from fastensdistill.method.arguments import checked_config, checked_student, checked_teachers, listed_networks
from fastensdistill.method.calls import call, dtype_of
from fastensdistill.method.inspection import check_values
from fastensdistill.method.modes import set_mode
from fastensdistill.method.perturbation import Pair, Perturbed
from fastensdistill.method.student import Student
from fastensdistill.method.teachers import Teachers

if TYPE_CHECKING:
    from fastensdistill.data.loader import DeviceLoader

Losses = Callable[[Tensor, Tensor], list[Tensor]]
"""(images, labels) of a micro-batch → its losses; the first is the one to descend."""


class ReferenceStep:
    """One step of distillation: perturb the batch, distil on the perturbed images, update.

    ``step = ReferenceStep(student, teachers, config, num_classes=10)``, then ``step(images, labels)`` for images
    (B, channels, H, W) in [0, 1] and labels (B,) or probabilities (B, classes). Set the learning rate with
    :meth:`set_learning_rate` before a step. Returns scalars on the device, so nothing waits for it: loss (without
    weight decay), loss_kd, loss_ce and, where the perturbation ascends them, tdiv and sdiv. Cost of the paper's step:
    (M + 3K + 6) forwards.
    With ``config.micro_batches`` = n the batch is taken in n parts: one pair for all, each part normalised by its own
    statistics, one update by the mean gradient.
    """

    def __init__(
        self, student: Student, teachers: Teachers | Sequence[nn.Module], config: DistillConfig, *, num_classes: int
    ):
        student, teachers = checked_student(student), checked_teachers(teachers)
        config = checked_config(config, DistillConfig)
        for network, name in ((student, "student"), *((t, f"teacher {i}") for i, t in enumerate(teachers.networks))):
            check_values(network, name)
        self.student, self.teachers, self.config, self.num_classes = student, teachers, config, num_classes
        self.device = next(student.parameters()).device
        check_class_count(num_classes)
        self.loss = loss_options(config, student, len(teachers))
        self.perturbation = drawn_perturbation(config, teachers, student)
        self.optimizer = Optimizer(student, config)
        self.dtype, self.first = dtype_of(student), FirstBatch()
        same_start(student.state_dict().values())
        self.over_time = Averages([student], config.ema_decay)

    @property
    def averages(self) -> list[nn.Module]:
        """The student's average over time; [] where ``config.ema_decay`` asks for none."""
        return self.over_time.modules

    def train_on(self, loader: DeviceLoader) -> Scalars:
        """A step on the loader's next batch."""
        return self(*loader.next())

    def __call__(self, images: Tensor, labels: Tensor) -> Scalars:
        return self.distil(self.perturb(images), labels)

    def perturb(self, images: Tensor, pair: Pair | None = None) -> Perturbed:
        """The first half of a step: ``images`` moved by a drawn pair, or this ``pair``."""
        n = self.config.micro_batches
        check_images(images, self.dtype)
        check_micro_batches(len(images), n)
        self.first.see(images)
        with float32_products(self.config, self.device), autocast(self.config, self.device):
            number = self.perturbation.choose() if pair is None else self.perturbation.pairs.index(pair)
            return self.perturbation.by_choice(number, images, self.teachers, self.student, n)

    def distil(self, perturbed: Perturbed, labels: Tensor) -> Scalars:
        """The second half, on images that are perturbed already: teachers and student see only those."""
        check_images(perturbed.images, self.dtype)
        check_labels(labels, len(perturbed.images))
        self.first.see(labels=labels, classes=self.num_classes)
        batch = perturbed.images, labels
        losses = update(self.student, self.optimizer, batch, self.config, self.losses)
        self.over_time.move()
        self.first.over = True
        return dict(zip(("loss", "loss_kd", "loss_ce"), losses, strict=True)) | perturbed.diversities

    def losses(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Of a micro-batch: the loss, and the two that it is made of."""
        with autocast(self.config, self.device):
            with torch.no_grad():
                teacher_logits = self.teachers(images)
            branch_logits = self.student(images)
        self.first.see_logits({"student": branch_logits, "teachers": teacher_logits}, self.num_classes)
        *losses, _ = distillation_loss(teacher_logits, branch_logits, labels, **self.loss)
        return losses

    def set_learning_rate(self, rate: float) -> None:
        self.optimizer.set_learning_rate(rate)

    def state_dict(self) -> State:
        """The optimiser's state and generators; the weights of the student and of its average are their own."""
        return self.optimizer.state_dict() | self.over_time.state_dict() | drawn_state(self.perturbation)

    def load_state_dict(self, state: State) -> None:
        self.optimizer.load_state_dict(state)
        self.over_time.load_state_dict(state)
        load_drawn_state(self.perturbation, state)


class TeachStep:
    """One step of M networks at once, each on its own batch: cross-entropy, the same recipe, nothing shared.

    ``step(batches)`` takes M pairs of images (B, channels, H, W) and labels (B,) or probabilities (B, classes), and
    returns the losses (M,).
    """

    def __init__(self, networks: Sequence[nn.Module], config: TeachConfig):
        self.networks, self.config = listed_networks(networks), checked_config(config, TeachConfig)
        for i, network in enumerate(self.networks):
            check_values(network, f"network {i}")
        self.device = next(self.networks[0].parameters()).device
        self.optimizers = [Optimizer(network, config) for network in self.networks]
        self.dtype, self.first = dtype_of(self.networks[0]), FirstBatch()
        for network in self.networks:
            same_start(network.state_dict().values())
        self.over_time = Averages(self.networks, config.ema_decay)

    @property
    def averages(self) -> list[nn.Module]:
        """Every network's average over time; [] where ``config.ema_decay`` asks for none."""
        return self.over_time.modules

    def train_on(self, loaders: Sequence[DeviceLoader]) -> Scalars:
        """A step on the next batch of each network's own loader."""
        return self([loader.next() for loader in loaders])

    def __call__(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Scalars:
        self.check(batches)
        losses = self.updated(batches)
        self.first.over = True
        return {"loss": losses}

    def check(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Raise InputError for other than a batch for each network."""
        self.check_count(batches, "batches")
        for images, labels in batches:
            check_images(images, self.dtype)
            check_labels(labels, len(images))
            check_micro_batches(len(images), self.config.micro_batches)
            self.first.see(images)

    def check_count(self, sources: Sequence[object], kind: str) -> None:
        """Raise InputError for other than one of ``sources`` for each network."""
        if len(sources) != len(self.networks):
            raise InputError(f"{len(sources)} {kind} for {len(self.networks)} networks: expected as many")

    def updated(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Every network's update on its own batch; the losses (M,)."""
        every = zip(self.networks, self.optimizers, batches, strict=True)
        losses = [
            update(network, optimizer, batch, self.config, partial(self.losses, m))[0]
            for m, (network, optimizer, batch) in enumerate(every)
        ]
        self.over_time.move()
        return torch.stack(losses)

    def losses(self, m: int, images: Tensor, labels: Tensor) -> list[Tensor]:
        """The loss of network m on a micro-batch."""
        with autocast(self.config, self.device):
            logits = call(self.networks[m], images, f"network {m}")
        check_columns(labels, logits.shape[-1])
        self.first.see(labels=labels, classes=logits.shape[-1])
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        labels = labels.to(logits.dtype) if labels.is_floating_point() else labels
        return [F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)]

    def set_learning_rate(self, rate: float) -> None:
        for optimizer in self.optimizers:
            optimizer.set_learning_rate(rate)

    def state_dict(self) -> State:
        optimizers = {f"{m}.{k}": v for m, o in enumerate(self.optimizers) for k, v in o.state_dict().items()}
        return optimizers | self.over_time.state_dict()

    def load_state_dict(self, state: State) -> None:
        for m, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state, f"{m}.")
        self.over_time.load_state_dict(state)


def update(
    network: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], config: TrainConfig, losses: Losses
) -> Tensor:
    """One step of ``network`` by the mean gradient of the micro-batches' first loss; the means of all losses."""
    n, found = config.micro_batches, []
    set_mode(network, True)
    optimizer.zero_grad()
    with slower_statistics(network, n), float32_products(config, batch[0].device):
        for images, labels in zip(*(tensor.chunk(n) for tensor in batch), strict=True):
            of_one = losses(images, labels)
            (of_one[0] / n if n > 1 else of_one[0]).backward()
            found.append(torch.stack([loss.detach() for loss in of_one]))
    optimizer.step()
    return torch.stack(found).mean(0)
