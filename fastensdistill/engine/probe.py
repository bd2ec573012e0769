"""A traced network is compared with its module, once: what recording did not see shows as another number.

A copy with all weights moved (so that zeros and fresh statistics hide nothing) takes a few random images in float64:

    evaluation mode    logits, gradient of the image, logits of one image by itself; no state changes, no random number
                       is drawn
    training mode      logits, gradient of every parameter, running statistics, under one seed; nothing else changes,
                       and the same random numbers are drawn

against the engine's own passes over the network that was traced, which in float64 run the ops' references. A network
with dropout is compared on the CPU, where both draw the same. The module, its modes and all generators are left as they
are.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import is_dataclass
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastensdistill.engine.common import state_of
from fastensdistill.engine.packed import pack
from fastensdistill.engine.parameters import NormWeights
from fastensdistill.engine.part_run import PartRun
from fastensdistill.engine.passes import run_part
from fastensdistill.engine.planned_functions import computed
from fastensdistill.errors import InputError
from fastensdistill.method.copying import copy_network
from fastensdistill.method.modes import channels_last
from fastensdistill.network.launch import INPUT, Group, grad
from fastensdistill.network.nodes import Function, Network, Shape
from fastensdistill.network.plan import plan
from fastensdistill.network.trace import trace
from fastensdistill.network.unseen import generators_kept, refusing

IMAGES = 2
TOGETHER = 3
SEED = 1
STATISTICS_OF = 4
TOLERANCE = 1e-6  # in float64, of the largest value; right networks are within 1e-9
REMEMBERED = 256
_compared: OrderedDict[Hashable, None] = OrderedDict()  # modules that have been compared, by what they consist of


def compared(module: nn.Module, input_size: Shape, trains: bool = False, gradient: bool = True) -> Network:
    """:func:`~fastensdistill.network.trace.trace` of ``module``, whose plan computes what ``module`` does.

    Args:
        input_size: of an image, (C, H, W).
        trains: whether it is to be trained, not only evaluated.
        gradient: whether the gradient of the image is needed in evaluation mode.

    Raises InputError where the two differ, and as ``trace``.
    """
    network = trace(module, input_size, trains)
    kind = type(module).__name__
    with refusing(f"{kind}: cannot be compared with its plan"):
        group = Group(kind, statistics=kind if trains else None, gradient="parameters" if trains else None)
        plan([network], [group], "backward" if trains else "forward", 1)  # refuses what no launch computes
        device = next(module.parameters()).device
        consists = construction(module)
        key = (network, consists, trains, gradient, device.type)
        if device.type == "meta" or (consists is not None and key in _compared):
            return network
        with generators_kept(module), torch.inference_mode(False), torch.enable_grad():
            _Probe(module, network, input_size).run(trains, gradient)
        if consists is not None:
            _compared[key] = None
            if len(_compared) > REMEMBERED:
                _compared.popitem(last=False)
    return network


def construction(module: nn.Module) -> Hashable | None:
    """What decides about the operations of ``module`` besides its tensors; None where that cannot be told."""
    parts: list[Hashable] = []
    for path, layer in module.named_modules():
        kind = type(layer)
        own = {name: value for name, value in vars(layer).items() if name not in _INTERNAL}
        try:
            parts.append((path, kind, kind.forward, kind.train, _frozen(own)))
        except TypeError:
            return None
    return tuple(parts)


def _frozen(value: Any) -> Hashable:
    """A hashable equal of plain data; TypeError for what it cannot be told of when it changes."""
    if value is None or isinstance(value, bool | int | float | str | type | FunctionType | torch.dtype):
        return type(value), value
    if isinstance(value, tuple | list):
        return type(value), *map(_frozen, value)
    if isinstance(value, dict):
        return dict, *((_frozen(key), _frozen(own)) for key, own in value.items())
    if is_dataclass(value):
        return type(value), _frozen(vars(value))
    raise TypeError(type(value).__name__)


_INTERNAL = set(vars(nn.Module()))


def _drawn(device: torch.device) -> list[Any]:
    """The state of every generator that a forward might draw from."""
    own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    numpy: Any = np.random.get_state()
    return [*(t.tolist() for t in (torch.get_rng_state(), *own)), random.getstate(), numpy[1].tolist(), numpy[2:]]


class _Probe:
    """A moved copy of ``module`` in float64, and the same weights in the plan of ``network``."""

    def __init__(self, module: nn.Module, network: Network, input_size: Shape):
        self.network, self.kind = network, type(module).__name__
        own = copy_network(module, forget=True).requires_grad_(True)
        self.device = next(own.parameters()).device
        if self.device.type not in ("cpu", "cuda") or network.evaluated is not network:
            own, self.device = own.cpu(), torch.device("cpu")
        self.generator = torch.Generator().manual_seed(1)
        # as the reference engine has them: dropout draws in the order of memory
        images = self._random(torch.rand, IMAGES, *input_size)
        self.module = channels_last(moved(own.double(), self._random(torch.rand, STATISTICS_OF, *input_size)))
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.grad_logits = self._random(torch.randn, IMAGES, network.by_name[network.output].shape[0])

    def _random(self, draw: Any, *shape: int) -> Tensor:
        return draw(*shape, generator=self.generator, dtype=torch.float64).to(self.device)

    def refuse(self, why: str) -> InputError:
        return InputError(f"{self.kind}: {why}; the fused engine would compute something else")

    def run(self, trains: bool, gradient: bool) -> None:
        self.evaluation(gradient)
        if trains:
            self.training()

    def forward(self, images: Tensor, mode: str) -> tuple[Tensor, dict[str, Tensor]]:
        """The copy's logits and what its state was before; refuses random numbers and what is counted in Python."""
        before = {name: value.detach().clone() for name, value in state_of(self.module).items()}
        counts, drawn = self._counts(), _drawn(self.device)
        logits = self.module(images)
        draws = mode == "training" and self.network.evaluated is not self.network
        for name, value in self._counts().items():
            if value != counts.get(name, value):
                raise self.refuse(f"{name!r} changes from {counts[name]} to {value} in a forward in {mode} mode")
        if _drawn(self.device) != drawn and not draws:
            raise self.refuse(f"draws random numbers in {mode} mode")
        if not isinstance(logits, Tensor) or logits.shape != self.grad_logits.shape:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise self.refuse(f"returns {got} in {mode} mode, not logits {tuple(self.grad_logits.shape)}")
        return logits, before

    def _counts(self) -> dict[str, float]:
        return {
            f"{path}.{name}".lstrip("."): value
            for path, layer in self.module.named_modules()
            for name, value in vars(layer).items()
            if isinstance(value, int | float)
        }

    @torch.no_grad()
    def planned(self, group: Group, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, NormWeights]]:
        """What a forward and, where ``group`` asks for a gradient, a backward pass write, and BatchNorm afterwards."""
        network = self.network if group.statistics is not None else self.network.evaluated
        (part,) = plan([network], [group], "forward", IMAGES).parts
        weights = pack(part, [state], torch.float64, self.device)
        index = torch.zeros(1, dtype=torch.int32, device=self.device)
        buffers = {
            INPUT: self.images.permute(0, 2, 3, 1)[None].contiguous(),
            grad(network.output): self.grad_logits[None],
        }
        run_part(PartRun(part, weights, index, buffers))
        if group.gradient:
            (part,) = plan([network], [group], "backward", IMAGES).parts
            run_part(PartRun(part, weights, index, buffers))
        return {name: value[0] for name, value in buffers.items() if isinstance(value, Tensor)}, weights.norms

    def evaluation(self, gradient: bool) -> None:
        self.module.eval()
        images = self.images.clone().requires_grad_(gradient)
        logits, before = self.forward(images, "evaluation")
        self.same_state(before, {}, "evaluation")
        planned, _ = self.planned(Group("", gradient="input" if gradient else None), before)
        self.same("logits in evaluation mode", logits.detach(), planned[self.network.evaluated.output])
        if gradient:
            own = self.gradients(logits, {"image": images}, "evaluation")["image"]
            self.same("gradient of the image", own, planned[grad(INPUT)].permute(0, 3, 1, 2))
        with torch.no_grad():
            alone = self.module(self.images[-1:])
        self.same("logits of one image by itself, in evaluation mode,", alone, logits[-1:].detach())
        self.images_apart(before)

    @torch.no_grad()
    def images_apart(self, state: dict[str, Tensor]) -> None:
        """Refuse what PyTorch computes of several images together; ``state`` has the tensors that it computes with.

        Of random values: those of images may be the largest of a batch, or zero after a ReLU, and hide it.
        """
        for node in self.network.evaluated.nodes:
            if not isinstance(node, Function):
                continue
            shapes = [self.network.by_name[name].shape for name in node.inputs]
            values = [self._random(torch.randn, TOGETHER, H, W, C) for C, H, W in shapes]
            own = {name: state[name] for name in (*node.trained, *node.constants)}
            together = computed(node, values, own, torch.float64)
            for i in range(TOGETHER):
                alone = computed(node, [x[i : i + 1] for x in values], own, torch.float64)
                if not torch.allclose(alone, together[i : i + 1], TOLERANCE, TOLERANCE, equal_nan=True):
                    raise self.refuse(f"{node.name!r} does not compute each image by itself")

    def training(self) -> None:
        self.module.train()
        torch.manual_seed(SEED)
        logits, before = self.forward(self.images.clone(), "training")
        drawn = _drawn(self.device)
        torch.manual_seed(SEED)
        planned, norms = self.planned(Group("", statistics="", gradient="parameters"), before)
        if _drawn(self.device) != drawn:
            raise self.refuse("draws other random numbers in training mode than its dropout layers")
        self.same("logits in training mode", logits.detach(), planned[self.network.output])
        expected: dict[str, Tensor] = {}
        for name, norm in norms.items():
            count = before[f"{name}.num_batches_tracked"] + 1
            after = {"running_mean": norm.running_mean[0], "running_var": norm.running_var[0]}
            expected |= {f"{name}.{key}": value for key, value in (after | {"num_batches_tracked": count}).items()}
        self.same_state(before, expected, "training")
        own = self.gradients(logits, dict(self.module.named_parameters()), "training")
        scale = max(float(value.abs().max()) for value in own.values())
        for name, value in own.items():
            if grad(name) not in planned:
                raise self.refuse(f"its parameter {name!r} is in none of the layers that were traced")
            self.same(f"gradient of {name!r}", value, planned[grad(name)].view_as(value), 1e-3 * scale)

    def gradients(self, logits: Tensor, inputs: dict[str, Tensor], mode: str) -> dict[str, Tensor]:
        if not logits.requires_grad:
            raise self.refuse(f"gives no gradients in {mode} mode")
        gradients = torch.autograd.grad(logits, list(inputs.values()), self.grad_logits, allow_unused=True)
        for name, value in zip(inputs, gradients, strict=True):
            if value is None:
                raise self.refuse(f"gives no gradient of {name!r} in {mode} mode")
        return dict(zip(inputs, gradients, strict=True))

    def same_state(self, before: dict[str, Tensor], expected: dict[str, Tensor], mode: str) -> None:
        """Refuse unless the ``expected`` tensors have become that, and all others are what they were."""
        for name, value in self.module.state_dict().items():
            if name in expected:
                self.same(f"{name!r} after a forward in {mode} mode", value.double(), expected[name])
            elif not torch.equal(value, before[name]):
                raise self.refuse(f"its {name!r} changes in a forward in {mode} mode")

    def same(self, what: str, own: Tensor, planned: Tensor, scale: float = 0.0) -> None:
        """Refuse unless equal, up to rounding."""
        apart, size = float((own - planned).abs().max()), max(float(planned.abs().max()), scale, 1e-30)
        if not apart <= TOLERANCE * size:
            raise self.refuse(f"its {what}: apart by {apart / size:.0e} from what the layers that were traced give")


@torch.no_grad()
def moved(module: nn.Module, images: Tensor | None = None) -> nn.Module:
    """``module`` with every parameter and all of BatchNorm's statistics off their values, and finite, in place.

    With ``images`` the statistics are near those that the moved layers make of these: near their old values a deep
    network in evaluation mode may enlarge rounding errors a hundred million times.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=like.dtype).to(like.device)

    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():  # of a network whose training went wrong
            tensor.nan_to_num_(0.0, 0.0, 0.0)
    for parameter in module.parameters():
        size = parameter.square().mean().sqrt().clamp(min=0.05)
        parameter.add_((noise(parameter) - 0.5) * 0.5 * size)
    if images is not None:
        take_statistics(module, images)
    for norm in norms_with_statistics(module):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.add_(0.2 * (noise(norm.running_mean) - 0.5) * norm.running_var.sqrt())
        norm.running_var.mul_(0.9 + 0.2 * noise(norm.running_var))
    return module


def norms_with_statistics(module: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms of ``module`` that keep statistics."""
    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    return [norm for norm in norms if norm.running_mean is not None and norm.running_var is not None]


def take_statistics(module: nn.Module, images: Tensor) -> None:
    """Give every BatchNorm the statistics of ``images``, if a copy of the module gets any from a call with these."""
    other = copy_network(module, forget=True)
    norms, others = norms_with_statistics(module), norms_with_statistics(other)
    for norm in others:
        norm.train()
        norm.momentum = 1.0
    with suppress(Exception):  # of the module's own code: what is wrong with it is found and said later
        other(images)
    for norm, found in zip(norms, others, strict=True):
        for name in ("running_mean", "running_var"):
            value = getattr(found, name)
            if value is not None and value.isfinite().all():
                getattr(norm, name).copy_(value)
