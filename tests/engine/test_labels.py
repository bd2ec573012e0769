"""Labels as probabilities: the same numbers in all engines, given or read by a loader, and what is refused."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastensdistill.engine.captured import CapturedReferenceStep, CapturedTeachStep
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.reference import ReferenceStep, TeachStep
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.errors import InputError
from tests.compare import check_close
from tests.engine.cases import CLASSES, batch, check_equal, loader, setting, teach_setting
from tests.kernels.losses import soft

KINDS = {"latent-be": 3, "batch-ensemble": 2, "single": 1, "hydra": 2}  # with K; two teachers


def given(i: int, B: int = 4) -> tuple[Tensor, Tensor]:
    images, labels = batch(i, B)
    return images, soft(labels, CLASSES)


@pytest.mark.parametrize("reads", [False, True], ids=["given", "read"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_engines_distil_with_probabilities(kind, reads):
    changes = {"perturbation": "gaussian"} if kind == "single" else {}
    student, teachers, config = setting(kind, K=KINDS[kind], alpha=0.4, micro_batches=2, batch_size=4, **changes)
    students = [student, copy.deepcopy(student), copy.deepcopy(student)]
    steps: tuple[Any, ...] = (
        ReferenceStep(students[0], teachers, config, num_classes=CLASSES),
        CapturedReferenceStep(students[1], teachers, config, num_classes=CLASSES),
        FusedStep(students[2], teachers, config),
    )
    loaders = [loader(0, mixup=0.5) for _ in steps]
    for i in range(3):
        expected, *others = (
            step.train_on(own) if reads else step(*given(i)) for step, own in zip(steps, loaders, strict=True)
        )
        for actual in others:
            for name, value in expected.items():
                check_close(name, actual[name], value, 1e-9)
    for other, step in zip(students[1:], steps[1:], strict=True):
        check_equal(student, other, steps[0], step, 1e-8)


@pytest.mark.parametrize("reads", [False, True], ids=["given", "read"])
def test_all_engines_teach_with_probabilities(reads):
    networks, config = teach_setting(2)
    config.micro_batches = 2
    every = [networks, copy.deepcopy(networks), copy.deepcopy(networks)]
    steps: tuple[Any, ...] = (
        TeachStep(every[0], config),
        CapturedTeachStep(every[1], config),
        FusedTeachStep(every[2], config, image_shape=(3, 6, 6)),
    )
    loaders = [[loader(m, mixup=0.5) for m in range(2)] for _ in steps]
    for i in range(3):
        expected, *others = (
            step.train_on(own)["loss"] if reads else step([given(2 * i + m) for m in range(2)])["loss"]
            for step, own in zip(steps, loaders, strict=True)
        )
        for actual in others:
            check_close("losses", actual, expected, 1e-9)
    for own, step in zip(every[1:], steps[1:], strict=True):
        for network, other in zip(networks, own, strict=True):
            check_equal(network, other, steps[0], step, 1e-8)


def test_one_hot_probabilities_are_the_classes():
    """And probabilities of another precision are those."""
    found = []
    for change in (lambda y: y, lambda y: F.one_hot(y, CLASSES).double(), lambda y: F.one_hot(y, CLASSES).bfloat16()):
        student, teachers, config = setting(alpha=0.4)
        step = FusedStep(student, teachers, config)
        found.append([step(images, change(labels)) for images, labels in (batch(i) for i in range(2))])
        reference = ReferenceStep(student, teachers, config, num_classes=CLASSES)
        reference(batch(2)[0], change(batch(2)[1]))
    for other in found[1:]:
        for expected, actual in zip(found[0], other, strict=True):
            for name, value in expected.items():
                check_close(name, actual[name], value, 1e-12)


def test_the_loss_is_that_of_the_probabilities():
    networks, config = teach_setting(1)
    images, p = given(0)
    expected = F.cross_entropy(copy.deepcopy(networks[0]).train()(images), p)
    check_close("loss", TeachStep(networks, config)([(images, p)])["loss"][0], expected.detach(), 1e-12)


REFUSED = {
    "negative": (lambda p: p - 0.2, "labels hold -0.2; expected probabilities: logits"),
    "a NaN": (lambda p: p * torch.nan, "labels hold values that are NaN or infinite; expected probabilities"),
    "other sums": (lambda p: 1.1 * p, "labels of an image add up to 1.1; expected probabilities, which add up to 1"),
    "other classes": (lambda p: F.pad(p, (0, 1)), r"labels have shape \(3, 6\); expected \(3, 5\), a probability for"),
    "other images": (lambda p: p[:2], r"labels are torch.float64 of shape \(2, 5\); expected probabilities \(3, clas"),
    "one per image": (lambda p: p[:, 0], r"of shape \(3,\); expected probabilities \(3, classes\), or torch.int64"),
    "whole numbers": (lambda p: p.ceil().long(), r"shape \(3, 5\); expected torch.int64 \(3,\): labels.argmax\(1\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_are_no_probabilities_is_refused(case):
    change, words = REFUSED[case]
    images, p = batch(0)[0], torch.eye(CLASSES, dtype=torch.float64)[:3]
    student, teachers, config = setting()
    for step in (
        ReferenceStep(copy.deepcopy(student), teachers, config, num_classes=CLASSES),
        CapturedReferenceStep(copy.deepcopy(student), teachers, config, num_classes=CLASSES),
        FusedStep(student, teachers, config),
    ):
        with pytest.raises(InputError, match=words):
            step(images, change(p))
    networks, own = teach_setting(1)
    for teach in (
        TeachStep(copy.deepcopy(networks), own),
        CapturedTeachStep(copy.deepcopy(networks), own),
        FusedTeachStep(networks, own, image_shape=(3, 6, 6)),
    ):
        with pytest.raises(InputError, match=words):
            teach([(images, change(p))])


def test_a_step_that_was_built_for_the_other_kind_refuses():
    student, teachers, config = setting()
    images, labels = batch(0)
    for first, later in ((labels, soft(labels, CLASSES)), (soft(labels, CLASSES), labels)):
        for step in (
            CapturedReferenceStep(copy.deepcopy(student), teachers, config, num_classes=CLASSES),
            FusedStep(copy.deepcopy(student), teachers, config),
        ):
            step.perturb(images)
            step(images, first)
            with pytest.raises(InputError, match=r"labels are torch.* of shape .*; this step was built for torch\."):
                step(images, later)
            step(images, first)


def test_later_probabilities_of_other_classes_are_refused():
    networks, config = teach_setting(1)
    images, p = given(0)
    for step in (TeachStep(copy.deepcopy(networks), config), FusedTeachStep(networks, config, image_shape=(3, 6, 6))):
        step([(images, p)])
        with pytest.raises(InputError, match="labels "):
            step([(images, F.pad(p, (0, 1)))])
