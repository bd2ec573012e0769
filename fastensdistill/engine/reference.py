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
from fastensdistill.data.loader import DeviceLoader
from fastensdistill.engine.checks import FirstBatch, check_class_count, check_images, check_labels, check_parts
from fastensdistill.engine.parallel import average, processes, rank, same_start
from fastensdistill.engine.statistics import part_momentum
from fastensdistill.errors import InputError
from fastensdistill.kernels.distillation_loss import distillation_loss
from fastensdistill.method.arguments import checked_config, checked_student, checked_teachers, listed_networks
from fastensdistill.method.calls import call, dtype_of
from fastensdistill.method.inspection import check_values
from fastensdistill.method.modes import set_mode
from fastensdistill.method.perturbation import Perturbation, Perturbed
from fastensdistill.method.student import Single, Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.network.overlap import common_memory, dense

State = dict[str, Tensor]


class ReferenceStep:
    """One step of distillation: perturb the batch, distil on the perturbed images, update.

    ``step = ReferenceStep(student, teachers, config, num_classes=10)``, then ``step(images, labels)`` for images
    (B, channels, H, W) in [0, 1] and labels (B,). Set the learning rate with :meth:`set_learning_rate` before a step.
    Returns scalars on the device, so nothing waits for the device: loss (without weight decay), loss_kd, loss_ce and,
    where the perturbation ascends them, tdiv and sdiv. Cost of the paper's step: (M + 3K + 6) forwards.
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
        self.target = "mean" if isinstance(student, Single) else "one-to-one"
        seed = config.seed + 2 * rank()  # a process of its own draws its own pairs and noise
        self.pick = torch.Generator().manual_seed(seed)
        self.noise = torch.Generator(self.device).manual_seed(seed + 1)
        self.perturbation = Perturbation(
            config.perturbation, len(teachers), student.branches, size=config.step_size,
            temperature=config.temperature, pick=self.pick, noise=self.noise,
        )  # fmt: skip
        self.optimizer = sgd(student, config)
        self.dtype, self.first = dtype_of(student), FirstBatch()
        same_start(student.state_dict().values())

    def train_on(self, loader: DeviceLoader) -> dict[str, Tensor]:
        """A step on the loader's next batch."""
        return self(*loader.next())

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return self.distil(self.perturb(images), labels)

    def perturb(self, images: Tensor) -> Perturbed:
        check_images(images, self.dtype)
        check_parts(self.config, len(images))
        self.first.see(images)
        with float32_products(self.config, self.device), autocast(self.config, self.device):
            return self.perturbation(images, self.teachers, self.student, self.num_classes, self.config.micro_batches)

    def distil(self, perturbed: Perturbed, labels: Tensor) -> dict[str, Tensor]:
        """The update on images that are perturbed already; teachers and student see only those."""
        check_images(perturbed.images, self.dtype)
        check_labels(labels, len(perturbed.images))
        self.first.see(labels=labels, classes=self.num_classes)
        set_mode(self.student, True)
        self.optimizer.zero_grad(set_to_none=True)
        n = self.config.micro_batches
        losses = []
        with slower_statistics(self.student, n):
            for images, part in zip(perturbed.images.chunk(n), labels.chunk(n), strict=True):
                losses.append(self._gradients(images, part, n))
        average_gradients(self.student)
        self.optimizer.step()
        self.first.over = True
        loss, loss_kd, loss_ce = torch.stack(losses).mean(0)
        scalars = {"loss": loss, "loss_kd": loss_kd, "loss_ce": loss_ce}
        if perturbed.tdiv is not None:
            scalars["tdiv"] = perturbed.tdiv
        if perturbed.sdiv is not None:
            scalars["sdiv"] = perturbed.sdiv
        return scalars

    def _gradients(self, images: Tensor, labels: Tensor, parts: int) -> Tensor:
        """Add those of one of ``parts`` parts of a batch; the three losses."""
        with float32_products(self.config, self.device), autocast(self.config, self.device):
            with torch.no_grad():
                teacher_logits = self.teachers(images)
            branch_logits = self.student(images)
        self.first.see_logits({"student": branch_logits, "teachers": teacher_logits}, self.num_classes)
        loss, loss_kd, loss_ce, _ = distillation_loss(
            teacher_logits, branch_logits, labels, self.config.temperature, self.config.alpha, self.target
        )
        with float32_products(self.config, self.device):
            (loss / parts if parts > 1 else loss).backward()
        return torch.stack([loss.detach(), loss_kd.detach(), loss_ce.detach()])

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
        self.networks, self.config = listed_networks(networks), checked_config(config, TeachConfig)
        for i, network in enumerate(self.networks):
            check_values(network, f"network {i}")
        self.device = next(self.networks[0].parameters()).device
        self.optimizers = [sgd(network, config) for network in self.networks]
        self.dtype, self.first = dtype_of(self.networks[0]), FirstBatch()
        for network in self.networks:
            same_start(network.state_dict().values())

    def train_on(self, loaders: Sequence[DeviceLoader]) -> dict[str, Tensor]:
        """A step on the next batch of each network's own loader."""
        return self([loader.next() for loader in loaders])

    def __call__(self, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        n, losses = self.config.micro_batches, []
        if len(batches) != len(self.networks):
            raise InputError(f"{len(batches)} batches for {len(self.networks)} networks: expected as many")
        for images, labels in batches:
            check_images(images, self.dtype)
            check_labels(labels, len(images))
            check_parts(self.config, len(images))
        for m, (network, optimizer, (images, labels)) in enumerate(
            zip(self.networks, self.optimizers, batches, strict=True)
        ):
            self.first.see(images)
            set_mode(network, True)
            optimizer.zero_grad(set_to_none=True)
            with slower_statistics(network, n):
                parts = zip(images.chunk(n), labels.chunk(n), strict=True)
                found = [self._gradients(m, *part, n) for part in parts]
            average_gradients(network)
            optimizer.step()
            losses.append(torch.stack(found).mean())
        self.first.over = True
        return {"loss": torch.stack(losses)}

    def _gradients(self, m: int, images: Tensor, labels: Tensor, parts: int) -> Tensor:
        with float32_products(self.config, self.device), autocast(self.config, self.device):
            logits = call(self.networks[m], images, f"network {m}")
        self.first.see(labels=labels, classes=logits.shape[-1])
        loss = F.cross_entropy(logits.float() if logits.dtype == torch.bfloat16 else logits, labels)
        with float32_products(self.config, self.device):
            (loss / parts if parts > 1 else loss).backward()
        return loss.detach()

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
    """SGD with Nesterov momentum and coupled decay over all parameters; a student says how its factors differ.

    Parameters without gradients stay as they are. Raises InputError where there is nothing else, and for expanded ones.
    """
    if isinstance(network, Student):
        groups = network.parameter_groups(config.weight_decay)
    else:
        groups = [{"params": list(network.parameters()), "lr_scale": 1.0, "weight_decay": config.weight_decay}]
    parameters = dict(network.named_parameters())
    repeated = next((name for name, p in parameters.items() if common_memory([(name, p)])), None)
    if repeated:
        raise InputError(f"parameter {repeated!r} is expanded; expected memory for every element, as clone() gives it")
    if not any(p.requires_grad for p in parameters.values()):
        raise InputError(f"no parameter of {type(network).__name__} requires gradients; expected some to be trained")
    fused = all(map(dense, parameters.values()))  # the fused update walks memory, not elements
    optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=True, fused=fused)
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


def average_gradients(network: nn.Module) -> None:
    """The mean over all processes of every parameter's gradient, as one exchange; nothing where there is one."""
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    if processes() > 1:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        average(flat)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view(gradient.shape))


@contextmanager
def slower_statistics(network: nn.Module, parts: int) -> Iterator[None]:
    """Running statistics move ``parts`` times as they would have moved once."""
    kinds = nn.modules.batchnorm._BatchNorm
    norms = [m for m in network.modules() if isinstance(m, kinds) and m.momentum is not None] if parts > 1 else []
    momenta = [norm.momentum or 0.0 for norm in norms]
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = part_momentum(momentum, parts)
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def precision_on(config: TrainConfig, device: torch.device) -> str:
    """What ``config.precision`` "auto" means: bf16 on a GPU that multiplies it, fp32 elsewhere."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"


@contextmanager
def float32_products(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """cuDNN multiplies float32 in TF32 unless told otherwise: here only with ``precision="tf32"``."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = precision_on(config, device) == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision_on(config, device) == "bf16")
