"""How a step takes its batch: from a loader, and in several parts."""

import copy

import numpy as np
import pytest
import torch

from fastensdistill.data import DeviceLoader, Split
from fastensdistill.data.augment import Augment, Draws, Tables, draw
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.reference import ReferenceStep, TeachStep
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.errors import InputError
from tests.compare import check_close
from tests.engine.cases import CLASSES, batch, check_equal, loader, setting, steps, teach_setting
from tests.engine.meta import build, watched
from tests.network import models
from tests.untyped import untyped


@pytest.mark.parametrize("perturbation", ["tdiv-sdiv", "confods", "gaussian", "none"])
def test_both_engines_distil_on_a_loader(perturbation):
    student, teachers, config = setting(perturbation=perturbation)
    other = copy.deepcopy(student)
    one, two = ReferenceStep(student, teachers, config, num_classes=CLASSES), FusedStep(other, teachers, config)
    first, second = loader(0), loader(0)
    for _ in range(5):  # two batches in an epoch
        expected, actual = one.train_on(first), two.train_on(second)
        for name, value in expected.items():
            check_close(name, actual[name], value, 1e-8)
    check_equal(student, other, one, two, 1e-7)
    assert torch.equal(first.generator.get_state(), second.generator.get_state())


def test_both_engines_teach_on_loaders():
    networks, config = teach_setting(2)
    others = copy.deepcopy(networks)
    one, two = TeachStep(networks, config), FusedTeachStep(others, config, image_shape=(3, 6, 6))
    first, second = ([loader(m) for m in range(2)] for _ in range(2))
    for _ in range(3):
        check_close("losses", two.train_on(second)["loss"], one.train_on(first)["loss"], 1e-9)
    for network, other in zip(networks, others, strict=True):
        check_equal(network, other, one, two, 1e-8)
    with pytest.raises(InputError, match="3 loaders for 2 networks: expected as many"):
        two.train_on([*second, loader(2)])


def test_reading_the_batch_waits_for_nothing(monkeypatch):
    """As for the step: on the meta device a value that is read back raises."""
    step = build("wrn28_1", 4, M=2, K=2)
    for augment in (Augment(1), Augment(resized_crop=(0.3, 1.0), trivial_augment=True, erasing=0.5)):
        own = DeviceLoader(Split(np.zeros((9, 32, 32, 3), np.uint8), np.zeros(9, np.int64)), 4, device="cpu",
                           generator=torch.Generator(), augment=augment)  # fmt: skip
        own.images, own.labels, own._index = (t.to("meta") for t in (own.images, own.labels, own._index))
        own._permutation = own._permutation.to("meta")
        own._tables = Tables(*(None if table is None else table.to("meta") for table in own._tables))
        drawn = Draws(*(None if d is None else d.to("meta") for d in draw(4, augment, torch.Generator())))
        monkeypatch.setattr("fastensdistill.data.loader.draw", lambda *_, drawn=drawn: drawn)
        step.accept(own.batch_shape)
        step.loaders = (own,)
        with watched() as watch:
            step.body_on_loaders()
        assert watch.syncs == []


def test_a_loader_of_another_shape_is_refused():
    student, teachers, config = setting()
    step = FusedStep(student, teachers, config)
    step.train_on(loader(0))
    with pytest.raises(InputError, match=r"images have shape \(3, 3, 6, 6\); this step was built for \(4, 3, 6, 6\)"):
        step.train_on(loader(0, B=3))
    step.train_on(loader(0, B=8, share=(1, 2)))


CASES = [
    pytest.param("latent-be", "tdiv-sdiv", {}, id="paper"),
    pytest.param("latent-be", "ods", {}, id="noise-in-parts"),
    pytest.param("single", "gaussian", {}, id="mean-target"),
    pytest.param("hydra", "tdiv-sdiv", {}, id="heads"),
    pytest.param("latent-be", "none", {"student": models.odd, "teacher": models.odd}, id="unbiased-running-variance"),
]


@pytest.mark.parametrize(("kind", "perturbation", "networks"), CASES)
def test_both_engines_take_a_batch_in_parts(kind, perturbation, networks):
    K = 1 if kind == "single" else 2
    changes = {"perturbation": perturbation, "micro_batches": 3, "batch_size": 6, **networks}
    student, teachers, config = setting(kind, K=K, **changes)
    whole = copy.deepcopy(student)
    other = copy.deepcopy(student)
    one, two = ReferenceStep(student, teachers, config, num_classes=CLASSES), FusedStep(other, teachers, config)
    for expected, actual in zip(steps(one, 3, B=6), steps(two, 3, B=6), strict=True):
        for name, value in expected.items():
            check_close(name, actual[name], value, 1e-8)
    check_equal(student, other, one, two, 1e-7)
    config.micro_batches = 1
    steps(ReferenceStep(whole, teachers, config, num_classes=CLASSES), 3, B=6)
    apart = [(a - b).abs().max() for a, b in zip(whole.parameters(), student.parameters(), strict=True)]
    assert max(apart) > 1e-6, "parts are normalised by their own statistics"


def test_teachers_take_a_batch_in_parts():
    networks, config = teach_setting(2)
    config.micro_batches = 2
    others = copy.deepcopy(networks)
    one, two = TeachStep(networks, config), FusedTeachStep(others, config, image_shape=(3, 6, 6))
    for i in range(3):
        batches = [batch(10 * i + m, B=4) for m in range(2)]
        check_close("losses", two(batches)["loss"], one(batches)["loss"], 1e-9)
    for network, other in zip(networks, others, strict=True):
        check_equal(network, other, one, two, 1e-8)


def test_what_does_not_depend_on_batch_statistics_is_that_of_the_whole_batch():
    """Perturbed images and diversities; and equal parts make one update the update of a part."""
    student, teachers, config = setting(M=3, K=3)
    images, labels = batch(0, B=6)
    for engine in (ReferenceStep, FusedStep):
        shape = {"num_classes": CLASSES} if engine is ReferenceStep else {}
        found = []
        for parts in (1, 3):
            config.micro_batches = parts
            found.append(untyped(engine)(copy.deepcopy(student), teachers, config, **shape).perturb(images))
        whole, slices = found
        check_close("images", slices.images, whole.images, 1e-9)
        assert set(slices.diversities) == {"tdiv", "sdiv"}
        for name, value in whole.diversities.items():
            check_close(name, slices.diversities[name], value, 1e-9)

        ended = []
        for parts in (1, 2):
            config.micro_batches = parts
            own = copy.deepcopy(student)
            twice = (images[:3].repeat(parts, 1, 1, 1), labels[:3].repeat(parts))
            step = untyped(engine)(own, teachers, config, **shape)
            step.distil(step.perturbation(images[:1], teachers, own)._replace(images=twice[0]), twice[1])
            ended.append(own.state_dict())
        for name, value in ended[0].items():
            if not name.endswith("num_batches_tracked"):
                # also the running estimates: two moves towards equal statistics end where one does
                check_close(name, ended[1][name], value, 1e-9)


def test_unequal_parts_are_refused():
    student, teachers, config = setting(micro_batches=2, batch_size=4)
    for step in (
        ReferenceStep(copy.deepcopy(student), teachers, config, num_classes=CLASSES),
        FusedStep(student, teachers, config),
    ):
        with pytest.raises(InputError, match="3 images in micro_batches=2: expected equal parts"):
            step(*batch(0))
    with pytest.raises(InputError, match="batch_size=4 in micro_batches=3: expected equal parts"):
        setting(micro_batches=3, batch_size=4)


REFUSED = {
    "bytes": (lambda x, y: ((255 * x).byte(), y), r"images are torch.uint8 of shape \(3, 3, 6, 6\); expected floating"),
    "one image": (lambda x, y: (x[0], y), r"images are torch.float64 of shape \(3, 6, 6\); expected floating"),
    "an array": (lambda x, y: (x.numpy(), y), "images are a ndarray; expected a tensor"),
    "too few labels": (lambda x, y: (x, y[:2]), r"labels are torch.int64 of shape \(2,\); expected torch.int64 \(3,\)"),
    "short labels": (lambda x, y: (x, y.int()), r"labels are torch.int32 of shape \(3,\); expected torch.int64"),
    "a list of labels": (
        lambda x, y: (x, y.tolist()),
        "labels are a list; expected a tensor of int64, or of probabilities",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_batch_is_refused(case):
    change, words = REFUSED[case]
    student, teachers, config = setting()
    networks, own = teach_setting(1)
    for step in (
        ReferenceStep(copy.deepcopy(student), teachers, config, num_classes=CLASSES),
        FusedStep(student, teachers, config),
    ):
        with pytest.raises(InputError, match=words):
            step(*change(*batch(0)))
    teaching = (TeachStep(copy.deepcopy(networks), own), FusedTeachStep(networks, own, image_shape=(3, 6, 6)))
    for teach in teaching:
        with pytest.raises(InputError, match=words):
            teach([change(*batch(0))])
