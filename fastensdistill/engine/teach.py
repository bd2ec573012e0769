"""Training M teachers at once: M groups of the same launches, each with its own weights, statistics and batch.

Cross-entropy, the same recipe, nothing shared (method of Nam et al., ICML 2022, section 5: the teachers).

    loss_m = mean_b −log softmax(z_m)_label        ∂loss_m/∂z_m = (softmax(z_m) − onehot(label)) / B
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastensdistill.config import TeachConfig
from fastensdistill.data.loader import DeviceLoader
from fastensdistill.engine.checks import FirstBatch, check_images, check_labels, check_parts
from fastensdistill.engine.dispatch import Dispatch
from fastensdistill.engine.fused import ImageShape, State, arithmetic, mean_of_parts
from fastensdistill.engine.graph import Capturing, Graphs
from fastensdistill.engine.parallel import same_start
from fastensdistill.engine.parameters import FlatParameters
from fastensdistill.engine.part_run import Execution
from fastensdistill.engine.trained import Trained
from fastensdistill.errors import InputError
from fastensdistill.method.arguments import checked_config, listed_networks
from fastensdistill.network.nodes import Network
from fastensdistill.network.overlap import common_memory, trained_tensors
from fastensdistill.network.plan import plan, teach_groups
from fastensdistill.network.probe import compared
from fastensdistill.network.unseen import refusing


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


class FusedTeachStep(Capturing):
    """One step of M networks of one architecture at once; the interface of ``TeachStep``.

    ``step(batches)`` takes M pairs of images (B, channels, H, W), float32 in [0, 1], and labels int64 (B,), always of
    one shape, and returns the losses (M,). The networks' parameters live in this object's buffers from the start: do
    not move or cast them any more. ``implementations``, ``captured`` and ``capture_error`` as for ``FusedStep``.
    Raises InputError for networks that only the reference engine can train.
    """

    graphs: Graphs | None = None

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
        self.network = common_architecture(self.networks, image_shape)
        self.device = next(self.networks[0].parameters()).device
        self.dtype, precision = arithmetic(config, self.networks[0])
        self.parts, self.implementations = config.micro_batches, implementations or Dispatch()
        self.execution = Execution(precision, self.implementations, config.sync_batch_norm, self.parts)
        self.parameters = FlatParameters(self.networks, self.network, ranked=False)
        same_start(self.parameters.state())
        self.rate = torch.tensor(config.learning_rate, dtype=self.parameters.dtype, device=self.device)
        self.capture = capture and self.device.type == "cuda"
        self.images: Tensor | None = None
        self.first = FirstBatch()
        self.loaders: list[DeviceLoader] = []

    @refusing("the fused engine")
    def _build(self, shape: tuple[int, ...]) -> None:
        M, (B, C, H, W) = len(self.networks), shape
        check_parts(self.config, B)
        self.images = torch.zeros(M, B, H, W, C, dtype=self.parameters.dtype, device=self.device)
        self.labels = torch.zeros(M, B, dtype=torch.int64, device=self.device)
        (forward,), (backward,) = (
            plan([self.network], groups, way, B // self.parts).parts for groups, way in teach_groups(M).values()
        )
        self.trained = Trained(self.network, forward, backward, self.parameters, self.dtype, self.execution)
        self.graphs = Graphs(self.parameters.state, self.device) if self.capture else None

    def _body(self) -> dict[str, Tensor]:
        assert self.images is not None
        return self._step(self.images, self.labels)

    def _body_with_loaders(self) -> dict[str, Tensor]:
        images, labels = zip(*(loader.read() for loader in self.loaders), strict=True)
        # Stacked as they lie in memory, channels last: one copy
        stacked = torch.stack([x.permute(0, 2, 3, 1) for x in images])
        return self._step(stacked.to(self.parameters.dtype), torch.stack(labels))

    def _step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """``images`` (M, B, H, W, C), ``labels`` (M, B)."""
        self.trained.write()
        parts = zip(images.chunk(self.parts, 1), labels.chunk(self.parts, 1), strict=True)
        losses = [self._gradients(x.contiguous(), own, add=i > 0) for i, (x, own) in enumerate(parts)]
        self.trained.finish()
        self.trained.update(self.rate, self.config.momentum, self.config.weight_decay)
        return {"loss": mean_of_parts([[loss] for loss in losses])[0]}

    def _gradients(self, images: Tensor, labels: Tensor, add: bool) -> Tensor:
        """Those of one part of the batches, on top of the earlier ones with ``add``; the losses (M,)."""
        log_p = self.trained.forward(images).log_softmax(-1)
        index = labels[..., None]
        loss = -log_p.gather(-1, index)[..., 0].mean(1)
        seed = log_p.exp().scatter_add_(-1, index, torch.full_like(log_p[..., :1], -1))
        self.trained.backward(seed.div_(self.parts * log_p.shape[1]), add)
        return loss

    @torch.no_grad()
    def __call__(self, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        if len(batches) != len(self.networks):
            raise InputError(f"{len(batches)} batches for {len(self.networks)} networks: expected as many")
        for images, labels in batches:
            check_images(images)
            check_labels(labels, len(images))
            self.first.see(images, labels, self.network.by_name[self.network.output].shape[0])
        self.first.over = True
        if self.images is None:
            self._build(tuple(batches[0][0].shape))
        self._follow()
        assert self.images is not None
        for i, (images, labels) in enumerate(batches):
            self._check(tuple(images.shape))
            self.images[i].copy_(images.permute(0, 2, 3, 1))
            self.labels[i].copy_(labels)
        return self.graphs((), self._body, []) if self.graphs else self._body()

    @torch.no_grad()
    def train_on(self, loaders: Sequence[DeviceLoader]) -> dict[str, Tensor]:
        """A step on the next batch of each network's own loader, read, cropped and flipped in the captured graph."""
        if len(loaders) != len(self.networks):
            raise InputError(f"{len(loaders)} loaders for {len(self.networks)} networks: expected as many")
        if self.loaders != list(loaders):
            if self.images is None:
                self._build(loaders[0].batch_shape)
            for loader in loaders:
                self._check(loader.batch_shape)
            self.loaders = list(loaders)
        self._follow()
        for loader in loaders:
            loader.advance()
        if self.graphs is None:
            return self._body_with_loaders()
        return self.graphs(tuple(loaders), self._body_with_loaders, [loader.generator for loader in loaders])

    def _follow(self) -> None:
        """Parameters may have been frozen, or may require gradients again, since the last step."""
        if self.parameters.follow() and self.graphs:
            self.graphs = Graphs(self.parameters.state, self.device)

    def _check(self, shape: tuple[int, ...]) -> None:
        assert self.images is not None
        _, B, H, W, C = self.images.shape
        if shape != (B, C, H, W):
            raise InputError(f"images have shape {shape}; this step was built for {(B, C, H, W)}")

    def set_learning_rate(self, rate: float) -> None:
        self.rate.fill_(rate)

    def _momenta(self) -> dict[str, Tensor]:
        """Views of the momentum, named as the reference engine names its own."""
        named: dict[str, Tensor] = {}
        for m, network in enumerate(self.networks):
            own = self.parameters.momenta(m)
            named |= {f"{m}.momentum.{i}": own[name] for i, (name, _) in enumerate(network.named_parameters())}
        return named

    def state_dict(self) -> State:
        """Momentum; the networks' weights are their own."""
        return {name: buffer.clone() for name, buffer in self._momenta().items()}

    @torch.no_grad()
    def load_state_dict(self, state: State) -> None:
        for name, buffer in self._momenta().items():
            buffer.copy_(state[name]) if name in state else buffer.zero_()
