"""Passes of the plan as the engine runs them, and the same by the modules themselves and autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastensdistill.engine.packed import PackedWeights, pack
from fastensdistill.engine.part_run import PartRun
from fastensdistill.engine.passes import run_part
from fastensdistill.network.fold import fold_branches
from fastensdistill.network.launch import INPUT, Group, grad
from fastensdistill.network.nodes import Network
from fastensdistill.network.on_load import Fusions, nothing
from fastensdistill.network.plan import plan
from tests.compare import check_close
from tests.network import models

TOLERANCE = 1e-9
# model, image size, batch: odd sizes where strides meet odd edges
CASES = [
    pytest.param(models.preresnet, 8, 3, id="preresnet"),
    pytest.param(models.preresnet, 7, 2, id="preresnet-odd-size"),
    pytest.param(models.resnet, 7, 3, id="resnet-padded-shortcut-odd-size"),
    pytest.param(models.resnet18, 33, 2, id="torchvision-resnet-7x7-stem"),
    pytest.param(models.vgg, 20, 3, id="torchvision-vgg-linear-head"),
    pytest.param(models.odd, 9, 3, id="unusual-order"),
    pytest.param(models.padded, 13, 2, id="padded-where-nothing-is-added"),
]


def images(batch: int, size: int) -> Tensor:
    return torch.rand(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def random_logits(groups: int, batch: int, network: Network) -> Tensor:
    """A gradient of the logits (G, N, classes)."""
    classes = network.by_name[network.output].shape[0]
    return torch.randn(groups, batch, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def run_pass(
    network: Network,
    groups: Sequence[Group],
    states: Sequence[dict[str, Tensor]],
    index: Sequence[int],
    x: Tensor,
    grad_logits: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    fusions: Fusions = nothing,
) -> tuple[dict[str, Any], PackedWeights]:
    """The engine's one part forward and, given ``grad_logits``, backward: its buffers and its weights.

    ``index`` picks each group's state; ``x`` is (N, C, H, W). The ops run their references on a CPU.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    buffers: dict[str, Any] = {INPUT: x.permute(0, 2, 3, 1)[None].to(device, wide).contiguous()}
    (part,) = plan([network], groups, "forward", len(x), fusions).parts
    weights = pack(part, states, dtype, device)
    weight_index = torch.tensor(index, dtype=torch.int32, device=device)
    run_part(PartRun(part, weights, weight_index, buffers))
    if grad_logits is not None:
        (part,) = plan([network], groups, "backward", len(x), fusions).parts
        buffers[grad(network.output)] = grad_logits.to(device, wide)
        run_part(PartRun(part, weights, weight_index[: len(part.groups)], buffers))
    return buffers, weights


def student_gradients(
    student: dict[str, Tensor], network: Network, branches: int, buffers: dict[str, Any]
) -> dict[str, Tensor]:
    """What the gradients of a student's branches in ``buffers`` are of its own parameters: autograd of the fold.

    Layers have a gradient per branch, a BatchNorm that they share has one, already summed.
    """
    own = {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in student.items()}
    folded, gradients = [], []
    plain = fold_branches(own, branches)
    for name in (name for node in network.nodes for name in node.parameters):
        for branch, gradient in zip(plain, buffers[grad(name)], strict=False):
            folded.append(branch[name])
            gradients.append(gradient.view_as(branch[name]))
    trained = {name: value for name, value in own.items() if value.requires_grad}
    found = torch.autograd.grad(folded, list(trained.values()), gradients, allow_unused=True)
    return {name: value for name, value in zip(trained, found, strict=True) if value is not None}


def by_autograd(modules: Sequence[nn.Module], x: Tensor, grad_logits: Tensor) -> dict[str, list[Tensor]]:
    """Per module its output "logits", and the gradients of the image and of every parameter, by name."""
    found: dict[str, list[Tensor]] = {}
    for module, d in zip(modules, grad_logits, strict=True):
        image, parameters = x.clone().requires_grad_(), dict(module.named_parameters())
        logits = module(image)
        gradients = torch.autograd.grad(logits, [image, *parameters.values()], d)
        for name, value in zip(("logits", INPUT, *parameters), (logits.detach(), *gradients), strict=True):
            found.setdefault(name, []).append(value)
    return found


def check_gradient(name: str, actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """A bias before BatchNorm has a gradient of zero, of which both sides have only the rounding."""
    if expected.abs().max() < 1e-10:
        actual, expected = 1 + actual, 1 + expected
    check_close(name, actual, expected, tolerance)


def check_running(weights: PackedWeights, module: nn.Module, index: int = 0) -> None:
    """All of a module's running statistics, after a step of training."""
    new = module.state_dict()
    assert {f"{name}.running_mean" for name in weights.norms} == {name for name in new if "running_mean" in name}
    for path, norm in weights.norms.items():
        check_close(f"{path}.running_mean", norm.running_mean[index], new[f"{path}.running_mean"], TOLERANCE)
        check_close(f"{path}.running_var", norm.running_var[index], new[f"{path}.running_var"], TOLERANCE)
