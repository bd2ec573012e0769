"""The peak that is printed before a run, against what a step on the meta device allocates, and against the plan."""

import gc
from typing import Any

import pytest
import torch

from fastensdistill.config import TeachConfig
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.memory import estimate, main
from fastensdistill.engine.meta import meta_step
from fastensdistill.engine.passes import dead_after
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.errors import InputError
from fastensdistill.kernels.tiles import assume_arch
from fastensdistill.models import create_model
from fastensdistill.network.launch import is_sums
from tests.engine.cases import batch, gradients, network, packed, packed_by_architecture, setting, state
from tests.engine.meta import build, watched

CASES = [
    ("wrn28_4", 128, {}),
    ("wrn28_4", 1024, {}),
    ("wrn28_10", 128, {}),
    ("resnet32", 128, {"perturbation": "tdiv"}),
    ("wrn28_1", 64, {"perturbation": "none"}),
    ("wrn28_1", 256, {"micro_batches": 4, "batch_size": 256}),
]


@pytest.mark.parametrize(("model", "B", "settings"), CASES, ids=[f"{m}-{b}" for m, b, _ in CASES])
def test_peak_is_what_a_step_allocates(model, B, settings):
    step = build(model, B, **settings)
    found = estimate(step, B)
    gc.collect()
    with watched() as watch:
        step.body()
    transient = max(p.peak for p in found.passes)
    assert watch.peak == pytest.approx(
        transient, rel=0.02
    )  # partial sums of weight gradients are in the estimate alone
    held = {id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors_of(step)}
    stays = sum(found.fixed.values()) - found.fixed["teachers: as modules"]
    assert sum(held.values()) < stays < 1.03 * sum(held.values())  # tables and what is drawn are the rest


def test_every_pair_of_unlike_teachers_counts():
    """The first pair's are the small ones; a later one's need more."""
    like, unlike = (
        FusedStep(*setting(M=3, K=3, dtype=torch.float32, teacher=teacher), image_shape=(3, 6, 6))
        for teacher in (network, lambda seed: network(seed, widen=1 + 7 * (seed == 12)))
    )
    peaks = [max(p.peak for p in estimate(step, 8).passes if p.name.startswith("pert")) for step in (like, unlike)]
    assert peaks[1] > 1.5 * peaks[0]
    assert all(module.device.type == "cpu" for module in unlike.student.parameters())


def tensors_of(step: FusedStep) -> list[torch.Tensor]:
    """Everything the step itself holds for the whole run."""
    kept = [step.images, *gradients(step), *state(step)]
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


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_peak_of_teachers_is_what_a_step_allocates(micro_batches):
    B, M = 64, 3
    with torch.device("meta"):
        networks = [create_model("wrn28_1", 100) for _ in range(M)]
        config = TeachConfig(members=M, precision="bf16", batch_size=B, micro_batches=micro_batches)
        step = FusedTeachStep(networks, config, image_shape=(3, 32, 32))
        with assume_arch(90):
            step.build((B, 3, 32, 32))
    found = estimate(step, B)
    gc.collect()
    with watched() as watch:
        step.body()
    assert watch.syncs == []
    assert watch.peak == pytest.approx(max(p.peak for p in found.passes), rel=0.02)


def test_launches_and_bytes_are_the_plans(capsys):
    step = meta_step("wrn28_4")
    found = estimate(step, 128)
    with assume_arch(90):
        step.build((128, *step.image_shape))
    passes = {p.name: p for p in found.passes}
    parts = {name: part for one, names in step.passes() for name, part in zip(names, one.parts, strict=False)}
    assert set(parts) - {"distillation, teachers"} == set(passes) - {"un-fold and update"}
    assert step.joint
    joint, turns = sum(turn.joint for turn in step.joint.turns), step.joint.turns
    assert joint == 28 + 1  # all convolutions and the head
    assert sum(p.launches for p in found.passes) == 1 + sum(len(part.launches) for part in parts.values()) - joint
    both = [parts["distillation, teachers"], parts["distillation, forward"]]
    written = [{n for launch in part.launches for n in launch.writes} for part in both]
    forward = passes["distillation, forward"]
    assert forward.buffers == sum(len(names) for names in written)
    plain = sum(
        part.buffers[n].nbytes for part, names in zip(both, written, strict=True) for n in names if not is_sums(n)
    )
    assert plain < forward.total < 1.05 * plain  # partial sums are the rest
    elsewhere = set(step.trained.gradients)
    sides = list(zip(both, (step.joint.evaluation.dead[0], step.joint.training.dead[0]), strict=True))
    backward = parts["distillation, backward"], step.trained.dead[1]
    dead = {id(one): gone for part, names in (*sides, backward) for one, gone in zip(part.launches, names, strict=True)}
    live: dict[Any, Any] = {}
    runs: list[tuple[str, list[list[Any]]]] = [
        ("distillation, forward", [list(zip(both, turn, strict=True)) for turn in turns]),
        ("distillation, backward", [[(backward[0], launch)] for launch in backward[0].launches]),
    ]
    for name, order in runs:
        for of_turn, (op, layer, size) in zip(order, passes[name].rows, strict=True):
            there = [(part, launch) for part, launch in of_turn if launch]
            live |= {
                (part.training, n): part.buffers[n].nbytes
                for part, launch in there for n in launch.writes if n not in elsewhere
            }  # fmt: skip
            assert {(op, layer)} == {(launch.op, launch.node) for _, launch in there}
            scratch = 2**25 if op == "weight gradient" else 2**22
            assert sum(live.values()) < size < 1.01 * sum(live.values()) + scratch, (op, layer)
            for part, launch in there:
                for n in dead[id(launch)]:
                    live.pop((part.training, n), None)
    layers = [m for m in step.teachers.networks[0].modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    packed_values = 4 * sum(layer.weight.numel() for layer in layers)
    assert 2 * 2 * packed_values < found.fixed["packed for training"] < 1.01 * 2 * 2 * packed_values
    main(["wrn28_4", "--batch", "128", "--launches"])
    printed = capsys.readouterr().out
    assert "218 launches" in printed
    assert f"peak {found.peak / 2**30:.2f} GiB" in printed
    assert printed.count("conv gradient") > 40


def test_a_step_that_knows_no_image_has_no_estimate():
    with pytest.raises(InputError, match="give image_shape="):
        estimate(FusedStep(*setting()), 8)


def test_more_images_more_memory_and_refusals():
    step = meta_step("wrn28_1", 2, 2)
    peaks = [estimate(step, B).peak for B in (64, 128, 256)]
    assert peaks[0] < peaks[1] < peaks[2] < 2 * peaks[1]
    assert estimate(meta_step("wrn28_1", 2, 2, precision="fp32"), 128).peak > 1.5 * peaks[1]
    parts = meta_step("wrn28_1", 2, 2, micro_batches=2, batch_size=256)
    assert estimate(parts, 256).peak < peaks[1] + 2 * 4 * 256 * 3 * 32 * 32
    with pytest.raises(InputError, match="batch=10 in 4 parts: expected"):
        main(["resnet32", "--batch", "10", "--micro-batches", "4"])
    with pytest.raises(InputError, match="batch=0"):
        main(["resnet32", "--batch", "0"])
    with pytest.raises(InputError, match="perturbation"):
        main(["resnet32", "--perturbation", "tdif"])
