"""The reference engine: a training step in plain PyTorch, on any device, as the paper writes it (method §2–4).

Everything faster is tested against these two classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastensdistill.config import DistillConfig, TeachConfig, TrainConfig
from fastensdistill.kernels.distillation_loss import distillation_loss
from fastensdistill.method.perturbation import Perturbation, Perturbed
from fastensdistill.method.student import Single, Student
from fastensdistill.method.teachers import Teachers

State = dict[str, Tensor]


class ReferenceStep:
    """One step of distillation: perturb the batch, distil on the perturbed images, update.

    ``step = ReferenceStep(student, teachers, config, num_classes=10)``, then ``step(images, labels)`` for images
    (B, channels, H, W) in [0, 1] and labels (B,). Set the learning rate with :meth:`set_learning_rate` before a step.
    Returns scalars on the device, so nothing waits for the device: loss (without weight decay), loss_kd, loss_ce and,
    where the perturbation ascends them, tdiv and sdiv. Cost of the paper's step: (M + 3K + 6) forwards.
    """

    def __init__(self, student: Student, teachers: Teachers, config: DistillConfig, *, num_classes: int):
        self.student, self.teachers, self.config, self.num_classes = student, teachers, config, num_classes
        self.device = next(student.parameters()).device
        self.target = "mean" if isinstance(student, Single) else "one-to-one"
        self.pick = torch.Generator().manual_seed(config.seed)
        self.noise = torch.Generator(self.device).manual_seed(config.seed + 1)
        self.perturbation = Perturbation(
            config.perturbation, len(teachers), student.branches, size=config.step_size,
            temperature=config.temperature, pick=self.pick, noise=self.noise,
        )  # fmt: skip
        self.optimizer = sgd(student, config)

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return self.distil(self.perturb(images), labels)

    def perturb(self, images: Tensor) -> Perturbed:
        with float32_products(self.config), autocast(self.config, self.device):
            return self.perturbation(images, self.teachers, self.student, self.num_classes)

    def distil(self, perturbed: Perturbed, labels: Tensor) -> dict[str, Tensor]:
        """The update on images that are perturbed already; teachers and student see only those."""
        self.student.train()
        with float32_products(self.config), autocast(self.config, self.device):
            with torch.no_grad():
                teacher_logits = self.teachers(perturbed.images)
            branch_logits = self.student(perturbed.images)
        loss, loss_kd, loss_ce, _ = distillation_loss(
            teacher_logits, branch_logits, labels, self.config.temperature, self.config.alpha, self.target
        )
        self.optimizer.zero_grad(set_to_none=True)
        with float32_products(self.config):
            loss.backward()
        self.optimizer.step()
        scalars = {"loss": loss.detach(), "loss_kd": loss_kd.detach(), "loss_ce": loss_ce.detach()}
        if perturbed.tdiv is not None:
            scalars["tdiv"] = perturbed.tdiv
        if perturbed.sdiv is not None:
            scalars["sdiv"] = perturbed.sdiv
        return scalars

    def set_learning_rate(self, rate: float) -> None:
        set_learning_rate(self.optimizer, rate)

    def state_dict(self) -> State:
        """Momentum and generators; the student's weights are the student's own."""
        return momentum_state(self.optimizer) | {"pick": self.pick.get_state(), "noise": self.noise.get_state()}

    def load_state_dict(self, state: State) -> None:
        load_momentum_state(self.optimizer, state)
        self.pick.set_state(state["pick"])
        self.noise.set_state(state["noise"])


class TeachStep:
    """One step of M networks at once, each on its own batch: cross-entropy, the same recipe, nothing shared.

    ``step(batches)`` takes M pairs of images (B, channels, H, W) and labels (B,), and returns the losses (M,).
    """

    def __init__(self, networks: Sequence[nn.Module], config: TeachConfig):
        self.networks, self.config = list(networks), config
        self.device = next(self.networks[0].parameters()).device
        self.optimizers = [sgd(network, config) for network in self.networks]

    def __call__(self, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        losses = []
        for network, optimizer, (images, labels) in zip(self.networks, self.optimizers, batches, strict=True):
            network.train()
            with float32_products(self.config), autocast(self.config, self.device):
                logits = network(images)
            loss = F.cross_entropy(logits.float() if logits.dtype == torch.bfloat16 else logits, labels)
            optimizer.zero_grad(set_to_none=True)
            with float32_products(self.config):
                loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return {"loss": torch.stack(losses)}

    def set_learning_rate(self, rate: float) -> None:
        for optimizer in self.optimizers:
            set_learning_rate(optimizer, rate)

    def state_dict(self) -> State:
        return {f"{m}.{k}": v for m, o in enumerate(self.optimizers) for k, v in momentum_state(o).items()}

    def load_state_dict(self, state: State) -> None:
        for m, optimizer in enumerate(self.optimizers):
            own = {k.removeprefix(f"{m}."): v for k, v in state.items() if k.startswith(f"{m}.")}
            load_momentum_state(optimizer, own)


def sgd(network: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD with Nesterov momentum and coupled decay over all parameters; a student says how its factors differ."""
    if isinstance(network, Student):
        groups = network.parameter_groups(config.weight_decay)
    else:
        groups = [{"params": list(network.parameters()), "lr_scale": 1.0, "weight_decay": config.weight_decay}]
    optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=True, fused=True)
    set_learning_rate(optimizer, config.learning_rate)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def momentum_state(optimizer: torch.optim.SGD) -> State:
    """Momentum buffers by position; a parameter that has not been stepped yet has none."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    buffers = {i: optimizer.state[p].get("momentum_buffer") for i, p in enumerate(parameters) if p in optimizer.state}
    return {f"momentum.{i}": b for i, b in buffers.items() if b is not None}


def load_momentum_state(optimizer: torch.optim.SGD, state: State) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.state.clear()
    for i, p in enumerate(parameters):
        if f"momentum.{i}" in state:
            # In the parameter's own memory layout: the fused optimiser walks both as they lie in memory.
            optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(state[f"momentum.{i}"])


@contextmanager
def float32_products(config: TrainConfig) -> Iterator[None]:
    """cuDNN multiplies float32 in TF32 unless told otherwise: here only with ``precision="tf32"``."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
