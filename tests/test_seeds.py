"""Several seeds of one recipe by one command: their folders, their one row, resumed as a whole, and what is refused."""

import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastensdistill.cli import main, parse
from fastensdistill.config import TeachRun
from fastensdistill.errors import InputError
from fastensdistill.train.distill import DistillTrainer
from fastensdistill.train.teach import TeachTrainer
from tests.runs import NETWORK, dataset
from tests.untyped import untyped

SHORT = ["--batch-size", "8", "--epochs", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    data = dataset()
    path = tmp_path_factory.mktemp("data") / "quadrants.npz"
    np.savez(path, train_images=data.train.images, train_labels=data.train.labels, test_images=data.test.images,
             test_labels=data.test.labels)  # fmt: skip
    return str(path)


def distill(teachers, out, *more):
    return ["distill", *SHORT, "--teachers", str(teachers), "--out", str(out), *more]


@pytest.fixture(scope="module")
def runs(npz, tmp_path_factory):
    """Teachers of two seeds, and students of two seeds that learned from one set each."""
    folder = tmp_path_factory.mktemp("runs")
    teach = ["teach", "--data", npz, *NETWORK, *SHORT, "--members", "2", "--seeds", "0", "2"]
    assert main([*teach, "--out", str(folder / "teachers")]) == 0
    assert main(distill(folder / "teachers", folder / "students", "--seeds", "5", "1")) == 0
    return folder


def config(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def rows(folder):
    found = json.loads((folder / "results.json").read_text())["rows"]
    return {row["name"]: row for row in found}


def records(folder):
    """Of a run, all but how fast it was."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in lines]


def check_same_run(one, two):
    """Every file of two runs: networks and checkpoints bit for bit, records, settings but for the folder."""
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in two.iterdir()}
    for name in names:
        if name.endswith(".safetensors"):
            a, b = load_file(one / name), load_file(two / name)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[k], b[k]) for k in a), name
    assert records(one) == records(two)
    assert {**config(one), "out": ""} == {**config(two), "out": ""}


def test_every_seed_has_an_ordinary_run_s_folder_and_all_one_report(runs):
    whole = config(runs / "teachers")
    assert (whole["seeds"], whole["seed"], whole["model"]) == ([0, 2], 0, "preresnet")
    assert sorted(p.name for p in (runs / "teachers").glob("*.html")) == ["report.html"]
    for folder, seeds in ((runs / "teachers", (0, 2)), (runs / "students", (5, 1))):
        inside = sorted(p.name for p in folder.iterdir() if p.is_dir())
        assert inside == sorted(f"seed-{seed}" for seed in seeds)
        for seed in seeds:
            own = config(folder / f"seed-{seed}")
            assert (own["seed"], own["seeds"], own["resume"]) == (seed, [], False)
            assert own["out"] == str(folder / f"seed-{seed}")
            assert not list((folder / f"seed-{seed}").glob("*.html"))
    assert {p.name for p in (runs / "students" / "seed-5").iterdir()} == {
        "config.yaml", "metrics.jsonl", "checkpoint.safetensors", "student.safetensors", "network.safetensors",
        "last.safetensors",
    }  # fmt: skip


def test_one_row_has_all_seeds(runs, tmp_path, capsys):
    taught, learned = rows(runs / "teachers"), rows(runs / "students")
    counts = {name: len(row["metrics"]) for name, row in learned.items()}
    assert counts == {"teachers": 4, "ensemble of 2": 2, "students": 2}
    assert {name: row["metrics"] for name, row in taught.items()} == {
        name: row["metrics"] for name, row in learned.items() if name != "students"
    }
    capsys.readouterr()
    given = [str(runs / "students"), str(runs / "teachers")]
    assert main(["evaluate", *given, "--device", "cpu", "--out", str(tmp_path / "all")]) == 0
    again = rows(tmp_path / "all")
    for name, row in learned.items():
        assert again[name]["metrics"] == row["metrics"], name
    printed = capsys.readouterr().out
    values = [100 * one["accuracy"] for one in learned["students"]["metrics"]]
    assert f"{np.mean(values):.2f}" in printed
    assert f"± {np.std(values, ddof=1):.2f}" in printed.replace("±", "± ").replace("  ", " ")
    alone = tmp_path / "one seed"
    assert main(["evaluate", str(runs / "students" / "seed-1"), "--device", "cpu", "--out", str(alone)]) == 0
    assert [row["metrics"] for row in rows(alone).values()] == [learned["students"]["metrics"][1:]]


def test_a_seed_is_the_run_that_it_is_alone_and_learns_from_its_own_teachers(runs, tmp_path):
    files = [str(runs / "teachers" / "seed-2" / f"teacher-{i}.safetensors") for i in range(2)]
    assert config(runs / "students" / "seed-1")["teachers"] == files  # the second of both
    assert main(distill(runs / "teachers" / "seed-2", tmp_path / "alone", "--seed", "1")) == 0
    for name in ("report.html", "results.json"):
        (tmp_path / "alone" / name).unlink()
    for picture in (tmp_path / "alone").glob("*.png"):
        picture.unlink()
    check_same_run(tmp_path / "alone", runs / "students" / "seed-1")


def test_stopped_and_killed_in_the_second_seed_and_resumed_is_the_whole(runs, tmp_path, capsys, monkeypatch):
    """Ctrl-C in its fourth step, the last of an epoch, then the end of the process in its seventh."""
    inner, out = DistillTrainer.train_step, tmp_path / "students"

    def until(step, do):
        def train_step(self):
            if self.config.seed == 1 and self.step_index == step:
                do()
            return inner(self)

        monkeypatch.setattr(DistillTrainer, "train_step", train_step)

    until(3, lambda: signal.raise_signal(signal.SIGINT))
    assert main(distill(runs / "teachers", out, "--seeds", "5", "1")) == 128 + signal.SIGINT
    assert capsys.readouterr().err.splitlines()[-1] == f"stopped at step 4 of 8 of seed 1; resume {out}"
    assert main(["evaluate", str(out), "--device", "cpu"]) == 2
    assert "not finished" in capsys.readouterr().err
    before = {p: p.stat().st_mtime_ns for p in (out / "seed-5").iterdir()}
    until(6, lambda: exit(9))
    with pytest.raises(SystemExit):
        main(["distill", "--resume", "--out", str(out)])
    assert not list(out.glob(".lock"))
    monkeypatch.undo()
    capsys.readouterr()
    assert main(["distill", "--resume", "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert "seed 5, 1 of 2: done\nseed 1, 2 of 2\n" in said
    assert before == {p: p.stat().st_mtime_ns for p in (out / "seed-5").iterdir()}
    for seed in (5, 1):
        check_same_run(runs / "students" / f"seed-{seed}", out / f"seed-{seed}")
    assert rows(out) == {
        name: row | {"files": rows(out)[name]["files"]} for name, row in rows(runs / "students").items()
    }


def test_more_seeds_may_be_added_and_no_settings_changed(runs, npz, tmp_path, capsys):
    out = tmp_path / "students"
    shutil.copytree(runs / "students", out)
    teachers = str(runs / "teachers" / "seed-0")
    capsys.readouterr()
    for flags, words in (
        (["--seeds", "1", "2"], "holds runs of the seeds 5 1: expected these, and more after them if need be, not 1 2"),
        (["--seeds", "1", "5"], "not 1 5"),  # seed 5 learned from the first teachers
        (["--epochs", "3"], "was started with epochs=2, not 3"),
        (["--seed", "5"], "--seed and --seeds: expected one of the two"),
    ):
        assert main(["distill", "--out", str(out), "--resume", *flags]) == 2
        assert words in capsys.readouterr().err
    assert main(distill(runs / "teachers", out, "--seeds", "5", "1")) == 2
    assert "not empty" in capsys.readouterr().err
    one = runs / "students" / "seed-5"
    assert main(["distill", "--out", str(one), "--resume", "--seeds", "6", "7", "--teachers", teachers]) == 2
    assert re.search("seed=5 and seeds=6 7: expected one", capsys.readouterr().err)
    assert main(["distill", "--out", str(out), "--resume", "--seeds", "5", "1", "2", "--teachers", teachers]) == 0
    assert len(rows(out)["students"]["metrics"]) == 3
    assert (config(out)["seeds"], config(out)["resume"]) == ([5, 1, 2], False)


def test_a_seed_that_diverges_does_not_lose_the_others(runs, tmp_path, capsys, monkeypatch):
    inner, out = DistillTrainer.train_step, tmp_path / "students"

    def train_step(self):
        scalars = inner(self)
        if self.config.seed == 1 and self.step_index == 6:
            scalars["loss"] = scalars["loss"] * float("nan")
        return scalars

    monkeypatch.setattr(DistillTrainer, "train_step", train_step)
    teachers = runs / "teachers" / "seed-0"
    assert main(distill(teachers, out, "--seeds", "1", "5", "--perturbation", "none")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: 1 of 2 seeds failed: seed 1: the loss is not finite since step 6", error), error
    assert error.endswith(f"; the others are in {out}")
    assert {name: len(row["metrics"]) for name, row in rows(out).items()} == {
        "teachers": 2, "ensemble of 2": 1, "students": 1,
    }  # fmt: skip
    assert "seed 1: the loss is not finite" in (out / "report.html").read_text()
    monkeypatch.undo()
    assert main(["distill", "--out", str(out), "--resume"]) == 0  # from its last good checkpoint
    assert len(rows(out)["students"]["metrics"]) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seeds", "0", "1", "--seed", "0"], "--seed and --seeds: expected one of the two"),
        (["--seeds", "0", "4", "0"], "seeds=0 4 0: expected each once"),
        (["--seeds", "0", "1", "2"], "seeds=0 1 2 for 4 members, of which member i has the seed s + i: runs would "
         "share networks; expected seeds at least 4 apart, such as 0 4 8"),
        (["--seeds", "3", "10", "5", "--members", "3"], "expected seeds at least 3 apart, such as 3 6 9"),
        (["--seeds", "-1"], "--seeds: expected whole numbers from 0"),
        (["--seeds", "1.5"], "--seeds: expected whole numbers from 0"),
        (["--seeds"], "--seeds: expected whole numbers"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_seeds_that_cannot_be(flags, words, npz, tmp_path, capsys):
    assert main(["teach", "--data", npz, *NETWORK, *flags, "--out", str(tmp_path / "x")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not list(tmp_path.iterdir())


def test_seeds_in_a_file_and_a_seed_beside_them(tmp_path):
    (tmp_path / "c.yaml").write_text("seeds: [0, 8]\nmembers: 8")
    assert parse("teach", ["--config", str(tmp_path / "c.yaml")]).seeds == (0, 8)
    with pytest.raises(InputError, match="--seed and --seeds"):
        parse("teach", ["--config", str(tmp_path / "c.yaml"), "--seed", "0"])
    with pytest.raises(InputError, match="seed=3 and seeds=0 8"):
        TeachRun(seed=3, seeds=(0, 8))
    assert TeachRun(seeds=untyped([7]), members=100).seeds == (7,)


def test_what_does_not_fit_the_seeds_of_others_is_refused(runs, tmp_path, capsys):
    teachers, students = runs / "teachers", runs / "students"
    refused = {
        "teachers of 2 seeds for 3 of students: expected as many, or one of its folders, such as "
        f"{teachers / 'seed-0'}": distill(teachers, tmp_path / "x", "--seeds", "0", "1", "2"),
        "teachers of 2 seeds for 1 of students: expected --seeds with 2 of them": distill(teachers, tmp_path / "x"),
        "holds no teacher-*.safetensors": distill(students, tmp_path / "x", "--seeds", "0", "1"),
        "seed-5 is given twice": ["evaluate", str(students), str(students / "seed-5")],
        f"holds runs of 2 seeds: name one of them, as in {students / 'seed-5'}": ["export", str(students)],
    }
    capsys.readouterr()
    for words, arguments in refused.items():
        assert main(arguments) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_seeds_that_could_not_begin(npz, tmp_path, monkeypatch, capsys):
    def fail(self, *_):
        raise InputError("no such GPU")

    monkeypatch.setattr(TeachTrainer, "begin", fail)
    out = tmp_path / "x"
    assert (
        main(["teach", "--data", npz, *NETWORK, *SHORT, "--members", "1", "--seeds", "0", "1", "--out", str(out)]) == 2
    )
    assert capsys.readouterr().err.splitlines()[-1] == "error: no such GPU"
    assert not out.exists()
