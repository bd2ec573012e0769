"""The data sets by name and made by hand: what each holds, how it is split, and every refusal."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from fastensdistill.data import Dataset, Split, load_dataset
from fastensdistill.errors import InputError
from tests.datasets import arrays, one_line, same
from tests.untyped import untyped


def test_digits():
    from sklearn.datasets import load_digits

    data = load_dataset("digits", seed=1)
    assert (len(data.train), len(data.validation), len(data.test)) == (300, 300, 1197)
    assert data.classes == tuple("0123456789")
    assert (data.num_classes, data.channels, data.image_size) == (10, 1, (8, 8))
    assert set(data.train.labels.tolist()) == set(range(10))

    scans = load_digits()
    ours = np.concatenate([data.train.images, data.validation.images, data.test.images])[..., 0]
    labels = np.concatenate([data.train.labels, data.validation.labels, data.test.labels])
    assert (ours.min(), ours.max()) == (0, 255)
    order = np.random.default_rng(20220617).permutation(1797)  # the order is part of the set: results depend on it
    np.testing.assert_array_equal(np.rint(ours * (16 / 255)), scans.images[order])
    np.testing.assert_array_equal(labels, scans.target[order])
    same(load_dataset("digits", seed=2).train, data.train.images, data.train.labels)


def test_measured_statistics_are_of_the_training_split():
    data = load_dataset("digits", limit=100)
    pixels = data.train.images.astype(np.float64) / 255
    assert data.mean == (round(float(pixels.mean()), 4),)
    assert data.std == (round(float(pixels.std()), 4),)


def test_limit_comes_after_validation():
    whole, few = load_dataset("digits", validation=200), load_dataset("digits", validation=200, limit=37)
    assert (len(whole.train), len(whole.validation)) == (400, 200)
    same(few.train, whole.train.images[:37], whole.train.labels[:37])
    same(few.validation, whole.validation.images, whole.validation.labels)
    same(few.test, whole.test.images, whole.test.labels)


ARGUMENTS = [
    pytest.param({"name": "digit"}, "unknown dataset 'digit'; did you mean 'digits'", id="near-name"),
    pytest.param({"name": "cifra100"}, "unknown dataset 'cifra100'; did you mean 'cifar100'", id="swapped-letters"),
    pytest.param({"name": "n" * 300}, "there is no 'nnn", id="too-long-a-name"),
    pytest.param({"name": "missing.npz"}, "there is no 'missing.npz'; expected an .npz file", id="no-file"),
    pytest.param({"limit": 0}, "limit is 0; expected a whole number of at least 1", id="limit-0"),
    pytest.param({"limit": -2}, "limit is -2", id="limit-negative"),
    pytest.param({"limit": 2.5}, "limit is 2.5", id="limit-float"),
    pytest.param({"limit": 301}, "limit is 301; expected at most the 300 training images", id="limit-large"),
    pytest.param({"validation": 0}, "validation is 0; expected a whole number of at least 1", id="validation-0"),
    pytest.param({"validation": 600}, "validation is 600; expected less than the 600", id="validation-all"),
    pytest.param({"image_size": 16}, "image_size is 16 for 'digits'; expected it only for a folder", id="image-size"),
    pytest.param({"name": "cifar10"}, "cifar10 needs root", id="no-root"),
    pytest.param({"name": "cifar10", "root": "nowhere"}, "not in 'nowhere'.*CIFAR10.*download=True", id="empty-root"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS)
def test_arguments_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_dataset(**({"name": "digits"} | arguments))
    one_line(error)
    assert not list(tmp_path.iterdir())


def test_damaged_cifar_is_refused_before_it_is_unpickled(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")  # would run a command if it were unpickled
    with pytest.raises(InputError, match="not whole; get it with"):
        load_dataset("cifar100", root=tmp_path)


@pytest.mark.parametrize(("name", "class_name", "mean"), [
    pytest.param("cifar10", "CIFAR10", (0.4915, 0.4821, 0.4464), id="cifar10"),
    pytest.param("cifar100", "CIFAR100", (0.5072, 0.4866, 0.4410), id="cifar100"),
])  # fmt: skip
def test_cifar_splits(name, class_name, mean, tmp_path, monkeypatch):
    import torchvision

    class Fake:
        classes = ("apple", "bee", "cat")

        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert (root, download) == (str(tmp_path), False)
            count = 5_300 if train else 40
            generator = np.random.default_rng(count)
            self.data = generator.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
            self.targets = generator.integers(0, 3, count).tolist()

    monkeypatch.setattr(torchvision.datasets, class_name, Fake)
    data, fake = load_dataset(name, root=tmp_path), Fake(str(tmp_path), True, False)
    assert (data.name, data.classes, data.mean) == (name, ("apple", "bee", "cat"), mean)
    same(data.train, fake.data[:300], np.array(fake.targets[:300]))
    same(data.validation, fake.data[300:], np.array(fake.targets[300:]))
    assert len(data.test) == 40
    assert len(load_dataset(name, root=tmp_path, validation=10).validation) == 10


IMAGES, LABELS = arrays()["train_images"], arrays()["train_labels"]


def test_importing_the_package_loads_no_scikit_learn_and_no_torchvision():
    import subprocess

    code = "import sys, fastensdistill.data as d; print([m for m in ('sklearn', 'torchvision') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


BY_HAND = [
    pytest.param({"train": Split(IMAGES / 255, LABELS)}, "train_images are float64", id="float-images"),
    pytest.param({"train": Split(IMAGES, LABELS + 1)}, r"train_labels\[\d+\] is 4; expected", id="label-too-big"),
    pytest.param({"test": Split(IMAGES.transpose(0, 3, 1, 2), LABELS)}, r"expected \(N, H, W, C\)", id="nchw"),
    pytest.param({"test": Split(IMAGES[:, :4], LABELS)}, r"test images are \(4, 6, 3\)", id="two-sizes"),
    pytest.param({"validation": Split(IMAGES[:0], LABELS[:0])}, "validation split is empty", id="empty"),
    pytest.param(
        {"test": untyped(Split)(torch.from_numpy(IMAGES), LABELS)}, "a Tensor; expected a NumPy array", id="tensor"
    ),
    pytest.param({"mean": (0.5,)}, "expected one of each for 3 channels", id="statistics"),
    pytest.param({"std": (0.2, 0.2, 0.0)}, "std above 0", id="no-deviation"),
    pytest.param({"classes": ("a",)}, "at least 2", id="one-class"),
]


@pytest.mark.parametrize(("change", "message"), BY_HAND)
def test_a_data_set_made_by_hand_is_checked(change, message):
    parts = {name: Split(IMAGES, LABELS) for name in ("train", "validation", "test")}
    whole = {"name": "mine", **parts, "classes": tuple("abcd"), "mean": (0.5,) * 3, "std": (0.2,) * 3}
    assert Dataset(**untyped(whole)).image_size == (5, 6)
    with pytest.raises(InputError, match=message) as error:
        Dataset(**(whole | change))
    assert "mine" in one_line(error)
