"""Teachers that cannot be planned, as modules in the fused step, against the reference engine; and those refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.reference import ReferenceStep
from fastensdistill.method.perturbation import PERTURBATIONS
from tests.compare import check_close
from tests.engine.cases import check_equal, network, setting, steps
from tests.network.models import moved
from tests.untyped import untyped


class Standardised(nn.Conv2d):
    """A convolution with a custom forward: its weight is standardised in it."""

    def forward(self, x):
        mean, std = self.weight.mean((1, 2, 3), True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias, padding=1)


class Odd(nn.Module):
    """What nothing plans: weights computed in forward, Python that asks the shape and the type of what it is given."""

    def __init__(self, classes=5):
        super().__init__()
        self.conv, self.bn, self.own = Standardised(3, 6, 3), nn.BatchNorm2d(6), nn.Parameter(torch.rand(6, 1, 1))
        self.classifier = nn.Linear(6, classes)

    def forward(self, x):
        if not isinstance(x, torch.fx.Proxy) and len(x) > 1:
            x = x.sin()
        x = F.hardshrink(self.bn(self.conv(x)) * self.own, 0.01)
        return self.classifier(x.mean((2, 3)))


def odd(seed, **options):
    torch.manual_seed(seed)
    return moved(Odd(**options), seed)


def mixed(*modules):
    """Teachers of which those with these numbers are no plan's."""
    return lambda seed: odd(seed) if seed - 10 in modules else network(seed)


CASES = {
    **{name: {"perturbation": name, "M": 3, "teacher": mixed(1), "micro_batches": 1 + i % 2}
       for i, name in enumerate(PERTURBATIONS)},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_as_the_reference(case):
    """Four steps in float64: scalars, weights, statistics, momentum and generators."""
    options = {"K": 3, "batch_size": 4, **CASES[case]}
    student, teachers, config = setting(**untyped(options))
    other = copy.deepcopy(student)
    one = ReferenceStep(student, teachers, config, num_classes=5)
    two = FusedStep(other, teachers, config)
    for expected, actual in zip(steps(one, 4, B=4), steps(two, 4, B=4), strict=True):
        assert set(expected) == set(actual)
        for name, value in expected.items():
            check_close(name, actual[name], value, 1e-9)
    check_equal(student, other, one, two, 1e-9)
