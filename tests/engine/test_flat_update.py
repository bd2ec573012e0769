"""The fused engine's update with every setting: as the reference engine's, frozen, thawed, resumed, on either side."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastensdistill.config import TeachConfig
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.memory import estimate
from fastensdistill.engine.reference import ReferenceStep, TeachStep
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import use_kernels
from fastensdistill.models.preresnet import PreResNet
from tests.compare import check_close
from tests.engine.cases import CLASSES, batch, check_equal, network, setting, steps, teach_setting
from tests.engine.frozen import FROZEN, frozen
from tests.engine.updates import TEACHING, UPDATES, averages, check_averages, update_of
from tests.network import models

SHAPE = (3, 6, 6)
TOLERANCE = 1e-8
KINDS: dict[str, dict[str, Any]] = {
    "batch-ensemble": {"kind": "batch-ensemble", "K": 3},
    "hydra": {"kind": "hydra", "K": 3},
    "single": {"kind": "single", "K": 1, "perturbation": "ods"},
    "unusual": {"teacher": models.odd, "student": models.odd},
}
CASES = {
    **{f"latent-be, {name}": options for name, options in UPDATES.items()},
    **{
        f"{kind}, {name}": KINDS[kind] | update_of(KINDS[kind].get("kind", "latent-be"), name)
        for kind in KINDS
        for name in ("sgd, all", "adamw, all")
    },
}


def both(**options: Any) -> tuple[Any, Any, ReferenceStep, FusedStep]:
    student, teachers, config = setting(**{"perturbation": "none", **options})
    other = copy.deepcopy(student)
    two = FusedStep(other, teachers, config, image_shape=SHAPE)
    return student, other, ReferenceStep(student, teachers, config, num_classes=CLASSES), two


def check_step(one: Any, two: Any, i: int, rate: float) -> None:
    for step in (one, two):
        step.set_learning_rate(rate / (1 + i))
    check_close(f"loss {i}", two(*batch(i))["loss"], one(*batch(i))["loss"], TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_a_student_as_the_reference(case):
    student, other, one, two = both(**CASES[case])
    for i in range(3):
        check_step(one, two, i, 0.002 if "adamw" in case else 0.05)
        check_equal(student, other, one, two, TOLERANCE)
        check_averages(one, two, TOLERANCE)
    assert set(two.state_dict()) >= set(one.state_dict())


@pytest.mark.parametrize("name", TEACHING)
def test_teachers_as_the_reference(name):
    networks, _ = teach_setting()
    config = TeachConfig(members=3, learning_rate=0.002 if "adamw" in name else 0.05, seed=7, **TEACHING[name])
    others = copy.deepcopy(networks)
    one, two = TeachStep(networks, config), FusedTeachStep(others, config, image_shape=SHAPE)
    for i in range(3):
        batches = [batch(10 * i + m) for m in range(3)]
        check_close("loss", two(batches)["loss"], one(batches)["loss"], TOLERANCE)
    for first, second in zip(networks, others, strict=True):
        check_equal(first, second, one, two, TOLERANCE)
    check_averages(one, two, TOLERANCE)


@pytest.mark.parametrize("update", ["sgd, all", "adamw, all"])
@pytest.mark.parametrize("case", ["stem", "one side's factors", "one head of two", "a bias alone"])
def test_frozen_parameters_and_thawed_ones(case, update):
    """Their averages go on; their norm does not count; AdamW's count of their steps begins when they move."""
    kind, chosen = FROZEN[case]
    changes = {"K": 1, "perturbation": "tdiv"} if kind == "single" else {}
    student, other, one, two = both(**{"kind": kind, **changes, **update_of(kind, update)})
    before = copy.deepcopy(other.state_dict())
    for i in range(4):
        if i == 1:
            frozen(student, chosen)
            frozen(other, chosen)
            before = copy.deepcopy(other.state_dict())
        if i == 3:
            kept = {name for name, p in other.named_parameters() if torch.equal(p, before[name])}
            assert kept == {name for name, p in other.named_parameters() if not p.requires_grad}
            student.requires_grad_(True)
            other.requires_grad_(True)
        check_step(one, two, i, 0.002)
        check_equal(student, other, one, two, TOLERANCE)
        check_averages(one, two, TOLERANCE)


def test_all_of_one_side_is_frozen():
    student, other, one, two = both(**UPDATES["adamw, all"])
    for run in (student, other):
        frozen(run, lambda name: "delta" in name)
    check_step(one, two, 0, 0.002)
    check_equal(student, other, one, two, TOLERANCE)


def test_kernels_in_the_interpreter():
    small = lambda seed: models.moved(PreResNet(CLASSES, blocks=(1,), in_planes=4), seed)  # noqa: E731
    student, teachers, config = setting(
        dtype=torch.float32, teacher=small, student=small, perturbation="none", **UPDATES["adamw, all"]
    )
    other = copy.deepcopy(student)
    one, two = ReferenceStep(student, teachers, config, num_classes=CLASSES), FusedStep(other, teachers, config)
    shape: dict[str, Any] = {"B": 2, "size": 5, "dtype": torch.float32}
    steps(one, 1, rate=1e-3, **shape)
    with use_kernels():
        steps(two, 1, rate=1e-3, **shape)
    check_equal(student, other, one, two, 2e-3)
    check_averages(one, two, 2e-3)


@pytest.mark.parametrize("kind", ["latent-be", "hydra"])
@pytest.mark.parametrize("engines", [("fused", "fused"), ("fused", "reference"), ("reference", "fused")], ids="-".join)
def test_resumed_by_either_engine(kind, engines):
    """With its own engine bit for bit; averages are loaded as the networks that they are."""

    def make(engine: str) -> tuple[nn.Module, Any]:
        student, teachers, config = setting(kind, perturbation="none", **update_of(kind, "adamw, all"))
        if engine == "fused":
            return student, FusedStep(student, teachers, config, image_shape=SHAPE)
        return student, ReferenceStep(student, teachers, config, num_classes=CLASSES)

    (whole, one), (half, two), (rest, three) = make(engines[0]), make(engines[0]), make(engines[1])
    steps(one, 3, rate=0.002)
    steps(two, 2, rate=0.002)
    rest.load_state_dict(half.state_dict())
    three.load_state_dict(two.state_dict())
    for a, b in zip(three.averages, two.averages, strict=True):
        a.load_state_dict(b.state_dict())
    three.set_learning_rate(0.002 / 3)
    three(*batch(2))
    found = {**rest.state_dict(), **three.state_dict(), **averages(three)}
    for name, value in {**whole.state_dict(), **one.state_dict(), **averages(one)}.items():
        check_close(name, found[name].double(), value.double(), 0.0 if engines[0] == engines[1] else TOLERANCE)


def test_averages_are_networks_of_their_own():
    """Of the student's class and kind, in evaluation mode, with memory that only the update writes."""
    student, _, _, two = both(ema_decay=0.5)
    (average,) = two.averages
    assert type(average) is type(student)
    assert not average.training
    assert not any(p.requires_grad for p in average.parameters())
    values: dict[str, Tensor] = {name: value.clone() for name, value in average.state_dict().items()}
    for name, value in two.student.state_dict().items():
        assert torch.equal(values[name], value), name
    own = {value.untyped_storage().data_ptr() for value in average.state_dict().values()}
    assert not own & {value.untyped_storage().data_ptr() for value in two.student.state_dict().values()}
    two(*batch(0))
    moved = {name for name, value in average.state_dict().items() if not torch.equal(value, values[name])}
    assert moved == {name for name in values if "normalize" not in name}
    counts = "module.bn.num_batches_tracked"
    assert torch.equal(average.state_dict()[counts], two.student.state_dict()[counts])
    again = [value.data_ptr() for value in average.state_dict().values()]
    two(*batch(1))
    assert again == [value.data_ptr() for value in two.averages[0].state_dict().values()]


def test_nothing_is_kept_that_is_not_asked_for():
    """The paper's recipe has no table and no further tensors; each setting's are among the estimate of memory."""
    student, teachers, config = setting(perturbation="none")
    step = FusedStep(student, teachers, config, image_shape=SHAPE)
    assert step.rule.runs == [[], []]
    assert step.rule.state() == []
    assert step.averages == []
    options: dict[str, Any] = {"optimizer": "adamw", "ema_decay": 0.9, "clip_norm": 1.0}
    other = FusedStep(*setting(perturbation="none", **options), image_shape=SHAPE)
    plain, more = (estimate(one, 4).fixed["weights, moments, gradients"] for one in (step, other))
    values = sum(p.numel() for p in student.parameters())
    statistics = sum(b.numel() for name, b in student.named_buffers() if "running" in name)
    assert 0 <= more - plain - 8 * (2 * values + statistics) < 1000


def test_averages_before_an_image_is_known_are_refused():
    student, teachers, config = setting(ema_decay=0.9)
    with pytest.raises(InputError, match="has not seen an image"):
        _ = FusedStep(student, teachers, config).averages
    assert FusedTeachStep([network(1).double()], TeachConfig(members=1), image_shape=SHAPE).averages == []
