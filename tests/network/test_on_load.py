"""Plans whose convolutions take in what stands around them: the same numbers as without, fewer launches and bytes.

The references compute them, in float64; in bfloat16 the forward pass gives the same bits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastensdistill.models import create_model
from fastensdistill.network.launch import INPUT, Group, grad, is_sums
from fastensdistill.network.on_load import ALL, NONE, Abilities, Fusions
from fastensdistill.network.plan import plan, plan_step
from fastensdistill.network.trace import trace
from tests.compare import check_close
from tests.network import models
from tests.network.cases import (
    CASES,
    by_autograd,
    check_gradient,
    check_running,
    images,
    random_logits,
    run_pass,
    state,
)
from tests.untyped import untyped

EVERY = [case for case in CASES if case.values[0] not in (models.resnet18, models.vgg)]  # wide, and nothing new
EVERY.append(pytest.param(models.shortcuts, 9, 3, id="shortcuts-in-unusual-places"))


def fixed(abilities: Abilities) -> Fusions:
    return lambda part, node: abilities


everything = fixed(ALL)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a buffer, of partial sums their totals: rows are the kernel's affair."""
    return [value] if isinstance(value, Tensor) else [tensor for tensor in value if tensor is not None]


def compare(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-12) -> set[str]:
    """Buffers that both have are equal; returns the names that only ``expected`` has."""
    for name in found.keys() & expected.keys():
        for one, other in zip(tensors_of(found[name]), tensors_of(expected[name]), strict=True):
            if one.dtype == torch.uint8:
                assert torch.equal(one, other), name
            else:
                sums = (one.sum(1), other.sum(1)) if is_sums(name) else (one, other)
                check_gradient(name, *sums, tolerance)
    return expected.keys() - found.keys()


@pytest.mark.parametrize(("model", "size", "batch"), EVERY)
def test_training_is_what_it_is_without(model, size, batch):
    """Two networks with statistics in common and side by side; these against autograd as well."""
    members = [model(seed).train() for seed in range(2)]
    network, states = trace(members[0], (3, size, size)), [state(member) for member in members]
    x, d = images(batch, size), random_logits(2, batch, network)
    for labels in (("S", "S"), ("A", "B"))[model is not models.preresnet :]:
        groups = [Group(f"{i}", statistics=label, gradient="parameters") for i, label in enumerate(labels)]
        plain, weights = run_pass(network, groups, states, [0, 1], x, d)
        found, own = run_pass(network, groups, states, [0, 1], x, d, fusions=everything)
        gone = compare(found, plain)
        assert model is models.odd or any(name.endswith(".mask") for name in gone)
        for name, norm in weights.norms.items():
            for kind in ("running_mean", "running_var"):
                check_close(f"{name}.{kind}", getattr(own.norms[name], kind), getattr(norm, kind), 1e-12)
    expected = by_autograd(members, x, d)
    check_close("logits", found[network.output], torch.stack(expected["logits"]), 1e-9)
    for m, member in enumerate(members):
        for name, _ in member.named_parameters():
            check_gradient(f"{name} of {m}", found[grad(name)][m], expected[name][m])
        check_running(own, member, m)


@pytest.mark.parametrize(("model", "size", "batch"), EVERY)
def test_evaluation_and_its_input_gradient_are_what_they_are_without(model, size, batch):
    members = [model(seed).eval() for seed in range(3)]
    network, states = trace(members[0], (3, size, size)), [state(member) for member in members]
    groups = [Group("b1"), Group("a1", gradient="input"), Group("b2"), Group("a2", gradient="input")]
    index, x, d = [2, 0, 0, 1], images(batch, size), random_logits(4, batch, network)
    plain, _ = run_pass(network, groups, states, index, x, d[:2])
    found, _ = run_pass(network, groups, states, index, x, d[:2], fusions=everything)
    compare(found, plain)
    expected = by_autograd([members[i] for i in index], x, d)
    check_close("logits", found[network.output], torch.stack(expected["logits"]), 1e-9)
    for g in range(2):
        check_close("input gradient", found[grad(INPUT)][g].permute(0, 3, 1, 2), expected[INPUT][g], 1e-9)


def test_values_are_the_same_bits_in_bf16():
    """What is applied on load is rounded where the launch rounded that it replaces: once, after the ReLU.

    So is the gradient of a BatchNorm. A second source's products, though, are not rounded to bf16 before they are
    added, as a shortcut's stored result is.
    """
    network, groups = trace(models.preresnet(), (3, 8, 8)), [Group(f"S{k}", 0, "S", "parameters") for k in range(2)]
    x, d = images(2, 8), random_logits(2, 2, network)
    states = [{name: value.float() for name, value in state(models.preresnet(i)).items()} for i in range(2)]
    plain, _ = run_pass(network, groups, states, [0, 1], x, d, torch.bfloat16)
    norms = fixed(Abilities(norm=True, norm_gradient=True))
    found, _ = run_pass(network, groups, states, [0, 1], x, d, torch.bfloat16, fusions=norms)
    for name in found.keys() & plain.keys():
        for one, other in zip(tensors_of(found[name]), tensors_of(plain[name]), strict=True):
            assert torch.equal(one, other), name


def steps(part, op):
    return {
        launch.node: " | ".join([*map(str, launch.prologue), "->", *map(str, launch.epilogue)])
        for launch in part.launches
        if launch.op == op
    }


def test_a_preactivation_network():
    """A transition block and the next, written out, in training and in evaluation mode."""
    net = trace(models.preresnet(), (3, 8, 8))
    plans, a, b = plan_step(net, net, 2, 2, 4, fusions=everything), "groups.1.0", "groups.1.1"
    part = plans["distillation, forward"].parts[1]
    forward = steps(part, "conv")
    assert forward[f"{a}.conv1"] == f"batch_norm {a}.bn1 | relu | -> | store {a}.conv1 | sums {a}.bn2"
    assert forward[f"{a}.conv2"] == (
        f"batch_norm {a}.bn2 | relu | -> | second {a}.shortcut every 2 | store {a}.add | sums {b}.bn1"
    )
    assert f"{a}.shortcut" not in forward
    launches = {launch.node: launch for launch in part.launches if launch.op == "conv"}
    assert launches[f"{a}.conv2"].reads == (f"{a}.conv1", "groups.0.0.add", f"{a}.bn2.statistics")
    assert not [launch for launch in part.launches if launch.op == "norm"]
    assert not [name for name in part.buffers if name.endswith((".mask", "relu1", "relu2"))]

    (part,) = plans["distillation, backward"].parts
    gradients, weights = steps(part, "conv gradient"), steps(part, "weight gradient")
    assert gradients[f"{a}.conv2"] == f"-> | open {a}.bn2 | store {a}.bn2.grad | sums {a}.bn2"
    assert gradients[f"{a}.conv1"] == (f"norm_gradient {a}.bn2 | -> | open {a}.bn1 | store {a}.bn1.grad | sums {a}.bn1")
    assert gradients[f"{a}.shortcut"] == "-> | store groups.0.0.add.grad0", "joined by bn1's gradient, not by conv1's"
    assert weights[f"{a}.conv1"] == f"batch_norm {a}.bn1 | relu | norm_gradient {a}.bn2 | ->"
    assert weights[f"{a}.conv2"] == f"batch_norm {a}.bn2 | relu | ->"
    assert weights[f"{a}.shortcut"] == "->"
    assert {launch.node for launch in part.launches if launch.op == "norm coefficients"} == {
        f"groups.{g}.{i}.bn2" for g, i in ((0, 0), (1, 0), (1, 1))
    }
    assert steps(part, "norm gradient")[f"{a}.bn1"] == "-> | add groups.0.0.add.grad0 | store groups.0.0.add.grad"

    (part,) = plans["perturbation, forward"].parts
    assert steps(part, "conv")[f"{a}.conv2"].startswith(f"-> | second {a}.shortcut every 2 | store {a}.add")
    assert steps(part, "conv")[f"{a}.conv1"].startswith("-> | bias | relu | bits"), "as before: evaluation mode"


def test_a_postactivation_network():
    """Its shortcut's gradient joins that of the convolution beside it; the first BatchNorm of a block is on load."""
    net = trace(models.resnet18(), (3, 33, 33))
    plans = plan_step(net, net, 2, 2, 4, fusions=everything)
    forward, backward = plans["distillation, forward"].parts[1], plans["distillation, backward"].parts[0]
    assert steps(forward, "conv")["layer2.0.conv2"].startswith("batch_norm layer2.0.bn1 | relu | ->")
    assert "layer2.0.downsample.0" in steps(forward, "conv"), "its own BatchNorm comes between it and the sum"
    gradients = steps(backward, "conv gradient")
    assert gradients["layer2.0.conv1"].startswith(
        "norm_gradient layer2.0.bn1 | -> | second layer2.0.downsample.0 every 2 | mask layer1.0.relu#2.mask"
    )
    assert "layer2.0.downsample.0" not in gradients
    assert "layer2.0.downsample.0" in steps(backward, "weight gradient")
    assert "layer2.0.downsample.1" in steps(backward, "norm gradient"), "what a second source reads is stored"
    evaluation = plans["perturbation, forward"].parts[0]
    assert "bias | second layer2.0.downsample.0 every 2 | relu" in steps(evaluation, "conv")["layer2.0.conv2"]


def test_without_abilities_the_plan_is_the_plan():
    for name in ("wrn28_4", "resnet18"):
        net = trace(create_model(name, 100), (3, 64, 64))
        for (way, plain), (_, other) in zip(
            plan_step(net, net, 2, 2, 8).items(),
            plan_step(net, net, 2, 2, 8, fusions=fixed(NONE)).items(),
            strict=True,
        ):
            assert plain.launches == other.launches, way


def test_what_one_convolution_cannot_stays_a_launch():
    """Every reader of a ReLU has to be able to, both convolutions of a sum, and the one right before a BatchNorm."""
    net, block = trace(models.preresnet(), (3, 8, 8)), "groups.1.0"

    def without(*names):
        return lambda part, node: NONE if node.name in {f"{block}.{name}" for name in names} else ALL

    def launches(fusions):
        return [
            (launch.op, launch.node)
            for one in plan_step(net, net, 2, 2, 4, fusions=fusions).values()
            for launch in one.parts[-1].launches
        ]

    every = launches(everything)
    one = launches(without("conv1"))
    assert ("norm", f"{block}.bn1") in one
    assert ("norm", f"{block}.bn1") not in every
    assert ("norm gradient", f"{block}.bn2") in one
    assert ("norm", f"{block}.bn2") not in one
    for name in ("conv2", "shortcut"):
        assert ("conv", f"{block}.shortcut") in launches(without(name)), name
    assert ("conv", f"{block}.shortcut") not in every


def test_a_bias_a_head_and_an_image_are_left_alone():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn0, self.a, self.bn1 = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4)
            self.b, self.bn2, self.c = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.b(torch.relu(self.bn1(self.a(torch.relu(self.bn0(x))))))
            return self.c(torch.relu(self.bn2(x)).mean((2, 3)))

    network = trace(models.moved(Small(), 0), (3, 8, 8))
    group = Group("S", 0, "S", "parameters")
    forward, backward = (plan([network], [group], way, 2, everything).parts[0] for way in ("forward", "backward"))
    assert [launch.node for launch in forward.launches if launch.op == "norm"] == ["bn0"], "the image is float32"
    assert [launch.node for launch in backward.launches if launch.op == "norm gradient"] == ["bn1", "bn0"]
    assert [launch.node for launch in backward.launches if launch.op == "norm coefficients"] == ["bn2"]


@pytest.mark.parametrize("name", ["wrn28_4", "resnet18", "resnet50"])
def test_fewer_launches_and_bytes_for_the_same_work(name):
    """And every buffer is written before it is read, and once."""
    net = trace(create_model(name, 100), (3, 64, 64))
    plain, other = plan_step(net, net, 4, 4, 8), plan_step(net, net, 4, 4, 8, fusions=everything)
    for way in plain:
        assert len(other[way].launches) <= len(plain[way].launches)
        assert other[way].flops == plain[way].flops
        one, two = (sum(launch.nbytes for launch in p[way].launches) for p in (other, plain))
        assert one < two or way == "perturbation, input gradient"
    for forward, backward in zip(*[iter(other.values())] * 2, strict=True):
        for part in forward.parts:
            written, behind = {"input", f"{net.output}.grad"}, [p for p in backward.parts if p.name == part.name]
            for launch in [*part.launches, *[item for p in behind for item in p.launches]]:
                assert set(launch.reads) <= written, f"{launch.op} {launch.node}"
                assert len(set(launch.reads)) == len(launch.reads), f"{launch.op} {launch.node} reads twice"
                assert not set(launch.writes) & written, f"{launch.op} {launch.node} writes again"
                written |= set(launch.writes)


def test_wrn28_4_in_numbers():
    net = trace(create_model("wrn28_4", 100), (3, 32, 32))
    plain, other = plan_step(net, net, 4, 4, 512), plan_step(net, net, 4, 4, 512, fusions=everything)
    count = {way: (len(plain[way].launches), len(other[way].launches)) for way in plain}
    assert count == {
        "perturbation, forward": (29, 26),
        "perturbation, input gradient": (29, 29),
        "distillation, forward": (78, 51),  # 107 and 77 without joint launches
        "distillation, backward": (81, 81),  # 12 gradients of a BatchNorm are small launches now
    }
    backward = untyped(other)["distillation, backward"].parts[0]
    assert sum(launch.op == "norm coefficients" for launch in backward.launches) == 12
