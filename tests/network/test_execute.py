"""A plan executed by plain PyTorch against the modules it was made of, in float64: outputs, statistics, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastensdistill.method.student import LatentBE
from fastensdistill.network.execute import execute
from fastensdistill.network.fold import fold_branches, unfold_branches
from fastensdistill.network.launch import Group
from fastensdistill.network.plan import plan
from fastensdistill.network.trace import trace
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
]


def images(batch: int, size: int) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def random_like(x: torch.Tensor) -> torch.Tensor:
    return torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize(("model", "size", "batch"), CASES)
def test_input_gradient_in_evaluation_mode(model, size, batch):
    """Four groups forward, two of them backward, as in the perturbation; a part's gradient groups come first."""
    members = [model(seed).eval() for seed in range(4)]
    network = trace(members[0], (3, size, size))
    groups = [Group("b1"), Group("a1", gradient="input"), Group("b2"), Group("a2", gradient="input")]
    x = images(batch, size).requires_grad_()
    (part,) = plan([network], groups, "forward", batch).parts
    order = [groups.index(group) for group in part.groups]
    assert order == [1, 3, 0, 2]
    buffers = {"input": x.detach()[None]}
    execute(part, [state(members[i]) for i in order], buffers)
    expected = torch.stack([members[i](x) for i in order])
    check_close("logits", buffers[network.output], expected, TOLERANCE)

    seed = random_like(expected[:2])
    buffers[f"{network.output}.grad"] = seed
    (part,) = plan([network], groups, "backward", batch).parts
    execute(part, [state(members[i]) for i in order[:2]], buffers)
    for g in range(2):
        (gradient,) = torch.autograd.grad(expected[g], x, seed[g], retain_graph=True)
        check_close(f"input gradient of group {g}", buffers["input.grad"][g], gradient, TOLERANCE)


@pytest.mark.parametrize(("model", "size", "batch"), CASES)
def test_teachers_train_side_by_side(model, size, batch):
    """Groups with statistics of their own: logits, every gradient, the running estimates of either BatchNorm."""
    members = [model(seed).train() for seed in range(2)]
    network = trace(members[0], (3, size, size))
    parameters = [state(member) for member in members]
    groups = [Group(f"T{m}", statistics=f"T{m}", gradient="parameters") for m in range(2)]
    x, buffers = images(batch, size), {}
    buffers["input"] = x[None]
    (part,) = plan([network], groups, "forward", batch).parts
    execute(part, parameters, buffers)
    expected = torch.stack([member(x) for member in members])
    check_close("logits", buffers[network.output], expected, TOLERANCE)

    seed = random_like(expected)
    buffers[f"{network.output}.grad"] = seed
    (part,) = plan([network], groups, "backward", batch).parts
    execute(part, parameters, buffers)
    expected.backward(seed)
    for m, member in enumerate(members):
        for name, parameter in member.named_parameters():
            check_gradient(f"{name} of {m}", buffers[f"{name}.grad"][m], parameter.grad)
        check_running(network, buffers, member, m)


def check_gradient(name, actual, expected, tolerance=TOLERANCE):
    """A bias before BatchNorm has a gradient of zero, of which both sides have only the rounding."""
    if expected.abs().max() < 1e-10:
        actual, expected = 1 + actual, 1 + expected
    check_close(name, actual, expected, tolerance)


def check_running(network, buffers, module, index):
    new = module.state_dict()
    for name, buffer in buffers.items():
        if name.endswith(".running"):
            path = name.removesuffix(".running")
            check_close(f"{path}.running_mean", buffer[index, 0], new[f"{path}.running_mean"], TOLERANCE)
            check_close(f"{path}.running_var", buffer[index, 1], new[f"{path}.running_var"], TOLERANCE)
    assert sum(name.endswith(".running") for name in buffers) == sum(".running_mean" in name for name in new)


@pytest.mark.parametrize(("model", "size", "batch"), CASES)
def test_branches_of_a_student(model, size, batch):
    """K = 3 branches: shared statistics; dW, dr, ds and the shared BatchNorm's gradients through the rank-one fold."""
    plain = model(0)
    student = models.moved(LatentBE(plain, branches=3), 5).train()
    network = trace(plain, (3, size, size))
    parameters = state(student.module)
    branches = fold_branches(parameters, 3)
    groups = [Group(f"S{k}", statistics="S", gradient="parameters") for k in range(3)]
    x, buffers = images(batch, size), {}
    buffers["input"] = x[None]
    (part,) = plan([network], groups, "forward", batch).parts
    execute(part, branches, buffers)
    expected = student(x)
    check_close("logits", buffers[network.output], expected, TOLERANCE)

    seed = random_like(expected)
    buffers[f"{network.output}.grad"] = seed
    (part,) = plan([network], groups, "backward", batch).parts
    execute(part, branches, buffers)
    expected.backward(seed)
    gradients = {name.removesuffix(".grad"): value for name, value in buffers.items() if name.endswith(".grad")}
    actual = unfold_branches(parameters, gradients)
    for name, parameter in student.module.named_parameters():
        check_gradient(name, actual[name], parameter.grad)
    check_running(network, buffers, student.module, 0)


def test_teachers_of_another_architecture():
    """The student's branches and two kinds of teacher in one pass: a part each, all of them right."""
    wide, narrow, student = models.resnet(0).eval(), models.preresnet(1).eval(), models.preresnet(2).train()
    networks = [trace(module, (3, 8, 8)) for module in (wide, narrow, student)]
    groups = [Group("T1", 0), Group("T2", 1), Group("S1", 2, "S", "parameters")]
    parts = plan(networks, groups, "forward", 2).parts
    assert [[group.name for group in part.groups] for part in parts] == [["T1"], ["T2"], ["S1"]]
    x = images(2, 8)
    for part, module in zip(parts, (wide, narrow, student), strict=True):
        buffers = {"input": x[None]}
        execute(part, [state(module)], buffers)
        check_close(part.name, buffers[part.network.output][0], module(x), TOLERANCE)
