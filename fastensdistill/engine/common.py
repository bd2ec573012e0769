"""What both engines do alike: how they multiply, what they draw, how running statistics follow micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastensdistill.config import DistillConfig, TrainConfig
from fastensdistill.engine.parallel import rank
from fastensdistill.kernels.distillation_loss import shares
from fastensdistill.method.perturbation import Perturbation
from fastensdistill.method.student import Student
from fastensdistill.method.teachers import Teachers

State = dict[str, Tensor]
Scalars = dict[str, Tensor]
"""By name, on the device."""
ImageShape = tuple[int, int, int]
"""(channels, H, W)"""


def precision_on(config: TrainConfig, device: torch.device) -> str:
    """What ``config.precision`` "auto" means: bf16 on a GPU that multiplies it, fp32 elsewhere."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"


def state_of(module: nn.Module) -> State:
    """The state dict of ``module``, and its buffers that are not saved in it."""
    return dict(module.named_buffers(remove_duplicate=False)) | module.state_dict()


@contextmanager
def cudnn_tf32(allowed: bool) -> Iterator[None]:
    """cuDNN multiplies float32 in TF32 unless told otherwise: inside, only where that is ``allowed``."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def float32_products(config: TrainConfig, device: torch.device) -> AbstractContextManager[None]:
    """:func:`cudnn_tf32` with ``precision="tf32"`` alone."""
    return cudnn_tf32(precision_on(config, device) == "tf32")


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """For a forward pass in plain PyTorch: products in bfloat16 where ``config.precision`` says so.

    Without autocast's cache of weights: inside of a caller's own autocast it would outlive an update.
    """
    enabled = precision_on(config, device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def arithmetic(config: TrainConfig, network: nn.Module) -> tuple[torch.dtype, str]:
    """For the kernels: dtype of activations and packed weights, and how float32 is multiplied ("ieee" or "tf32")."""
    first = next(network.parameters())
    precision = precision_on(config, first.device)
    if precision == "bf16":
        return torch.bfloat16, "ieee"
    return first.dtype, "tf32" if precision == "tf32" else "ieee"


def drawn_perturbation(config: DistillConfig, teachers: Teachers, student: Student) -> Perturbation:
    """The perturbation of ``config`` with its generators, the same for both engines; each process draws its own."""
    seed, device = config.seed + 2 * rank(), next(student.parameters()).device
    on = "cpu" if device.type == "meta" else device  # the meta device has no generators
    return Perturbation(
        config.perturbation, len(teachers), student.branches, size=config.step_size, temperature=config.temperature,
        pick=torch.Generator().manual_seed(seed), noise=torch.Generator(on).manual_seed(seed + 1),
    )  # fmt: skip


def loss_options(config: DistillConfig, student: Student, teachers: int) -> dict[str, Any]:
    """What ``config`` says of the loss, as ``kernels.distillation_loss`` takes it.

    Raises InputError for weights that do not fit so many teachers, and those of ``student``'s branches.
    """
    target = config.target or student.target
    shares(config.teacher_weights, teachers, student.branches, target)
    return {
        "temperature": config.temperature, "alpha": config.alpha, "target": target,
        "label_smoothing": config.label_smoothing, "standardize_logits": config.standardize_logits,
        "teacher_weights": config.teacher_weights,
    }  # fmt: skip


def drawn_state(perturbation: Perturbation) -> State:
    """Where the generators of ``perturbation`` are."""
    return {"pick": perturbation.pick.get_state(), "noise": perturbation.noise.get_state()}


def load_drawn_state(perturbation: Perturbation, state: State) -> None:
    """The way back from :func:`drawn_state`."""
    perturbation.pick.set_state(state["pick"])
    perturbation.noise.set_state(state["noise"])


def micro_batch_momentum(momentum: float, micro_batches: int) -> float:
    """BatchNorm's momentum in each of so many updates in a row that together keep 1 − momentum of the old value."""
    return momentum if micro_batches == 1 else 1 - (1 - momentum) ** (1 / micro_batches)


@contextmanager
def slower_statistics(network: nn.Module, micro_batches: int) -> Iterator[None]:
    """Scale BatchNorm's momentum so that ``micro_batches`` updates equal one."""
    kinds = nn.modules.batchnorm._BatchNorm
    every = [m for m in network.modules() if isinstance(m, kinds)] if micro_batches > 1 else []
    momenta = [(norm, norm.momentum) for norm in every if norm.momentum is not None]
    for norm, momentum in momenta:
        norm.momentum = micro_batch_momentum(momentum, micro_batches)
    try:
        yield
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
