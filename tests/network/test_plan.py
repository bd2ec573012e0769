"""The plan's totals against the arithmetic of the paper, its fusions, and what it refuses."""

from __future__ import annotations

import pytest

from fastensdistill.engine.planned_ops import OPS
from fastensdistill.errors import InputError
from fastensdistill.models import create_model
from fastensdistill.network.forward import FUSIONS
from fastensdistill.network.gpu import GPUS
from fastensdistill.network.gradients import FUSIONS as GRADIENT_FUSIONS
from fastensdistill.network.launch import INPUT, Group, grad, grad_sums, is_sums, statistics, sums
from fastensdistill.network.nodes import Conv, Network
from fastensdistill.network.on_load import ALL, nothing
from fastensdistill.network.plan import plan, plan_step, step_groups, teach_groups
from fastensdistill.network.table import print_plan
from fastensdistill.network.trace import trace
from tests.network import models
from tests.network.cases import CASES
from tests.network.nodes_by_hand import CASES as BY_HAND
from tests.untyped import untyped


def network(name: str, size: int = 32) -> Network:
    return trace(create_model(name, 100), (3, size, size))


def stem(net: Network) -> Conv:
    return next(node for node in net.nodes if isinstance(node, Conv))


@pytest.mark.parametrize(("teachers", "branches"), [(4, 4), (3, 2), (1, 1)])
@pytest.mark.parametrize("name", ["wrn28_4", "wrn28_10", "resnet32", "resnet18"])
def test_flops_are_the_least_possible(name, teachers, branches):
    """M + 3K + 6 forward passes per image by arithmetic, less the stem's input gradient, which nobody reads."""
    net, batch = network(name), 128
    plans = plan_step(net, net, teachers, branches, batch)
    F = 2 * net.macs * batch
    assert plans["perturbation, forward"].flops == 4 * F
    assert plans["perturbation, input gradient"].flops == 2 * F
    assert plans["distillation, forward"].flops == (teachers + branches) * F
    unread = 2 * stem(net).macs * batch * branches
    assert plans["distillation, backward"].flops == 2 * branches * F - unread
    total = sum(p.flops for p in plans.values())
    assert total == (teachers + 3 * branches + 6) * F - unread


def test_least_time_of_wrn28_4():
    """The bounds by hand: 37.2 GFLOP per image, 21.2k images/s by arithmetic; ResNet-32 is bound by traffic, 88k."""
    rates = {}
    for name in ("wrn28_4", "resnet32"):
        net = network(name)
        launches = [launch for p in plan_step(net, net, 4, 4, 128).values() for launch in p.launches]
        flops = sum(launch.flops for launch in launches) / 128
        least = sum(GPUS["h200"].least_time(launch) for launch in launches)
        rates[name] = flops / 1e9, GPUS["h200"].flops / flops, 128 / least
    gflop, arithmetic, rate = rates["wrn28_4"]
    assert round(gflop, 1) == 37.2
    assert round(arithmetic / 1e3, 1) == 21.2
    assert 11.3e3 < rate < 16.8e3  # between unfused elementwise passes and everything fused
    assert 53e3 < rates["resnet32"][2] < 95e3


@pytest.mark.parametrize(
    ("perturbation", "forwards"),
    # a forward pass and an input gradient cost F each; training M + 3K
    [("none", 0), ("gaussian", 0), ("ods", 2), ("confods", 2), ("tdiv", 3), ("tdiv-sdiv", 6)],
)
def test_flops_of_every_perturbation(perturbation, forwards):
    net = network("wrn28_4")
    total = sum(p.flops for p in plan_step(net, net, 4, 4, 1, perturbation).values())
    assert total == 2 * ((16 + forwards) * net.macs - 4 * stem(net).macs)


def test_flops_of_teaching():
    net = network("wrn28_4")
    total = sum(plan([net], groups, way, 1).flops for groups, way in teach_groups(3).values())
    assert total == 2 * (9 * net.macs - 3 * stem(net).macs)


def epilogues(part, op="conv"):
    return {launch.node: [str(step) for step in launch.epilogue] for launch in part.launches if launch.op == op}


def test_a_preactivation_block():
    """One transition block and the head, written out: the fusions of all four passes."""
    net = trace(models.preresnet(), (3, 8, 8))
    plans = plan_step(net, net, 2, 2, 4)
    (part,) = plans["perturbation, forward"].parts
    steps = epilogues(part)
    block = "groups.1.0"
    assert steps[f"{block}.conv1"] == ["bias", "relu", f"bits {block}.relu2.mask", f"store {block}.relu2"]
    assert steps[f"{block}.conv2"] == [f"store {block}.conv2"]
    assert steps[f"{block}.shortcut"] == [
        f"add {block}.conv2", f"store {block}.add",
        "scale_shift groups.1.1.bn1", "relu", "bits groups.1.1.relu1.mask", "store groups.1.1.relu1",
    ]  # fmt: skip
    assert {launch.node: launch.folded for launch in part.launches}[f"{block}.conv1"] == f"{block}.bn2"
    assert [str(s) for s in part.launches[0].prologue] == ["affine normalize"]
    assert [str(s) for s in part.launches[-1].prologue] == ["scale_shift bn", "relu"]

    (part,) = plans["perturbation, input gradient"].parts
    steps = epilogues(part, "conv gradient")
    assert steps[f"{block}.conv2"] == [f"mask {block}.relu2.mask", f"store {block}.conv1.grad"]
    assert steps["groups.1.1.conv1"] == [
        "mask groups.1.1.relu1.mask", "scale groups.1.1.bn1", "add groups.1.1.add.grad", f"store {block}.add.grad",
    ]  # fmt: skip
    assert steps["stem"] == ["scale normalize", "store input.grad"]

    part = plans["distillation, forward"].parts[1]
    assert epilogues(part)[f"{block}.conv1"] == [f"store {block}.conv1", f"sums {block}.bn2"]
    (part,) = plans["distillation, backward"].parts
    steps = epilogues(part, "conv gradient")
    assert steps[f"{block}.conv2"] == [
        f"mask {block}.relu2.mask", f"store {block}.bn2.grad", f"sums {block}.bn2",
    ]  # fmt: skip
    assert epilogues(part, "norm gradient")["groups.1.1.bn1"] == [
        "add groups.1.1.add.grad", f"store {block}.add.grad",
    ]  # fmt: skip
    assert "stem" not in steps


def test_a_strided_shortcuts_gradient_is_stored_where_it_is_not_zero():
    """In evaluation mode; a training-mode BatchNorm's gradient adds whole ones only."""
    net = trace(create_model("wrn28_4", 10), (3, 32, 32))
    plans, value = plan_step(net, net, 2, 2, 4), "groups.0.3.add"
    part = plans["perturbation, input gradient"].parts[0]
    steps = epilogues(part, "conv gradient")
    assert steps["groups.1.0.shortcut"] == [f"store {value}.grad0 every 2"]
    assert f"add {value}.grad0 every 2" in steps["groups.1.0.conv1"]
    assert part.buffers[f"{value}.grad0"].shape == (4, 16, 16, 64)
    part = plans["distillation, backward"].parts[0]
    assert epilogues(part, "conv gradient")["groups.1.0.shortcut"] == [f"store {value}.grad0"]
    assert part.buffers[f"{value}.grad0"].shape == (4, 32, 32, 64)


def test_a_padded_shortcut_is_read_in_place():
    net = trace(models.resnet(), (3, 8, 8))
    plans = plan_step(net, net, 2, 2, 4)
    steps = epilogues(plans["perturbation, forward"].parts[0])["groups.1.0.conv2"]
    assert steps[:2] == ["bias", "add groups.0.1.relu2 every 2"]
    steps = epilogues(plans["perturbation, input gradient"].parts[0], "conv gradient")["groups.1.0.conv1"]
    assert steps[0] == "add groups.1.0.add.grad every 2"


@pytest.mark.parametrize("name", ["wrn28_4", "resnet32", "resnet18", "resnet50"])
def test_buffers_are_written_before_they_are_read(name):
    """What a memory plan needs: every buffer known, every read after its write, every activation written once."""
    net = network(name, 64)
    plans = list(plan_step(net, net, 4, 4, 8).values())
    for forward, backward in (plans[:2], plans[2:]):
        for part in forward.parts:
            written = {"input"}
            backwards = [p for p in backward.parts if p.name == part.name]
            for launch in [*part.launches, *[item for p in backwards for item in p.launches]]:
                buffers = (backwards or [part])[0].buffers
                known = written | {f"{net.output}.grad"}
                assert set(launch.reads) <= known, f"{launch.op} {launch.node}: {set(launch.reads) - known}"
                assert not set(launch.writes) & written, f"{launch.op} {launch.node} writes again"
                assert set(launch.reads) | set(launch.writes) <= set(buffers)
                written |= set(launch.writes)


def test_refusals():
    net = network("wrn28_4")
    train = [Group(f"S{k}", 0, "AAB"[k], "parameters") for k in range(3)]
    with pytest.raises(InputError, match="S0, S1, S2 share 2 sets of BatchNorm statistics"):
        plan([net], train, "forward", 4)
    with pytest.raises(InputError, match="expected all of them to ask for the parameters' gradient, or none"):
        plan([net], [Group("S0", 0, "A", "parameters"), Group("S1", 0, "A")], "forward", 4)
    with pytest.raises(InputError, match="unknown direction 'sideways'"):
        plan([net], train[:1], "sideways", 4)
    with pytest.raises(InputError, match="asks for the gradient of its parameters in evaluation mode"):
        Group("T", gradient="parameters")
    with pytest.raises(InputError, match="asks for the gradient of its input in training mode"):
        Group("T", statistics="T", gradient="input")
    with pytest.raises(InputError, match="unknown gradient 'inputs'; did you mean 'input'"):
        Group("T", gradient="inputs")
    with pytest.raises(InputError, match="unknown perturbation 'tdiv_sdiv'; did you mean 'tdiv-sdiv'"):
        step_groups(4, 4, "tdiv_sdiv")
    with pytest.raises(InputError, match="unknown gpu 'h20'; did you mean 'h200'"):
        print_plan("wrn28_4", gpu="h20")


def test_printed_table(capsys):
    print_plan("wrn28_4", teachers=4, branches=4, batch=128, gpu="h200")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "wrn28_4, 4 teachers, 4 branches, batch 128, images 3x32x32"
    assert max(len(line) for line in lines) < 220
    rows = [line for line in lines if line.startswith("conv  ")]
    assert len(rows) == 28  # 25 3x3 convolutions and 3 shortcuts, of the perturbation
    assert len([line for line in lines if line.startswith("joint conv  ")]) == 28  # of the distillation's two parts
    sides = [line.split() for line in lines if line.startswith("  training side")]
    assert len(sides) == 28 + 1
    assert sides[0] == ["training", "side", "stem", "32x32x16", "normalise", "store", "sums"]
    assert any(line.startswith("total of 78 launches ") for line in lines)
    assert "without joint launches 107" in lines
    assert any(line.startswith("step of 217 launches") for line in lines)
    (shortcut,) = [line.split() for line in rows if "groups.0.0.shortcut" in line][:1]
    assert shortcut[:3] == ["conv", "groups.0.0.shortcut", "32x32x64"]
    assert any("37.20 GFLOP = 22.00 F" in line for line in lines)
    assert any(line.startswith("least time on H200 (790 TFLOP/s bf16, 4.30 TB/s") for line in lines)
    assert not any("on load" in line for line in lines[13:]), "nothing can, so there is nothing to compare with"


def test_printed_totals_with_and_without_what_is_taken_in_on_load(capsys):
    tables = []
    for on_load in (False, True):
        print_plan("wrn28_4", batch=512, fusions=lambda part, node: ALL, on_load=on_load)
        tables.append(capsys.readouterr().out.splitlines())

    def totals(lines, label):
        """Launches of the passes and of the step, and images a second."""
        found = [line for line in lines if line.startswith(("total of", "step of", "least", label or "least"))]
        counts = [int(line.split()[2]) for line in found if line[0] in "ts" and (label or "launches  ") in line]
        return counts, next(line for line in found if line.startswith(label or "least")).split("at most ")[1].split()[0]

    (plain, taken), on = tables, "BatchNorm and shortcuts on load"
    assert totals(plain, "") == totals(taken, "nothing on load")
    assert totals(plain, on) == totals(taken, "")
    assert totals(plain, "")[0] == [29, 29, 78, 81, 217]
    assert totals(taken, "")[0] == [26, 29, 51, 81, 187]
    rows = [line for line in taken if line.startswith("conv gradient      groups.0.1.conv1")]
    assert rows[-1].split()[4:8] == ["norm-gradient", "mask-from-input", "store", "sums"]
    assert any("shortcut/2" in line for line in taken)
    assert not any("shortcut/2" in line for line in plain)


def test_partial_sums_are_told_from_layers_of_that_name():
    assert is_sums(sums("block.bn"))
    assert is_sums(grad_sums("block.bn"))
    assert not any(is_sums(name) for name in ("block.sums", grad("sums"), statistics("block.grad_sums"), INPUT))


def test_every_op_of_a_plan_can_be_run():
    """A layer's five files: what the planners emit and fuse is in the engine's table, and tests run each op of it."""
    assert {*FUSIONS, *GRADIENT_FUSIONS} <= set(OPS)
    used: set[str] = set()
    nets = [(trace(model(), (3, size, size)), batch) for model, size, batch in (untyped(case.values) for case in CASES)]
    nets += [(by_hand.network(size), 3) for by_hand, size in BY_HAND.values()]
    for net, batch in nets:
        for group in (Group("T", gradient="input"), Group("S", 0, "S", "parameters")):
            for way in ("forward", "backward"):
                for fusions in (nothing, lambda part, node: ALL):
                    used.update(launch.op for launch in plan([net], [group], way, batch, fusions).launches)
    assert used == set(OPS) - {"module", "module gradient"}  # of networks that are no plan's
