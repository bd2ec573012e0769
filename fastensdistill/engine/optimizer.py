"""The reference engine's update of one network: PyTorch's own optimisers, state by position, nothing read on the host.

A position is a parameter's place among all of a network's: those that branches share, then a student's factors. State
is named ``momentum.3`` with SGD, and ``exp_avg.3``, ``exp_avg_sq.3`` and ``step.3`` with AdamW, in both engines.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastensdistill.config import DistillConfig, TrainConfig
from fastensdistill.engine.common import State
from fastensdistill.engine.parallel import average, processes
from fastensdistill.errors import InputError
from fastensdistill.method.student import Student
from fastensdistill.network.overlap import common_memory, dense

# What an optimiser keeps for a parameter, by PyTorch's name → ours; zeros are what its first step takes it to be
KEPT = {
    "sgd": {"momentum_buffer": "momentum"},
    "adamw": {"step": "step", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
}


def factors_of(network: nn.Module) -> list[nn.Parameter]:
    """The rank-one factors of a student; none of other networks."""
    return network.factors() if isinstance(network, Student) else []


def positions(network: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``network`` by position."""
    factors = factors_of(network)
    last = {id(p) for p in factors}
    return [*(p for p in network.parameters() if id(p) not in last), *factors]


def parameter_groups(network: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups for PyTorch's optimisers; the rate of each is that of the schedule times its ``lr_scale``.

    A student says how its factors differ with SGD. AdamW's step has the same size whatever its gradient is multiplied
    by, so that they have the rate and the decay of all else there (docs/method.md, Recipe).
    """
    decay, factors = config.weight_decay, {id(p) for p in factors_of(network)}
    groups: list[dict[str, Any]] = [{"params": positions(network), "lr_scale": 1.0, "weight_decay": decay}]
    if isinstance(network, Student):
        groups = network.parameter_groups(decay)
    for group in groups:
        if any(id(p) in factors for p in group["params"]):
            if config.optimizer == "adamw":
                group |= {"lr_scale": 1.0, "weight_decay": decay}
            group["lr_scale"] *= config.factor_rate if isinstance(config, DistillConfig) else 1.0
    if not config.decay_norm_and_bias:
        named = network.named_parameters(remove_duplicate=False)
        spared = {id(p) for name, p in named if p.ndim < 2 or name.rpartition(".")[2] == "bias"}
        for group in list(groups):
            groups.append(group | {"params": [p for p in group["params"] if id(p) in spared], "weight_decay": 0.0})
            group["params"] = [p for p in group["params"] if id(p) not in spared]
    return [group for group in groups if group["params"]]


class Optimizer:
    """Moves one network by the gradients that its parameters have; those without any stay as they are.

    Raises InputError where none is to be trained, and for expanded parameters.
    """

    def __init__(self, network: nn.Module, config: TrainConfig):
        self.network, self.clip_norm, self.kept = network, config.clip_norm, KEPT[config.optimizer]
        named = dict(network.named_parameters())
        repeated = next((name for name, p in named.items() if common_memory([(name, p)])), None)
        if repeated:
            raise InputError(
                f"parameter {repeated!r} is expanded; expected memory for every element, as clone() gives it"
            )
        if not any(p.requires_grad for p in named.values()):
            raise InputError(
                f"no parameter of {type(network).__name__} requires gradients; expected some to be trained"
            )
        self.parameters = positions(network)
        self.rule = _rule(parameter_groups(network, config), config, self.parameters)
        self.set_learning_rate(config.learning_rate)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.rule.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Average the gradients over processes, clip them, and move the parameters."""
        average_gradients(self.network)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.complete()  # a fused update fails where some have their state and others, just thawed, have none
        self.rule.step()

    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of every group: ``rate`` times the group's ``lr_scale``."""
        for group in self.rule.param_groups:
            value = rate * group["lr_scale"]
            group["lr"] = group["lr"].fill_(value) if isinstance(group["lr"], Tensor) else value

    def rates_on_device(self, device: torch.device) -> None:
        """From now on groups read their rates from tensors that stay: the fused update does, without a host.

        On a GPU it takes them in float32, which is how it multiplies.
        """
        for group in self.rule.param_groups:
            dtype = torch.float32 if device.type == "cuda" else torch.float64
            group["lr"] = torch.tensor(group["lr"], dtype=dtype, device=device)

    def complete(self) -> None:
        """Give every parameter that may be stepped its state, zeros, which is what the first step takes it to be."""
        for p in self.parameters:
            if p.requires_grad:
                self._complete(p)

    def _complete(self, p: nn.Parameter) -> None:
        for name in self.kept:
            if name not in self.rule.state[p]:
                # A moment in the parameter's own memory layout: the fused update walks both as they lie in memory
                zeros = torch.zeros_like(p) if name != "step" else torch.zeros((), dtype=torch.float32, device=p.device)
                self.rule.state[p][name] = zeros.detach()

    def tensors(self) -> list[Tensor]:
        """All that a step changes beside the parameters."""
        return [kept[name] for kept in self.rule.state.values() for name in self.kept if name in kept]

    def state_dict(self) -> State:
        """By position; a parameter that has not been stepped yet has none."""
        return {
            f"{ours}.{i}": self.rule.state[p][name]
            for i, p in enumerate(self.parameters) if p in self.rule.state
            for name, ours in self.kept.items() if name in self.rule.state[p]
        }  # fmt: skip

    @torch.no_grad()
    def load_state_dict(self, state: State, prefix: str = "") -> None:
        """The way back from :meth:`state_dict`, into the memory where state lies: zeros where ``state`` has none."""
        for i, p in enumerate(self.parameters):
            names = {name: f"{prefix}{ours}.{i}" for name, ours in self.kept.items()}
            if any(ours in state for ours in names.values()):  # it may be frozen meanwhile
                self._complete(p)
            for name, ours in names.items():
                if name in self.rule.state.get(p, {}):
                    kept = self.rule.state[p][name]
                    kept.copy_(state[ours]) if ours in state else kept.zero_()


def _rule(groups: list[dict[str, Any]], config: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    fused = all(map(dense, parameters))  # the fused update walks memory, not elements
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=True, fused=fused)
    capturable = parameters[0].device.type == "cuda"  # its count of steps is on the device
    betas = config.beta1, config.beta2
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused, capturable=capturable)


def average_gradients(network: nn.Module) -> None:
    """The mean over all processes of every parameter's gradient, as one exchange; nothing where there is one."""
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    if processes() > 1:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        average(flat)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view(gradient.shape))
