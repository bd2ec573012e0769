"""The update's settings against PyTorch's own: optimisers, clipping, averages over time, what is spared of decay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastensdistill.config import DistillConfig, TeachConfig
from fastensdistill.engine.averages import Averages
from fastensdistill.engine.optimizer import Optimizer, parameter_groups
from fastensdistill.engine.reference import ReferenceStep, TeachStep
from fastensdistill.errors import InputError
from fastensdistill.method.student import LatentBE
from tests.compare import check_close
from tests.engine.cases import CLASSES, batch, network, setting, steps, teach_setting
from tests.engine.updates import TEACHING, UPDATES, averages
from tests.networks import tiny

COUNT = 4


def whole_state(module: nn.Module, step: Any) -> dict[str, Tensor]:
    return {**module.state_dict(), **step.state_dict(), **averages(step)}


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_network_is_moved_and_averaged_as_by_pytorchs_own(kind):
    """A decay of at most 0.1 is the same from the first step on."""
    betas: dict[str, Any] = {"beta1": 0.8, "beta2": 0.95} if kind == "adamw" else {}
    config = TeachConfig(
        members=1, optimizer=kind, learning_rate=0.02, clip_norm=0.5, ema_decay=0.1, weight_decay=0.1, **betas
    )
    own, other = network(1).double(), network(1).double()
    step, average = TeachStep([own], config), AveragedModel(other, multi_avg_fn=get_ema_multi_avg_fn(0.1))
    average.update_parameters(other)  # the first time it copies
    rule: torch.optim.Optimizer
    if kind == "adamw":
        rule = torch.optim.AdamW(other.parameters(), lr=1.0, betas=(0.8, 0.95), weight_decay=0.1, foreach=False)
    else:
        rule = torch.optim.SGD(other.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=False)
    clipped = []
    for i in range(COUNT):
        images, labels = batch(i)
        step.set_learning_rate(0.02 / (1 + i))
        step([(images, labels)])
        rule.param_groups[0]["lr"] = 0.02 / (1 + i)
        rule.zero_grad()
        F.cross_entropy(other.train()(images), labels).backward()
        clipped.append(float(nn.utils.clip_grad_norm_(other.parameters(), 0.5)) > 0.5)
        rule.step()
        average.update_parameters(other)
        for name, value in other.state_dict().items():
            check_close(f"step {i}: {name}", own.state_dict()[name].double(), value.double(), 1e-12)
        for name, p in average.module.named_parameters():
            check_close(f"step {i}: average of {name}", step.averages[0].get_parameter(name), p, 1e-12)
    assert any(clipped), "else nothing was clipped"


def test_the_average_starts_as_a_copy_and_forgets_its_start_at_once():
    """min(decay, (1 + t) / (10 + t)) of what it was, running statistics too; counters are copied."""
    net = network(1).double()
    over_time = Averages([net], 0.35)
    (average,) = over_time.modules
    assert not average.training
    assert not any(p.requires_grad for p in average.parameters())
    expected = {name: value.clone() for name, value in net.state_dict().items()}
    for name, value in average.state_dict().items():
        assert torch.equal(value, expected[name])
        assert value.data_ptr() != net.state_dict()[name].data_ptr()
    for t in range(10):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        net.train()(batch(t)[0])
        over_time.move()
        d = min(0.35, (1 + t) / (10 + t))
        for name, value in net.state_dict().items():
            counts = name.endswith("num_batches_tracked")
            expected[name] = value.clone() if counts else d * expected[name] + (1 - d) * value
            check_close(f"{t}: {name}", average.state_dict()[name].double(), expected[name].double(), 1e-12)


def test_factors_have_the_rate_and_decay_that_the_method_says():
    student, K = LatentBE(tiny(), 3), 3
    options: dict[str, Any] = {"learning_rate": 0.1, "weight_decay": 0.06, "factor_rate": 0.5}
    _, factors = parameter_groups(student, DistillConfig(**options))
    assert factors["params"] == student.factors()
    assert (factors["lr_scale"], factors["weight_decay"]) == (K * 0.5, 0.06 / K)
    shared, factors = parameter_groups(student, DistillConfig(optimizer="adamw", **options))
    assert (shared["lr_scale"], shared["weight_decay"]) == (1.0, 0.06)
    assert (factors["lr_scale"], factors["weight_decay"]) == (0.5, 0.06)


def test_scales_shifts_and_biases_are_spared_of_decay():
    student = LatentBE(network(1), 2)
    config = DistillConfig(decay_norm_and_bias=False)
    groups = parameter_groups(student, config)
    spared = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    names = {name for name, p in student.named_parameters() if id(p) in spared}
    everything = dict(student.named_parameters())
    assert names == {name for name in everything if "bn" in name or name.endswith("bias")}
    assert any("bn" in name for name in names)
    assert any(name.endswith("layer.bias") for name in names)
    assert sum(len(group["params"]) for group in groups) == len(everything)


@pytest.mark.parametrize("options", UPDATES.values(), ids=UPDATES)
def test_resumed_is_bit_equal(options):
    def make():
        student, teachers, config = setting(**options)
        return student, ReferenceStep(student, teachers, config, num_classes=CLASSES)

    (whole, one), (half, two), (rest, three) = make(), make(), make()
    steps(one, 3)
    steps(two, 2)
    rest.load_state_dict(half.state_dict())
    three.load_state_dict(two.state_dict())
    for a, b in zip(three.averages, two.averages, strict=True):
        a.load_state_dict(b.state_dict())
    three.set_learning_rate(0.05 / 3)
    three(*batch(2))
    found = whole_state(rest, three)
    for name, value in whole_state(whole, one).items():
        assert torch.equal(value, found[name]), name


def test_teachers_have_their_own_norm_and_their_own_average():
    """Each is what it is alone."""
    networks, config = teach_setting(2)
    options = TEACHING["adamw, all"]
    alone = copy.deepcopy(networks)
    together = TeachStep(networks, TeachConfig(members=2, learning_rate=0.05, seed=7, **options))
    single = [TeachStep([net], TeachConfig(members=1, learning_rate=0.05, **options)) for net in alone]
    for i in range(2):
        batches = [batch(10 * i + m) for m in range(2)]
        together(batches)
        for step, one in zip(single, batches, strict=True):
            step([one])
    for m, step in enumerate(single):
        for name, value in step.averages[0].state_dict().items():
            assert torch.equal(together.averages[m].state_dict()[name], value)
        for name, value in alone[m].state_dict().items():
            assert torch.equal(networks[m].state_dict()[name], value)
    assert config.ema_decay is None
    assert TeachStep(networks, config).averages == []


@pytest.mark.parametrize("first", [True, False], ids=["trained first", "frozen first"])
def test_a_thawed_parameter_counts_its_own_steps(first):
    """As PyTorch's optimisers do: its moments begin when it does."""
    net = network(1).double()
    optimizer = Optimizer(net, TeachConfig(members=1, optimizer="adamw"))
    for flag in (first, not first, first):
        net.stem.weight.requires_grad_(flag)
        optimizer.zero_grad()
        net.train()(batch(0)[0]).square().sum().backward()
        optimizer.step()
    state = optimizer.state_dict()
    counts = [float(state[f"step.{i}"]) for i in range(len(optimizer.parameters))]
    stem = next(i for i, p in enumerate(optimizer.parameters) if p is net.stem.weight)
    assert counts.pop(stem) == (2 if first else 1)
    assert set(counts) == {3}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", "adam"), ("optimizer", None), ("beta1", 1.0), ("beta1", -0.1), ("beta2", 1), ("ema_decay", 0),
        ("ema_decay", 1.0), ("ema_decay", "0.9"), ("clip_norm", 0), ("clip_norm", -1.0), ("clip_norm", float("inf")),
        ("decay_norm_and_bias", 0), ("factor_rate", -1), ("factor_rate", None),
    ],
)  # fmt: skip
def test_bad_values_are_refused_in_a_line(name, value):
    with pytest.raises(InputError, match=name) as refused:
        DistillConfig(**{name: value})
    assert "\n" not in str(refused.value)
