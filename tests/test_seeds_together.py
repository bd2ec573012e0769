"""Students of several seeds in one step, a trainer for each: file by file the runs that they are alone."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastensdistill.config import DistillRun
from fastensdistill.engine import seeds_gain, select
from fastensdistill.engine.seeds import SeedsStep
from fastensdistill.errors import InputError
from fastensdistill.method.student import STUDENTS
from fastensdistill.method.teachers import Teachers
from fastensdistill.train import checkpoint, together
from fastensdistill.train.distill import DistillTrainer
from fastensdistill.train.seeds import train_seeds
from fastensdistill.train.setup import seeded
from fastensdistill.train.stop import Interrupted
from fastensdistill.train.together import chosen, one_step, train_together
from tests.runs import StopAt, dataset
from tests.untyped import untyped

SEEDS = (5, 1)
TOLERANCE = 1e-6


def recipe(out: Path, **settings: Any) -> DistillRun:
    given: dict[str, Any] = {"epochs": 3, "batch_size": 8, "learning_rate": 0.05, "device": "cpu", "engine": "fused",
                             "student": "latent-be", "branches": 2, "seeds": SEEDS, "out": out, "mixup": 0.4,
                             "cutout": 3, "ema_decay": 0.9, "clip_norm": 1.0}  # fmt: skip
    return DistillRun(**{**given, **settings})


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 4),
    )  # fmt: skip


def trainer_of(own: DistillRun, teachers: int = 10) -> DistillTrainer:
    networks = Teachers([seeded(teachers + i, small) for i in range(2)])
    student = seeded(own.seed, lambda: STUDENTS[own.student](small(), 2))
    trainer = DistillTrainer(student, networks, dataset(), own, out=own.out, resume=own.resume)
    trainer.saved_config = own
    return trainer


@pytest.fixture(scope="module", autouse=True)
def unchecked():
    """The comparison with the reference engine, which takes longer than these runs, has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "verify_distillation", lambda *_: {})
        yield


@pytest.fixture
def at_once(monkeypatch):
    """How many steps were made with several students."""
    inner, count = SeedsStep.train_on, [0]

    def train_on(self, loaders):
        count[0] += 1
        return inner(self, loaders)

    monkeypatch.setattr(SeedsStep, "train_on", train_on)
    return count


def records(folder: Path, stopped: bool) -> list[dict[str, Any]]:
    """Of a run, all but how fast it was; where it was ``stopped``, whose last steps have a record, its validations."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    kept = [line for line in lines if not stopped or line["event"] != "train"]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in kept]


def flat(value: Any) -> tuple[list[Any], list[float]]:
    """What a record says, and its numbers that are no integers apart from that."""
    if isinstance(value, float):
        return ["float"], [value]
    if isinstance(value, dict):
        value = [part for pair in sorted(value.items()) for part in pair]
    if not isinstance(value, list):
        return [value], []
    parts = [flat(part) for part in value]
    return [x for words, _ in parts for x in words], [x for _, numbers in parts for x in numbers]


def check_same_run(one: Path, two: Path, stopped: bool) -> None:
    """Every file of two runs: names, tensors, records, settings but for the folder."""
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in two.iterdir()}
    for name in names:
        if name.endswith(".safetensors"):
            a, b = load_file(one / name), load_file(two / name)
            assert a.keys() == b.keys(), name
            for key in a:
                if a[key].is_floating_point():
                    torch.testing.assert_close(a[key], b[key], rtol=TOLERANCE, atol=TOLERANCE, msg=f"{name}: {key}")
                else:
                    assert torch.equal(a[key], b[key]), f"{name}: {key}"
    (words, numbers), (others, expected) = flat(records(one, stopped)), flat(records(two, stopped))
    assert words == others
    torch.testing.assert_close(torch.tensor(numbers), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    settings = [(folder / "config.yaml").read_text().replace(str(folder), "") for folder in (one, two)]
    assert settings[0] == settings[1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The runs of the seeds one after another, as ever on a CPU."""
    out = tmp_path_factory.mktemp("alone") / "students"
    ended, failed = train_seeds(recipe(out), trainer_of)
    assert ([path.name for path in ended], failed) == ([f"seed-{seed}" for seed in SEEDS], [])
    return out


def check_all(out: Path, alone: Path, seeds: tuple[int, ...] = SEEDS, stopped: bool = False) -> None:
    for seed in seeds:
        check_same_run(out / f"seed-{seed}", alone / f"seed-{seed}", stopped)


def test_at_once_is_one_after_another(alone, tmp_path, at_once, capsys):
    ended, failed = train_seeds(recipe(tmp_path / "x"), trainer_of, together=True)
    assert ([path.name for path in ended], failed, at_once) == ([f"seed-{seed}" for seed in SEEDS], [], [15])
    check_all(tmp_path / "x", alone)
    assert {path.name for path in (tmp_path / "x" / "seed-5").iterdir()} >= {
        "student.safetensors", "network.safetensors", "last.safetensors", "ema.safetensors", "last-ema.safetensors",
    }  # fmt: skip
    said = capsys.readouterr().err
    assert "seeds 5 1 at once\n" in said
    assert all(f"seed {seed}: kept epoch" in said for seed in SEEDS)
    assert not list((tmp_path / "x").rglob(".lock"))


def test_stopped_and_resumed_at_once_alone_and_when_unlike_far(alone, tmp_path, at_once, monkeypatch):
    """Stopped at once after step 3, then each alone after step 7, at once again until the process ends while it writes
    the checkpoints of step 10, of which the second seed has none; then one after another."""
    out, inner, save = tmp_path / "x", SeedsStep.train_on, DistillTrainer.save

    def train_on(self, loaders):
        if at_once == [2]:
            signal.raise_signal(signal.SIGTERM)
        return inner(self, loaders)

    monkeypatch.setattr(SeedsStep, "train_on", train_on)
    with pytest.raises(Interrupted, match=f"stopped at step 3 of 15 of seeds 5 1; resume {out}") as caught:
        train_seeds(recipe(out), trainer_of, together=True)
    assert (caught.value.signum, at_once) == (signal.SIGTERM, [3])
    assert not list(out.rglob(".lock"))
    for seed in SEEDS:
        trainer = trainer_of(replace(recipe(out, resume=True), seed=seed, seeds=(), out=out / f"seed-{seed}"))
        StopAt(trainer, 4)
        with pytest.raises(Interrupted):
            trainer.fit()
        assert checkpoint.finished(out / f"seed-{seed}") == (False, 7, 15)

    def end(self):
        if self.config.seed == 1 and self.step_index == 10:
            exit(9)
        save(self)

    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, "save", end)
        with pytest.raises(SystemExit):
            train_seeds(recipe(out, resume=True), trainer_of, together=True)
    assert at_once == [6]
    assert [checkpoint.finished(out / f"seed-{seed}")[1] for seed in SEEDS] == [10, 7]
    ended, failed = train_seeds(recipe(out, resume=True), trainer_of, together=True)
    assert (len(ended), failed, at_once) == (2, [], [6])
    check_all(out, alone, stopped=True)


def test_one_that_diverges_drops_out_and_the_other_is_what_it_is_alone(alone, tmp_path, at_once, monkeypatch, capsys):
    """Weights become NaN in memory; then those of all, and the last of them ends the training."""
    out, inner, broken = tmp_path / "x", SeedsStep.train_on, [1]

    def train_on(self, loaders):
        if at_once == [7]:
            with torch.no_grad():
                for number in broken:
                    next(self.students[number].parameters()).fill_(float("nan"))
        return inner(self, loaders)

    monkeypatch.setattr(SeedsStep, "train_on", train_on)
    ended, failed = train_seeds(recipe(out), trainer_of, together=True)
    assert ([path.name for path in ended], at_once) == (["seed-5"], [15])
    (line,) = failed
    assert line.startswith("seed 1: the loss is not finite since step 7, at learning rate ")
    assert "seed 1: warning: the loss is not finite since step 7" in capsys.readouterr().err
    check_all(out, alone, (5,))
    assert checkpoint.finished(out / "seed-1") == (False, 5, 15)
    ended, failed = train_seeds(recipe(out, resume=True), trainer_of, together=True)
    assert (len(ended), failed, at_once) == (2, [], [15])  # one alone, from its last good checkpoint
    check_all(out, alone)
    at_once[0], broken = 0, [0, 1]
    ended, failed = train_seeds(recipe(tmp_path / "y"), trainer_of, together=True)
    assert (ended, len(failed), at_once) == ([], 2, [10])
    assert not list((tmp_path / "y").rglob(".lock"))


@pytest.mark.parametrize(
    ("other", "settings", "words"),
    [
        (1, {}, "each seed has teachers of its own"),
        (0, {"engine": "reference"}, "the engine is reference"),
        (0, {"student": "hydra"}, "hydra students are trained one after another"),
    ],
    ids=["teachers", "engine", "refused by the step"],
)
def test_what_cannot_be_trained_at_once_goes_one_after_another(other, settings, words, tmp_path, at_once, capsys):
    run = recipe(tmp_path / "x", epochs=1, **settings)
    ended, failed = train_seeds(run, lambda own: trainer_of(own, 10 + other * own.seed), together=True)
    assert (len(ended), failed, at_once) == (2, [], [0])
    said = capsys.readouterr().err
    assert f"seeds one after another: {words}" in said
    assert "seed 1, 2 of 2\n" in said


def test_a_folder_that_cannot_be_used_leaves_the_others_as_they_were(tmp_path):
    trainers = [trainer_of(replace(recipe(tmp_path / f"{seed}"), seed=seed, seeds=())) for seed in SEEDS]
    step = one_step(trainers)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "thesis.txt").write_text("")
    with pytest.raises(InputError, match="not empty"):
        train_together(trainers, step)
    assert not (tmp_path / "5").exists()
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["thesis.txt"]


def test_the_choice_is_the_prediction_and_the_memory(tmp_path, monkeypatch):
    """As on a GPU of a name that is known or not, with so much memory free."""
    trainer = trainer_of(replace(recipe(tmp_path / "x"), seed=1, seeds=()))
    assert chosen(trainer, 2) == (False, "the engine is fused, on cpu")
    trainer.device = torch.device("cuda")
    free, name = [2**34], ["NVIDIA H100 80GB HBM3"]
    monkeypatch.setattr(together, "free_memory", lambda _: free[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name[0])
    worth_it, why = chosen(trainer, 3)
    assert worth_it
    assert why.startswith("3 seeds at once, predicted, not measured, on H100 SXM: ")
    free[0] = 2**10
    assert chosen(trainer, 3) == (False, "they need about 0.00 GiB at once, of 0.00 that are free")
    monkeypatch.setattr(seeds_gain, "ENOUGH", 100.0)
    assert chosen(trainer, 3)[1].endswith("not worth it (from 100.0 on)")
    name[0] = "NVIDIA GeForce RTX 4090"
    assert chosen(trainer, 3) == (False, "what it would give is not predicted for NVIDIA GeForce RTX 4090")
    trainer.engine = untyped(trainer.engine)._replace(name="captured")
    assert chosen(trainer, 3) == (False, "the engine is captured, on cuda")
