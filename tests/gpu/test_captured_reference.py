"""The reference step as CUDA graphs, replayed, against itself launched operation by operation."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from fastensdistill.config import DistillConfig
from fastensdistill.engine.captured import CapturedReferenceStep, CapturedTeachStep
from fastensdistill.engine.host_reads import HostReads
from fastensdistill.engine.select import distillation_step
from tests.compare import check_close
from tests.engine.captured_cases import KINDS, READING, STAYING, of_kind
from tests.engine.cases import CLASSES, setting, teach_setting
from tests.gpu.test_captured import CUDA, STEPS, check_same, loader, state
from tests.untyped import untyped

SETTINGS: dict[str, dict[str, Any]] = {
    **{kind: {"student": of_kind(kind), "teacher": of_kind(kind)} for kind in KINDS},
    "gaussian noise": {"perturbation": "gaussian"},
    "noise of a drawn teacher": {"perturbation": "confods", "M": 3},
    "in parts": {"micro_batches": 2, "batch_size": 4},
    "heads": {"kind": "hydra", "K": 3},
}


@pytest.fixture(autouse=True)
def repeatable():
    """Sums in one order, and a capture that fails is an error."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the step could not be captured")
        yield
    torch.backends.cudnn.deterministic = before


def distil(case: str, capture: bool, precision: str) -> CapturedReferenceStep:
    student, teachers, config = setting(dtype=torch.float32, precision=precision, **untyped(SETTINGS[case]))
    last: Any = {"memory_format": torch.channels_last}
    return CapturedReferenceStep(
        student.to(CUDA).to(**last), teachers.to(CUDA).to(**last), config, num_classes=CLASSES, capture=capture
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", SETTINGS)
def test_replayed_is_launched(case, precision):
    """Pairs, rates, noise, dropout and batches change between replays; BatchNorm counts them."""
    ended: list[dict[str, Tensor]] = []
    for capture in (True, False):
        step, batches = distil(case, capture, precision), loader(5)
        torch.manual_seed(3)
        for i in range(STEPS):
            step.set_learning_rate(0.05 / (1 + i))
            scalars = step.train_on(batches)
        assert step.captured is capture, step.capture_error
        ended.append({**state(step.student, step, batches), **{k: v.float() for k, v in scalars.items()}})
    assert set(ended[0]) == set(ended[1])
    for name, value in ended[1].items():  # backward passes of pooling add up in any order
        check_close(name, ended[0][name].double(), value.double(), 1e-3 if precision == "fp32" else 2e-2)


def test_a_captured_run_is_resumed():
    """Into graphs that have gone further."""
    step, batches = distil("plain", True, "fp32"), loader(5)
    for _ in range(2):
        step.train_on(batches)
    owners = step.student, step, batches
    saved = [copy.deepcopy(owner.state_dict()) for owner in owners]
    ends = []
    for _ in range(2):
        for owner, values in zip(owners, saved, strict=True):
            untyped(owner).load_state_dict(values)
        for _ in range(3):
            step.train_on(batches)
        ends.append(state(*owners))
    check_same(*ends)


def test_networks_that_become_teachers():
    ended = []
    for capture in (True, False):
        networks, config = teach_setting(2, torch.float32)
        networks = [network.to(CUDA) for network in [*networks, of_kind("inverted")(3).float()]]
        step = CapturedTeachStep(networks, config, capture=capture)
        torch.manual_seed(3)
        batches = [loader(m) for m in range(3)]
        for _ in range(STEPS):
            step.train_on(batches)
        assert step.captured is capture, step.capture_error
        ended.append(state(*networks, step, *batches))
    for name, value in ended[1].items():
        check_close(name, ended[0][name].double(), value.double(), 1e-3)


@pytest.mark.parametrize("kind", [*READING, *STAYING])
def test_what_is_said_to_read_on_the_host_is_what_cannot_be_captured(kind):
    """But for what Python alone decides, of which a capture takes no notice."""
    student, teachers, config = setting(dtype=torch.float32, teacher=of_kind("plain", kind), student=of_kind("plain"))
    step = CapturedReferenceStep(student.to(CUDA), teachers.to(CUDA), config, num_classes=CLASSES, capture=False)
    reads = HostReads({"the teachers": teachers}, CUDA)
    batch = torch.rand(4, 3, 6, 6, device=CUDA), torch.zeros(4, dtype=torch.int64, device=CUDA)
    if kind == "numpy":  # which there is none of on a GPU
        return
    step(*batch)
    step.bodies.around = lambda: reads
    step(*batch)
    step.bodies.capture, step.bodies.where = True, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(*batch)
    assert bool(reads.found) is (kind in READING)
    if kind not in ("counter", "python_random"):
        assert step.captured is (kind in STAYING)


def test_where_it_is_asked_for_the_line_says_what_was_found():
    student, teachers, config = setting(dtype=torch.float32, student=of_kind("plain", "scalar"), engine="captured")
    step, choice = distillation_step(student.to(CUDA), teachers.to(CUDA), config, (3, 6, 6), CLASSES)
    assert isinstance(config, DistillConfig)
    assert type(step) is CapturedReferenceStep
    assert str(choice).startswith("captured engine, about ")
    assert "checked against the reference engine" in str(choice)
