"""The augmentation of a run, from its settings: presets, switches, what is safe, recorded, said and refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fastensdistill.cli import main, parse
from fastensdistill.config import AUGMENTS, OF_PRESETS, DistillConfig, TeachConfig, TrainConfig
from fastensdistill.data import Augment, Dataset, Split, choose_augment, load_dataset
from fastensdistill.data.augment import augment_images, draw, make_tables
from fastensdistill.data.presets import SWITCHES, augmentation, doubts, of_preset, recorded, switches
from fastensdistill.errors import InputError
from fastensdistill.train import checkpoint
from fastensdistill.train.teach import TeachTrainer
from tests.networks import tiny
from tests.runs import NETWORK, dataset

STRONG: dict[str, Any] = {"trivial_augment": True, "cutout": 16}


def data_of(size: tuple[int, int] = (6, 5), channels: int = 3, mirrors: bool = False) -> Dataset:
    images = np.random.default_rng(0).integers(0, 256, (4, *size, channels), dtype=np.uint8)
    split = Split(images, np.arange(4, dtype=np.int64))
    return Dataset("set", split, split, split, tuple("abcd"), (0.5,) * channels, (0.2,) * channels, mirrors=mirrors)


PHOTOGRAPHS = data_of((32, 32), mirrors=True)


@pytest.mark.parametrize(("data", "setting", "expected"), [
    pytest.param(PHOTOGRAPHS, {}, Augment(4, True), id="photographs"),
    pytest.param(data_of((64, 64)), {}, Augment(8, False), id="symmetry-unknown"),
    pytest.param(data_of((28, 40)), {"flip": True}, Augment(3, True), id="flips-asked-for"),
    pytest.param(PHOTOGRAPHS, {"flip": False, "pad": 0}, Augment(0, False), id="all-off"),
    pytest.param(PHOTOGRAPHS, {"preset": "none"}, Augment(0, False), id="none"),
    pytest.param(PHOTOGRAPHS, {"preset": "none", "mixup": 0.2}, Augment(0, False, mixup=0.2), id="none-but-mixup"),
    pytest.param(PHOTOGRAPHS, {"preset": "strong"}, Augment(4, True, **STRONG), id="strong"),
    pytest.param(data_of((33, 65)), {"preset": "strong"}, Augment(4, False, **STRONG), id="strong-unknown"),
    pytest.param(PHOTOGRAPHS, {"preset": "strong", "cutout": 0, "trivial_augment": False, "erasing": 0.1},
                 Augment(4, True, erasing=0.1), id="strong-overridden"),
    pytest.param(PHOTOGRAPHS, {"resized_crop": [0.2, 1.0]}, Augment(0, True, (0.2, 1.0)), id="list-of-a-file"),
    pytest.param(data_of(), {"given": Augment(2, True, (0.2, 1.0))}, Augment(0, True, (0.2, 1.0)), id="given-crop"),
    pytest.param(data_of((32, 32)), {"given": Augment(2, True)}, Augment(2, True), id="given"),
    pytest.param(data_of(), {"given": Augment(2, True), "pad": 2, "flip": True}, Augment(2, True), id="given-twice"),
    pytest.param(data_of(), {"given": Augment(2, mixup=1.0), "mixup": 0.0}, Augment(2, mixup=1.0), id="given-mixup"),
])  # fmt: skip
def test_augmentation_is_what_is_set_and_else_a_preset(data, setting, expected):
    assert choose_augment(data, **setting) == expected


@pytest.mark.parametrize(("setting", "message"), [
    ({"pad": 5}, "pad is 5; expected a whole number from 0 to 4 for images of 6x5"),
    ({"cutout": 5}, "cutout is 5; expected a whole number from 0 to 4 for images of 6x5"),
    ({"preset": "storng"}, "unknown augment 'storng'; did you mean 'strong'"),
    ({"given": Augment(2, False), "flip": True}, "the config says flip=True; expected one of them"),
    ({"given": Augment(2, False), "pad": 1}, "the config says pad=1; expected one of them"),
    ({"given": Augment(2, False, mixup=1.0), "mixup": 0.2}, "the config says mixup=0.2; expected one of them"),
    ({"given": Augment(2, False), "preset": "strong"}, "the config says augment='strong'; expected one of them"),
])  # fmt: skip
def test_augmentation_that_does_not_fit_is_refused(setting, message):
    with pytest.raises(InputError, match=message):
        choose_augment(data_of(), **setting)


def test_digits_are_never_mirrored_and_turned_with_a_word_only():
    digits = load_dataset("digits", limit=10)
    assert choose_augment(digits) == Augment(1, flip=False)
    strong = choose_augment(digits, "strong")
    turned, black = doubts(strong, digits)
    assert "a turned 6 is a 9" in turned
    assert black.startswith("TrivialAugment moves images by up to 32 pixels: of images of 8x8 about 11 % are all black")
    assert doubts(choose_augment(digits), digits) == doubts(strong, PHOTOGRAPHS) == []
    assert len(doubts(strong, data_of((32, 32)))) == 1


def test_every_image_that_is_said_to_be_black_is():
    """The share that the words name, of 8x8 images with nothing black in them."""
    augment, index = Augment(0, False, trivial_augment=True), torch.zeros(10_000, dtype=torch.int64)
    draws = draw(len(index), augment, torch.Generator().manual_seed(0))
    pixels = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    out = augment_images(pixels, index, draws, augment, make_tables(augment, (8, 8), "cpu"))
    black = (out.flatten(1).amax(1) == 0).double().mean()
    assert abs(black - 0.106) < 0.015


WORDS = {
    "moved by up to 1 pixel, not mirrored": Augment(1, False),
    "not moved, mirrored at random": Augment(0, True),
    "moved by up to 4 pixels, mirrored at random, TrivialAugment, a cutout of 16 pixels": Augment(4, True, **STRONG),
    "a box of 25 to 100 % enlarged, not mirrored, a box erased from 30 %, mixup 0.2, cutmix 1": Augment(
        4, False, (0.25, 1.0), erasing=0.3, mixup=0.2, cutmix=1.0
    ),
}


@pytest.mark.parametrize("words", WORDS)
def test_in_words(words):
    assert augmentation(WORDS[words]) == words


def test_presets_and_switches_are_the_settings():
    for preset in AUGMENTS:
        assert set(of_preset(PHOTOGRAPHS, preset)) <= set(SWITCHES)
    assert set(switches(TrainConfig())) == {"preset", *SWITCHES}
    assert switches(DistillConfig(augment="strong", cutout=3))["cutout"] == 3


RECIPE: dict[str, Any] = {"members": 1, "epochs": 1, "batch_size": 8, "device": "cpu"}


def teach(**options: Any) -> TeachTrainer:
    config = TeachConfig(**RECIPE, **options.pop("settings", {}))
    return TeachTrainer([tiny(4)], dataset(), config, quiet=True, **options)


SETTINGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "strong": ({"augment": "strong"}, ["--augment", "strong"]),
    "switches": ({"trivial_augment": True, "cutout": 2, "erasing": 0.25, "resized_crop": (0.5, 1.0), "flip": True},
                 ["--trivial-augment", "--cutout", "2", "--erasing", "1/4", "--resized-crop", "0.5", "1", "--flip"]),
    "mixed": ({"mixup": 0.2, "cutmix": 1.0, "augment": "none"},
              ["--mixup", "0.2", "--cutmix", "1", "--augment", "none"]),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "flags"), SETTINGS.values(), ids=SETTINGS)
def test_python_flags_and_yaml_come_to_the_same(settings, flags, tmp_path):
    expected = choose_augment(dataset(), **switches(TrainConfig(**settings)))
    assert teach(settings=settings).augment == expected
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}))
    for command in ("teach", "distill"):
        for given in (flags, ["--config", str(file)]):
            assert choose_augment(dataset(), **switches(parse(command, given))) == expected


def test_a_run_records_its_augmentation_shows_it_and_is_resumed_with_it(tmp_path, capsys):
    """Its config.yaml says all of it: the same comes of it again, and a resumed run needs nothing else."""
    np.savez(tmp_path / "data.npz", **{
        f"{name}_{what}": getattr(getattr(dataset(), split), what)
        for name, split in (("train", "train"), ("valid", "validation"), ("test", "test"))
        for what in ("images", "labels")
    })  # fmt: skip
    run = ["teach", "--data", str(tmp_path / "data.npz"), *NETWORK, "--members", "1", "--epochs", "1",
           "--batch-size", "8", "--device", "cpu", "--out", str(tmp_path / "run")]  # fmt: skip
    assert main([*run, "--augment", "strong", "--cutout", "2", "--cutmix", "1"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "in training moved by up to 1 pixel, not mirrored, TrivialAugment, a cutout of 2 pixels, cutmix 1" in told
    assert "a turned 6 is a 9" in told
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    expected = Augment(1, False, trivial_augment=True, cutout=2, cutmix=1.0)
    assert recorded(saved, dataset()) == expected
    assert {name: saved[name] for name in SWITCHES} == {name: getattr(expected, name) for name in SWITCHES}
    assert (tmp_path / "run/augmentation.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "run/report.html").read_text()
    assert "<dt>augmentation</dt><dd>moved by up to 1 pixel, not mirrored, TrivialAugment" in page
    assert main([*run, "--resume"]) == 0
    capsys.readouterr()
    assert main([*run, "--resume", "--cutout", "0"]) == 2
    assert "was started with cutout=2, not 0" in capsys.readouterr().err
    assert main([*run, "--resume", "--augment", "standard"]) == 2  # though all that it would change is in config.yaml
    assert "was started with augment='strong', not 'standard'" in capsys.readouterr().err


def test_a_run_from_before_these_settings_goes_on(tmp_path):
    """Its fingerprint has only the crop and the flip."""
    trainer = teach(out=tmp_path / "run").fit()
    state = checkpoint.load_checkpoint(tmp_path / "run", trainer.fingerprint)
    older = {k: v for k, v in trainer.fingerprint.items() if k not in ("augment", *SWITCHES) or k in ("flip", "pad")}
    checkpoint.save_checkpoint(tmp_path / "run", state, older)
    assert teach(out=tmp_path / "run", resume=True).fit().phase == "finished"
    with pytest.raises(InputError, match="was started with cutout=0, not 2"):
        teach(settings={"cutout": 2}, out=tmp_path / "run", resume=True).fit()


def test_a_preset_on_top_of_a_file_that_sets_all_of_its_switches_is_refused(tmp_path):
    file = tmp_path / "config.yaml"
    every = {"augment": "standard", "pad": 1, "flip": False, "trivial_augment": False, "cutout": 0}
    file.write_text(yaml.safe_dump(every))
    with pytest.raises(InputError, match=r"--augment strong changes nothing, as .*config.yaml sets pad, flip"):
        parse("teach", ["--config", str(file), "--augment", "strong"])
    assert parse("teach", ["--config", str(file), "--cutout", "2"]).cutout == 2
    file.write_text(yaml.safe_dump({**every, "cutout": None}))
    assert parse("teach", ["--config", str(file), "--augment", "strong"]).augment == "strong"
    assert set(OF_PRESETS) == {name for preset in AUGMENTS for name in of_preset(PHOTOGRAPHS, preset)}
