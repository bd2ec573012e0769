"""The peak that is printed before a run, against what a step on the meta device allocates, and against the plan."""

import gc

import pytest
import torch

from fastensdistill.config import TeachConfig
from fastensdistill.engine import memory
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.memory import estimate, estimate_teaching, main
from fastensdistill.engine.passes import dead_after
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.errors import InputError
from fastensdistill.models import create_model
from fastensdistill.network.plan import plan_step
from fastensdistill.network.trace import trace
from tests.engine.cases import batch, packed, packed_by_architecture, setting
from tests.engine.meta import build, watched


def traced(model, size=32):
    with torch.device("meta"):
        return trace(create_model(model, 100), (3, size, size))


CASES = [
    ("wrn28_4", 128, {}),
    ("wrn28_4", 1024, {}),
    ("wrn28_10", 128, {}),
    ("resnet32", 128, {"perturbation": "tdiv"}),
    ("wrn28_1", 64, {"perturbation": "none"}),
    ("wrn28_1", 256, {"micro_batches": 4, "batch_size": 256}),
]


@pytest.mark.parametrize(("model", "B", "settings"), CASES, ids=[f"{m}-{b}" for m, b, _ in CASES])
def test_peak_is_what_a_step_allocates(monkeypatch, model, B, settings):
    step = build(model, B, **settings)
    # on the meta device no kernel runs that would need partial sums
    monkeypatch.setattr(memory.Timeline, "scratch", lambda *unused: 0.0)
    network = traced(model)
    perturbation, parts = settings.get("perturbation", "tdiv-sdiv"), settings.get("micro_batches", 1)
    found = estimate(network, network, 4, 4, B, perturbation, parts=parts)
    gc.collect()
    with watched() as watch:
        step.body()
    transient = max(p.peak for p in found.passes)
    assert watch.peak == pytest.approx(transient, rel=0.02)
    held = {id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors_of(step)}
    stays = sum(found.fixed.values()) - found.fixed["teachers: as modules"] - B * 3 * 32 * 32 * 4
    assert sum(held.values()) == pytest.approx(stays, rel=0.02)


def tensors_of(step: FusedStep) -> list[torch.Tensor]:
    """Everything the step itself holds for the whole run."""
    kept = [step.images, step.parameters.gradient, step.trained.layer_gradients, *step.parameters.state()]
    for weights in [packed(step), *packed_by_architecture(step)]:
        kept += [weights.values, *(t for layer in weights.layers.values() for t in (layer.forward, layer.gradient))]
    return kept


def test_fixed_buffers_stay_and_every_other_is_freed_after_its_last_reader():
    """Live buffers after every launch of a real step are those the plan says."""
    student, teachers, config = setting(dtype=torch.float32)
    step = FusedStep(student, teachers, config)
    step(*batch(0, dtype=torch.float32))
    training = step.trained
    output = training.output
    dead = dead_after(training.parts, ["input", output, f"{output}.grad", *training.gradients])
    expected: set[str] = {"input"}
    training.refresh()
    grad_logits = torch.zeros_like(training.forward(step.images))
    alive = set(training.buffers)
    assert len(alive) > 10
    left = set(training.backward(grad_logits))
    for part, gone in zip(training.parts, dead, strict=True):
        for launch, names in zip(part.launches, gone, strict=True):
            expected |= {n for n in launch.writes if n not in training.gradients and not n.endswith(".running")}
            expected -= set(names)
        if part is training.parts[0]:
            assert alive == expected
    assert left - {f"{output}.grad"} == expected
    assert len(expected) <= 4, expected


@pytest.mark.parametrize("parts", [1, 2])
def test_peak_of_teachers_is_what_a_step_allocates(parts):
    B, M = 64, 3
    with torch.device("meta"):
        networks = [create_model("wrn28_1", 100) for _ in range(M)]
        config = TeachConfig(members=M, precision="bf16", batch_size=B, micro_batches=parts)
        step = FusedTeachStep(networks, config, image_shape=(3, 32, 32))
        step.build((B, 3, 32, 32))
    found = estimate_teaching(traced("wrn28_1"), M, B, parts=parts)
    gc.collect()
    with watched() as watch:
        step.body()
    assert watch.syncs == []
    assert watch.peak == pytest.approx(max(p.peak for p in found.passes), rel=0.02)


def test_launches_and_bytes_are_the_plans(capsys):
    network = traced("wrn28_4")
    found = estimate(network, network, 4, 4, 128)
    plans = plan_step(network, network, 4, 4, 128)
    assert sum(p.launches for p in found.passes) == 1 + sum(len(plan.launches) for plan in plans.values())
    (training,) = (part for part in plans["distillation, forward"].parts if part.training)
    written = {n for launch in training.launches for n in launch.writes if not n.endswith((".running", "sums"))}
    branches = next(p for p in found.passes if p.name == "distillation, branches")
    sums = sum(1 for launch in training.launches for n in launch.writes if n.endswith("sums"))
    assert branches.buffers == len(written) + sums
    plain = sum(training.buffers[n].nbytes for n in written)
    assert plain < branches.total < 1.05 * plain  # partial sums are the rest
    assert found.fixed["student: packed for training"] == 2 * 2 * 4 * memory.weight_count(network)[0]
    main(["wrn28_4", "--batch", "128", "1024", "--launches"])
    printed = capsys.readouterr().out
    assert "247 launches" in printed
    assert f"peak {found.peak / 2**30:.2f} GiB" in printed
    assert printed.count("conv gradient") > 40


def test_more_images_more_memory_and_refusals():
    network = traced("resnet32")
    peaks = [estimate(network, network, 4, 4, B).peak for B in (64, 128, 256)]
    assert peaks[0] < peaks[1] < peaks[2] < 2 * peaks[1]
    half = estimate(network, network, 4, 4, 128, itemsize=4)
    assert half.peak > 1.5 * peaks[1]
    assert estimate(network, network, 4, 4, 256, parts=2).peak < peaks[1] + 2 * 4 * 256 * 3 * 32 * 32
    with pytest.raises(InputError, match="batch=10 in 4 parts: expected"):
        main(["resnet32", "--batch", "10", "--micro-batches", "4"])
    with pytest.raises(InputError, match="batch=0"):
        main(["resnet32", "--batch", "0"])
    with pytest.raises(InputError, match="perturbation"):
        main(["resnet32", "--perturbation", "tdif"])
