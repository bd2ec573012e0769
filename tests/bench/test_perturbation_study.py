"""The study of the perturbation: its images, its differences, and that every kind of run leaves its numbers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from bench import perturbation_study as study
from fastensdistill.errors import InputError


@pytest.fixture
def cifar(tmp_path):
    """A file like CIFAR-100's, of three classes with 8 training and 2 test images each, in a shuffled order."""
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", 8), ("test", 2)):
        arrays[f"{split}_labels"] = generator.permutation(np.repeat([0, 3, 13], count)).astype(np.uint8)
        arrays[f"{split}_images"] = generator.integers(0, 256, (3 * count, 32, 32, 3)).astype(np.uint8)
    np.savez(tmp_path / "small.npz", **arrays)
    return tmp_path / "small.npz"


def test_its_splits_are_the_first_images_the_next_and_all_others(cifar):
    data = study.prepare(cifar, (3, 13), kept=2, size=16)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [4, 4, 12]
    arrays = np.load(cifar)
    found = arrays["train_images"][arrays["train_labels"] == 13].astype(int)
    corner = found[:, :2, 2:4].mean((1, 2))
    for split, images in ((data.train, corner[:2]), (data.validation, corner[2:4]), (data.test, corner[4:])):
        ours = split.images[split.labels == 1][: len(images), 0, 1]
        assert np.abs(ours - images).max() <= 0.5
    np.savez(cifar, train_images=found)
    with pytest.raises(InputError, match="lacks train_images or train_labels"):
        study.prepare(cifar, (3, 13))


def test_its_differences_are_paired_by_seed():
    def run(way, seed, nll):
        return {"condition": "fit", "way": way, "seed": seed, "accuracy": 0.5, "nll": nll, "cnll": nll}

    runs = [run("LatentBE", s, 1 + s) for s in range(5)] + [run("KD", s, 1 + s + d) for s, d in enumerate((1, 2, 3))]
    [row] = study.compare(runs)
    assert (row["first"], row["second"], row["nll"]["seeds"]) == ("LatentBE", "KD", 3)
    assert row["nll"]["mean"] == -2
    assert row["nll"]["error"] == pytest.approx(1 / 3**0.5)
    assert row["accuracy"]["error"] == 0
    assert "branch_kl" not in row
    *_, row = study.compare(runs + [r | {"condition": "not fit", "nll": 2 * r["nll"]} for r in runs])
    assert row["condition"] == "fit − not fit"
    assert row["nll"]["mean"] == 2
    assert row["nll"]["error"] == pytest.approx(1 / 3**0.5)


def test_every_kind_of_run_leaves_its_numbers(cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "KEPT", 2)
    monkeypatch.setattr(study, "NETWORK", {"blocks": (1,), "in_planes": 4})
    monkeypatch.setattr(study, "RECIPE", study.RECIPE | {"batch_size": 2})
    monkeypatch.setattr(study, "TEACHERS", {"fit": 1, "not fit": 1})
    monkeypatch.setattr(study, "STUDENT", {"epochs": 1, "warmup_epochs": 0})
    ways = ["teachers", *study.WAYS]
    monkeypatch.setattr(study, "prepare", lambda file, classes, prepare=study.prepare: prepare(file, classes, kept=2))
    for way in ways:
        study.do(study.Run("fit", way, 100), cifar, tmp_path, (3, 13))
    found = [json.loads((tmp_path / f"{study.Run('fit', way, 100).name}.json").read_text()) for way in ways]
    assert [run["way"] for run in found] == ways
    assert all(0 <= run["accuracy"] <= 1 and run["nll"] > 0 for run in found[1:])
    assert ["branch_kl" in run for run in found[1:]] == [False, True, True, True]
    assert study.picture([run | {"condition": c} for run in found[1:] for c in study.BOTH])[:4] == b"\x89PNG"
    text = study.report(found)
    assert "TDiv-SDiv 4/255 − noise 4/255" in text
