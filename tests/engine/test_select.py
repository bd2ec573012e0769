"""Which tier trains what, and what is said of it; never silently another, and never half of one."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

from fastensdistill.config import TeachConfig
from fastensdistill.engine import captured, select, trial
from fastensdistill.engine.captured import CapturedReferenceStep, CapturedTeachStep
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.reference import ReferenceStep, TeachStep
from fastensdistill.engine.select import distillation_step, teaching_step
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.errors import InputError
from fastensdistill.train.stop import Interrupted
from tests.engine.captured_cases import READING, Planted, of_kind
from tests.engine.cases import CLASSES, network, setting
from tests.engine.recorded_graph import RecordedGraphs
from tests.networks import tiny
from tests.runs import StopAt, make
from tests.untyped import untyped

SHAPE = (3, 6, 6)
calls: list[int] = []


class TwoFaced(nn.Module):
    """Computes what its trace does not show, so that it has no plan, and nothing that a graph could not hold."""

    def forward(self, x):
        return x if isinstance(x, torch.fx.Proxy) else x.sin()


class Secretive(nn.Module):
    """Decides by what no watch sees."""

    def forward(self, x):
        calls.append(1)
        return x if len(calls) % 2 else -x


def with_layer(layer):
    """(seed) → a network without a plan: its own layer stands behind the first."""

    def create(seed: int) -> nn.Module:
        one = of_kind("plain")(seed)
        untyped(one).insert(1, layer())
        return one

    return create


unplanned = with_layer(TwoFaced)


@pytest.fixture
def on_gpu(monkeypatch):
    """As if the CPU were one: chosen like it, with recorded graphs."""
    monkeypatch.setattr(select, "_on_cuda", lambda device: True)
    monkeypatch.setattr(select, "HAS_TRITON", True)
    monkeypatch.setattr(captured, "has_graphs", lambda device: True)
    monkeypatch.setattr(captured, "Graphs", lambda state, device: RecordedGraphs(state, torch.enable_grad))


def chosen(engine: str = "auto", **options: Any) -> tuple[Any, select.EngineChoice]:
    """In float32; the networks are as they were afterwards."""
    student, teachers, config = setting(**{"dtype": torch.float32, "engine": engine, **options})
    before = copy.deepcopy((student.state_dict(), teachers.state_dict()))
    step, choice = distillation_step(student, teachers, config, SHAPE, CLASSES)
    for own, expected in zip((student, teachers), before, strict=True):
        for name, value in own.state_dict().items():
            assert torch.equal(value, expected[name]), name
    assert "\n" not in str(choice)
    assert all(p.grad is None for p in student.parameters())
    return step, choice


def test_planned(on_gpu):
    step, choice = chosen()
    assert (type(step), choice.tier, choice.name) == (FusedStep, "planned", "fused")
    assert str(choice).startswith("fused engine, planned, float32, 100% of its FLOPs by own kernels, about 0.0")
    assert "GiB beside the training set: every operation is planned; checked against the reference" in str(choice)


@pytest.mark.parametrize("which", [(1,), (0, 1)])
def test_mixed(on_gpu, which):
    step, choice = chosen(teacher=lambda seed: (unplanned if seed - 10 in which else network)(seed))
    assert (type(step), choice.tier, choice.name) == (FusedStep, "mixed", "fused")
    share = re.match(r"fused engine, mixed, float32, (\d+)% of its FLOPs by own kernels, about 0\.0", str(choice))
    assert share is not None
    assert 0 < int(share[1]) < 100
    words = "1 of 2 teachers planned, teacher 1 runs as its own module (Sequential: "
    if len(which) == 2:
        words = "0 of 2 teachers planned, teachers 0, 1 run as their own modules (0: Sequential: "
    assert f": {words}" in str(choice)
    assert "; all else is planned; checked" in str(choice)


@pytest.mark.parametrize("teacher", [network, unplanned])
def test_captured(on_gpu, teacher):
    step, choice = chosen(student=unplanned, teacher=teacher)
    assert (type(step), choice.tier, choice.name) == (CapturedReferenceStep, "captured", "captured")
    assert str(choice).startswith("captured engine, about 0.0")
    assert "GiB beside the training set: no fused step: the student: Sequential: " in str(choice)
    assert "; checked against the reference engine, 1 − cosine " in str(choice)
    assert step.bodies.capture


@pytest.mark.parametrize("where", ["teacher", "student", "both"])
@pytest.mark.parametrize("kind", ["item", "backward", "counter"])
def test_what_reads_on_the_host_trains_eagerly_and_is_named(on_gpu, where, kind):
    """Planted in a teacher of a plannable student too: no half of the step is captured."""
    planted = of_kind("plain", kind)
    networks: dict[str, Any] = {"teacher": network, "student": network}
    for role in ("teacher", "student") if where == "both" else (where,):
        networks[role] = planted
    step, choice = chosen(**networks)
    assert (type(step), choice.tier, choice.name) == (ReferenceStep, "eager", "reference")
    assert str(choice).startswith("reference engine: ")
    _, why = choice.reason.split("; nor can its step be captured: ")
    assert READING[kind] in why
    if kind != "backward":
        name = "teacher" if where == "teacher" else "the student" if where == "student" else ("teacher", "the student")
        assert why.startswith(name)
        assert ": 1 (Planted)" in why


def test_what_no_watch_sees_a_comparison_does(on_gpu, monkeypatch):
    step, choice = chosen(student=with_layer(Secretive), kind="single", K=1, perturbation="none")
    assert type(step) is ReferenceStep
    assert "replayed, the step is not what it is when it is launched" in choice.reason


def test_a_capture_that_fails_is_a_reason(on_gpu, monkeypatch):
    class Failing:
        captured, error = False, "operation not permitted when stream is capturing"

        def prepare(self, key, body, generators):
            return body

    monkeypatch.setattr(captured, "Graphs", lambda state, device: Failing())
    step, choice = chosen(student=unplanned)
    assert type(step) is ReferenceStep
    assert choice.reason.endswith("; nor can its step be captured: operation not permitted when stream is capturing")


def test_another_process_that_cannot_capture_keeps_all_from_it(on_gpu, monkeypatch):
    asked: list[Any] = []

    def anyone(value):
        asked.append(value)
        return "process 1 reads" if len(asked) == 2 else value

    monkeypatch.setattr(select, "anyone", anyone)
    step, choice = chosen(student=unplanned)
    assert type(step) is ReferenceStep
    assert choice.reason.endswith("; nor can its step be captured: process 1 reads")


def test_asked_for(on_gpu):
    step, choice = chosen("captured")
    assert type(step) is CapturedReferenceStep
    assert ": asked for; checked against the reference engine" in str(choice)
    assert type(chosen("reference", student=unplanned)[0]) is ReferenceStep
    with pytest.raises(InputError, match=r"engine='captured' cannot be used here: the student: 1 \(Planted\) reads"):
        chosen("captured", student=of_kind("plain", "item"))
    with pytest.raises(
        InputError, match=r"engine='fused' cannot train this: the student: Sequential: .*'auto' finds one that can"
    ):
        chosen("fused", student=unplanned)


def test_on_a_cpu():
    step, choice = chosen()
    assert (type(step), str(choice)) == (ReferenceStep, "reference engine: no CUDA device, training on cpu")
    step, choice = chosen("captured")
    assert type(step) is CapturedReferenceStep
    assert not step.captured
    words = "asked for, but every operation is launched from Python: no CUDA device, training on cpu"
    assert str(choice).endswith(words)
    with pytest.raises(InputError, match=r"the student: 1 \(Planted\) reads values on the host"):
        chosen("captured", student=of_kind("plain", "item"))


def test_a_run_says_which_engine_it_had_and_goes_on_with_another(tmp_path):
    """Bit for bit: the engines take the same steps."""
    ends = [make(epochs=1, engine="reference").fit().student.state_dict()]
    for engines in (("captured", "reference"), ("reference", "captured")):
        out = tmp_path / engines[0]
        trainer = make(out=out, epochs=1, engine=engines[0])
        StopAt(trainer, 2)
        with pytest.raises(Interrupted):
            trainer.fit()
        assert f"engine: {engines[0]}\n" in (out / "config.yaml").read_text()
        trainer = make(out=out, epochs=1, engine=engines[1], resume=True).fit()
        assert trainer.engine.name == engines[1]
        ends.append(trainer.student.state_dict())
    for end in ends[1:]:
        assert all(torch.equal(value, end[name]) for name, value in ends[0].items())


def test_networks_that_become_teachers(on_gpu):
    config = TeachConfig(members=2)
    kinds = {
        "planned": ([tiny(), tiny()], FusedTeachStep),
        "captured": ([tiny(), unplanned(1).float()], CapturedTeachStep),
        "eager": ([tiny(), of_kind("plain", "item")(1).float()], TeachStep),
    }
    for tier, (networks, kind) in kinds.items():
        before = copy.deepcopy([network.state_dict() for network in networks])
        step, choice = teaching_step(networks, config, SHAPE)
        assert (type(step), choice.tier) == (kind, tier)
        for own, expected in zip(networks, before, strict=True):
            assert all(torch.equal(value, expected[name]) for name, value in own.state_dict().items())
    assert choice.reason.endswith("network 1: 1 (Planted) reads values on the host by item(), float(), int() or a "
                                  "condition")  # fmt: skip
    config.engine = "captured"
    with pytest.raises(InputError, match=r"engine='captured' cannot be used here: network 0: 1 \(Planted\) reads"):
        teaching_step([of_kind("plain", "item")(1).float()], config, SHAPE)


def test_memory_of_larger_batches_follows_from_two_small_ones(monkeypatch):
    """On other sizes than those that were tried; what is not activations is in it too."""
    student, teachers, config = setting(
        dtype=torch.float32, student=of_kind("dense"), teacher=of_kind("inverted"), micro_batches=2
    )
    found = trial.try_distillation(student, teachers, config, SHAPE, CLASSES)
    assert found.reads == []
    weights = sum(p.nbytes for network in (student, teachers) for p in network.parameters())
    assert found.stays > weights + sum(p.nbytes for p in student.parameters())
    monkeypatch.setattr(trial, "IMAGES", 40)
    larger = trial.try_distillation(student, teachers, config, SHAPE, CLASSES)
    monkeypatch.undo()
    assert found.peak(80, 2) == pytest.approx(larger.stays + larger.small, rel=0.02)


def test_planted_layers_pass_on_what_they_get():
    x = torch.rand(2, 3, 4, 4)
    for kind in READING:
        assert torch.equal(Planted(kind).eval()(x), x), kind
