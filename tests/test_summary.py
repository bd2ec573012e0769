"""The block that a run begins with, and what it records in its settings and cards."""

import itertools

import numpy as np
import pytest
import yaml

from fastensdistill.config import DistillConfig, TeachConfig
from fastensdistill.data.augment import Augment
from fastensdistill.data.sources import Dataset, Split
from fastensdistill.method.student import STUDENTS
from fastensdistill.models import create_model
from fastensdistill.tensor_files import read_card
from fastensdistill.train import summary
from fastensdistill.train.distill import DistillTrainer
from fastensdistill.train.teach import TeachTrainer
from tests.runs import dataset
from tests.untyped import untyped


def model(widen=1):
    return create_model("preresnet", 4, blocks=(1,), in_planes=4, widen=widen)


def block_of(text):
    """Of what a run says, its first line and those indented below it."""
    first, *rest = text.splitlines(keepends=True)
    return first + "".join(itertools.takewhile(lambda line: line.startswith(" "), rest))


def lines_of(block):
    """The block's lines by their labels, joined where they were broken."""
    found: dict[str, str] = {}
    label = ""
    for line in block.splitlines()[1:]:
        label = line[2:12].strip() or label
        found[label] = " ".join([found[label], line[12:]]) if label in found and not line[2:12].strip() else line[12:]
    return found


@pytest.mark.parametrize("kind", STUDENTS)
def test_what_is_said_of_a_student(kind, tmp_path, capsys):
    branches = 1 if kind == "single" else 2
    perturbation = "tdiv" if kind == "single" else "tdiv-sdiv"
    stepped = (
        {"schedule": "step", "milestones": (0.5, 0.75), "gamma": 0.1, "optimizer": "adamw"} if kind == "hydra" else {}
    )
    config = DistillConfig(
        epochs=1, batch_size=8, student=kind, device="cpu", seed=3, perturbation=perturbation, **untyped(stepped)
    )
    student, teachers = STUDENTS[kind](model(), branches), [model(), model(2)]
    trainer = DistillTrainer(student, teachers, dataset(), config, out=tmp_path / "run", augment=Augment(2, False))
    trainer.notes = ["a note"]
    trainer.fit()
    block = block_of(capsys.readouterr().err)
    assert max(map(len, block.splitlines()[1:])) <= 80  # the first has a path
    assert len(block.splitlines()) <= 14
    told = lines_of(block)
    assert block.startswith(f"distill: a student of 2 teachers, seed 3, into {tmp_path / 'run'}\n")
    rate = "learning rate 0.1, warm-up 0.1 epochs"
    rate = f"AdamW, {rate}, then times 0.1 at 50 75 % of the run" if stepped else rate
    assert told["recipe"] == f"1 epoch of 5 steps, batch 8, {rate}"
    assert told["data"] == "quadrants: 40 training, 24 validation, 24 test images"
    counts = np.bincount(dataset().train.labels, minlength=4)
    low, high = (f"{n} ({'abcd'[list(counts).index(n)]})" for n in (counts.min(), counts.max()))
    assert told["classes"] == f"4: a, b, c, d; training images: {low} to {high}"
    assert told["images"] == "8x8, 3 channels; in training moved by up to 2 pixels, not mirrored"
    assert told["engine"] == f"{trainer.engine}; precision fp32"
    one, two = (sum(p.numel() for p in model(w).parameters()) for w in (1, 2))
    accuracies = " ".join(f"{100 * a:.2f}" for a in trainer.about_teachers()["teacher_accuracy"])
    together = 100 * trainer.about_teachers()["ensemble_accuracy"]
    assert told["teachers"] == (
        f"1 of preresnet (blocks 1, widen 1, in planes 4), {one:,} parameters; "
        f"1 of preresnet (blocks 1, widen 2, in planes 4), {two:,} parameters; "
        f"validation {accuracies} %, their ensemble {together:.2f} %"
    )
    assert told["student"].startswith(f"{kind}, {branches} branch")
    assert told["student"].endswith(f"perturbation {perturbation} of size 1/255")
    assert told["note"] == "a note"


def test_what_is_said_of_teachers(capsys):
    config = TeachConfig(epochs=1, batch_size=8, members=2, device="cpu")
    TeachTrainer([model(), model()], dataset(), config, augment=Augment(0, True)).fit()
    told = lines_of(block_of(capsys.readouterr().err))
    assert told["model"].startswith("2 of preresnet (blocks 1, widen 1, in planes 4), ")
    assert told["images"].endswith("; in training not moved, mirrored at random")
    assert "teachers" not in told
    TeachTrainer([model(), model()], dataset(), config, quiet=True).fit()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("classes", "labels", "expected"),
    [
        (3, [0, 1, 2], "3: n0, n1, n2; training images: 1 each"),
        (7, [0] * 3 + [1, 2, 3, 4, 5], "7: n0, n1, n2, ..., n6; training images: 0 (n6) to 3 (n0)"),
    ],
    ids=["balanced", "one without images"],
)
def test_images_per_class(classes, labels, expected):
    def split(values):
        return Split(np.zeros((len(values), 8, 8, 1), np.uint8), np.array(values))

    names = tuple(f"n{i}" for i in range(classes))
    assert summary.per_class(Dataset("d", split(labels), split([0]), split([0]), names, (0.5,), (0.5,))) == expected


def test_settings_and_cards_say_what_was_used(tmp_path):
    np.savez(tmp_path / "d.npz", train_images=dataset().train.images, train_labels=dataset().train.labels,
             test_images=dataset().test.images, test_labels=dataset().test.labels)  # fmt: skip
    config = TeachConfig(epochs=1, batch_size=8, members=1, device="cpu")
    TeachTrainer([model()], tmp_path / "d.npz", config, out=tmp_path / "run", quiet=True).fit()
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["engine"], saved["precision"]) == ("reference", "fp32")
    card = read_card(tmp_path / "run" / "teacher-0.safetensors")
    assert (card["data"], card["classes"], card["image_size"], card["channels"]) == ("d.npz", list("0123"), [8, 8], 3)
    assert card["source"] == {"data": str(tmp_path / "d.npz")}
