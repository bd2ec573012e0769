"""The reference engine's optimiser: PyTorch's SGD, its momentum by position, gradients averaged over processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastensdistill.config import TrainConfig
from fastensdistill.engine.common import State
from fastensdistill.engine.parallel import average, processes
from fastensdistill.errors import InputError
from fastensdistill.method.student import Student
from fastensdistill.network.overlap import common_memory, dense


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
    """Set the rate of every group: ``rate`` times the group's ``lr_scale``."""
    for group in optimizer.param_groups:
        value = rate * group["lr_scale"]
        group["lr"] = group["lr"].fill_(value) if isinstance(group["lr"], Tensor) else value


def rates_on_device(optimizer: torch.optim.SGD, device: torch.device) -> None:
    """From now on groups read their rates from tensors that stay: the fused update does, without a host.

    On a GPU it takes them in float32, which is how it multiplies.
    """
    for group in optimizer.param_groups:
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        group["lr"] = torch.tensor(group["lr"], dtype=dtype, device=device)


def momentum_state(optimizer: torch.optim.SGD) -> State:
    """Momentum buffers by position; a parameter that has not been stepped yet has none."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    buffers = {i: optimizer.state[p].get("momentum_buffer") for i, p in enumerate(parameters) if p in optimizer.state}
    return {f"momentum.{i}": b for i, b in buffers.items() if b is not None}


def load_momentum_state(optimizer: torch.optim.SGD, state: State) -> None:
    """The way back from :func:`momentum_state`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.state.clear()
    for i, p in enumerate(parameters):
        if f"momentum.{i}" in state:
            # In the parameter's own memory layout: the fused optimiser walks both as they lie in memory.
            optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(state[f"momentum.{i}"])


def complete_momentum(optimizer: torch.optim.SGD) -> None:
    """Give every parameter that may be stepped its momentum, zero, which is what the first step takes it to be."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.requires_grad and "momentum_buffer" not in optimizer.state[p]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def copy_momentum(optimizer: torch.optim.SGD, state: State, prefix: str = "") -> None:
    """As :func:`load_momentum_state`, into the memory where the momentum lies, zero where ``state`` has none."""
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        name = f"{prefix}momentum.{i}"
        if name in state and "momentum_buffer" not in optimizer.state[p]:  # frozen meanwhile
            optimizer.state[p]["momentum_buffer"] = torch.empty_like(p)
        if "momentum_buffer" in optimizer.state[p]:
            buffer = optimizer.state[p]["momentum_buffer"]
            buffer.copy_(state[name]) if name in state else buffer.zero_()


def average_gradients(network: nn.Module) -> None:
    """The mean over all processes of every parameter's gradient, as one exchange; nothing where there is one."""
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    if processes() > 1:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        average(flat)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view(gradient.shape))
