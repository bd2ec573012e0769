"""Every setting of the loss: the definition's numbers in the reference step, the reference step's in all others."""

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fastensdistill.config import DistillConfig, TeachConfig
from fastensdistill.engine.captured import CapturedReferenceStep, CapturedTeachStep
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.reference import ReferenceStep, TeachStep
from fastensdistill.engine.select import distillation_step
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.engine.verify import verify_distillation, verify_teaching
from fastensdistill.errors import InputError
from tests.compare import check_close
from tests.engine.cases import CLASSES, batch, check_equal, setting, teach_setting
from tests.kernels.losses import definition, soft

SETTINGS: dict[str, dict[str, Any]] = {
    "smoothing": {"label_smoothing": 0.1, "alpha": 0.4},
    "standardised": {"standardize_logits": True, "temperature": 2.0},
    "weights": {"teacher_weights": (2.0, 0.0, 1.0)},
    "one-to-one": {"target": "one-to-one", "alpha": 0.7},
    "mean": {"target": "mean"},
    "everything": {"label_smoothing": 0.2, "alpha": 0.5, "standardize_logits": True, "teacher_weights": (1.0, 4.0, 0.5),
                   "target": "mean", "micro_batches": 2, "batch_size": 4},
}  # fmt: skip
KINDS = {"latent-be": 4, "batch-ensemble": 2, "single": 1, "hydra": 2}  # with K; three teachers


def parts(kind: str, **changes: Any):
    changes = {"perturbation": "gaussian"} | changes if kind == "single" else changes
    return setting(kind, M=3, K=KINDS[kind], **changes)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_engines_take_it(kind, name):
    student, teachers, config = parts(kind, **SETTINGS[name])
    students = [student, copy.deepcopy(student), copy.deepcopy(student)]
    steps: tuple[Any, ...] = (
        ReferenceStep(students[0], teachers, config, num_classes=CLASSES),
        CapturedReferenceStep(students[1], teachers, config, num_classes=CLASSES),
        FusedStep(students[2], teachers, config),
    )
    for i in range(2):
        images, labels = batch(i, B=4)
        y = soft(labels, CLASSES) if name == "everything" else labels
        expected, *others = (step(images, y) for step in steps)
        for actual in others:
            for what, value in expected.items():
                check_close(what, actual[what], value, 1e-9)
    for other, step in zip(students[1:], steps[1:], strict=True):
        check_equal(student, other, steps[0], step, 1e-8)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", ["latent-be", "single"])
def test_the_reference_step_takes_the_definition(kind, name):
    changes = {k: v for k, v in SETTINGS[name].items() if k not in ("micro_batches", "batch_size")}
    student, teachers, config = parts(kind, perturbation="none", **changes)
    images, labels = batch(0)
    with torch.no_grad():
        logits = teachers(images), copy.deepcopy(student).train()(images)
    target = changes.get("target") or ("mean" if kind == "single" else "one-to-one")
    options = {k: changes[k] for k in ("label_smoothing", "standardize_logits", "teacher_weights") if k in changes}
    expected = definition(*logits, labels, config.temperature, config.alpha, target, **options)
    actual = ReferenceStep(student, teachers, config, num_classes=CLASSES)(images, labels)
    for what, value in zip(("loss", "loss_kd", "loss_ce"), expected, strict=False):
        check_close(what, actual[what], value, 1e-9)


@pytest.mark.parametrize("as_soft", [False, True], ids=["classes", "probabilities"])
def test_teachers_are_smoothed_by_all_engines(as_soft):
    networks, config = teach_setting(2)
    config.label_smoothing = 0.15
    every = [networks, copy.deepcopy(networks), copy.deepcopy(networks)]
    before = copy.deepcopy(networks)
    steps: tuple[Any, ...] = (
        TeachStep(every[0], config),
        CapturedTeachStep(every[1], config),
        FusedTeachStep(every[2], config, image_shape=(3, 6, 6)),
    )
    for i in range(2):
        batches = [batch(2 * i + m) for m in range(2)]
        batches = [(x, soft(y, CLASSES)) for x, y in batches] if as_soft else batches
        expected, *others = (step(batches)["loss"] for step in steps)
        for actual in others:
            check_close("losses", actual, expected, 1e-9)
        if i == 0:
            wanted = [
                F.cross_entropy(network.train()(x), y, label_smoothing=0.15).detach()
                for network, (x, y) in zip(before, batches, strict=True)
            ]
            check_close("losses", expected, torch.stack(wanted), 1e-12)
    for own, step in zip(every[1:], steps[1:], strict=True):
        for network, other in zip(networks, own, strict=True):
            check_equal(network, other, steps[0], step, 1e-8)


def test_the_comparison_before_a_run_takes_them():
    student, teachers, config = parts("latent-be", dtype=torch.float32, **SETTINGS["everything"], mixup=0.2)
    assert max(verify_distillation(student, teachers, config, (3, 6, 6), CLASSES).values()) < 1e-3
    networks, own = teach_setting(1, torch.float32)
    own.label_smoothing, own.cutmix = 0.1, 1.0
    assert max(verify_teaching(networks, own, (3, 6, 6)).values()) < 1e-3


def test_the_comparison_before_a_run_mixes_labels_where_the_run_does(monkeypatch):
    seen = []

    def losses(self, images, labels):
        seen.append(labels)
        raise ZeroDivisionError

    monkeypatch.setattr(ReferenceStep, "losses", losses)
    for mixup in (0.0, 0.2):
        student, teachers, config = setting(perturbation="none", mixup=mixup, dtype=torch.float32)
        with pytest.raises(ZeroDivisionError):
            verify_distillation(student, teachers, config, (3, 6, 6), CLASSES)
    assert [labels.ndim for labels in seen] == [1, 2]
    check_close("sums", seen[1].sum(1), torch.ones(len(seen[1])), 1e-6)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "smoothing above": (TeachConfig, {"label_smoothing": 1.0}, "label_smoothing=1.0: expected a number of at least 0"),
    "smoothing below": (TeachConfig, {"label_smoothing": -0.1}, "label_smoothing=-0.1: expected a number of at least"),
    "smoothed for nothing": (DistillConfig, {"label_smoothing": 0.1}, "label_smoothing=0.1 with alpha=1, where labels"),
    "target": (DistillConfig, {"target": "avg"}, "unknown target 'avg'"),
    "negative": (DistillConfig, {"teacher_weights": (1, -1)}, r"teacher_weights=\(1, -1\): expected numbers from 0 to"),
    "all zero": (DistillConfig, {"teacher_weights": (0, 0)}, "teacher_weights=0 0: expected one above 0"),
    "no truth": (DistillConfig, {"standardize_logits": 2}, "standardize_logits=2: expected true or false"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    config, changes, words = REFUSED[case]
    with pytest.raises(InputError, match=words) as raised:
        config(**changes)
    assert "\n" not in str(raised.value)


WEIGHTS: dict[str, tuple[tuple[float, ...], dict[str, Any], str]] = {
    "count": ((1, 2), {}, "teacher_weights has 2 numbers for 3 teachers; expected one for each"),
    "none learnt from": ((0, 0, 1), {"K": 2}, "teacher_weights of the teachers that 2 branches learn from are all 0"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_do_not_fit_the_teachers_are_refused_by_every_engine(case):
    weights, changes, words = WEIGHTS[case]
    student, teachers, config = setting(M=3, **({"K": 3} | changes), teacher_weights=weights)
    for build in (
        lambda: ReferenceStep(student, teachers, config, num_classes=CLASSES),
        lambda: CapturedReferenceStep(student, teachers, config, num_classes=CLASSES),
        lambda: FusedStep(student, teachers, config),
        lambda: distillation_step(student, teachers, config, (3, 6, 6), CLASSES),
    ):
        with pytest.raises(InputError, match=words):
            build()
