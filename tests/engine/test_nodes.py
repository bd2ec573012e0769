"""Whole fused steps of networks with the new nodes, written by hand, against the reference engine in float64."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastensdistill.config import TeachConfig
from fastensdistill.engine import teach
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.memory import estimate
from fastensdistill.engine.planned_functions import concatenates
from fastensdistill.engine.planned_ops import OPS
from fastensdistill.engine.reference import ReferenceStep, TeachStep
from fastensdistill.network.expression import Call, ListOf, Value
from fastensdistill.network.nodes import Function
from tests.compare import check_close
from tests.engine.cases import CLASSES, batch, check_equal, setting
from tests.network.nodes_by_hand import CASES as BY_HAND
from tests.network.nodes_by_hand import ByHand, without_dropout

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


@pytest.mark.parametrize(("name", "members"), [("mobile", 1), ("convnext", 2), ("strange", 2)])
def test_teaching_is_the_reference_engines(name, members, monkeypatch):
    """Networks side by side, one parameter frozen; several are without dropout, which they would draw in turn."""
    by_hand, size = BY_HAND[name]
    network = by_hand.network(size) if members == 1 else by_hand.network(size).evaluated
    monkeypatch.setattr(teach, "compared", lambda *args, **options: network)
    config = TeachConfig(members=members, learning_rate=0.05, seed=7)
    both = []
    for _ in range(2):
        modules = [by_hand.module(seed) for seed in range(members)]
        for module in modules if members > 1 else []:
            without_dropout(module)
        next(modules[0].parameters()).requires_grad_(False)
        both.append(modules)
    reference = TeachStep(both[0], config)
    fused = teach.FusedTeachStep(both[1], config, image_shape=(3, size, size))
    batches = [batch(m, 3, size) for m in range(members)]
    torch.manual_seed(1)
    expected = reference(batches)
    torch.manual_seed(1)
    actual = fused(batches)
    check_close("loss", actual["loss"], expected["loss"], TOLERANCE)
    for m, (one, other) in enumerate(zip(*both, strict=True)):
        for key, value in one.state_dict().items():
            check_close(f"{key} of {m}", other.state_dict()[key].double(), value.double(), TOLERANCE)


@pytest.mark.parametrize("name", ["mobile", "vision"])
def test_a_step_in_bf16_and_its_memory(name):
    """Finite, near float64's, and what is live at once is known on the meta device before."""
    by_hand, size = BY_HAND[name]
    losses = []
    for dtype, precision in ((torch.float64, "fp32"), (torch.float32, "bf16")):
        given = setting(teacher=lambda s: by_hand.module(s).eval(), student=by_hand.module, dtype=dtype,
                        precision=precision)  # fmt: skip
        step = fused_step(given, (by_hand, by_hand), size)
        images, labels = batch(0, 4, size, dtype=dtype)
        torch.manual_seed(1)
        losses.append(step(images, labels)["loss"].double())
    found = estimate(step, 4)
    assert all(one.peak > 0 for one in found.passes)
    launches = sum(one.launches for one in found.passes)
    assert launches == 1 + sum(len(part.launches) for run, _ in step.passes() for part in run.parts) - joint_turns(step)
    check_close("loss", losses[1], losses[0], 0.1)


class TF32(TorchDispatchMode):
    """Keeps for every convolution of PyTorch's whether cuDNN might have rounded its float32."""

    def __init__(self):
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in func.name():
            self.seen.append(torch.backends.cudnn.allow_tf32)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_pytorchs_convolutions_multiply_as_asked(precision):
    by_hand, size = BY_HAND["dense"]
    given = setting(teacher=lambda s: by_hand.module(s).eval(), student=by_hand.module, dtype=torch.float32,
                    precision=precision)  # fmt: skip
    step = fused_step(given, (by_hand, by_hand), size)
    before = torch.backends.cudnn.allow_tf32
    with TF32() as mode:
        step(*batch(0, 4, size, dtype=torch.float32))
    assert len(mode.seen) > 10
    assert set(mode.seen) == {precision == "tf32"}
    assert torch.backends.cudnn.allow_tf32 == before


def test_concatenations_are_not_made_again_for_their_gradient(monkeypatch):
    by_hand, size = BY_HAND["dense"]
    given = setting(teacher=lambda s: by_hand.module(s).eval(), student=by_hand.module)
    step, gradient, seen = fused_step(given, (by_hand, by_hand), size), OPS["function gradient"], Counter[str]()

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen[func.overloadpacket.__name__] += not func.is_view
            return func(*args, **(kwargs or {}))

    def counted(run, launch):
        with Counted():
            gradient(run, launch)

    monkeypatch.setitem(OPS, "function gradient", counted)
    step(*batch(0, 4, size))
    assert set(+seen) == {"clone"}


def concatenation(layout: str, *args, function=torch.cat, other=None, **kwargs) -> Function:
    """Of the channels of two inputs, as the reader writes it."""
    call = Call(function, args, tuple(kwargs.items()))
    return Function("cat", ("a", "b"), (5, 4, 1), call, (layout, other or layout), layout)


def test_what_is_a_concatenation_of_channels():
    both = ListOf((Value(0), Value(1)))
    for node in (
        concatenation("image", both, 1),
        concatenation("image", both, dim=-3, function=torch.concat),
        concatenation("tokens", both, -1),
        concatenation("last", tensors=(Value(0), Value(1)), dim=3),
    ):
        assert concatenates(node)
    for node in (
        concatenation("image", both, 2),
        concatenation("image", both),
        concatenation("last", both, 1),
        concatenation("tokens", both, 1),
        concatenation("image", both, 1, other="last"),
        concatenation("image", ListOf((Value(1), Value(0))), 1),
        concatenation("image", ListOf((Value(0), Value(1), Value(0))), 1),
        concatenation("image", both, 1, function=torch.stack),
    ):
        assert not concatenates(node)


def joint_turns(step: FusedStep) -> int:
    assert step.joint
    return sum(turn.joint for turn in step.joint.turns)
