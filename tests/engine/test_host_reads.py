"""What keeps a step from being captured is found, wherever it is, and named; what does not, is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastensdistill.engine.captured import CapturedReferenceStep
from fastensdistill.engine.host_reads import HostReads
from tests.engine.captured_cases import KINDS, READING, STAYING, of_kind
from tests.engine.cases import CLASSES, batch, setting
from tests.untyped import untyped

MIXING = ("mask",)  # images: no student of branches can have it


def found(**kinds: Any) -> list[str]:
    """What a step finds whose networks are all plain but for ``kinds``."""
    student, teachers, config = setting(**{"teacher": of_kind("plain"), "student": of_kind("plain"), **kinds})
    step = CapturedReferenceStep(student, teachers, config, num_classes=CLASSES)
    named = {"the student": student.module} | {f"teacher {m}": one for m, one in enumerate(teachers.networks)}
    reads = HostReads(named, step.device)
    step(*batch(0))  # networks are looked at by others too when they are first called
    step.bodies.around = lambda: reads
    step(*batch(0))
    return reads.found


@pytest.mark.parametrize(
    ("kind", "where"),
    [(kind, where) for kind in READING for where in ("teacher", "student", "both")
     if where == "teacher" or kind not in MIXING],
)  # fmt: skip
def test_what_reads_on_the_host_is_named(kind, where):
    planted = of_kind("plain", kind)
    lines = found(**dict.fromkeys(("teacher", "student") if where == "both" else (where,), planted))
    networks = {"teacher": ["teacher 0", "teacher 1"], "student": ["the student"]}
    expected = [*networks["teacher"], *networks["student"]] if where == "both" else networks[where]
    words = READING[kind]
    if kind == "backward":
        assert any(line.startswith(words) for line in lines)
        return
    for name in expected:
        assert any(line.startswith(f"{name}: 1 (Planted) ") and words in line for line in lines), (name, lines)
    assert all(line.startswith((*expected, "the backward pass")) for line in lines)


@pytest.mark.parametrize("kind", STAYING)
def test_what_waits_for_nothing_is_left_alone(kind):
    assert found(student=of_kind("plain", kind), teacher=of_kind("plain", kind)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_networks_that_wait_for_nothing(kind):
    assert found(student=of_kind(kind), teacher=of_kind(kind)) == []


def test_a_batch_norm_that_averages_over_all_batches_counts_on_the_host():
    def cumulative(seed):
        network = of_kind("plain")(seed)
        untyped(network)[1].momentum = None
        return network

    (line,) = found(student=cumulative)
    assert line.startswith("the student: 1 (BatchNorm2d) reads values on the host by item()")


def test_nothing_is_left_behind():
    """No hook, no mode, also after an error."""
    from torch.nn.modules import module as every_module

    hooks = every_module._global_forward_hooks, every_module._global_forward_pre_hooks
    network = of_kind("plain", "item")(0)
    with pytest.raises(ZeroDivisionError), HostReads({"it": network}, torch.device("cpu")):
        raise ZeroDivisionError
    with HostReads({"it": network}, torch.device("cpu")) as reads:
        network(batch(0)[0])
    network(batch(0)[0])
    assert len(reads.found) == 1
    assert not any(hooks)
