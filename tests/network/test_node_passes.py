"""Whole passes with activations, gates, functions, dropout, other convolutions, against the modules and autograd.

In float64, where a mistake in a plan shows as a wrong number. Networks are written by hand (``nodes_by_hand``).
"""

from __future__ import annotations

import pytest
import torch

from fastensdistill.method.student import LatentBE
from fastensdistill.network.fold import fold_branches
from fastensdistill.network.launch import INPUT, Group, Launch, grad
from fastensdistill.network.nodes import Activation, Network, Node, Norm
from fastensdistill.network.plan import plan
from tests.compare import check_close
from tests.network import models
from tests.network.cases import (
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
from tests.network.nodes_by_hand import CASES, without_dropout
from tests.untyped import untyped

NAMES = [pytest.param(*case, id=name) for name, case in CASES.items()]


@pytest.mark.parametrize(("by_hand", "size"), NAMES)
def test_input_gradient_in_evaluation_mode(by_hand, size):
    """Four groups of three networks, chosen by index, two of them backward."""
    members = [by_hand.module(seed).eval() for seed in range(3)]
    network = by_hand.network(size)
    groups = [Group("b1"), Group("a1", gradient="input"), Group("b2"), Group("a2", gradient="input")]
    index, x, d = [2, 0, 0, 1], images(3, size), random_logits(4, 3, network)
    buffers, _ = run_pass(network, groups, [state(member) for member in members], index, x, d[:2])
    expected = by_autograd([members[i] for i in index], x, d)
    check_close("logits", buffers[network.output], torch.stack(expected["logits"]), TOLERANCE)
    for g in range(2):
        actual = buffers[grad(INPUT)][g].permute(0, 3, 1, 2)
        check_close(f"input gradient of group {g}", actual, expected[INPUT][g], TOLERANCE)


@pytest.mark.parametrize(("by_hand", "size"), NAMES)
def test_networks_train_side_by_side(by_hand, size):
    """Groups with statistics and tensors of their own, without dropout: they would draw in another order."""
    members = [without_dropout(by_hand.module(seed).train()) for seed in range(2)]
    network, states = by_hand.network(size).evaluated, [state(member) for member in members]
    groups = [Group(f"T{m}", statistics=f"T{m}", gradient="parameters") for m in range(2)]
    x, d = images(3, size), random_logits(2, 3, network)
    buffers, weights = run_pass(network, groups, states, [0, 1], x, d)
    expected = by_autograd(members, x, d)
    check_close("logits", buffers[network.output], torch.stack(expected["logits"]), TOLERANCE)
    for m, member in enumerate(members):
        for name, _ in member.named_parameters():
            check_gradient(f"{name} of {m}", buffers[grad(name)][m], expected[name][m])
        check_running(weights, member, m)


@pytest.mark.parametrize(("by_hand", "size"), NAMES)
def test_branches_of_a_student(by_hand, size):
    """K = 3 branches: shared statistics and tensors, and the dropout that PyTorch draws from the same state."""
    plain = by_hand.module(0)
    student = models.moved(LatentBE(plain, branches=3), 5).train()
    network, own = by_hand.network(size), state(untyped(student).module)
    groups = [Group(f"S{k}", statistics="S", gradient="parameters") for k in range(3)]
    x, d = images(3, size), random_logits(3, 3, network)
    torch.manual_seed(4)
    buffers, weights = run_pass(network, groups, fold_branches(own, 3), [0, 1, 2], x, d)
    after = torch.get_rng_state()
    torch.manual_seed(4)
    logits = student(x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(after, torch.get_rng_state())
    check_close("logits", buffers[network.output], logits, TOLERANCE)
    logits.backward(d)
    actual = student_gradients(own, network, 3, buffers)
    for name, parameter in untyped(student).module.named_parameters():
        check_gradient(name, actual[name], parameter.grad)
    check_running(weights, untyped(student).module)


@pytest.mark.parametrize(("by_hand", "size"), NAMES)
def test_evaluation_without_a_gradient(by_hand, size):
    """A depthwise convolution applies the activation behind it, where nobody else needs what it is applied to."""
    members = [by_hand.module(seed).eval() for seed in range(2)]
    network, x = by_hand.network(size), images(3, size)
    groups = [Group("a"), Group("b")]
    buffers, _ = run_pass(network, groups, [state(member) for member in members], [1, 0], x)
    expected = torch.stack([members[i](x) for i in (1, 0)])
    check_close("logits", buffers[network.output], expected, TOLERANCE)


@pytest.mark.parametrize("gradient", [None, "input"])
def test_a_depthwise_convolution_with_its_activation(gradient):
    by_hand, size = CASES["mobile"]
    groups = [Group("a", gradient=gradient)]
    (part,) = plan([by_hand.network(size)], groups, "forward", 2).parts
    depthwise = [one for one in part.launches if one.op == "depthwise conv"]
    fused = [step.arg for one in depthwise for step in one.steps("activation")]
    alone = [one.node for one in part.launches if one.op == "activation"]
    followed = [user.name for one in depthwise for user in readers(part.network, one)]
    assert followed
    assert set(followed) <= set(alone if gradient else fused)
    assert not set(followed) & set(fused if gradient else alone)


def readers(network: Network, launch: Launch) -> list[Node]:
    """The activations of what a convolution's launch makes, behind a BatchNorm that its weights carry or not."""
    user = network.sole(launch.node)
    user = network.sole(user.name) if isinstance(user, Norm) else user
    return [user] if isinstance(user, Activation) else []
