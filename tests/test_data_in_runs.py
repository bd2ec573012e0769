"""What a run makes of its data: the augmentation it is trained with, and grey images for colour networks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import yaml

from fastensdistill.cli import main
from fastensdistill.config import TeachConfig
from fastensdistill.data import Augment, Dataset, Split
from fastensdistill.errors import InputError
from fastensdistill.method.student import LatentBE
from fastensdistill.method.teachers import Teachers
from fastensdistill.train.distill import DistillTrainer
from fastensdistill.train.setup import seeded
from fastensdistill.train.teach import TeachTrainer
from fastensdistill.weights import load_network
from tests.networks import tiny
from tests.runs import dataset, make
from tests.untyped import untyped

RECIPE = TeachConfig(members=1, epochs=1, batch_size=8, device="cpu")


def teach(data: Dataset | None = None, **options):
    config = options.pop("config", RECIPE)
    return TeachTrainer([tiny(4)], data or dataset(), config, quiet=True, **options)


@pytest.mark.parametrize(("setting", "expected"), [
    ({}, Augment(1, False)), ({"flip": True}, Augment(1, True)), ({"pad": 0}, Augment(0, False)),
])  # fmt: skip
def test_the_augmentation_is_set_and_recorded(setting, expected, tmp_path):
    config = replace(RECIPE, **setting)
    trainer = teach(config=config, out=tmp_path / "run").fit()
    assert trainer.augment == expected == trainer.loaders[0].augment
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (saved["flip"], saved["pad"]) == (expected.flip, expected.pad)
    assert (config.flip, config.pad) == (setting.get("flip"), setting.get("pad"))  # what was handed over stays


def test_known_photographs_are_mirrored():
    assert teach(replace(dataset(), mirrors=True)).augment == Augment(1, True)


def test_an_augmentation_given_twice_and_differently_is_refused():
    assert teach(augment=Augment(2, True)).config.pad == 2
    with pytest.raises(InputError, match="the config says flip=False; expected one of them"):
        teach(config=replace(RECIPE, flip=False), augment=Augment(2, True))
    with pytest.raises(InputError, match="pad is 8; expected a whole number from 0 to 7"):
        teach(config=replace(RECIPE, pad=8))
    with pytest.raises(InputError, match="pad=-1: expected"):
        replace(RECIPE, pad=-1)


def test_a_run_is_resumed_with_its_augmentation_only(tmp_path):
    out = tmp_path / "run"
    teach(out=out, augment=Augment(1, True)).fit()
    with pytest.raises(InputError, match="was started with flip=True, not False"):
        teach(out=out, resume=True).fit()
    with pytest.raises(InputError, match="was started with pad=1, not 2"):
        teach(out=out, resume=True, augment=Augment(2, True)).fit()
    teach(out=out, resume=True, config=replace(RECIPE, flip=True)).fit()


def grey(data: Dataset) -> Dataset:
    parts = {part: getattr(data, part) for part in ("train", "validation", "test")}
    grey: Any = {part: Split(split.images[..., :1], split.labels) for part, split in parts.items()}
    return replace(data, **grey, mean=data.mean[:1], std=data.std[:1])


def test_grey_images_are_repeated_where_networks_take_colour():
    given = grey(dataset())
    trainer = teach(given)
    assert trainer.data.channels == 3
    np.testing.assert_array_equal(trainer.data.train.images, np.repeat(given.train.images, 3, 3))
    assert any("repeated 3 times" in note for note in trainer.data.notes)
    assert given.channels == 1
    distil = make(data=given, epochs=1).fit()
    assert distil.data.channels == 3
    assert distil.loaders[0].next()[0].shape[1] == 3


def test_colour_images_are_not_made_grey():
    def narrow():
        return tiny(4, mean=(0.5,), std=(0.2,))

    with pytest.raises(InputError, match=r"teacher 0 .*does not take images of shape \(3, 8, 8\)"):
        TeachTrainer([narrow()], dataset(), RECIPE, quiet=True)
    student = LatentBE(tiny(4), 2)
    with pytest.raises(InputError, match=r"teacher 0 .*does not take images of shape \(3, 8, 8\)"):
        DistillTrainer(student, Teachers([seeded(i, narrow) for i in range(2)]), grey(dataset()), quiet=True)


def test_a_torchvision_network_on_grey_images(tmp_path, capsys):
    data = grey(dataset(16))
    arrays = {f"{part}_{kind}": getattr(getattr(data, part), kind) for part in ("train", "test") for kind in
              ("images", "labels")}  # fmt: skip
    np.savez(tmp_path / "set.npz", **{k: v[..., 0] if k.endswith("images") else v for k, v in arrays.items()})
    common = ["--data", str(tmp_path / "set.npz")]
    out = tmp_path / "teacher"
    assert main(["teach", *common, "--model", "resnet18", "--members", "1", "--epochs", "1", "--batch-size", "4",
                 "--device", "cpu", "--out", str(out)]) == 0  # fmt: skip
    file = out / "teacher-0.safetensors"
    assert untyped(load_network(file)).normalize.mean.numel() == 3
    assert main(["evaluate", str(file), *common, "--device", "cpu"]) == 0
    assert main(["export", str(file), *common, "--out", str(tmp_path / "export"), "--formats", "safetensors"]) == 0
    assert main(["distill", *common, "--teachers", str(file), "--epochs", "1", "--batch-size", "4", "--device", "cpu",
                 "--student", "single", "--perturbation", "none", "--model", "preresnet", "--blocks", "1",
                 "--in-planes", "4", "--out", str(tmp_path / "student")]) == 0, capsys.readouterr().err  # fmt: skip
    saved = yaml.safe_load((tmp_path / "student/config.yaml").read_text())
    assert (saved["flip"], saved["pad"]) == (False, 1)
