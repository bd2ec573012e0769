"""Averages over time in a run: validated, kept at their best by themselves, resumed, saved, shown and used."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastensdistill.cli import main
from fastensdistill.config import TeachConfig
from fastensdistill.data.loader import EvaluationSet
from fastensdistill.evaluate.metrics import accuracy, nll
from fastensdistill.evaluate.predict import predict
from fastensdistill.evaluate.report import read_metrics
from fastensdistill.evaluate.validate import Evaluator
from fastensdistill.method.student import STUDENTS
from fastensdistill.tensor_files import read_card
from fastensdistill.train.keeping import Score
from fastensdistill.train.setup import seeded
from fastensdistill.train.stop import Interrupted
from fastensdistill.train.teach import TeachTrainer
from fastensdistill.weights import load_network
from tests.compare import check_close
from tests.networks import tiny
from tests.runs import NETWORK, StopAt, dataset, make
from tests.untyped import untyped

DECAY = 0.7
IMAGES = EvaluationSet(dataset().validation, "cpu")


class Follow:
    """Averages a trainer's network by hand, in float64, after every step; the states at the ends of epochs."""

    def __init__(self, trainer, name):
        self.network, self.updates = trainer.networks[name], 0
        self.ends: dict[int, dict[str, torch.Tensor]] = {}
        self.average = {k: v.double().clone() for k, v in self.network.state_dict().items()}
        inner = trainer.train_step

        def train_step():
            scalars = inner()
            decay = min(DECAY, (1 + self.updates) / (10 + self.updates))
            self.updates += 1
            for key, value in self.network.state_dict().items():
                whole = not value.is_floating_point()
                self.average[key] = value.clone() if whole else decay * self.average[key] + (1 - decay) * value.double()
            if self.updates % 5 == 0:
                self.ends[self.updates] = dict(self.average)
            return scalars

        trainer.train_step = train_step


def records(folder, event):
    return [record for record in read_metrics(folder / "metrics.jsonl") if record["event"] == event]


@pytest.mark.parametrize(
    ("kind", "engine"), [*((kind, "reference") for kind in STUDENTS), ("latent-be", "fused"), ("single", "fused")]
)
def test_an_average_over_time_is_validated_and_kept_by_itself(kind, engine, tmp_path):
    """The student is best after its second epoch, its average after the third of four: these are what their files
    hold."""
    trainer = make(kind, out=tmp_path, perturbation="none", ema_decay=DECAY, engine=engine)
    follow, inner = Follow(trainer, "student"), trainer.validate
    forced = {5: (9.0, 9.0), 10: (1.0, 8.0), 15: (2.0, 3.0), 20: (4.0, 5.0)}
    measured = {}

    def validate():
        scores, record = inner()
        measured[trainer.step_index] = {name: (s.accuracy, s.nll) for name, s in scores.items()}
        found = zip(scores.items(), forced[trainer.step_index], strict=True)
        return {name: Score(s.accuracy, value) for (name, s), value in found}, record

    untyped(trainer).validate = validate
    trainer.fit()
    student = STUDENTS[kind](tiny(4), 1 if kind == "single" else 2).eval()
    looks = records(tmp_path, "validation")
    for look in looks:
        student.load_state_dict(follow.ends[look["step"]])
        p = predict(student.deployed(), IMAGES).mean(0)
        assert look["ema_nll"] == pytest.approx(nll(p, IMAGES.labels), rel=1e-4)
        assert look["ema_accuracy"] == pytest.approx(accuracy(p, IMAGES.labels), abs=1 / 24 + 1e-9)
        assert (look["ema_accuracy"], look["ema_nll"]) == measured[look["step"]]["ema"]
        assert ("ema_branch_kl" in look) == (kind != "single")
    (kept,) = records(tmp_path, "kept")
    assert (kept["kept_epoch"], kept["ema_kept_epoch"], kept["ema_nll"], kept["ema_last_nll"]) == (2, 3, 3.0, 5.0)
    assert "; EMA: kept epoch 3 of 4, validation " in trainer.kept
    for name, step in (("ema", 15), ("last-ema", 20)):
        student.load_state_dict(follow.ends[step])
        expected = student.deployed().state_dict()
        network = load_network(tmp_path / f"{name}.safetensors")
        assert type(network) is type(student.deployed())
        for key, value in network.state_dict().items():
            check_close(f"{name}: {key}", value.double(), expected[key].double(), 1e-5)
        card = read_card(tmp_path / f"{name}.safetensors")
        assert (card["step"], card["validation_nll"]) == (step, forced[step][1])
    held = untyped(trainer).averages["ema"].deployed().state_dict()
    saved = load_network(tmp_path / "ema.safetensors").state_dict()
    assert all(torch.equal(held[key], saved[key]) for key in held | saved)


def test_without_a_decay_there_is_none(tmp_path):
    trainer = make(out=tmp_path, epochs=1, perturbation="none").fit()
    assert (trainer.averages, trainer.every) == ({}, trainer.networks)
    assert not list(tmp_path.glob("*ema*"))
    assert not any(key.startswith("ema") for record in read_metrics(tmp_path / "metrics.jsonl") for key in record)


@pytest.mark.parametrize(("step", "engine"), [(2, "reference"), (13, "reference"), (7, "fused")])
def test_interrupted_and_resumed_is_bit_equal(step, engine, tmp_path):
    whole = make(out=tmp_path / "whole", ema_decay=DECAY, engine=engine).fit()
    stopped = make(out=tmp_path / "stopped", ema_decay=DECAY, engine=engine)
    StopAt(stopped, step)
    with pytest.raises(Interrupted):
        stopped.fit()
    resumed = make(out=tmp_path / "stopped", ema_decay=DECAY, engine=engine, resume=True).fit()
    assert resumed.kept == whole.kept
    names = {path.name for path in (tmp_path / "whole").glob("*.safetensors")}
    assert {"ema.safetensors", "last-ema.safetensors", "checkpoint.safetensors"} <= names
    assert names == {path.name for path in (tmp_path / "stopped").glob("*.safetensors")}
    for name in names:
        one, two = (load_file(tmp_path / folder / name) for folder in ("whole", "stopped"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name


def test_each_teacher_has_its_own(tmp_path):
    config = TeachConfig(members=2, epochs=3, batch_size=8, device="cpu", ema_decay=DECAY)
    networks = [seeded(i, lambda: tiny(4)) for i in range(2)]
    trainer = TeachTrainer(networks, dataset(), config, out=tmp_path, quiet=True)
    follow = Follow(trainer, "teacher-1")
    trainer.fit()
    plain = tiny(4).eval()
    for look in records(tmp_path, "validation"):
        plain.load_state_dict(follow.ends[look["step"]])
        assert look["ema_nll"][1] == pytest.approx(nll(predict(plain, IMAGES)[0], IMAGES.labels), rel=1e-4)
    (kept,) = records(tmp_path, "kept")
    assert len(kept["ema_kept_epoch"]) == 2
    for name in ("ema-1", "last-ema-1"):
        step = read_card(tmp_path / f"{name}.safetensors")["step"]
        assert step == (5 * kept["ema_kept_epoch"][1] if name == "ema-1" else 15)
        for key, value in load_network(tmp_path / f"{name}.safetensors").state_dict().items():
            check_close(f"{name}: {key}", value.double(), follow.ends[step][key].double(), 1e-5)


@pytest.mark.parametrize("kind", [kind for kind in STUDENTS if kind != "hydra"])
def test_a_student_and_its_average_are_groups_of_the_same_launches(kind):
    """And so are the networks on the way between its average and its branches, of either."""
    torch.manual_seed(0)
    students = [STUDENTS[kind](tiny(4), 2).double().eval() for _ in range(2)]
    with torch.no_grad():
        for student in students:
            for parameter in student.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    images = EvaluationSet(dataset().validation, "cpu", dtype=torch.float64)
    evaluator = Evaluator("fused", (3, 8, 8))
    found = evaluator.students(students, images)
    (owners, predictor) = evaluator.kept["student"]
    assert owners == students
    assert predictor is not None
    assert len(predictor.shapes) == 2 * {"single": 1, "batch-ensemble": 2, "latent-be": 3}[kind]
    for i, student in enumerate(students):
        alone = Evaluator("reference", (3, 8, 8)).student(student, images)
        for what, one, other in zip(("deployed", "branches"), found[i], alone, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                check_close(f"{what} of {i}", one.double(), untyped(other).double(), 1e-6)
        if kind == "latent-be":
            weights = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)
            way = evaluator.mixed(student, weights, images)
            check_close("way", way.double(), predict(student.mixed(weights), images).double(), 1e-6)
            assert evaluator.kept["student"][1] is predictor
    again = evaluator.students(students, images)  # the way's weights are not left in the slots
    assert all(torch.equal(a[0], b[0]) for a, b in zip(again, found, strict=True))


# ---- the commands


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Teachers with averages, and students of two seeds with theirs."""
    folder, data = tmp_path_factory.mktemp("runs"), dataset()
    np.savez(folder / "d.npz", train_images=data.train.images, train_labels=data.train.labels,
             test_images=data.test.images, test_labels=data.test.labels)  # fmt: skip
    short = ["--batch-size", "8", "--epochs", "2", "--device", "cpu", "--ema-decay", "0.7"]
    teach = ["teach", "--data", str(folder / "d.npz"), *NETWORK, *short, "--members", "2"]
    assert main([*teach, "--out", str(folder / "teachers")]) == 0
    distill = ["distill", *short, "--teachers", str(folder / "teachers"), "--seeds", "0", "1"]
    assert main([*distill, "--out", str(folder / "students")]) == 0
    return folder


def results(folder):
    return {row["name"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}


def test_tables_have_a_row_for_them(runs, tmp_path):
    assert {name: len(row["metrics"]) for name, row in results(runs / "teachers").items()} == {
        "teachers": 2, "ensemble of 2": 1, "teachers, EMA": 2, "ensemble of 2, EMA": 1,
    }  # fmt: skip
    own = results(runs / "students")
    assert {name: (row["group"], len(row["metrics"])) for name, row in own.items() if row["group"] == "student"} == {
        "students": ("student", 2), "students, EMA": ("student", 2),
    }  # fmt: skip
    assert main(["evaluate", str(runs / "students"), "--device", "cpu", "--out", str(tmp_path)]) == 0
    for name, row in results(tmp_path).items():
        assert row["metrics"] == own[name]["metrics"]
    test = EvaluationSet(dataset().test, "cpu")
    for seed, found in enumerate(own["students, EMA"]["metrics"]):
        p = predict(load_network(runs / "students" / f"seed-{seed}" / "ema.safetensors"), test)[0]
        assert found["nll"] == pytest.approx(nll(p, test.labels), rel=1e-6)
    page = (tmp_path / "report.html").read_text()
    assert "students, EMA" in page
    assert "students, EMA: epoch " in page  # of which epoch


def test_an_ensemble_of_all_has_each_run_s_network_once(runs, tmp_path):
    assert main(["evaluate", str(runs / "students"), "--ensemble", "--device", "cpu", "--out", str(tmp_path)]) == 0
    [row] = [row for row in results(tmp_path).values() if row["group"] == "ensemble"]
    assert row["files"] == [str(runs / "students" / f"seed-{seed}" / "network.safetensors") for seed in range(2)]


def test_they_are_exported_and_learned_from_where_that_is_asked_for(runs, tmp_path, capsys):
    seed, teachers = runs / "students" / "seed-0", runs / "teachers"
    for flags, name in (([], "network"), (["--ema"], "ema")):
        assert main(["export", str(seed), *flags, "--formats", "safetensors", "--out", str(tmp_path / name)]) == 0
        one, two = load_file(seed / f"{name}.safetensors"), load_file(tmp_path / name / "network.safetensors")
        assert all(torch.equal(one[key], two[key]) for key in one | two), name
    short = ["--batch-size", "8", "--epochs", "1", "--device", "cpu", "--teachers"]
    for flags, name in (([], "teacher"), (["--teacher-ema"], "ema")):
        out = tmp_path / f"from {name}"
        assert main(["distill", *short, str(teachers), *flags, "--out", str(out)]) == 0
        files = json.loads((out / "results.json").read_text())["rows"][0]["files"]
        assert files == [str(teachers / f"{name}-{i}.safetensors") for i in range(2)]
    assert main(["distill", "--out", str(tmp_path / "from ema"), "--resume"]) == 0
    capsys.readouterr()
    without = tmp_path / "from teacher"
    for arguments in (["export", str(without), "--ema"], ["export", str(without / "network.safetensors"), "--ema"]):
        assert main([*arguments, "--out", str(tmp_path / "x")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "holds no average over time: expected the folder of a run with --ema-decay" in line
    named = [str(teachers / f"teacher-{i}.safetensors") for i in range(2)]
    assert main(["distill", *short, *named, "--teacher-ema", "--out", str(tmp_path / "y")]) == 2
    assert f"teacher_ema with {named[0]}, {named[1]}: expected the folder of a run" in capsys.readouterr().err
    for file in teachers.glob("ema-*"):
        file.rename(tmp_path / file.name)
    assert main(["distill", *short, str(teachers), "--teacher-ema", "--out", str(tmp_path / "y")]) == 2
    assert f"{teachers} holds no average over time" in capsys.readouterr().err
