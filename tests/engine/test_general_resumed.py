"""A student of depthwise convolutions, LayerNorm and layer scale: parts frozen, thawed, and the run continued."""

from __future__ import annotations

import copy

import pytest
import torch

from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.reference import ReferenceStep
from tests.engine.cases import CLASSES, batch, check_equal, setting
from tests.network.nodes_by_hand import CASES as BY_HAND


@pytest.mark.parametrize("kind", ["latent-be", "single"])
def test_both_engines_train_alike_and_a_run_continues(kind):
    """Frozen until the last step, which a third student and step go to from the states of the second."""
    by_hand, size = BY_HAND["convnext"]
    changes = {"K": 1, "perturbation": "tdiv"} if kind == "single" else {}

    def made():
        return setting(kind, teacher=lambda seed: by_hand.module(seed).eval(), student=by_hand.module, **changes)

    def fused(given) -> FusedStep:
        step = FusedStep(*given)
        network = by_hand.network(size)
        step.train_as([*[network.evaluated] * len(given[1].networks), network])
        return step

    given = [made() for _ in range(3)]
    student, other, third = (own for own, _, _ in given)
    functions = {name for node in by_hand.network(size).nodes for name in getattr(node, "trained", ())}
    frozen = [p for name, p in student.module.named_parameters() if name in functions]
    assert frozen
    for own in (student, other, third):
        for name in functions:
            own.module.get_parameter(name).requires_grad_(False)
    before = copy.deepcopy(frozen)
    one, two, three = ReferenceStep(*given[0], num_classes=CLASSES), fused(given[1]), fused(given[2])

    def advance(*every) -> None:
        for step in every:
            torch.manual_seed(1)  # for dropout
            step(*batch(0, 4, size))

    advance(one, two)
    check_equal(student, other, one, two, 1e-9)
    assert all(torch.equal(now, then) for now, then in zip(frozen, before, strict=True))
    third.load_state_dict(other.state_dict())
    three.load_state_dict(two.state_dict())
    for own in (student, other, third):
        own.module.requires_grad_(True)
    advance(one, two, three)
    check_equal(student, other, one, two, 1e-9)
    check_equal(other, third, two, three, 0.0)
    assert not any(torch.equal(now, then) for now, then in zip(frozen, before, strict=True))
