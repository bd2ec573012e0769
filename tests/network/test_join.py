"""The order of two parts that run together: each part's own, a layer of both at once."""

import pytest
import torch
from torch import nn

from fastensdistill.models import create_model
from fastensdistill.network.join import JOINT, join, running
from fastensdistill.network.nodes import Network
from fastensdistill.network.plan import branch_groups, drawn_groups, plan, plan_step
from fastensdistill.network.trace import trace
from tests.network.nodes_by_hand import Writer


def network(name: str, size: int = 32) -> Network:
    with torch.device("meta"):
        return trace(create_model(name, 10), (3, size, size))


def layers(net: Network) -> int:
    return len(list(net.layers))


@pytest.mark.parametrize("training_first", [False, True])
@pytest.mark.parametrize(("name", "size"), [("wrn28_1", 32), ("resnet32", 32), ("resnet18", 64)])
def test_every_layer_is_shared(name, size, training_first):
    net = network(name, size)
    teachers, branches = drawn_groups(["T1", "T2"], ["T1"], lambda name: 0), branch_groups(2)
    found = plan([net], [*branches, *teachers] if training_first else [*teachers, *branches], "forward", 4)
    ((evaluation, training),) = running(found.parts)
    assert training.training
    assert not evaluation.training
    turns = join(evaluation, training)
    for part, side in ((evaluation, 0), (training, 1)):
        assert [turn[side] for turn in turns if turn[side]] == part.launches
    joint = [turn for turn in turns if turn.joint]
    for turn in joint:
        assert len({(one.op, one.node) for one in turn if one}) == 1
    assert len(joint) == layers(net) == len([one for one in training.launches if one.op in JOINT])
    assert len(found.launches) == len(evaluation.launches) + len(training.launches) - len(joint)
    for number in ("flops", "nbytes"):
        parts = sum(getattr(one, number) for part in found.parts for one in part.launches)
        assert sum(getattr(one, number) for one in found.launches) == parts


def test_what_reads_a_launch_comes_after_it():
    net = network("resnet32")
    found = plan([net], [*drawn_groups(["T"], [], lambda name: 0), *branch_groups(2)], "forward", 4)
    (parts,) = running(found.parts)
    written = [{"input"}, {"input"}]
    for turn in join(*parts):
        for names, launch in zip(written, turn, strict=True):
            if launch:
                assert set(launch.reads) <= names
        for names, launch in zip(written, turn, strict=True):
            names.update(launch.writes if launch else ())


def test_other_architectures_share_nothing():
    one, other = network("wrn28_1"), network("resnet32")
    found = plan([one, other], [*drawn_groups(["T"], [], lambda name: 0), *branch_groups(2, 1)], "forward", 4)
    assert [len(parts) for parts in running(found.parts)] == [1, 1]
    turns = join(*found.parts)
    assert not any(turn.joint for turn in turns)
    assert [turn.launch for turn in turns] == found.launches


def test_heads_that_take_in_different_things_are_launched_apart():
    """In evaluation mode BatchNorm is in the weights of the convolution."""
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    net = trace(nn.Sequential(*layers, nn.Linear(8, 10)), (3, 8, 8))
    groups = [*drawn_groups(["T1"], [], lambda name: 0), *branch_groups(2)]
    ((evaluation, training),) = running(plan([net], groups, "forward", 4).parts)
    heads = [next(one for one in part.launches if one.op == "head") for part in (evaluation, training)]
    assert [len(head.prologue) for head in heads] == [1, 2]
    assert [turn.launch.op for turn in join(evaluation, training) if turn.joint] == ["conv"]


def test_heads_of_which_one_has_a_dropout_before_it_are_launched_apart():
    """In evaluation mode the head takes in the pooling, in training mode a dropout stands between."""
    w = Writer(8)
    x = w.mean("mean", w.activation("act", w.conv("conv", "input", 8), "relu6"))
    w.linear("linear", w.drop("drop", x, 0.2, "value"), 10)
    net = w.network()
    groups = [*drawn_groups(["T1"], [], lambda name: 0), *branch_groups(2)]
    ((evaluation, training),) = running(plan([net], groups, "forward", 4).parts)
    heads = [next(one for one in part.launches if one.op == "head") for part in (evaluation, training)]
    assert [head.reads[0] for head in heads] == ["act", "drop"]
    assert [turn.launch.op for turn in join(evaluation, training) if turn.joint] == ["conv"]


def test_launches_of_a_step():
    """From what to what: the distillation's forward pass, and the step."""
    for name, before, after in (("wrn28_4", (107, 246), (78, 217)), ("resnet32", (126, 284), (94, 252))):
        net = network(name)
        plans = plan_step(net, net, 4, 4, 512)
        apart = {name: sum(len(part.launches) for part in one.parts) for name, one in plans.items()}
        assert (apart["distillation, forward"], sum(apart.values())) == before
        assert len(plans["distillation, forward"].launches) == after[0]
        assert sum(len(one.launches) for one in plans.values()) == after[1]
        for others in ("perturbation, forward", "perturbation, input gradient", "distillation, backward"):
            assert len(plans[others].launches) == apart[others]
            assert len(plans[others].parts) == 1, "all members of a perturbation are groups of the same launches"
