"""Whole fused steps whose convolutions take in what stands around them, against steps of the plan without.

Which ones do follows from the table of implementations. Off a GPU the references compute all of it.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastensdistill.engine import dispatch
from fastensdistill.engine.dispatch import Choice, Dispatch
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.memory import estimate
from fastensdistill.engine.meta import meta_step
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.evaluate.validate import GroupedPredictor
from fastensdistill.kernels import wgmma
from fastensdistill.kernels.grouped_conv import grouped_conv
from fastensdistill.models.preresnet import PreResNet
from fastensdistill.network.launch import Group
from fastensdistill.network.on_load import ALL, NONE, Abilities
from fastensdistill.network.plan import plan
from fastensdistill.network.trace import trace
from tests import parity
from tests.compare import check_close
from tests.engine.cases import (
    CLASSES,
    Everything,
    batch,
    check_equal,
    evaluated_parts,
    network,
    setting,
    steps,
    teach_setting,
    trained_parts,
)
from tests.network import models
from tests.untyped import untyped

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "preresnet, micro-batches, frozen parameters, resumed": ("latent-be", {"micro_batches": 2, "batch_size": 4}),
    "post-activation, shortcuts": (
        "latent-be", {"teacher": models.shortcuts, "student": models.shortcuts, "perturbation": "tdiv"},
    ),
    "hydra, synchronised statistics": ("hydra", {"perturbation": "none", "sync_batch_norm": True}),
}  # fmt: skip


def launches(step: FusedStep | FusedTeachStep) -> list[str]:
    return [launch.op for part in trained_parts(step) for launch in part.launches]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_is_what_it_is_without(name):
    """Losses, parameters, momentum, running statistics."""
    kind, changes = SETTINGS[name]
    shape: dict[str, Any] = {"B": 4, "size": 7 if "shortcuts" in name else 6}
    student, teachers, config = setting(kind, **changes)
    if "frozen" in name:
        for key, parameter in student.named_parameters():
            parameter.requires_grad_("bn2" not in key and "conv1.layer.weight" not in key)
    other, before = copy.deepcopy(student), copy.deepcopy(student.state_dict())
    one = FusedStep(student, teachers, config)
    two = FusedStep(other, teachers, config, implementations=Everything())
    for expected, actual in zip(steps(one, 2, **shape), steps(two, 2, **shape), strict=True):
        for key, value in expected.items():
            check_close(key, actual[key], value, 1e-12)
    check_equal(student, other, one, two, 1e-11)
    for key, parameter in other.named_parameters():
        assert torch.equal(parameter, before[key]) == (not parameter.requires_grad), key
    assert "norm coefficients" in launches(two)
    assert launches(two).count("norm") < launches(one).count("norm")
    if "resumed" in name:
        again = copy.deepcopy(student)
        three = FusedStep(again, teachers, config, implementations=Everything(), image_shape=(3, 6, 6))
        three.load_state_dict(one.state_dict())
        steps(one, 1, **shape)
        steps(three, 1, **shape)
        check_equal(student, again, one, three, 1e-11)


def test_teachers_are_trained_alike():
    networks, config = teach_setting()
    others = copy.deepcopy(networks)
    one = FusedTeachStep(networks, config, image_shape=(3, 6, 6))
    two = FusedTeachStep(others, config, image_shape=(3, 6, 6), implementations=Everything())
    for i in range(2):
        batches = [batch(10 * i + m) for m in range(3)]
        check_close("loss", two(batches)["loss"], one(batches)["loss"], 1e-12)
    for first, second in zip(networks, others, strict=True):
        check_equal(first, second, one, two, 1e-11)
    assert "norm coefficients" in launches(two)


def test_recorded_steps(monkeypatch):
    """The authors' code, every quantity of every step, with everything taken in."""
    made = []

    class Step(FusedStep):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options, implementations=Everything())
            made.append(self)

    monkeypatch.setattr(parity, "FusedStep", Step)
    assert max(parity.run(parity.RECORDING, "fused", torch.float64).values()) < 1e-9
    assert "norm" not in launches(made[0])


def wide(seed: int):
    """Every convolution but the stem has the widths that the wgmma kernels cover."""
    torch.manual_seed(seed)
    return models.moved(PreResNet(CLASSES, blocks=(1, 2), in_planes=16), seed)


ROWS = [Choice(op, "wgmma", "for the test") for op in ("conv", "conv gradient", "weight gradient")]


def test_naming_wgmma_changes_the_plan():
    """Its own references compute in bf16; the stem, which it does not cover, has a row of its own."""
    student, teachers, config = setting(
        dtype=torch.float32, precision="bf16", teacher=wide, student=wide, perturbation="none"
    )
    table = Dispatch([Choice(row.op, "triton", "three channels", layer="stem") for row in ROWS] + ROWS)
    losses = []
    for implementations in (None, table):
        step = FusedStep(copy.deepcopy(student), teachers, config, implementations=implementations)
        losses.append(steps(step, 1, dtype=torch.float32)[0]["loss"])
    check_close("loss", losses[1], losses[0], 3e-2)
    ops = launches(step)
    assert "norm" not in ops
    assert ops.count("norm coefficients") == 3
    assert not [x for part in trained_parts(step) for x in part.launches if x.op == "conv" and "shortcut" in x.node]
    predictor = GroupedPredictor(teachers.networks, (3, 6, 6), precision="bf16", implementations=table)
    predictor._build(4)
    assert [launch for launch in evaluated_parts(predictor)[0].launches if launch.steps("second")]


def test_teachers_and_branches_share_launches_of_the_wgmma_kernels(monkeypatch):
    """One for each convolution but the stem and the shortcuts, which are second sources; sums in rows of their own."""
    student, teachers, config = setting(
        dtype=torch.float32, precision="bf16", teacher=wide, student=wide, perturbation="none"
    )
    calls, joint_form = [], dispatch.JOINT["wgmma"][grouped_conv]

    def counted(evaluation, training):
        calls.append("second" in evaluation or "second" in training)
        return joint_form(evaluation, training)

    monkeypatch.setitem(dispatch.JOINT, "wgmma", {grouped_conv: counted})
    rows = [Choice(row.op, "triton", "three channels", layer="stem") for row in ROWS] + ROWS
    losses = []
    for joint in (True, False):
        step = FusedStep(copy.deepcopy(student), teachers, config, implementations=Dispatch(rows, joint=joint))
        losses.append(steps(step, 1, dtype=torch.float32)[0]["loss"])
    check_close("loss", losses[0], losses[1], 1e-2)
    convolutions = [x for part in trained_parts(step) for x in part.launches if x.op == "conv"]
    assert len(calls) == len(convolutions) - 1
    assert sum(calls) == sum(bool(x.steps("second")) for x in convolutions) > 0


def asked(
    rows, arch=0, dtype=torch.bfloat16, model=wide, layer="groups.1.1.conv1", image=(3, 13, 13), training=True
) -> Abilities:
    group = Group("S", 0, "S", "parameters") if training else Group("T")
    (part,) = plan([trace(model(0), image)], [group], "forward", 2).parts
    return Dispatch(rows).fusions(arch, dtype)(part, untyped(part.network.by_name[layer]))


def test_what_the_table_says_that_convolutions_can(monkeypatch):
    conv, data, weight = ROWS
    assert asked(ROWS) == ALL
    assert asked([conv, weight]) == Abilities(norm=True, second=True)
    assert asked([data, weight]) == Abilities(norm_gradient=True, second_gradient=True)
    assert asked([conv]) == Abilities(second=True)
    assert asked([conv, Choice("conv gradient", "cuda", ""), weight]) == Abilities(second=True)
    assert asked([conv, Choice("conv gradient", "cudnn", ""), weight]) == Abilities(norm=True, second=True)
    assert asked([]) == asked(ROWS, layer="stem") == asked(ROWS, dtype=torch.float32) == NONE
    monkeypatch.setattr(wgmma, "built", lambda op, arch: False)
    assert asked(ROWS, arch=90) == NONE
    monkeypatch.setattr(wgmma, "built", lambda op, arch: True)
    assert asked(ROWS, arch=90) == ALL
    assert asked(ROWS, arch=100) == NONE


def test_a_residual_that_the_kernels_refuse_leaves_the_plan_as_it_is():
    """Widths of 4 and 6 channels, and zero-padded shortcuts of another stride than the convolution's beside them."""
    assert asked(ROWS, model=network, layer="groups.0.0.conv1") == NONE
    assert asked(ROWS, model=models.padded, layer="shortcut") == NONE


def test_the_image_is_in_float32():
    """Of as many channels as the kernels take it is none of theirs: the stem's weight gradient is the op's."""

    def many(seed: int):
        return PreResNet(CLASSES, blocks=(1, 1), in_planes=16, mean=16 * [0.5], std=16 * [0.25])

    assert asked(ROWS, model=many, image=(16, 8, 8), layer="groups.0.0.conv1") == ALL
    assert asked(ROWS, model=many, image=(16, 8, 8), layer="stem") == NONE


class Branching(nn.Module):
    """A block of few channels whose shortcut of ``wide`` ones reads what its first convolution does, activated.

    A strided shortcut reads the same before the ReLU.
    """

    def __init__(self, wide: int):
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv1, self.bn2 = nn.Conv2d(16, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.shortcut, self.strided, self.pool = nn.Conv2d(16, wide, 1), nn.Conv2d(16, wide, 1, 2), nn.AvgPool2d(2)
        self.conv2, self.classifier = nn.Conv2d(64, wide, 3, padding=1), nn.Linear(wide, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.stem(x))
        y = F.relu(x)
        y = self.conv2(F.relu(self.bn2(self.conv1(y)))) + self.shortcut(y)
        return self.classifier((self.pool(y) + self.strided(x)).mean((2, 3)))


def test_a_second_source_of_many_channels_takes_the_launch_to_the_other_kernel():
    """Which has no room for z's tile at 8 x 8; the one for few channels, of up to 128 on the other side, has."""
    options = {"layer": "conv1", "image": (3, 8, 8)}
    assert untyped(asked)(ROWS, model=lambda seed: Branching(128), **options) == ALL
    assert not untyped(asked)(ROWS, model=lambda seed: Branching(160), **options).norm_gradient


def test_a_strided_gradient_of_a_shortcut_is_refused_at_another_stride():
    """In evaluation mode, where it is stored at that stride."""
    options = {"layer": "conv1", "image": (3, 16, 16), "model": lambda seed: Branching(64)}
    assert untyped(asked)(ROWS, training=True, **options) == ALL
    assert untyped(asked)(ROWS, training=False, **options) == NONE
    network = trace(Branching(64), (3, 16, 16))
    (part,) = plan([network], [Group("T", gradient="input")], "backward", 2, lambda part, node: ALL).parts
    launch = next(x for x in part.launches if x.op == "conv gradient" and x.node == "conv1")
    assert [(step.kind, step.stride) for step in launch.epilogue if step.kind in ("second", "add")] == [
        ("second", 1), ("add", 2),
    ]  # fmt: skip


def test_memory(monkeypatch):
    """z stays until the backward pass instead of it, what is activated and its bits; the teachers' part stays."""
    monkeypatch.setattr(wgmma, "built", lambda op, arch: True)
    step = meta_step("wrn28_1", 2, 2)
    plain = estimate(step, 64)
    step.implementations = Dispatch(predicted=ROWS)
    on_load = estimate(step, 64)
    before, after = ({p.name: p for p in found.passes} for found in (plain, on_load))
    assert after["distillation, forward"].launches < before["distillation, forward"].launches
    assert after["distillation, forward"].total < 0.7 * before["distillation, forward"].total
    assert after["distillation, forward"].peak < 0.55 * before["distillation, forward"].peak
