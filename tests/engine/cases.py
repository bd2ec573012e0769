"""Small runs of both engines from the same start, and what is compared afterwards."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastensdistill.config import DistillConfig, TeachConfig
from fastensdistill.data import Augment, DeviceLoader, Split
from fastensdistill.engine.dispatch import Dispatch
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.packed import PackedWeights, TrainedWeights
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.evaluate.validate import GroupedPredictor
from fastensdistill.kernels.update import runs_of
from fastensdistill.method.student import STUDENTS, Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.models.preresnet import PreResNet
from fastensdistill.network.launch import Part
from fastensdistill.network.on_load import ALL, Fusions
from tests.compare import check_close
from tests.network.models import moved

CLASSES = 5


class Everything(Dispatch):
    """Every convolution takes in everything that stands around it; off a GPU the references compute that."""

    def fusions(self, arch: int, dtype: torch.dtype = torch.bfloat16) -> Fusions:
        return lambda part, node: ALL


def network(seed: int, widen: int = 1):
    torch.manual_seed(seed)
    return moved(PreResNet(CLASSES, blocks=(1, 1), in_planes=4, widen=widen), seed)


def setting(kind="latent-be", M=2, K=2, dtype=torch.float64, teacher=network, student=network, **changes):
    """Student, teachers and config, the same for every call; every parameter and statistic off its initial value."""
    teachers = Teachers([teacher(10 + m) for m in range(M)])
    wrapped = STUDENTS[kind](student(3), K)
    config = DistillConfig(**{"student": kind, "learning_rate": 0.05, "seed": 7, **changes})
    return scattered(wrapped).to(dtype), teachers.to(dtype), config


def scattered(student: Student) -> Student:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "delta" in name:
                p.add_(0.1 * (torch.rand(p.shape, generator=generator, dtype=p.dtype) - 0.5))
    return student


def batch(step: int, B: int = 3, size: int = 6, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.rand(B, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)
    return (
        images.contiguous(memory_format=torch.channels_last),
        torch.randint(CLASSES, (B,), generator=generator),
    )


def loader(seed: int, B: int = 4, mixup: float = 0.0, **options) -> DeviceLoader:
    """Of eleven images, cropped and mirrored."""
    generator = np.random.default_rng(3)
    split = Split(generator.integers(0, 256, (11, 6, 6, 3), dtype=np.uint8), generator.integers(0, CLASSES, 11))
    own = torch.Generator().manual_seed(seed)
    options |= {"augment": Augment(1, mixup=mixup), "classes": CLASSES}
    return DeviceLoader(split, B, device="cpu", generator=own, dtype=torch.float64, **options)


def steps(step, count: int, rate: float = 0.05, **shape) -> list[dict[str, Tensor]]:
    """Several steps on the same batches for everyone; the rate changes from one to the next."""
    scalars = []
    for i in range(count):
        step.set_learning_rate(rate / (1 + i))
        scalars.append(step(*batch(i, **shape)))
    return scalars


def check_equal(first, second, one, two, tolerance: float) -> None:
    """Networks, momentum and generators of two runs."""
    for name, value in first.state_dict().items():
        check_close(name, second.state_dict()[name].double(), value.double(), tolerance)
    expected, actual = one.state_dict(), two.state_dict()
    for name, value in expected.items():
        check_close(name, actual[name].double(), value.double(), tolerance)


def teach_setting(M=3, dtype=torch.float64):
    return [network(20 + m).to(dtype) for m in range(M)], TeachConfig(members=M, learning_rate=0.05, seed=7)


# What tests look at in a fused step that has been built: only the functions from here on know where it is.


def state(step: FusedStep | FusedTeachStep) -> list[Tensor]:
    """All that a step changes, where it lies."""
    return step.state()


def static_inputs(step: FusedStep) -> list[Tensor]:
    """All that a step is told from outside, where it lies."""
    return [step.images, step.labels, step.draw, step.rate]


def gradients(step: FusedStep | FusedTeachStep) -> list[Tensor]:
    """Memory of gradients that stays: as the kernels leave them, and as the update reads them."""
    return [step.trained.layer_gradients, step.parameters.gradient]


def left_as_they_are(step: FusedStep | FusedTeachStep, name: str) -> tuple[Tensor, int]:
    """Which values (copies, …) of a parameter are frozen, and how many of all parameters are."""
    values = step.parameters.values
    frozen = torch.zeros_like(values, dtype=torch.bool)
    for run in runs_of(step.rule.runs[0], len(values)):
        frozen[run.start : run.start + run.size] = not run.moves
    return step.parameters.view(frozen, name), int(frozen.sum())


def packed(step: FusedStep | FusedTeachStep) -> TrainedWeights:
    """What is trained, as it is packed for training."""
    return step.trained.weights


def packed_for_evaluation(step: FusedStep) -> TrainedWeights | None:
    """The student's branches, as they are packed for the perturbation; None where it does not look at them."""
    return step.perturber.branches


def packed_by_architecture(step: FusedStep) -> list[PackedWeights]:
    """All that is packed for evaluation mode: the teachers of each architecture, and the branches with them."""
    branches = [step.perturber.branches] if step.perturber.branches else []
    return list(dict.fromkeys([*step.targets.weights.values(), *branches]))


def evaluated_parts(predictor: GroupedPredictor) -> list[Part]:
    """What a batch of validation images runs through."""
    return [run.parts[0] for run in predictor.ensemble.passes]


def trained_parts(step: FusedStep | FusedTeachStep) -> tuple[Part, Part]:
    """Forward and backward part of what is trained."""
    forward, backward = step.trained.parts
    return forward, backward


def update(step: FusedStep | FusedTeachStep) -> None:
    """All that a step does after its last backward pass."""
    step.trained.finish()
    step.update()
