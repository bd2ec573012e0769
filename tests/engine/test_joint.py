"""A step whose teachers run with its branches is, bit for bit, the step in which they run one after the other."""

import copy

import pytest
import torch

from fastensdistill.engine import dispatch
from fastensdistill.engine.dispatch import Choice, Dispatch
from fastensdistill.engine.fused import FusedStep
from fastensdistill.errors import InputError
from fastensdistill.kernels.grouped_conv import grouped_conv
from fastensdistill.kernels.launch import use_kernels
from fastensdistill.models.preresnet import PreResNet
from fastensdistill.models.resnet import ResNet
from fastensdistill.network.launch import is_sums
from tests.engine.cases import CLASSES, batch, network, setting, state, steps
from tests.network.models import moved
from tests.untyped import untyped


def resnet(seed: int):
    torch.manual_seed(seed)
    return moved(ResNet(CLASSES, blocks=(1, 1), in_planes=4), seed)


def mixed(seed: int):
    """Every second one is of another architecture, or of a third."""
    return {0: network, 1: resnet, 2: lambda seed: network(seed, widen=2)}[seed % 3](seed)


CASES = {
    "branches": {},
    "batch ensemble": {"kind": "batch-ensemble"},
    "plain student": {"kind": "single", "K": 1, "perturbation": "tdiv"},
    "hydra": {"kind": "hydra"},
    "ResNet": {"teacher": resnet, "student": resnet, "perturbation": "none"},
    "one teacher": {"M": 1, "perturbation": "gaussian"},
    "mixed teachers": {"M": 4, "teacher": mixed},
    "another architecture": {"teacher": resnet},
    "in parts": {"micro_batches": 2, "batch_size": 4},
}
JOINT = {"hydra": False, "another architecture": False}


def both(case: str, shape: dict, table=(), count: int = 2):
    """The same steps with joint launches and without."""
    student, teachers, config = setting(dtype=shape["dtype"], **untyped(CASES[case]))
    found = []
    for joint in (True, False):
        step = FusedStep(copy.deepcopy(student), teachers, config, implementations=Dispatch(table, joint=joint))
        found.append((step, steps(step, count, **shape)))
    (one, losses), (other, expected) = found
    assert other.joint is None
    for mine, theirs in zip(losses, expected, strict=True):
        for name, value in theirs.items():
            assert torch.equal(mine[name], value), name
    for tensor, right in zip(state(one), state(other), strict=True):
        assert torch.equal(tensor, right)
    return one, other


@pytest.mark.parametrize("case", list(CASES))
def test_bit_equal(case):
    one, _ = both(case, {"B": 4, "size": 6, "dtype": torch.float32})
    assert bool(one.joint) == JOINT.get(case, True)
    if one.joint:
        assert sum(turn.joint for turn in one.joint.turns) == len(one.networks[-1].layers)


@pytest.mark.parametrize("case", ["branches", "ResNet"])
def test_bit_equal_in_the_interpreter(case):
    with use_kernels():
        both(case, {"B": 2, "size": 5, "dtype": torch.float32}, count=1)


def test_a_table_takes_launches_apart(monkeypatch):
    """An implementation without a joint form; with one it is called once per layer, and may refuse."""
    shape = {"B": 2, "size": 6, "dtype": torch.float64}
    table = [Choice("conv", "cudnn", "a test", layer="groups.0.0.conv1")]
    both("branches", shape, table, 1)
    called = []

    def together(evaluation, training):
        called.append(len(evaluation["weight_index"]) + len(training["weight_index"]))
        cudnn = dispatch.VENDOR[grouped_conv]
        return cudnn(**evaluation), cudnn(**training)

    monkeypatch.setitem(dispatch.JOINT, "cudnn", {grouped_conv: together})
    both("branches", shape, table, 1)
    assert called == [4]

    def refuses(evaluation, training):
        called.append(0)
        raise InputError("not these")

    monkeypatch.setitem(dispatch.JOINT, "cudnn", {grouped_conv: refuses})
    both("branches", shape, table, 1)
    assert called == [4, 0]


def test_who_watches_sees_either_side_with_its_buffers():
    """In the order of the turns, before anything is freed; afterwards only what the backward pass reads is left."""
    student, teachers, config = setting(dtype=torch.float32, perturbation="none")
    step = FusedStep(student, teachers, config)
    step(*batch(0, dtype=torch.float32))
    assert step.joint
    seen = []

    def watch(launch, buffers):
        assert all(name in buffers for name in (*launch.reads, *launch.writes)), launch
        seen.append(launch)

    step.execution.watch = watch
    targets, logits = step.joint.forward(step.images)
    assert [id(one) for one in seen] == [id(one) for turn in step.joint.turns for one in turn if one]
    assert targets.shape == logits.shape == (2, 3, CLASSES)
    assert step.targets.passes[0].buffers == {}
    left = step.trained.buffers
    assert not any(is_sums(name) for name in left)
    del step.execution.watch
    step.trained.forward(step.images)
    assert set(step.trained.buffers) == set(left)


def test_a_network_of_one_block_in_float64():
    small = lambda seed: moved(PreResNet(CLASSES, blocks=(1,), in_planes=4), seed)  # noqa: E731
    student, teachers, config = setting(teacher=small, student=small)
    step = FusedStep(student, teachers, config)
    assert torch.isfinite(step(*batch(0))["loss"])
    assert step.joint
