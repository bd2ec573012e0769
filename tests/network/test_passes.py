"""Whole passes of the engine against the modules themselves and autograd: outputs, statistics, every gradient.

In float64 by the ops' references, where a mistake in a plan shows as a wrong number; by the kernels in float32; in
bfloat16 against PyTorch's own error.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from fastensdistill.kernels.launch import use_kernels
from fastensdistill.method.student import LatentBE
from fastensdistill.network.fold import fold_branches
from fastensdistill.network.launch import INPUT, Group, grad
from fastensdistill.network.plan import plan
from fastensdistill.network.trace import trace
from tests.compare import check_close
from tests.network import models
from tests.network.cases import (
    CASES,
    TOLERANCE,
    by_autograd,
    check_gradient,
    check_running,
    images,
    random_logits,
    run_pass,
    state,
    student_gradients,
)
from tests.untyped import untyped

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("model", "size", "batch"), CASES)
def test_input_gradient_in_evaluation_mode(model, size, batch):
    """Four groups of three networks, chosen by index, two of them backward: a part's gradient groups come first."""
    members = [model(seed).eval() for seed in range(3)]
    network = trace(members[0], (3, size, size))
    groups = [Group("b1"), Group("a1", gradient="input"), Group("b2"), Group("a2", gradient="input")]
    (part,) = plan([network], groups, "forward", batch).parts
    assert [group.name for group in part.groups] == ["a1", "a2", "b1", "b2"]
    index, x, d = [2, 0, 0, 1], images(batch, size), random_logits(4, batch, network)
    buffers, _ = run_pass(network, groups, [state(member) for member in members], index, x, d[:2])
    expected = by_autograd([members[i] for i in index], x, d)
    check_close("logits", buffers[network.output], torch.stack(expected["logits"]), TOLERANCE)
    for g in range(2):
        actual = buffers[grad(INPUT)][g].permute(0, 3, 1, 2)
        check_close(f"input gradient of group {g}", actual, expected[INPUT][g], TOLERANCE)


@pytest.mark.parametrize(("model", "size", "batch"), CASES)
def test_networks_train_side_by_side(model, size, batch):
    """Groups with statistics of their own: logits, every gradient, the running estimates of either BatchNorm."""
    members = [model(seed).train() for seed in range(2)]
    network, states = trace(members[0], (3, size, size)), [state(member) for member in members]
    groups = [Group(f"T{m}", statistics=f"T{m}", gradient="parameters") for m in range(2)]
    x, d = images(batch, size), random_logits(2, batch, network)
    buffers, weights = run_pass(network, groups, states, [0, 1], x, d)
    expected = by_autograd(members, x, d)
    check_close("logits", buffers[network.output], torch.stack(expected["logits"]), TOLERANCE)
    for m, member in enumerate(members):
        for name, _ in member.named_parameters():
            check_gradient(f"{name} of {m}", buffers[grad(name)][m], expected[name][m])
        check_running(weights, member, m)


@pytest.mark.parametrize(("model", "size", "batch"), CASES)
def test_branches_of_a_student(model, size, batch):
    """K = 3 branches: shared statistics; dW, dr, ds and the shared BatchNorm's gradients through the rank-one fold."""
    plain = model(0)
    student = models.moved(LatentBE(plain, branches=3), 5).train()
    network, own = trace(plain, (3, size, size)), state(untyped(student).module)
    groups = [Group(f"S{k}", statistics="S", gradient="parameters") for k in range(3)]
    x, d = images(batch, size), random_logits(3, batch, network)
    buffers, weights = run_pass(network, groups, fold_branches(own, 3), [0, 1, 2], x, d)
    logits = student(x)
    check_close("logits", buffers[network.output], logits, TOLERANCE)
    logits.backward(d)
    actual = student_gradients(own, network, 3, buffers)
    for name, parameter in untyped(student).module.named_parameters():
        check_gradient(name, actual[name], parameter.grad)
    check_running(weights, untyped(student).module)


def test_teachers_of_another_architecture():
    """The student's branches and two kinds of teacher in one pass: a part each."""
    modules = models.resnet(0).eval(), models.preresnet(1).eval(), models.preresnet(2).train()
    networks = [trace(module, (3, 8, 8)) for module in modules]
    groups = [Group("T1", 0), Group("T2", 1), Group("S1", 2, "S", "parameters")]
    parts = plan(networks, groups, "forward", 2).parts
    assert [[group.name for group in part.groups] for part in parts] == [["T1"], ["T2"], ["S1"]]
    assert [part.network for part in parts] == networks


@pytest.mark.parametrize("gradient", ["input", "parameters"])
def test_kernels_where_layers_stand_in_unusual_order(gradient):
    """What test_step.py's networks lack, with the kernels themselves: pooling, 5x5, biases, sums, linear layers."""
    members = [models.odd(seed).train(gradient == "parameters") for seed in range(2)]
    network = trace(members[0], (3, 9, 9))
    groups = [Group(f"{k}", 0, None if gradient == "input" else f"{k}", gradient) for k in range(2)]
    x, d, states = images(2, 9), random_logits(2, 2, network), [state(member) for member in members]
    with use_kernels() if DEVICE == "cpu" else contextlib.nullcontext():
        buffers, _ = run_pass(network, groups, states, [0, 1], x, d, torch.float32, DEVICE)
    expected = by_autograd(members, x, d)
    check_close("logits", buffers[network.output], torch.stack(expected["logits"]), 1e-4)
    names = [INPUT] if gradient == "input" else [name for name, _ in members[0].named_parameters()]
    for name in names:
        actual = buffers[grad(name)].permute(0, 1, 4, 2, 3) if name == INPUT else buffers[grad(name)]
        check_gradient(name, actual, torch.stack(expected[name]), 1e-4)


@pytest.mark.parametrize("gradient", ["input", "parameters"])
@pytest.mark.parametrize("model", [models.preresnet, models.resnet, models.resnet18])
def test_bfloat16_errs_no_more_than_pytorch(model, gradient):
    """Root-mean-square errors against float64: at most twice those of the module itself in bfloat16."""
    modules = [model(seed).train(gradient == "parameters") for seed in range(2)]
    network, x, states = trace(model(), (3, 16, 16)), images(16, 16), [state(module) for module in modules]
    groups = [Group(f"{k}", 0, None if gradient == "input" else f"{k}", gradient) for k in range(2)]
    d = random_logits(2, 16, network)
    fused, _ = run_pass(network, groups, states, [0, 1], x, d, torch.bfloat16)
    exact = by_autograd(modules, x, d)
    peers = by_autograd([module.bfloat16() for module in modules], x.bfloat16(), d.bfloat16())
    names = [INPUT] if gradient == "input" else [name for name, _ in modules[0].named_parameters()]
    ours, theirs = [], []
    for name in ["logits", *names]:
        actual = fused[network.output] if name == "logits" else fused[grad(name)]
        actual = actual.permute(0, 1, 4, 2, 3) if name == INPUT else actual
        for k in range(2):
            # beyond 100% an error says no more: a layer whose ReLUs are all but closed has next to no gradient
            size = exact[name][k].norm()
            ours.append(min(1.0, float((actual[k].double() - exact[name][k]).norm() / size)))
            theirs.append(min(1.0, float((peers[name][k].double() - exact[name][k]).norm() / size)))
    for what, part in (("logits", slice(0, 2)), ("gradients", slice(2, None))):
        mine, torchs = sum(ours[part]), sum(theirs[part])
        assert mine <= 2 * torchs, f"{what}: error {mine:.2e}, PyTorch's own {torchs:.2e}"
