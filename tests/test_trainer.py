"""The trainer: schedule, what is kept, resumption bit for bit, divergence, and that M at once is M alone."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastensdistill.config import DistillConfig, TeachConfig, TrainConfig
from fastensdistill.data.augment import Augment
from fastensdistill.data.loader import EvaluationSet
from fastensdistill.errors import InputError
from fastensdistill.evaluate.metrics import accuracy, nll
from fastensdistill.evaluate.predict import predict
from fastensdistill.method.student import STUDENTS, LatentBE
from fastensdistill.method.teachers import Teachers
from fastensdistill.train.distill import DistillTrainer
from fastensdistill.train.record import DivergedError
from fastensdistill.train.schedule import is_validation_epoch, make_schedule
from fastensdistill.train.setup import seeded
from fastensdistill.train.stop import Interrupted
from fastensdistill.train.teach import TeachTrainer
from fastensdistill.weights import load_network, read_tensors, save_tensors
from tests.networks import tiny
from tests.runs import ROOT, StopAt, dataset, make
from tests.untyped import untyped


def test_schedule_warms_up_from_zero_and_ends_at_zero():
    rate = make_schedule(TrainConfig(epochs=200, learning_rate=0.1), steps_per_epoch=351)
    assert rate(0) == 0
    assert rate(5 * 351) == 0.1
    assert rate(1000) == pytest.approx(0.1 * 1000 / 1755)
    assert rate((5 + 195 // 2) * 351) == pytest.approx(0.05, rel=0.01)
    assert 0 < rate(200 * 351 - 1) < 1e-8
    assert TrainConfig(epochs=20).warmup_epochs == 2
    with pytest.raises(InputError, match="warmup_epochs=7"):
        make_schedule(TrainConfig(epochs=7, warmup_epochs=7), 10)


@pytest.mark.parametrize("shares", [(), (0.2, 0.5, 0.51)], ids=["the usual", "given"])
def test_steps_are_those_of_pytorch(shares):
    """``MultiStepLR`` after the warm-up; unset, the milestones of Wide Residual Networks."""
    config = TrainConfig(epochs=200, learning_rate=0.1, schedule="step", milestones=shares)
    assert (config.milestones, config.gamma) == (shares or (0.3, 0.6, 0.8), 0.2)
    rate = make_schedule(config, steps_per_epoch=3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    at = [round(200 * share) for share in shares] or [60, 120, 160]
    expected = torch.optim.lr_scheduler.MultiStepLR(optimizer, at, gamma=0.2)
    for epoch in range(200):
        if epoch >= 5:
            found = [rate(3 * epoch + i) for i in range(3)]
            assert found == pytest.approx(expected.get_last_lr() * 3, rel=1e-12), epoch
        optimizer.step()
        expected.step()
    assert [rate(step) for step in range(16)] == pytest.approx([0.1 * step / 15 for step in range(16)])


def test_a_constant_rate_stays():
    rate = make_schedule(TrainConfig(epochs=10, warmup_epochs=1, learning_rate=0.3, schedule="constant"), 4)
    assert [rate(step) for step in (0, 2, 4, 5, 39)] == [0, 0.15, 0.3, 0.3, 0.3]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"milestones": (0.5,)}, "milestones=0.5 with schedule='cosine': expected schedule 'step'"),
        ({"schedule": "constant", "milestones": (0.5, 0.75)}, "milestones=0.5 0.75 with schedule='constant'"),
        ({"gamma": 0.1}, "gamma=0.1 with schedule='cosine': expected schedule 'step'"),
        ({"schedule": "step", "milestones": (0.5, 0.5)}, "milestones=0.5 0.5: expected each later than the one"),
        ({"schedule": "step", "milestones": (0.6, 0.5)}, "milestones=0.6 0.5: expected each later"),
        ({"schedule": "step", "milestones": (0.5, 1.0)}, "expected numbers above 0 and below 1"),
        ({"schedule": "step", "milestones": (0.0, 0.5)}, "expected numbers above 0 and below 1"),
        ({"schedule": "step", "milestones": (60, 120)}, "expected numbers above 0 and below 1"),
        ({"schedule": "step", "gamma": 1.0}, "gamma=1.0: expected a number above 0 and below 1"),
        ({"schedule": "step", "gamma": 0}, "gamma=0: expected"),
        ({"schedule": "step", "epochs": 10, "warmup_epochs": 3}, "milestones=0.3 0.6 0.8: expected the first after the "
         "warm-up, which takes 0.3 of the run"),
        ({"schedule": "linear"}, "unknown schedule 'linear'"),
    ],
    ids=lambda value: " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else "",
)  # fmt: skip
def test_schedules_that_cannot_be(settings, words):
    with pytest.raises(InputError, match=re.escape(words)):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta1": 0.8}, "beta1=0.8 with optimizer='sgd': expected optimizer 'adamw', or beta1 unset"),
        ({"beta2": 0.99}, "beta2=0.99 with optimizer='sgd'"),
        ({"optimizer": "adamw", "momentum": 0.8}, "momentum=0.8 with optimizer='adamw': expected optimizer 'sgd'"),
        ({"resized_crop": (0.25, 1), "pad": 2}, "pad=2 with resized_crop=0.25 1, which takes the place"),
        ({"alpha": 0, "target": "mean"}, "target=mean with alpha=0, where teachers have no weight: expected alpha"),
        ({"alpha": 0, "teacher_weights": (1, 2)}, "teacher_weights=1 2 with alpha=0"),
        ({"alpha": 0, "standardize_logits": True}, "standardize_logits=True with alpha=0"),
        ({"student": "hydra", "factor_rate": 2}, "factor_rate=2 with a hydra student, which has no factors: ex"),
        ({"student": "single", "factor_rate": 0.5}, "factor_rate=0.5 with a single student"),
    ],
    ids=lambda value: " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else "",
)  # fmt: skip
def test_settings_that_would_be_ignored_are_refused(settings, words):
    with pytest.raises(InputError, match=re.escape(words)):
        DistillConfig(**settings)
    DistillConfig(**{key: value for key, value in settings.items() if key in ("optimizer", "student", "resized_crop")})


def test_validation_epochs():
    looked = [e for e in range(1, 201) if is_validation_epoch(e, 200)]
    assert looked == [1, *range(20, 180, 20), *range(180, 201)]
    assert [e for e in range(1, 5) if is_validation_epoch(e, 4)] == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", STUDENTS)
def test_every_student_learns_and_the_best_weights_are_kept(kind, tmp_path):
    upright = Augment(pad=1, flip=False)  # a flip would turn one class into another
    recipe = TeachConfig(members=2, epochs=12, batch_size=8, device="cpu")
    teachers = TeachTrainer(
        [seeded(i, lambda: tiny(4)) for i in range(2)], dataset(80), recipe,
        out=tmp_path / "teachers", quiet=True, augment=upright,
    ).fit()  # fmt: skip
    frozen = Teachers(list(teachers.networks.values()))
    perturbation = "gaussian" if kind == "single" else "tdiv-sdiv"
    config = DistillConfig(
        epochs=15, batch_size=8, student=kind, learning_rate=0.05, perturbation=perturbation, device="cpu"
    )
    student = seeded(0, lambda: STUDENTS[kind](tiny(4), 2))
    trainer = DistillTrainer(
        student, frozen, dataset(80), config, out=tmp_path / "run", quiet=True, augment=upright
    ).fit()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validations = [r for r in records if r["event"] == "validation"]
    best = min((v for v in validations if v["epoch"] > config.warmup_epochs), key=lambda v: (v["nll"], -v["step"]))
    assert best["accuracy"] > 0.8
    images = EvaluationSet(dataset(80).validation, "cpu")
    p = predict(trainer.student.deployed(), images).mean(0)
    assert (accuracy(p, images.labels), nll(p, images.labels)) == (best["accuracy"], best["nll"])
    again = load_network(tmp_path / "run" / "student.safetensors")
    assert torch.equal(predict(again, images), predict(trainer.student, images))
    if kind in ("latent-be", "single"):
        plain = load_network(tmp_path / "run" / "network.safetensors")
        assert torch.equal(predict(plain, images), predict(trainer.student.deployed(), images))
    trained = [r for r in records if r["event"] == "train"]
    assert trained[-1]["loss"] < trained[0]["loss"]
    assert ("tdiv" in trained[0]) == (kind != "single")


def test_teachers_at_once_are_teachers_alone():
    config = TeachConfig(members=2, epochs=3, batch_size=8, seed=5, device="cpu")
    both = TeachTrainer([seeded(5 + i, lambda: tiny(4)) for i in range(2)], dataset(), config, quiet=True).fit()
    one = TeachConfig(members=1, epochs=3, batch_size=8, seed=6, device="cpu")
    alone = TeachTrainer([seeded(6, lambda: tiny(4))], dataset(), one, quiet=True).fit()
    for name, value in alone.networks["teacher-0"].state_dict().items():
        assert torch.equal(value, both.networks["teacher-1"].state_dict()[name]), name
    first = both.networks["teacher-0"].state_dict()
    assert not torch.equal(first["stem.weight"], both.networks["teacher-1"].state_dict()["stem.weight"])


MAKE = make


@pytest.mark.parametrize(
    ("step", "kind", "perturbation"),  # five steps an epoch: inside the first, at the end of it, later
    [(2, "latent-be", "tdiv-sdiv"), (5, "batch-ensemble", "gaussian"), (13, "latent-be", "confods"),
     (7, "hydra", "tdiv-sdiv"), (8, "single", "ods")],
)  # fmt: skip
def test_interrupted_and_resumed_is_bit_equal(tmp_path, step, kind, perturbation):
    def make(**more):
        return MAKE(kind, perturbation=perturbation, **more)

    whole = make(out=tmp_path / "whole").fit()
    stopped = make(out=tmp_path / "stopped")
    StopAt(stopped, step)
    with pytest.raises(Interrupted, match=f"step {step} of 20") as stop:
        stopped.fit()
    assert stop.value.signum == signal.SIGINT
    resumed = make(out=tmp_path / "stopped", resume=True).fit()
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[name]), name
    one, two = (load_file(tmp_path / f / "checkpoint.safetensors") for f in ("whole", "stopped"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    lines = [json.loads(line) for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if r["event"] == "validation"] == [5, 10, 15, 20]


def test_teachers_interrupted_and_resumed_are_bit_equal(tmp_path):
    def make(out, resume=False):
        config = TeachConfig(members=2, epochs=3, batch_size=8, device="cpu")
        networks = [seeded(i, lambda: tiny(4)) for i in range(2)]
        return TeachTrainer(networks, dataset(), config, out=out, resume=resume, quiet=True)

    whole = make(tmp_path / "whole").fit()
    stopped = make(tmp_path / "stopped")
    StopAt(stopped, 8)
    with pytest.raises(Interrupted):
        stopped.fit()
    (tmp_path / "stopped" / ".checkpoint.safetensors.1.tmp").write_bytes(b"of a write that was killed")
    resumed = make(tmp_path / "stopped", resume=True).fit()
    for name, network in whole.networks.items():
        for key, value in network.state_dict().items():
            assert torch.equal(value, resumed.networks[name].state_dict()[key]), (name, key)
    assert not list((tmp_path / "stopped").glob(".*"))


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from tests.runs import make
trainer = make(out={out!r}, resume={resume})
inner, save = trainer.train_step, trainer.save
left = {steps}
def train_step():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner()
def killed_in_save():
    import fastensdistill.weights as w
    replace = os.replace
    def never(a, b):
        os.kill(os.getpid(), signal.SIGKILL)
    if left <= {torn}:
        os.replace = never
    save()
trainer.train_step = train_step
trainer.save = killed_in_save
trainer.fit()
"""


def test_killed_at_random_steps_and_resumed_is_bit_equal(tmp_path):
    """SIGKILL at random steps, and once while a checkpoint is being written."""
    whole = make(out=tmp_path / "whole").fit()
    rng = np.random.default_rng()
    out = str(tmp_path / "killed")
    plan = [(int(rng.integers(2, 9)), -1), (int(rng.integers(6, 12)), -1), (9, 8)]
    for i, (steps, torn) in enumerate(plan):
        code = KILLED.format(root=str(ROOT), out=out, resume=i > 0, steps=steps, torn=torn)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == -signal.SIGKILL, f"{plan}: {done.stderr}"
    resumed = make(out=out, resume=True).fit()
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[name]), (name, plan)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    trainer = make(out=tmp_path / "run", perturbation="none")
    inner = trainer.train_step

    def poisoned():
        if trainer.step_index == 12:
            with torch.no_grad():
                untyped(trainer.student).module.classifier.layer.bias.fill_(float("nan"))
        return inner()

    untyped(trainer).train_step = poisoned
    with pytest.raises(DivergedError, match="step 12"):
        trainer.fit()
    kept = load_file(tmp_path / "run" / "checkpoint.safetensors")
    assert all(bool(torch.isfinite(v).all()) for v in kept.values() if v.is_floating_point())
    resumed = make(out=tmp_path / "run", perturbation="none", resume=True).fit()
    assert resumed.step_index == 20


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_a_stop_signal_saves_nothing_that_is_not_finite(tmp_path, what):
    trainer = make(out=tmp_path / "run", perturbation="none")
    inner = trainer.train_step

    def poisoned():
        scalars = inner()
        if trainer.step_index == 6 and what == "loss":
            scalars["loss"] = scalars["loss"] * float("nan")
        if trainer.step_index == 7:
            if what == "weights":
                untyped(trainer.student).module.classifier.layer.bias.data.fill_(float("inf"))
            signal.raise_signal(signal.SIGTERM)
        return scalars

    untyped(trainer).train_step = poisoned
    with pytest.raises(DivergedError, match="step 6" if what == "loss" else "weights of student .* step 7"):
        trainer.fit()
    resumed = make(out=tmp_path / "run", perturbation="none", resume=True)
    resumed.fit()
    assert resumed.step_index == 20


def test_another_kind_of_device_cannot_go_on(tmp_path):
    from fastensdistill.train import checkpoint

    make(out=tmp_path / "run", epochs=1).fit()
    other = make(out=tmp_path / "run", epochs=1, resume=True)
    other.config.precision = "fp32"
    print_of = checkpoint.fingerprint(other.config, torch.device("cuda"), other.data, other.frozen())
    with pytest.raises(InputError, match="device='cpu', not 'cuda'"):
        checkpoint.load_checkpoint(tmp_path / "run", print_of)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 0.07}, "learning_rate=0.05"),
        ({"perturbation": "none"}, "perturbation='tdiv-sdiv'"),
        ({"precision": "bf16"}, "precision='fp32', not 'bf16'"),  # what auto meant
        ({"data": dataset(48)}, "images="),
    ],
)
def test_a_run_is_resumed_only_with_its_own_settings(tmp_path, change, words):
    make(out=tmp_path / "run", epochs=1).fit()
    with pytest.raises(InputError, match=words):
        make(out=tmp_path / "run", resume=True, **{"epochs": 1, **change}).fit()


# What the first runs knew of themselves
OLDEST = (
    "epochs batch_size learning_rate warmup_epochs momentum weight_decay seed flip pad precision device processes "
    "student branches perturbation step_size temperature alpha teachers images"
)


def test_a_run_from_before_a_setting_existed_goes_on_with_its_default(tmp_path):
    whole, stopped = make(out=tmp_path / "whole").fit(), make(out=tmp_path / "run")
    StopAt(stopped, 8)
    with pytest.raises(Interrupted):
        stopped.fit()
    file = tmp_path / "run" / "checkpoint.safetensors"
    tensors, card = read_tensors(file)
    assert card["fingerprint"]["milestones"] == []
    card["fingerprint"] = {key: card["fingerprint"][key] for key in OLDEST.split()}
    save_tensors(file, tensors, card)
    for schedule in ("constant", "step"):  # and not the milestones, which follow from it
        with pytest.raises(InputError, match=f"started with schedule='cosine', not '{schedule}'"):
            make(out=tmp_path / "run", resume=True, schedule=schedule).fit()
    resumed = make(out=tmp_path / "run", resume=True).fit()
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[name]), name
    del card["fingerprint"]["images"]  # no setting: never left out
    save_tensors(file, tensors, card)
    with pytest.raises(InputError, match="images=None"):
        make(out=tmp_path / "run", resume=True).fit()


def test_auto_goes_on_as_what_it_meant(tmp_path):
    make(out=tmp_path / "run", epochs=1).fit()
    assert make(out=tmp_path / "run", resume=True, epochs=1, precision="fp32").fit().step_index == 5


def test_a_folder_with_another_run_is_refused(tmp_path):
    make(out=tmp_path / "run", epochs=1).fit()
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir())
    with pytest.raises(InputError, match="not empty"):
        make(out=tmp_path / "run", epochs=1).fit()
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir())
    with pytest.raises(InputError, match="nothing to resume"):
        make(out=tmp_path / "empty", epochs=1, resume=True).fit()


def test_a_truncated_checkpoint_is_refused(tmp_path):
    make(out=tmp_path / "run", epochs=1).fit()
    file = tmp_path / "run" / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        make(out=tmp_path / "run", epochs=1, resume=True).fit()


def test_no_space_left_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    trainer = make(out=tmp_path / "run")
    inner = trainer.train_step

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    def step():
        if trainer.step_index == 7:
            monkeypatch.setattr(os, "fsync", full)
        return inner()

    untyped(trainer).train_step = step
    with pytest.raises(InputError, match="No space left on device"):
        trainer.fit()
    monkeypatch.undo()
    assert not list((tmp_path / "run").glob(".*tmp"))
    assert make(out=tmp_path / "run", resume=True).fit().step_index == 20


def test_refusals():
    with pytest.raises(InputError, match="wrap it"):
        untyped(DistillTrainer)(tiny(4), [tiny(4), tiny(4)], dataset(), DistillConfig())
    with pytest.raises(InputError, match="teacher 1 returns 5 values per image; the data has 4 classes"):
        DistillTrainer(LatentBE(tiny(4), 2), [tiny(4), tiny(5)], dataset(), DistillConfig())
    with pytest.raises(InputError, match="student returns 5 values"):
        DistillTrainer(LatentBE(tiny(5), 2), [tiny(4), tiny(4)], dataset(), DistillConfig())
    with pytest.raises(InputError, match="at least 2 teachers"):
        DistillTrainer(LatentBE(tiny(4), 2), [tiny(4)], dataset(), DistillConfig())
    with pytest.raises(InputError, match="batch size is 41"):
        make(batch_size=41).fit()
    with pytest.raises(InputError, match="device 'cuda:9'"):
        make(device="cuda:9")
    with pytest.raises(InputError, match="out="):
        make(resume=True)


def test_bf16_trains_with_float32_weights():
    trainer = make(precision="bf16", epochs=1).fit()
    assert {p.dtype for p in trainer.student.parameters()} == {torch.float32}
    assert all(bool(torch.isfinite(p).all()) for p in trainer.student.parameters())


def test_tensorboard_holds_the_records(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is an extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = DistillConfig(epochs=2, batch_size=8, device="cpu")
    teachers = [seeded(10 + i, lambda: tiny(4)) for i in range(2)]
    DistillTrainer(
        LatentBE(tiny(4), 2), teachers, dataset(), config, out=tmp_path, tensorboard=True, quiet=True
    ).fit()  # fmt: skip
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    written = [(e.step, round(e.value, 5)) for e in events.Scalars("train/loss")]
    assert written == [(r["step"], round(r["loss"], 5)) for r in records if r["event"] == "train"]
    assert [e.step for e in events.Scalars("validation/accuracy")] == [5, 10]


def test_data_may_be_a_path_and_nothing_else_passes_for_data(tmp_path):
    data = dataset()
    arrays = {f"{part}_{kind}": getattr(getattr(data, part), kind) for part in ("train", "validation", "test")
              for kind in ("images", "labels")}  # fmt: skip
    np.savez(tmp_path / "set.npz", **arrays)
    assert make(data=tmp_path / "set.npz", epochs=1).fit().step_index == 5
    with pytest.raises(InputError, match="data is a TensorDataset; expected a Dataset"):
        untyped(make)(data=torch.utils.data.TensorDataset(torch.zeros(2)))


def test_settings_of_another_kind_are_refused():
    for config, name in ((TeachConfig(), "TeachConfig"), ({"epochs": 1}, "dict")):
        with pytest.raises(InputError, match=f"config is a {name}; expected a DistillConfig"):
            untyped(DistillTrainer)(LatentBE(tiny(4), 2), [tiny(4), tiny(4)], dataset(), config)
    with pytest.raises(InputError, match="branches=3 for a student of 2"):
        make(branches=3)
    with pytest.raises(InputError, match="branches=3 for a single student"):
        DistillConfig(student="single", branches=3, perturbation="none")


def test_networks_end_in_evaluation_mode():
    assert not make(epochs=1).fit().student.training
    networks = [tiny(4), tiny(4)]
    TeachTrainer(networks, dataset(), TeachConfig(epochs=1, batch_size=8, members=2, device="cpu"), quiet=True).fit()
    assert not any(network.training for network in networks)


def test_one_value_per_channel_is_said_as_it_is():
    """PyTorch refuses to normalise one value by itself; here the maps are 1x1 and the batch is one image."""
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.BatchNorm2d(3), torch.nn.Flatten(),
                                  torch.nn.Linear(3, 4))  # fmt: skip
    config = TeachConfig(epochs=1, batch_size=1, members=1, device="cpu")
    trainer = TeachTrainer([network], dataset(), config, quiet=True)
    with pytest.raises(InputError, match="batch_size=1 in micro_batches=1 leaves BatchNorm one value"):
        trainer.fit()


def test_a_run_that_starts_anew_saves_the_settings_it_starts_with(tmp_path):
    """Killed or diverged before its first checkpoint, it may go on with others: what it saves must be those."""
    with pytest.raises(DivergedError):
        make(out=tmp_path / "run", learning_rate=1e30, epochs=1).fit()
    make(out=tmp_path / "run", learning_rate=0.01, epochs=1, resume=True).fit()
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["learning_rate"], saved["student"], saved["branches"]) == (0.01, "latent-be", 2)


def test_the_teachers_accuracy_is_told_once(tmp_path, capsys):
    trainer = make(out=tmp_path / "run", epochs=2)
    trainer.quiet = False
    trainer.fit()
    expected = [accuracy(p, torch.from_numpy(dataset().validation.labels)) for p in
                predict(trainer.teachers, EvaluationSet(dataset().validation, "cpu"))]  # fmt: skip
    told = " ".join(capsys.readouterr().err.split())  # whatever the lines
    assert told.count(f"validation {' '.join(f'{100 * a:.2f}' for a in expected)} %, their ensemble") == 1
    records = [json.loads(r) for r in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["teacher_accuracy"] for r in records if r["event"] == "validation"] == [expected, expected]
