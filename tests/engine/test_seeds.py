"""Students of several seeds at once: each as the fused step trains it alone; refusals, resume, memory."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from fastensdistill.data import Split
from fastensdistill.data.augment import Augment
from fastensdistill.data.loader import DeviceLoader
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.memory import estimate
from fastensdistill.engine.seeds import SeedsStep
from fastensdistill.engine.seeds_gain import joint_seeds_gain
from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import use_kernels
from fastensdistill.kernels.update import runs_of
from fastensdistill.method.student import STUDENTS, Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.network.gpu import GAP, GPUS, HELD, LEAST
from tests.compare import check_close
from tests.datasets import arrays
from tests.engine.cases import CLASSES, Everything, batch, network, scattered, setting
from tests.engine.updates import UPDATES, update_of
from tests.network import models
from tests.untyped import untyped

SHAPE = 3, 6, 6


def several(S: int, kind="latent-be", K=2, student=network, dtype=torch.float64, **changes):
    """S students whose weights and factors differ, the teachers, a config."""
    _, teachers, config = setting(kind, K=K, student=student, dtype=dtype, **changes)
    students: list[Student] = []
    for s in range(S):
        one = scattered(STUDENTS[kind](student(30 + s), K))
        with torch.no_grad():
            for p in one.parameters():
                p.mul_(1 + 0.03 * s)
        students.append(one.to(dtype))
    return students, teachers, config


def alone(students, teachers, config, seeds, **options) -> list[FusedStep]:
    return [
        FusedStep(student, teachers, dataclasses.replace(config, seed=seed), **options)
        for student, seed in zip(students, seeds, strict=True)
    ]


def train(together: SeedsStep, steps: list[FusedStep], count: int, first=0, tolerance=1e-9, **shape) -> None:
    for i in range(first, first + count):
        rate = 0.05 / (1 + i)
        batches = [batch(10 * i + s, **shape) for s in range(len(steps))]
        together.set_learning_rate(rate)
        found = together(batches)
        for s, step in enumerate(steps):
            step.set_learning_rate(rate)
            expected = step(*batches[s])
            assert set(expected) == set(found)
            for name, value in expected.items():
                check_close(f"{name} of seed {s}", found[name][s], value, tolerance)


def check_same(students, together: SeedsStep, others, steps, tolerance: float) -> None:
    """Weights, statistics, counters, momentum and generators."""
    for s, (student, other) in enumerate(zip(students, others, strict=True)):
        states = student.state_dict() | together.seeds[s].state_dict(), other.state_dict() | steps[s].state_dict()
        assert set(states[0]) == set(states[1])
        for name, value in states[1].items():
            check_close(f"{name} of seed {s}", states[0][name].double(), value.double(), tolerance)


CASES = {
    "kd, three seeds": {"S": 3, "kind": "single", "K": 1, "perturbation": "none", "M": 3},
    "kd, a drawn teacher": {"S": 2, "kind": "single", "K": 1, "perturbation": "ods", "M": 3},
    "latent-be": {"S": 2, "perturbation": "none"},
    "latent-be of one branch": {"S": 3, "K": 1, "perturbation": "gaussian"},
    "latent-be, noise": {"S": 2, "K": 3, "perturbation": "gaussian", "alpha": 0.9},
    "tdiv": {"S": 2, "perturbation": "tdiv", "M": 3},
    "tdiv-sdiv, five seeds of three branches": {"S": 5, "K": 3, "M": 3},
    "batch-ensemble": {"S": 3, "kind": "batch-ensemble", "alpha": 0.5, "temperature": 2.0},
    "micro-batches": {"S": 2, "micro_batches": 3, "batch_size": 3},
    "wider teachers": {"S": 2, "teacher": lambda seed: network(seed, widen=2)},
    "unusual network": {"S": 2, "kind": "single", "K": 1, "perturbation": "tdiv",
                        "teacher": models.odd, "student": models.odd},
    "adamw, clipped, averaged": {"S": 2, "K": 3, "perturbation": "none", **UPDATES["adamw, all"]},
    "clipped sgd of plain networks": {
        "S": 2, "kind": "single", "K": 1, "perturbation": "none", **update_of("single", "sgd, all"),
    },
    "residual with zero padding": {"S": 3, "teacher": models.resnet, "student": models.resnet},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_student_comes_out_as_alone(case):
    """Two steps in float64, from different weights and on different batches; seeds of no order."""
    settings = untyped(CASES[case])
    S = settings.pop("S")
    seeds = [5, 11, 2, 40, 3][:S]
    students, teachers, config = several(S, **settings)
    others = copy.deepcopy(students)
    together = SeedsStep(students, teachers, config, seeds, image_shape=SHAPE)
    steps = alone(others, teachers, config, seeds)
    train(together, steps, 2)
    check_same(students, together, others, steps, 1e-9)
    first = "exp_avg.0" if config.optimizer == "adamw" else "momentum.0"
    assert len({float(one.state_dict()[first].sum()) for one in together.seeds}) == S
    assert len(together.averages) == (S if config.ema_decay else 0)
    for s, average in enumerate(together.averages):
        for name, value in steps[s].averages[0].state_dict().items():
            check_close(f"average of {name} of seed {s}", average.state_dict()[name].double(), value.double(), 1e-9)


def test_kernels_in_the_interpreter():
    """The Triton kernels themselves, float32, a whole step of three students of two branches."""
    seeds = [0, 1, 2]
    students, teachers, config = several(3, dtype=torch.float32)
    others = copy.deepcopy(students)
    together = SeedsStep(students, teachers, config, seeds, image_shape=(3, 5, 5))
    steps = alone(others, teachers, config, seeds)
    shape = {"B": 2, "size": 5, "dtype": torch.float32}
    with use_kernels():
        batches = [batch(s, **untyped(shape)) for s in range(3)]
        together(batches)
    for step, one in zip(steps, batches, strict=True):
        step(*one)
    check_same(students, together, others, steps, 1e-3)


def test_a_seed_goes_on_alone_and_back():
    """One step together, one apart, one together again: as three apart; loaders, their draws and frozen parameters."""
    seeds = [4, 9]
    content = arrays(shape=SHAPE[1:] + SHAPE[:1])
    split = Split(content["train_images"], content["train_labels"])

    def loaders(dtype=torch.float64):
        return [
            DeviceLoader(split, 4, device="cpu", generator=torch.Generator().manual_seed(seed),
                         augment=Augment(pad=1, flip=True), dtype=dtype)
            for seed in seeds
        ]  # fmt: skip

    students, teachers, config = several(2)
    for student in students:
        student.module.get_parameter("stem.layer.weight").requires_grad_(False)
    whole = copy.deepcopy(students)
    rest = copy.deepcopy(students)
    one = SeedsStep(students, teachers, config, seeds, image_shape=SHAPE)
    reading, expected = loaders(), alone(whole, teachers, config, seeds)
    one.train_on(reading)
    for step, loader in zip(expected, loaders(), strict=True):
        for _ in range(3):
            step.train_on(loader)
    apart = alone(rest, teachers, config, seeds, image_shape=SHAPE)
    for s, step in enumerate(apart):
        rest[s].load_state_dict(students[s].state_dict())
        step.load_state_dict(one.seeds[s].state_dict())
        step.train_on(reading[s])
    last = copy.deepcopy(rest)
    two = SeedsStep(last, teachers, config, seeds, image_shape=SHAPE)
    for s, step in enumerate(apart):
        two.seeds[s].load_state_dict(step.state_dict())
    three = SeedsStep(copy.deepcopy(rest), teachers, config, seeds, image_shape=SHAPE)
    three.load_state_dict(two.state_dict())
    assert {name: value.sum() for name, value in three.state_dict().items()} == {
        name: value.sum() for name, value in two.state_dict().items()
    }
    two.train_on(reading)
    check_same(last, two, whole, expected, 1e-9)
    assert not all(run.moves for run in runs_of(two.rule.runs[0], two.parameters.values.numel()))


def test_given_pairs():
    students, teachers, config = several(2, M=3, K=3)
    others = copy.deepcopy(students)
    together = SeedsStep(students, teachers, config, [0, 1], image_shape=SHAPE)
    pairs = [(0, 2), (2, 1)]
    together([batch(0), batch(1)], pairs)
    for s, step in enumerate(alone(others, teachers, config, [0, 1])):
        step(*batch(s), pairs[s])
        check_close("momentum", together.seeds[s].state_dict()["momentum.3"], step.state_dict()["momentum.3"], 1e-9)
    with pytest.raises(InputError, match=r"pair \(1, 1\) is not among those"):
        together([batch(0), batch(1)], [(1, 1), (0, 1)])


def with_layer_norm(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 4]), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES))


def refused(S=2, seeds=(0, 1), other=None, **changes):
    students, teachers, config = several(S, **changes)
    if other:
        students, teachers = other(students, teachers)
    SeedsStep(students, teachers, config, seeds[:S], image_shape=SHAPE)


REFUSED = {
    "one student": ({"S": 1}, "1 students given; expected at least 2"),
    "seeds": ({"seeds": (1,)}, "1 seeds for 2 students"),
    "hydra": ({"kind": "hydra"}, "hydra students are trained one after another"),
    "kinds": ({"other": lambda s, t: ([s[0], STUDENTS["batch-ensemble"](network(3).double(), 2)], t)},
              "student 1 is of another kind or number of branches"),
    "branches": ({"other": lambda s, t: ([s[0], STUDENTS["latent-be"](network(3).double(), 3)], t)},
                 "student 1 is of another kind or number of branches"),
    "architecture": ({"other": lambda s, t: ([s[0], STUDENTS["latent-be"](network(3, 2).double(), 2)], t)},
                     "student 1 has another architecture"),
    "the same twice": ({"other": lambda s, t: ([s[0], s[0]], t)}, "share their memory"),
    "a teacher's": ({"kind": "single", "K": 1, "perturbation": "none",
                     "other": lambda s, t: (s, Teachers([*t.networks, s[1].module], copy=False))},
                    "share their memory"),
    "functions' parameters": ({"student": with_layer_norm, "perturbation": "none"},
                              "computes with parameters of no layer"),
    "unlike teachers that are drawn": ({"K": 2, "M": 2, "teacher": lambda seed: network(seed, 1 + seed % 2)},
                                       "where teachers of several architectures are drawn"),
    "synchronised": ({"sync_batch_norm": True}, "several processes train the seeds one after another"),
    "weights": ({"teacher_weights": (1.0,)}, "teacher_weights has 1 numbers for"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    changes, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as caught:
        refused(**untyped(changes))
    assert "\n" not in str(caught.value)


def test_kernels_that_take_in_what_stands_around_them():
    """Statistics, coefficients and second sources on load, as wgmma kernels have them."""
    students, teachers, config = several(2, student=models.resnet, teacher=models.resnet)
    others = copy.deepcopy(students)
    everything = {"implementations": Everything()}
    together = SeedsStep(students, teachers, config, [0, 1], image_shape=SHAPE, **untyped(everything))
    steps = alone(others, teachers, config, [0, 1], **everything)
    train(together, steps, 2)
    check_same(students, together, others, steps, 1e-9)
    kinds = {step.kind for part in together.trained.parts for launch in part.launches for step in launch.prologue}
    assert {"batch_norm", "norm_gradient"} <= kinds


def test_a_node_takes_its_share_of_the_device():
    gpu = GPUS["h100"]
    assert gpu.node_time(0, 0, 1) == LEAST + GAP
    assert gpu.node_time(798e9, 0, 132) == pytest.approx(1e-3 + GAP)
    assert gpu.node_time(798e9, 0, 33) == pytest.approx(4e-3 + GAP)
    assert gpu.node_time(798e9, 0, 1320) == gpu.node_time(798e9, 0, 132)
    assert gpu.node_time(0, 3e9, 66) == pytest.approx(2e-3 / HELD + GAP)
    assert {name: one.multiprocessors for name, one in GPUS.items()} == {
        "h200": 132, "h100": 132, "a100": 108, "b200": 148
    }  # fmt: skip


def test_small_students_gain_and_large_batches_do_not():
    """Fewer nodes and fuller ones: near as many times as there are seeds at first, and nearly nothing in the end."""
    students, teachers, config = several(3, dtype=torch.float32, batch_size=4, precision="bf16")
    small = joint_seeds_gain(students, teachers, config, SHAPE, GPUS["h100"])
    one, every = small.nodes
    assert one < every < 2 * one
    assert small.worth_it
    assert 2 < small.ratio < 3
    assert small.ratio == small.apart / small.together
    lower = 3 * one * (LEAST + GAP)
    assert small.apart == pytest.approx(lower, rel=0.3)
    assert str(small).startswith("3 seeds at once, predicted, not measured, on H100 SXM: a step of each ")
    assert str(small).endswith("worth it (from 1.3 on)")
    large = dataclasses.replace(config, batch_size=2**18)
    found = joint_seeds_gain(students, teachers, large, SHAPE, GPUS["h100"])
    assert 0.8 < found.ratio < 1.1
    assert not found.worth_it
    assert found.peak > 1000 * small.peak
    assert not any(p.device.type == "meta" for student in students for p in student.parameters())
    hydras, teachers, config = several(2, kind="hydra")
    with pytest.raises(InputError, match="hydra students are trained one after another"):
        joint_seeds_gain(hydras, teachers, config, SHAPE, GPUS["h100"])


def test_memory():
    """The estimate is that of the step as it runs: more than one student's, less than as many steps'."""
    students, teachers, config = several(3, dtype=torch.float32)
    one = FusedStep(copy.deepcopy(students[0]), teachers, config, image_shape=SHAPE)
    together = SeedsStep(students, teachers, config, [0, 1, 2], image_shape=SHAPE)
    single, several_ = estimate(one, 4), estimate(together, 4)
    assert single.peak < several_.peak < 3 * single.peak
    for what in ("weights, moments, gradients", "packed for training"):
        assert several_.fixed[what] == pytest.approx(3 * single.fixed[what], rel=0.1)
    assert several_.fixed["packed for evaluation"] < 3 * single.fixed["packed for evaluation"]
