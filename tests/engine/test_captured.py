"""The captured reference step: what is captured reads tensors alone, and replayed it is the reference step."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastensdistill.data import Augment, DeviceLoader, Split
from fastensdistill.engine.captured import CapturedReferenceStep, CapturedTeachStep
from fastensdistill.engine.host_reads import HostReadError
from fastensdistill.engine.reference import ReferenceStep, TeachStep
from fastensdistill.errors import InputError
from tests.engine.captured_cases import KINDS, of_kind
from tests.engine.cases import CLASSES, batch, network, setting, steps, teach_setting
from tests.engine.recorded_graph import RecordedGraphs, recorded
from tests.engine.updates import TEACHING, UPDATES, averages

COUNT = 4  # of steps, of which some replay
SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "unperturbed": {"perturbation": "none"},
    "noise": {"perturbation": "gaussian"},
    "noise of a drawn teacher": {"perturbation": "confods", "M": 3},
    "heads": {"kind": "hydra", "K": 3},
    "in parts": {"micro_batches": 3, "batch_size": 3},
    "one branch": {"kind": "single", "K": 1, "perturbation": "tdiv"},
    "bf16": {"precision": "bf16", "dtype": torch.float32},
    "float32": {"dtype": torch.float32},
    "sgd, all": UPDATES["sgd, all"],
    "adamw, all": UPDATES["adamw, all"],
}


def both(**options: Any) -> tuple[ReferenceStep, CapturedReferenceStep, RecordedGraphs]:
    student, teachers, config = setting(**{"teacher": of_kind("plain"), "student": of_kind("plain"), **options})
    one = ReferenceStep(student, teachers, config, num_classes=CLASSES)
    other = CapturedReferenceStep(copy.deepcopy(student), teachers, config, num_classes=CLASSES)
    return one, other, recorded(other, {"the student": other.student.module, "the teachers": teachers})


def everything(step: ReferenceStep) -> dict[str, Tensor]:
    return {**step.student.state_dict(), **step.state_dict(), **averages(step)}


def check_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def check_steps(one: Any, other: Any, count: int = COUNT, dtype: torch.dtype = torch.float64) -> None:
    """The same scalars of so many steps of each, from one state of the global generator."""
    torch.manual_seed(3)
    expected = steps(one, count, dtype=dtype)
    torch.manual_seed(3)
    for scalars, found in zip(expected, steps(other, count, dtype=dtype), strict=True):
        assert set(scalars) == set(found)
        check_same(scalars, found)


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_replayed_is_the_reference_step_bit_for_bit(options):
    """Rates, pairs, noise and images change between replays."""
    one, other, graphs = both(**options)
    check_steps(one, other, dtype=options.get("dtype", torch.float64))
    check_same(everything(one), everything(other))
    assert graphs.replayed.count("distil") == COUNT
    drawn = {key for key in graphs.replayed if key != "distil"}
    assert len(drawn) == len(graphs.made) - 1
    assert len(drawn) > 1 or not options.get("perturbation", "tdiv-sdiv").startswith(("tdiv", "confods"))
    assert all(p.grad is None for p in other.student.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_fused_engine_may_not_plan_is_captured(kind):
    """Dropout and BatchNorm's count of batches included."""
    one, other, graphs = both(teacher=of_kind(kind), student=of_kind(kind))
    check_steps(one, other)
    check_same(everything(one), everything(other))
    assert len(graphs.made) > 1


def test_a_body_that_reads_on_the_host_is_refused_and_nothing_has_happened():
    for where in ("student", "teacher"):
        _, other, _ = both(**{"student": of_kind("plain"), "teacher": of_kind("plain"),
                              where: of_kind("plain", "item")})  # fmt: skip
        before = {k: v.clone() for k, v in everything(other).items() if k != "pick"}
        with pytest.raises(HostReadError, match=rf"the {where}.*1 \(Planted\) reads values on the host by item"):
            other(*batch(0))
        check_same(before, everything(other))


def test_the_stand_in_replays_what_was_decided():
    """Else it would prove nothing: a factor that Python changes stays as it was recorded."""
    factor, total = [1.0], torch.zeros(())
    graphs = RecordedGraphs(lambda: [total], contextlib.nullcontext)

    def body():
        total.add_(factor[0])
        return {"total": total * factor[0]}

    assert graphs.prepare("key", body, [])()["total"] == 1
    factor[0] = 2.0
    assert graphs.prepare("key", body, [])()["total"] == 2
    assert total == 2


def loader(seed: int) -> DeviceLoader:
    generator = np.random.default_rng(3)
    split = Split(generator.integers(0, 256, (13, 6, 6, 3), dtype=np.uint8), generator.integers(0, CLASSES, 13))
    own = torch.Generator().manual_seed(seed)
    return DeviceLoader(split, 4, device="cpu", generator=own, augment=Augment(1), dtype=torch.float64)


def test_batches_are_read_by_a_replay_too():
    one, other, graphs = both()
    first, second = loader(5), loader(5)
    for _ in range(7):  # more than two epochs of three batches
        check_same(one.train_on(first), other.train_on(second))
    check_same(everything(one), everything(other))
    assert graphs.replayed.count(("read", second)) == 7


def test_a_run_is_resumed_bit_for_bit_in_either_engine():
    for first in (0, 1):
        one, *_ = both()
        steps(one, 4)
        halves: Any = both()[first]
        steps(halves, 2)
        saved = copy.deepcopy((halves.student.state_dict(), halves.state_dict()))
        pairs: list[Any] = [both()[0], both()[1], halves]
        steps(pairs[1], 1)  # captured already: what is loaded has to reach its graphs
        for step in pairs:
            step.student.load_state_dict(saved[0])
            step.load_state_dict(saved[1])
            for i in (2, 3):
                step.set_learning_rate(0.05 / (1 + i))
                step(*batch(i))
            check_same(everything(one), everything(step))


def test_where_tensors_move_or_are_frozen_all_is_captured_anew(monkeypatch):
    """A graph knows addresses."""
    made = []
    monkeypatch.setattr("fastensdistill.engine.captured.Graphs", lambda state, device: made.append(1))
    _, other, _ = both()
    other.bodies.capture, other.bodies.graphs = True, None
    batches = [batch(0)]
    other.bodies.accept(batches)
    other.bodies.accept(batches)
    assert len(made) == 1
    parameter = next(other.student.parameters())
    parameter.requires_grad_(False)
    other.bodies.accept(batches)
    parameter.data = parameter.data.clone()
    other.bodies.accept(batches)
    next(other.teachers.buffers()).data = next(other.teachers.buffers()).data.clone()
    other.bodies.accept(batches)
    other.load_state_dict(other.state_dict())
    other.bodies.accept(batches)
    assert len(made) == 4


def test_frozen_parameters_stay_as_they_are():
    one, other, _ = both()
    for step in (one, other):
        next(step.student.module.parameters()).requires_grad_(False)
    check_steps(one, other)
    check_same(everything(one), everything(other))


def test_on_a_cpu_every_operation_is_launched():
    one, other, _ = both()
    other.bodies.graphs = None
    check_steps(one, other)
    assert (other.captured, other.capture_error) == (False, "")


def test_the_halves_and_wrong_batches_are_those_of_the_reference_step():
    one, other, _ = both()
    (images, labels), rate = batch(0), 0.05
    for step in (one, other):
        step.set_learning_rate(rate)
    perturbed = [step.perturb(images) for step in (one, other)]
    assert torch.equal(perturbed[0].images, perturbed[1].images)
    check_same(*(step.distil(perturbed[0], labels) for step in (one, other)))
    check_same(everything(one), everything(other))
    other(images, labels)
    for wrong, of_them, words in (
        (images[:2], labels[:2], "images have shape"), (images.float(), labels, "expected torch.float64"),
        (images, labels[:1], "labels are"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            other(wrong, of_them)
    _, other, _ = both()
    with pytest.raises(InputError, match="labels hold"):
        other(batch(0)[0], batch(0)[1] + CLASSES)
    with pytest.raises(InputError, match="images hold"):
        other(batch(0)[0] * 9, batch(0)[1])


@pytest.mark.parametrize("reads", [False, True], ids=["given", "read"])
@pytest.mark.parametrize("options", [{}, {"micro_batches": 2}, TEACHING["adamw, all"]], ids=["", "parts", "adamw"])
def test_networks_that_become_teachers(options, reads):
    networks, config = teach_setting(2)
    networks = [*networks, of_kind("dense")(3).double()]
    config = dataclasses.replace(config, **options)
    one, other = TeachStep(networks, config), CapturedTeachStep(copy.deepcopy(networks), config)
    graphs = recorded(other, {f"network {m}": own for m, own in enumerate(other.networks)})
    losses: list[list[Tensor]] = []
    for step in (one, other):
        torch.manual_seed(5)
        losses.append([])
        loaders = [loader(m) for m in range(3)]
        for i in range(4):
            step.set_learning_rate(0.05 / (1 + i))
            given = [batch(3 * i + m, B=4) for m in range(3)]
            losses[-1].append((step.train_on(loaders) if reads else step(given))["loss"])
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))
    for a, b in zip(one.networks, other.networks, strict=True):
        check_same(a.state_dict(), b.state_dict())
    check_same(one.state_dict() | averages(one), other.state_dict() | averages(other))
    assert [key for key in graphs.replayed if key == "teach"] == ["teach"] * 4
    assert len(graphs.replayed) == (8 if reads else 4)


def test_teachers_refuse_other_labels_at_the_first_batch_and_counts():
    networks, config = teach_setting(2)
    step = CapturedTeachStep(networks, config)
    recorded(step, {})
    with pytest.raises(InputError, match="labels hold 9"):
        step([batch(0), (batch(0)[0], torch.full((3,), 9))])
    with pytest.raises(InputError, match="1 loaders for 2 networks"):
        step.train_on([loader(1)])
    step([batch(0), batch(1)])
    state = step.state_dict()
    again = CapturedTeachStep([network(5).double(), network(6).double()], config)
    again.load_state_dict(state)
    check_same(state, again.state_dict())
