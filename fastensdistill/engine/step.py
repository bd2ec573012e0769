"""What all fused steps share: inputs that never move, one body that is launched or replayed, checks, learning rate.

A step reads its batches, the learning rate and what was drawn from tensors that never move, so that a graph captured
once serves the whole run. Given loaders, the graph contains the reading and augmentation of the batch too. A key
says which launches a body makes: each has a graph of its own, in one pool of memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastensdistill.config import TrainConfig
from fastensdistill.engine.checks import FirstBatch, check_images, check_kind, check_labels, check_micro_batches
from fastensdistill.engine.common import Scalars, State, arithmetic
from fastensdistill.engine.dispatch import Dispatch
from fastensdistill.engine.flat_update import FlatUpdate
from fastensdistill.engine.graph import Captured, Capturing, Graphs
from fastensdistill.engine.joint import JointPass
from fastensdistill.engine.parallel import same_start
from fastensdistill.engine.parameters import FlatParameters
from fastensdistill.engine.part_run import Execution
from fastensdistill.engine.passes import Pass
from fastensdistill.engine.trained import TrainedPass
from fastensdistill.errors import InputError
from fastensdistill.kernels.tiles import device_arch
from fastensdistill.network.unseen import refusing

if TYPE_CHECKING:
    from fastensdistill.data.loader import DeviceLoader

Loaders = tuple["DeviceLoader", ...]
Batch = tuple[Tensor, Tensor | None]
"""Images (B, channels, H, W), and labels (B,) or (B, classes) where they are needed."""


def mean_of_micro_batches(scalars: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    """The scalars of every micro-batch, averaged; those of one as they are, without a launch."""
    if len(scalars) == 1 or not scalars[0]:
        return scalars[0]
    return torch.stack([torch.stack(list(of_one)) for of_one in scalars]).mean(0).unbind()


class CapturedStep(Capturing):
    """A step over N batches of one shape, as a fixed list of launches.

    A kind of step says what these are (``_plan``, ``_launch_all``, ``_gradients``), which networks it trains
    (``adopt``), what ``classes`` labels may be of and, where not every step launches the same, which launches are this
    step's (``_key``). Tests and benchmarks build, load and launch it by the public methods, too.
    """

    graphs: Graphs | None = None
    joint: JointPass | None = None  # the teachers of the student's architecture run with what is trained
    parameters: FlatParameters
    rule: FlatUpdate
    trained: TrainedPass
    classes: int
    images: Tensor  # (N, B, H, W, channels), from ``build`` on
    labels: Tensor  # int64 (N, B), or probabilities (N, B, classes) if the first ones were
    built = labelled = False
    loaders: Loaders = ()

    def __init__(
        self, config: TrainConfig, network: nn.Module, batches: int, capture: bool, implementations: Dispatch | None
    ):
        """``network`` is one of those that are trained; ``batches`` is N."""
        like = next(network.parameters())
        self.batches, self.device, self.first = batches, like.device, FirstBatch()
        self.dtype, self.precision = arithmetic(config, network)
        self.micro_batches, self.implementations = config.micro_batches, implementations or Dispatch.on(like.device)
        self.rate = torch.tensor(config.learning_rate, dtype=like.dtype, device=like.device)
        fusions = self.implementations.fusions(device_arch(self.rate), self.dtype)
        self.execution = Execution(
            self.precision, self.implementations, config.sync_batch_norm, self.micro_batches, fusions,
            self.implementations.joint_op,
        )  # fmt: skip
        self.settings = config
        self.capture = capture and like.device.type == "cuda"
        self.generators: list[torch.Generator] = []  # that the launches draw from, beside the loaders'

    def _plan(self, images: int) -> None:
        """Plan the passes over micro-batches of so many images."""
        raise NotImplementedError

    def _launch_all(self, images: Tensor, labels: Tensor) -> Scalars:
        """The whole step on ``images`` (N, B, H, W, C) and ``labels`` (N, B, ...); waits for nothing."""
        raise NotImplementedError

    def _gradients(self, images: Tensor, labels: Tensor, add: bool) -> Sequence[Tensor]:
        """Forward and backward pass of a micro-batch (N, b, H, W, C); returns its losses.

        With ``add`` the gradients go on top of those of earlier micro-batches.
        """
        raise NotImplementedError

    def _key(self) -> Hashable:
        """What decides which launches this step makes."""
        return None

    def variants(self) -> Iterator[None]:
        """Become, one after another, every step that what is drawn can make of this one."""
        yield

    def adopt(self, parameters: FlatParameters, networks: Sequence[nn.Module]) -> None:
        """Train these, the parameters of ``networks``, from here on; several processes begin with the first one's."""
        same_start(parameters.state())
        self.parameters, self.rule = parameters, FlatUpdate(networks, parameters, self.settings)

    @property
    def averages(self) -> list[nn.Module]:
        """The average over time of each network that is trained; [] where the config's ``ema_decay`` asks for none."""
        return self.rule.averages

    def state(self) -> list[Tensor]:
        """Everything a step changes."""
        return self.parameters.state() + self.rule.state()

    @refusing("the fused engine")
    def build(self, shape: Sequence[int]) -> None:
        """Plans and static inputs for batches of this ``shape`` (B, channels, H, W)."""
        B, C, H, W = shape
        check_micro_batches(B, self.micro_batches)
        self.images = torch.zeros(self.batches, B, H, W, C, dtype=self.rate.dtype, device=self.device)
        self.labels = torch.zeros(self.batches, B, dtype=torch.int64, device=self.device)
        self._plan(B // self.micro_batches)
        self.graphs = Graphs(self.state, self.device) if self.capture else None
        self.built = True

    def passes(self) -> list[tuple[Pass, tuple[str, str]]]:
        """All passes of a step, in order, with the names of their parts: forward and, where there is one, backward."""
        return [(self.trained, ("distillation, forward", "distillation, backward"))]

    def accept(self, shape: Sequence[int]) -> None:
        """Build for batches of this ``shape``; raises InputError where that was done for another."""
        if not self.built:
            self.build(shape)
        _, B, H, W, C = self.images.shape
        if tuple(shape) != (B, C, H, W):
            raise InputError(f"images have shape {tuple(shape)}; this step was built for {(B, C, H, W)}")

    def load(self, *batches: Batch) -> None:
        """Check the N batches and copy them into the static inputs; the first ones decide the shape."""
        for images, labels in batches:
            check_images(images)
            if labels is not None:
                check_labels(labels, len(images))
            self.accept(images.shape)
            self.first.see(images, labels, self.classes)
            if labels is not None:
                self.accept_labels(labels)
        for i, (images, labels) in enumerate(batches):
            self.images[i].copy_(images.permute(0, 2, 3, 1))
            if labels is not None:
                self.labels[i].copy_(labels)
                self.first.over = True
        self.follow()

    def accept_labels(self, labels: Tensor) -> None:
        """The first decide whether a batch has classes or probabilities; raises InputError for the other kind later."""
        if not self.labelled and labels.is_floating_point():
            shape = self.batches, *labels.shape
            self.labels = torch.zeros(shape, dtype=self.rate.dtype, device=self.device)
        self.labelled = True
        check_kind(labels, self.labels[0])

    def advance(self, loaders: Loaders) -> None:
        """Have each of the N ``loaders`` choose its next batch, which the step will read."""
        if self.loaders != loaders:
            for loader in loaders:
                self.accept(loader.batch_shape)
            self.loaders = loaders
        for loader in loaders:
            loader.advance()
        self.follow()

    def follow(self) -> None:
        """Parameters may have been frozen, or may require gradients again, since the last step."""
        if self.parameters.follow():
            self.rule.follow()
            if self.graphs:
                self.graphs = Graphs(self.state, self.device)

    def body(self) -> Scalars:
        """The step as it is captured, on the static inputs."""
        return self._launch_all(self.images, self.labels)

    def body_on_loaders(self) -> Scalars:
        """The same on the batches that the loaders have chosen."""
        read = [(images.permute(0, 2, 3, 1), labels) for images, labels in (loader.read() for loader in self.loaders)]
        if len(read) == 1:
            ((images, labels),) = read
            return self._launch_all(images.to(self.images.dtype).contiguous()[None], labels[None])
        images, labels = (torch.stack(tensors) for tensors in zip(*read, strict=True))  # channels last: one copy each
        return self._launch_all(images.to(self.images.dtype), labels)

    def _run(self, loaders: Loaders = ()) -> Scalars:
        """One step, replayed or launched."""
        if self.graphs is not None:
            return self._captured(self.graphs, loaders)()
        return self.body_on_loaders() if loaders else self.body()

    def _captured(self, graphs: Graphs, loaders: Loaders) -> Captured:
        """What replays this step; at the first one all variants are captured, whichever this process drew.

        Warming up averages over processes as a step does, so that all of them have to warm up the same bodies.
        """
        body = self.body_on_loaders if loaders else self.body
        generators = [*self.generators, *(loader.generator for loader in loaders)]
        if (self._key(), loaders) not in graphs.made:
            for _ in self.variants():
                graphs.prepare((self._key(), loaders), body, generators)
        return graphs.prepare((self._key(), loaders), body, generators)

    def _train(self, images: Sequence[Tensor], labels: Tensor) -> Sequence[Tensor]:
        """One update by the mean gradient of the micro-batches ``images``; the means of their losses."""
        self.trained.refresh()
        pairs = zip(images, labels.chunk(self.micro_batches, 1), strict=True)
        losses = [self._gradients(x, of_them, add=i > 0) for i, (x, of_them) in enumerate(pairs)]
        self.trained.finish()
        self.update()
        return mean_of_micro_batches(losses)

    def set_learning_rate(self, rate: float) -> None:
        """That of the steps from now on."""
        self.rate.fill_(rate)

    def update(self) -> None:
        """Move the parameters by their gradients."""
        self.rule(self.rate, self.trained.factor_gradients)
        del self.trained.factor_gradients

    def _state(self) -> State:
        """Views of the optimiser's state, named as in the reference engine."""
        return self.rule.state_of(0) | self.rule.shared_state()

    def state_dict(self) -> State:
        """The optimiser's state, as the reference engine's; weights and averages are the networks' own."""
        return {name: tensor.clone() for name, tensor in self._state().items()}

    @torch.no_grad()
    def load_state_dict(self, state: State) -> None:
        """Go on from where :meth:`state_dict` was taken, of either engine."""
        for name, tensor in self._state().items():
            tensor.copy_(state[name]) if name in state else tensor.zero_()
