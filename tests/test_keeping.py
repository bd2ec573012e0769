"""Which weights a run ends with, what it says of them, and what it warns of."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastensdistill.config import TeachConfig
from fastensdistill.data.loader import EvaluationSet
from fastensdistill.evaluate.metrics import accuracy, nll
from fastensdistill.evaluate.predict import predict
from fastensdistill.train import keeping
from fastensdistill.train.checkpoint import finished
from fastensdistill.train.keeping import Keeper, Score
from fastensdistill.train.record import DivergedError
from fastensdistill.train.setup import seeded
from fastensdistill.train.stop import Interrupted
from fastensdistill.train.teach import TeachTrainer
from fastensdistill.weights import load_network, teacher_files
from tests.networks import tiny
from tests.runs import StopAt, dataset, make
from tests.untyped import untyped

NAN = math.nan
LOOKS = {  # (accuracy, NLL) of the looks after steps 1, 2, 3, ...; which of them is kept
    "few-images-by-nll": (60, 0, [(0.55, 1.3), (0.58, 1.5), (0.53, 1.1), (0.56, 1.2)], 3),
    "many-images-by-accuracy": (5000, 0, [(0.55, 1.3), (0.58, 1.5), (0.53, 1.1), (0.56, 1.2)], 2),
    "just-few": (999, 0, [(0.6, 1.5), (0.5, 1.1)], 2),
    "just-many": (1000, 0, [(0.6, 1.5), (0.5, 1.1)], 1),
    "equal-accuracy-by-nll": (5000, 0, [(0.6, 1.2), (0.6, 1.0), (0.6, 1.1)], 2),
    "equal-nll-by-accuracy": (60, 0, [(0.6, 1.0), (0.7, 1.0), (0.5, 1.0)], 2),
    "equal-in-both-the-later": (60, 0, [(0.6, 1.0), (0.6, 1.0)], 2),
    "none-in-the-warm-up": (5000, 2, [(0.9, 0.1), (0.8, 0.2), (0.5, 1.0), (0.6, 0.9)], 4),
    "nan-is-never-kept": (5000, 0, [(NAN, NAN), (0.5, 1.0), (NAN, NAN), (0.9, NAN)], 2),
    "infinite-nll-is-never-kept": (60, 0, [(0.9, math.inf), (0.5, 1.0)], 2),
    "nothing-finite": (60, 0, [(NAN, NAN), (0.5, NAN)], None),
}


@pytest.mark.parametrize("name", LOOKS)
def test_what_is_kept(name):
    images, warmup, looks, expected = LOOKS[name]
    keeper, network = Keeper(images, warmup), torch.nn.Linear(1, 1)
    for step, (acc, loss) in enumerate(looks, 1):
        network.weight.data.fill_(step)
        keeper.note("student", Score(acc, loss, step=step), network)
    assert keeper.last["student"].step == len(looks)
    if expected is None:
        assert not keeper.best
        return
    score, weights = keeper.best["student"]
    assert (score.step, weights["weight"].item()) == (expected, expected)
    again = Keeper(images, warmup)
    again.load_state_dict(keeper.state_dict())
    assert repr(again.kept()) == repr(keeper.kept())
    assert repr(again.last) == repr(keeper.last)


def test_what_is_said_of_it():
    kept, last = {"student": Score(0.5491, 1.2, step=280)}, {"student": Score(0.5473, 1.21, step=300)}
    assert keeping.in_words(kept, last, 10, 30, 5000) == "kept epoch 28 of 30, validation 54.9% (last: 54.7%)"
    assert keeping.in_words(kept, last, 10, 30, 60).endswith("(last: 54.7%), by NLL 1.200 (last: 1.210)")
    kept, last = kept | {"b": Score(0.6, 1.0, step=300)}, last | {"b": Score(0.6, 1.0, step=300)}
    assert keeping.in_words(kept, last, 10, 30, 5000) == (
        "kept epochs 28 30 of 30, validation 54.9 60.0% (last: 54.7 60.0%)"
    )


def test_what_is_warned_of():
    assert keeping.warn_of_images(5000) == keeping.warn_of_images(200) == []
    assert (
        "60 validation images: .* standard error of 6.5 points".replace(".*", "accuracies near one half have a")
        in (keeping.warn_of_images(60)[0])
    )
    assert keeping.warn_of_student(Score(0.7, 1.0), [0.75, 0.8], 300) == []
    (line,) = keeping.warn_of_student(Score(0.32, 1.0), [0.75, 0.81], 300)
    assert "32.0%" in line
    assert "its teachers have 78.0%" in line
    (line,) = keeping.warn_of_student(Score(0.10, 1.0), [0.24, 0.26], 5000)  # of a hundred classes
    assert "25.0%" in line
    assert keeping.warn_of_student(Score(0.5, 1.0), [0.75], 8) == []  # within the error of eight images


def validations(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["event"] == "validation"], [r for r in records if r["event"] == "kept"]


def card(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["card"])


def test_a_run_says_and_saves_what_it_kept(tmp_path, capsys):
    """Forced scores: the third of four epochs is best; the last weights lie beside it."""
    trainer = make(out=tmp_path, data=dataset())
    trainer.quiet = False
    inner, states = trainer.validate, {}
    forced = {5: 0.5, 10: 1.4, 15: 1.1, 20: 1.2}  # the first epoch is the warm-up

    def validate():
        scores, record = inner()
        states[trainer.step_index] = {k: v.clone() for k, v in trainer.student.state_dict().items()}
        score = Score(scores["student"].accuracy, forced[trainer.step_index], scores["student"].averaging)
        return {"student": score}, record | {"nll": score.nll}

    untyped(trainer).validate, trainer.config.warmup_epochs = validate, 1.0
    trainer.fit()
    looks, (kept,) = validations(tmp_path)
    assert (kept["kept_epoch"], kept["nll"], kept["last_nll"], kept["step"]) == (3, 1.1, 1.2, 20)
    assert kept["last_accuracy"] == looks[-1]["accuracy"]
    assert (kept["said"], kept["warnings"]) == (trainer.kept, trainer.warnings)
    shown = [100 * looks[i]["accuracy"] for i in (2, 3)]
    line = f"kept epoch 3 of 4, validation {shown[0]:.1f}% (last: {shown[1]:.1f}%), by NLL 1.100 (last: 1.200)"
    assert trainer.kept == line
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert any("24 validation images" in warning for warning in trainer.warnings)
    images = EvaluationSet(dataset().validation, "cpu")
    for step, files in ((15, ("network", "student")), (20, ("last",))):
        trainer.student.load_state_dict(states[step])
        expected = predict(trainer.student.deployed(), images).mean(0)
        for name in files:
            path = tmp_path / f"{name}.safetensors"
            network = load_network(path)
            found = predict(getattr(network, "deployed", lambda n=network: n)(), images).mean(0)
            assert torch.equal(found, expected), name
            said = card(path)
            assert (said["step"], said["epoch"], said["epochs"]) == (step, step // 5, 4)
            assert said["validation_nll"] == forced[step]
            assert said["validation_accuracy"] == accuracy(expected, images.labels)
            assert said["validation_images"] == 24


def test_teachers_keep_each_its_own_epoch_and_the_last_are_no_teachers(tmp_path):
    config = TeachConfig(members=2, epochs=3, batch_size=8, device="cpu")
    networks = [seeded(i, lambda: tiny(4)) for i in range(2)]
    trainer = TeachTrainer(networks, dataset(), config, out=tmp_path, quiet=True)
    inner = trainer.validate
    forced = {5: (1.0, 2.0), 10: (2.0, 1.0), 15: (3.0, 3.0)}

    def validate():
        scores, record = inner()
        values = forced[trainer.step_index]
        return {n: Score(s.accuracy, v) for (n, s), v in zip(scores.items(), values, strict=True)}, record

    untyped(trainer).validate = validate
    trainer.fit()
    assert trainer.kept.startswith("kept epochs 1 2 of 3, validation ")
    assert [path.name for path in teacher_files(tmp_path)] == ["teacher-0.safetensors", "teacher-1.safetensors"]
    assert [card(path)["epoch"] for path in teacher_files(tmp_path)] == [1, 2]
    last = [tmp_path / f"last-{i}.safetensors" for i in range(2)]
    assert [card(path)["validation_nll"] for path in last] == [3.0, 3.0]
    end = load_file(tmp_path / "checkpoint.safetensors")
    for i, path in enumerate(last):
        for key, value in load_file(path).items():
            assert torch.equal(value, end[f"networks/teacher-{i}/{key}"]), key
    assert validations(tmp_path)[1][0]["kept_epoch"] == [1, 2]


def test_what_was_kept_survives_a_stop(tmp_path):
    """The best look lies before the stop; after the end, resuming writes the same again, once."""
    whole, stopped = make(out=tmp_path / "whole", epochs=3).fit(), make(out=tmp_path / "stopped", epochs=3)
    StopAt(stopped, 12)
    with pytest.raises(Interrupted):
        stopped.fit()
    assert finished(tmp_path / "stopped") == (False, 12, 15)
    resumed = make(out=tmp_path / "stopped", epochs=3, resume=True).fit()
    assert resumed.kept == whole.kept
    again = make(out=tmp_path / "stopped", epochs=3, resume=True).fit()
    assert again.kept == whole.kept
    for name in ("student", "network", "last"):
        one, two = (tmp_path / f / f"{name}.safetensors" for f in ("whole", "stopped"))
        assert card(one) == card(two)
        one, two = load_file(one), load_file(two)
        assert all(torch.equal(one[k], two[k]) for k in one | two), name
    assert validations(tmp_path / "whole")[1] == validations(tmp_path / "stopped")[1]
    assert finished(tmp_path / "stopped") == (True, 15, 15)
    assert finished(tmp_path) == (False, 0, 0)


def test_predictions_that_are_never_finite_leave_nothing_to_keep(tmp_path):
    trainer = make(out=tmp_path, epochs=2, perturbation="none")
    inner = trainer.evaluator.students
    untyped(trainer.evaluator).students = lambda *a: [tuple(p * NAN for p in one) for one in untyped(inner)(*a)]
    with pytest.raises(DivergedError, match=r"no look at student .* finite .*learning_rate=0.05"):
        trainer.fit()
    assert not (tmp_path / "network.safetensors").exists()
    assert not (tmp_path / "student.safetensors").exists()


def test_a_look_that_is_not_finite_does_not_end_the_run():
    trainer = make(epochs=3, perturbation="none")
    inner = trainer.evaluator.students

    def broken(*arguments):
        factor = NAN if trainer.step_index == 10 else 1
        return [tuple(p * factor for p in one) for one in untyped(inner)(*arguments)]

    untyped(trainer.evaluator).students = broken
    trainer.fit()
    images = EvaluationSet(dataset().validation, "cpu")
    p = predict(trainer.student.deployed(), images).mean(0)
    assert nll(p, images.labels) == trainer.keeper.kept()["student"].nll


def test_the_branches_accuracy_is_in_the_record(tmp_path):
    make(out=tmp_path, epochs=1, learning_rate=0.2).fit()
    (look,), _ = validations(tmp_path)
    student = load_network(tmp_path / "student.safetensors")
    images = EvaluationSet(dataset().validation, "cpu")
    assert look["branch_accuracy"] == [accuracy(p, images.labels) for p in predict(student, images)]


def test_a_student_far_below_its_teachers_is_warned_of(capsys):
    trainer = make(epochs=1, learning_rate=1e-6)
    trainer.quiet = False
    trainer._about_teachers = {"teacher_accuracy": [1.0, 0.9]}
    trainer.fit()
    (line,) = [warning for warning in trainer.warnings if "its teachers have 95.0%" in warning]
    assert f"warning: {line}\n" in capsys.readouterr().err
