"""The reference engine's steps as CUDA graphs: its operations and draws, replayed instead of launched one by one.

For networks that the fused engine cannot plan. Nothing is rewritten: what is captured are the bodies of
``engine.reference``, on tensors that never move.

    read       a graph for the loaders      images and labels of the next batch, augmented
    perturb    a graph for each choice      images → perturbed images, diversities
    distil     one graph                    perturbed images, labels → weights, momentum, statistics, losses

A drawn pair decides whose modules are called, so each has a graph, captured when it is first drawn; the update, most of
the work, is captured once. They share one pool of memory: none leaves anything in it for another. What a body decides
on the host is decided by the capture for good: ``engine.host_reads`` finds the networks for which that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastensdistill.config import DistillConfig, TeachConfig
from fastensdistill.engine.averages import Averages
from fastensdistill.engine.checks import check_images, check_kind, check_labels, check_micro_batches
from fastensdistill.engine.common import Scalars, autocast, float32_products
from fastensdistill.engine.graph import Capturing, Graphs, Results
from fastensdistill.engine.optimizer import Optimizer
from fastensdistill.engine.reference import ReferenceStep, TeachStep, update
from fastensdistill.errors import InputError
from fastensdistill.method.modes import set_mode
from fastensdistill.method.student import Student
from fastensdistill.method.teachers import Teachers

if TYPE_CHECKING:
    from fastensdistill.data.loader import DeviceLoader


def has_graphs(device: torch.device) -> bool:
    """Whether what ``device`` does can be captured."""
    return device.type == "cuda"


class Bodies(Capturing):
    """N batches in tensors that never move, and what is computed on them, replayed where there is a CUDA device."""

    graphs: Graphs | None = None
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    """Bodies that are not captured run within what this gives."""

    def __init__(
        self, capture: bool, trained: Sequence[nn.Module], optimizers: Sequence[Optimizer], over_time: Averages,
        others: Sequence[nn.Module] = (),
    ):  # fmt: skip
        """``trained`` networks, their ``optimizers`` and averages ``over_time``, and the ``others`` that are called."""
        self.device = next(trained[0].parameters()).device
        self.capture = capture and has_graphs(self.device)
        self.trained, self.optimizers, self.over_time, self.others = trained, optimizers, over_time, others
        self.images: list[Tensor] = []  # N of (B, channels, H, W), from the first batch on, as that lies in memory
        self.labels: list[Tensor] = []  # N of int64 (B,), or of probabilities (B, classes)
        self.where: Hashable = None
        for optimizer in optimizers:
            optimizer.rates_on_device(self.device)

    def state(self) -> list[Tensor]:
        """All that a body may change and a warm-up has to put back, where it lies."""
        tensors = [t for network in self.trained for t in (*network.parameters(), *network.buffers())]
        tensors += [t for network in self.others for t in network.buffers()]
        tensors += [t for optimizer in self.optimizers for t in optimizer.tensors()] + self.over_time.tensors()
        return [tensor.detach() for tensor in tensors]

    def accept(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Make the static inputs like the first ``batches``; raises InputError for other shapes and labels later."""
        if not self.images:
            self.images = [torch.empty_like(images, device=self.device) for images, _ in batches]
            self.labels = [
                torch.empty_like(labels, dtype=images.dtype if labels.is_floating_point() else None, device=self.device)
                for images, labels in batches
            ]
        for (images, labels), own, of_them in zip(batches, self.images, self.labels, strict=True):
            if images.shape != own.shape:
                raise InputError(f"images have shape {tuple(images.shape)}; this step was built for {tuple(own.shape)}")
            check_kind(labels, of_them)
        self.follow()

    def follow(self) -> None:
        """What was captured is captured anew where tensors have moved, been frozen or unfrozen since the last step."""
        for optimizer in self.optimizers:
            optimizer.complete()
        flags = [p.requires_grad for network in (*self.trained, *self.others) for p in network.parameters()]
        read = [p.data_ptr() for network in self.others for p in network.parameters()]
        where = (*flags, *read, *(tensor.data_ptr() for tensor in self.state()))
        if self.capture and where != self.where:
            self.graphs = Graphs(self.state, self.device)
        self.where = where
        for network in self.trained:
            if not network.training:  # as a step that is launched leaves it
                set_mode(network, True)

    def load(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy the batches into the static inputs."""
        self.accept(batches)
        for own_images, own_labels, (images, labels) in zip(self.images, self.labels, batches, strict=True):
            own_images.copy_(images)
            own_labels.copy_(labels)

    def load_next(self, loaders: Sequence[DeviceLoader]) -> None:
        """The loaders' next batches, read by the device alone."""
        self.accept([loader.meta_batch() for loader in loaders])
        for loader in loaders:
            loader.advance()
        self.run(("read", *loaders), partial(self._read, loaders), [loader.generator for loader in loaders])

    def _read(self, loaders: Sequence[DeviceLoader]) -> Results:
        for own_images, own_labels, loader in zip(self.images, self.labels, loaders, strict=True):
            images, labels = loader.read()
            own_images.copy_(images)
            own_labels.copy_(labels)
        return {}

    def run(self, key: Hashable, body: Callable[[], Results], generators: Sequence[torch.Generator] = ()) -> Results:
        """What ``body`` returns, which has to be the same body whenever ``key`` is; it draws from ``generators``."""
        # The backward pass on this thread: what is asked of the device on others is none of a capture's business
        with torch.autograd.set_multithreading_enabled(False):
            if self.graphs is not None:
                return self.graphs.prepare(key, body, generators)()
            with self.around():
                return body()


class CapturedReferenceStep(ReferenceStep):
    """:class:`~fastensdistill.engine.reference.ReferenceStep`, captured: the same numbers, batches of one shape.

    On a CUDA device the first calls capture the graphs (``capture=False`` launches every operation from Python, and a
    CPU does); ``captured`` says whether that worked, ``capture_error`` why not. :meth:`perturb` and :meth:`distil`,
    called by themselves, are not captured. Parameters' gradients are gone after a step.
    """

    def __init__(
        self,
        student: Student,
        teachers: Teachers | Sequence[nn.Module],
        config: DistillConfig,
        *,
        num_classes: int,
        capture: bool = True,
    ):
        super().__init__(student, teachers, config, num_classes=num_classes)
        self.bodies = Bodies(capture, [self.student], [self.optimizer], self.over_time, [self.teachers])
        self.perturbed = torch.empty(0)

    @property
    def captured(self) -> bool | None:
        """As ``FusedStep.captured``."""
        return self.bodies.captured

    @property
    def capture_error(self) -> str:
        """As ``FusedStep.capture_error``."""
        return self.bodies.capture_error

    def train_on(self, loader: DeviceLoader) -> Scalars:
        """A step on the loader's next batch, which is read and augmented by a graph too."""
        self.bodies.load_next([loader])
        (images,), (labels,) = self.bodies.images, self.bodies.labels
        self._check(images, labels)
        return self._step()

    def __call__(self, images: Tensor, labels: Tensor) -> Scalars:
        self._check(images, labels)
        self.bodies.load([(images, labels)])
        return self._step()

    def _check(self, images: Tensor, labels: Tensor) -> None:
        check_images(images, self.dtype)
        check_labels(labels, len(images))
        check_micro_batches(len(images), self.config.micro_batches)
        self.first.see(images, labels, self.num_classes)

    def _step(self) -> Scalars:
        (images,) = self.bodies.images
        if self.perturbed.shape != images.shape:
            self.perturbed = torch.empty_like(images)
        diversities = self._run_perturbation(self.perturbation.choose())
        return self.bodies.run("distil", self._distil) | diversities

    def run_all(self) -> None:
        """Run bodies on what is loaded until every network has done, in one of them, what a step may have it do."""
        self.perturbed = torch.empty_like(self.bodies.images[0])
        for number in self.perturbation.differing():
            self._run_perturbation(number)
        self.bodies.run("distil", self._distil)

    def _run_perturbation(self, number: int) -> Results:
        return self.bodies.run(("perturb", number), partial(self._perturb, number), [self.perturbation.noise])

    def _perturb(self, number: int) -> Results:
        (images,), n = self.bodies.images, self.config.micro_batches
        with float32_products(self.config, self.device), autocast(self.config, self.device):
            found = self.perturbation.by_choice(number, images, self.teachers, self.student, n)
        self.perturbed.copy_(found.images)
        return found.diversities

    def _distil(self) -> Results:
        batch = self.perturbed, self.bodies.labels[0]
        losses = update(self.student, self.optimizer, batch, self.config, self.losses)
        self.over_time.move()
        self.first.over = True  # where it is captured, the warm-up was first
        self.optimizer.zero_grad()  # their memory is the pool's, and others' from here on
        return dict(zip(("loss", "loss_kd", "loss_ce"), losses, strict=True))


class CapturedTeachStep(TeachStep):
    """:class:`~fastensdistill.engine.reference.TeachStep`, captured: one graph for all networks."""

    def __init__(self, networks: Sequence[nn.Module], config: TeachConfig, *, capture: bool = True):
        super().__init__(networks, config)
        self.bodies = Bodies(capture, self.networks, self.optimizers, self.over_time)

    @property
    def captured(self) -> bool | None:
        """As ``FusedStep.captured``."""
        return self.bodies.captured

    @property
    def capture_error(self) -> str:
        """As ``FusedStep.capture_error``."""
        return self.bodies.capture_error

    def train_on(self, loaders: Sequence[DeviceLoader]) -> Scalars:
        """A step on the next batch of each network's own loader."""
        self.check_count(loaders, "loaders")
        self.bodies.load_next(loaders)
        self.check([*zip(self.bodies.images, self.bodies.labels, strict=True)])
        return self._step()

    def __call__(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Scalars:
        self.check(batches)
        self.bodies.load(batches)
        return self._step()

    def _step(self) -> Scalars:
        return self.bodies.run("teach", self._teach)

    def run_all(self) -> None:
        """As :meth:`CapturedReferenceStep.run_all`."""
        self._step()

    def _teach(self) -> Results:
        batches = [*zip(self.bodies.images, self.bodies.labels, strict=True)]
        losses = self.updated(batches)
        self.first.over = True
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return {"loss": losses}
