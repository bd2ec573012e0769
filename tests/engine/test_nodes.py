"""Whole fused steps of networks with the new nodes, written by hand, against the reference engine in float64."""

from __future__ import annotations

import pytest
import torch

from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.reference import ReferenceStep
from tests.compare import check_close
from tests.engine.cases import CLASSES, batch, check_equal, setting
from tests.network.nodes_by_hand import CASES as BY_HAND
from tests.network.nodes_by_hand import ByHand

TOLERANCE = 1e-9


def fused_step(given, by_hand: tuple[ByHand, ByHand], size: int) -> FusedStep:
    (student, teachers, config), (teacher, own) = given, by_hand
    step = FusedStep(student, teachers, config)
    frozen = teacher.network(size).evaluated
    step.train_as([*[frozen] * len(teachers.networks), own.network(size)])
    return step


@pytest.mark.parametrize(
    ("teacher", "own", "changes"),
    [
        ("mobile", "mobile", {}),
        ("convnext", "convnext", {}),
        ("dense", "dense", {}),
        ("shuffle", "shuffle", {}),
        ("vision", "vision", {}),
        ("strange", "strange", {}),
        ("convnext", "mobile", {"micro_batches": 2}),
        ("dense", "vision", {"student": "batch-ensemble"}),
    ],
)
def test_a_step_is_the_reference_engines(teacher, own, changes):
    """The same losses, weights, statistics and momentum afterwards, with the same dropout drawn."""
    size = max(BY_HAND[name][1] for name in (teacher, own))
    by_hand = BY_HAND[teacher][0], BY_HAND[own][0]
    kind = changes.pop("student", "latent-be") if "student" in changes else "latent-be"
    pair = [
        setting(kind, teacher=lambda s: by_hand[0].module(s).eval(), student=by_hand[1].module, **changes)
        for _ in range(2)
    ]
    reference, fused = ReferenceStep(*pair[0], num_classes=CLASSES), fused_step(pair[1], by_hand, size)
    images, labels = batch(0, 4, size)
    torch.manual_seed(1)
    expected = reference(images, labels)
    torch.manual_seed(1)
    actual = fused(images, labels)
    for name, value in expected.items():
        check_close(name, actual[name], value, TOLERANCE)
    check_equal(pair[0][0], pair[1][0], reference, fused, TOLERANCE)
