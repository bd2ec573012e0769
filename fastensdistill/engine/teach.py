"""Training M teachers at once: M groups of the same launches, each with its own weights, statistics and batch.

Cross-entropy, the same recipe, nothing shared (docs/method.md, Loss and Recipe).

    loss_m = mean_b cross-entropy(z_m, labels)        ∂loss_m/∂z_m: ``kernels.cross_entropy``, divided by B
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastensdistill.config import TeachConfig
from fastensdistill.engine.common import ImageShape, Scalars, State
from fastensdistill.engine.dispatch import Dispatch
from fastensdistill.engine.parameters import FlatParameters
from fastensdistill.engine.probe import compared
from fastensdistill.engine.step import CapturedStep
from fastensdistill.engine.trained import TrainedPass
from fastensdistill.errors import InputError
from fastensdistill.kernels.cross_entropy import cross_entropy
from fastensdistill.method.arguments import checked_config, listed_networks
from fastensdistill.network.nodes import Network
from fastensdistill.network.overlap import common_memory, trained_tensors
from fastensdistill.network.plan import plan, teach_groups
from fastensdistill.network.unseen import refusing

if TYPE_CHECKING:
    from fastensdistill.data.loader import DeviceLoader


@refusing("the fused engine")
def common_architecture(networks: Sequence[nn.Module], shape: ImageShape) -> Network:
    """The traced architecture that all ``networks`` share. Raises InputError where they differ or cannot be planned."""
    first, *others = [compared(network, shape, trains=True) for network in networks]
    for i, other in enumerate(others):
        if other != first:
            raise InputError(f"network {i + 1} has another architecture than network 0, so they share no launches")
    for groups, way in teach_groups(len(networks)).values():
        plan([first], groups, way, 1)
    for network in networks:
        FlatParameters.check(network, first, ranked=False)
    named = (pair for i, network in enumerate(networks) for pair in trained_tensors(network, f"network {i}"))
    shared = common_memory(named)
    if shared:
        raise InputError(f"{shared[0]!r} and {shared[1]!r} share their memory; expected networks of their own")
    return first


class FusedTeachStep(CapturedStep):
    """One step of M networks of one architecture at once; the interface of ``TeachStep``.

    ``step(batches)`` takes M pairs of images (B, channels, H, W), float32 in [0, 1], and labels int64 (B,) or
    probabilities (B, classes), always of one shape, and returns the losses (M,). The networks' parameters live in this
    object's buffers from the start: do not move or cast them any more. ``implementations``, ``captured`` and
    ``capture_error`` as for ``FusedStep``. Raises InputError for networks that only the reference engine can train.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        config: TeachConfig,
        *,
        image_shape: ImageShape,
        capture: bool = True,
        implementations: Dispatch | None = None,
    ):
        self.networks, self.config = listed_networks(networks), checked_config(config, TeachConfig)
        self.network, self.image_shape = common_architecture(self.networks, image_shape), image_shape
        self.classes = self.network.by_name[self.network.output].shape[0]
        super().__init__(config, self.networks[0], len(self.networks), capture, implementations)
        self.adopt(FlatParameters(self.networks, self.network, ranked=False), self.networks)

    def _plan(self, images: int) -> None:
        (forward,), (backward,) = (
            plan([self.network], groups, way, images, self.execution.fusions).parts
            for groups, way in teach_groups(self.batches).values()
        )
        self.trained = TrainedPass(forward, backward, self.parameters, self.dtype, self.execution)

    def _launch_all(self, images: Tensor, labels: Tensor) -> Scalars:
        (loss,) = self._train([x.contiguous() for x in images.chunk(self.micro_batches, 1)], labels)
        return {"loss": loss}

    def _gradients(self, images: Tensor, labels: Tensor, add: bool) -> list[Tensor]:
        rows, grad_logits = cross_entropy(
            self.trained.forward(images).log_softmax(-1), labels, self.config.label_smoothing
        )
        self.trained.backward(grad_logits.div_(self.micro_batches * rows.shape[1]), add)
        return [rows.mean(1)]

    @torch.no_grad()
    def __call__(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Scalars:
        """One step on a batch for each network."""
        self._check_count(batches, "batches")
        self.load(*batches)
        return self._run()

    @torch.no_grad()
    def train_on(self, loaders: Sequence[DeviceLoader]) -> Scalars:
        """A step on the next batch of each network's own loader, read and augmented in the captured graph."""
        self._check_count(loaders, "loaders")
        self.advance(tuple(loaders))
        return self._run(self.loaders)

    def _check_count(self, sources: Sequence[object], kind: str) -> None:
        if len(sources) != self.batches:
            raise InputError(f"{len(sources)} {kind} for {self.batches} networks: expected as many")

    def _state(self) -> State:
        every = {f"{m}.{name}": x for m in range(self.batches) for name, x in self.rule.state_of(m).items()}
        return every | self.rule.shared_state()
