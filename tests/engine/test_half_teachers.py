"""Teachers of half precision: float32 copies, value for value, in every engine."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastensdistill.engine.captured import CapturedReferenceStep
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.reference import ReferenceStep
from fastensdistill.method.teachers import Teachers
from tests.engine.cases import CLASSES, batch, network, setting
from tests.untyped import untyped


class Mixed(nn.Module):
    """As much software keeps it: BatchNorm in float32, a buffer in float64, everything else halved."""

    def __init__(self, seed: int, dtype: torch.dtype):
        super().__init__()
        self.inner = network(seed).to(dtype)
        for module in self.inner.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.float()
        self.register_buffer("scale", torch.tensor(1 / 3, dtype=torch.float64))

    def forward(self, x):
        return self.inner(x * self.scale.to(x.dtype))


def halved(seed: int, dtype: torch.dtype) -> nn.Module:
    return network(seed).to(dtype)


@pytest.mark.parametrize("engine", [ReferenceStep, CapturedReferenceStep, FusedStep], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_halved_teacher_gives_the_numbers_of_its_values_in_float32(engine, dtype):
    results = []
    for widen in (False, True):
        given = [halved(10 + m, dtype) for m in range(2)]
        given = [one.float() for one in given] if widen else given
        student, _, config = setting(dtype=torch.float32)
        options = {} if engine is FusedStep else {"num_classes": CLASSES}
        step = untyped(engine)(student, given, config, **options)
        for i in range(2):
            scalars = step(*batch(i, dtype=torch.float32))
        results.append([*scalars.values(), *student.state_dict().values()])
        assert all(t.dtype == torch.float32 for t in step.teachers.state_dict().values() if t.is_floating_point())
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_several_dtypes_only_the_half_ones_change_and_no_value_does(dtype):
    given = Mixed(1, dtype)
    before = copy.deepcopy(given.state_dict())
    teachers = Teachers([given, network(2).float()])
    for name, value in teachers.networks[0].state_dict().items():
        half = before[name].dtype == dtype
        assert value.dtype == (torch.float32 if half else before[name].dtype), name
        assert torch.equal(value, before[name].to(value.dtype)), name
        assert torch.equal(given.state_dict()[name], before[name]), name
        assert given.state_dict()[name].dtype == before[name].dtype, name
    names = {torch.float32, torch.float64, dtype}
    (note,) = teachers.notes
    assert note.startswith("teacher 0 (Mixed) is of torch.")
    assert note.endswith(": a copy of it in torch.float32 is used")
    assert all(str(kind) in note for kind in names)
    images = batch(0, dtype=torch.float32)[0]
    expected = copy.deepcopy(given).eval()
    expected.inner.float()
    assert torch.equal(teachers(images)[0], expected(images))


def test_tied_weights_stay_tied():
    one = nn.Sequential(nn.Flatten(), nn.Linear(27, 27), nn.Linear(27, 27)).half()
    untyped(one)[2].weight = untyped(one)[1].weight
    (held,) = Teachers([one]).networks
    assert untyped(held)[1].weight is untyped(held)[2].weight
    assert untyped(held)[1].weight.dtype == torch.float32
