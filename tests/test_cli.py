"""The command line: the whole job, settings from YAML and flags, and one clear line with exit code 2 for bad input."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from fastensdistill.cli import main, parse
from fastensdistill.config import DistillRun, TeachRun
from fastensdistill.errors import InputError
from fastensdistill.models import create_model
from fastensdistill.weights import load_network, read_tensors, save_network
from tests.test_trainer import dataset

SMALL = ["--model", "preresnet", "--blocks", "1", "1", "--in-planes", "4", "--batch-size", "8", "--epochs", "2"]


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    data = dataset()
    path = tmp_path_factory.mktemp("data") / "quadrants.npz"
    np.savez(
        path, train_images=data.train.images, train_labels=data.train.labels, test_images=data.test.images,
        test_labels=data.test.labels, classes=np.array(["a", "b", "c", "d"]),
    )  # fmt: skip
    return str(path)


@pytest.fixture(scope="module")
def runs(npz, tmp_path_factory):
    """Two teachers and a student, made by the command line."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["teach", "--data", npz, *SMALL, "--members", "2", "--out", str(folder / "teachers")]) == 0
    arguments = ["distill", "--data", npz, "--batch-size", "8", "--epochs", "2", "--teachers", str(folder / "teachers")]
    assert main([*arguments, "--out", str(folder / "student-0")]) == 0
    assert main([*arguments, "--seed", "1", "--out", str(folder / "student-1")]) == 0
    return folder


def test_the_whole_job(runs, npz, tmp_path, capsys):
    files = {p.name for p in (runs / "teachers").glob("*.safetensors")}
    assert files == {"teacher-0.safetensors", "teacher-1.safetensors", "checkpoint.safetensors"}
    for file in ("config.yaml", "checkpoint.safetensors", "metrics.jsonl", "network.safetensors", "results.json",
                 "report.html", "perturbation.png"):  # fmt: skip
        assert (runs / "student-0" / file).stat().st_size > 0, file
    student = load_network(runs / "student-0" / "student.safetensors")
    assert student.branches == 2
    assert student.module.spec.arguments["in_planes"] == 4, "the student's shape is its teachers'"

    assert main(["evaluate", str(runs / "teachers"), str(runs / "student-0"), str(runs / "student-1"), "--data", npz,
                 "--out", str(tmp_path / "report")]) == 0  # fmt: skip
    rows = json.loads((tmp_path / "report" / "results.json").read_text())["rows"]
    assert [(r["name"], r["group"], len(r["metrics"])) for r in rows] == [
        ("teachers", "teachers", 2), ("ensemble of 2", "ensemble", 1), ("student", "student", 2),
    ]  # fmt: skip
    assert rows[1]["parameters"] == 2 * rows[0]["parameters"] == 2 * rows[2]["parameters"]
    assert rows[1]["macs"] == 2 * rows[0]["macs"]
    printed = capsys.readouterr().out
    assert f"{100 * rows[1]['metrics'][0]['accuracy']:.2f}" in printed

    assert main(["export", str(runs / "student-0"), "--data", npz, "--out", str(tmp_path / "export")]) == 0
    card = json.loads((tmp_path / "export" / "network.json").read_text())
    assert card["classes"] == ["a", "b", "c", "d"]
    assert card["metrics"]["accuracy"] == rows[2]["metrics"][0]["accuracy"]
    with torch.no_grad():
        x = torch.rand(3, 3, 8, 8)
        assert torch.equal(load_network(tmp_path / "export" / "network.safetensors")(x), student.average().eval()(x))


def test_a_finished_run_resumes_to_itself(runs, capsys):
    tensors, card = read_tensors(runs / "student-0" / "network.safetensors")
    assert main(["distill", "--out", str(runs / "student-0"), "--resume"]) == 0
    again, same = read_tensors(runs / "student-0" / "network.safetensors")
    assert same == card
    assert all(torch.equal(again[k], v) for k, v in tensors.items())


def test_settings_come_from_yaml_and_flags_win(tmp_path):
    file = tmp_path / "c.yaml"
    settings = "epochs: 7\nlearning_rate: 1e-2\nteachers: [a.pt, b.pt]\nblocks: [2, 1]\nresume: false\nbranches: null\n"
    file.write_text(settings)
    run = parse("distill", ["--config", str(file), "--epochs", "9"])
    assert isinstance(run, DistillRun)
    assert (run.epochs, run.learning_rate, run.blocks, run.branches) == (9, 0.01, (2, 1), None)
    assert [str(t) for t in run.teachers] == ["a.pt", "b.pt"]


def test_the_saved_config_is_the_resolved_one(runs):
    saved = yaml.safe_load((runs / "student-0" / "config.yaml").read_text())
    assert saved["branches"] == 2
    assert saved["warmup_epochs"] == 0.2
    assert saved["perturbation"] == "tdiv-sdiv"
    assert set(saved) == set(DistillRun.__dataclass_fields__)
    assert set(yaml.safe_load((runs / "teachers" / "config.yaml").read_text())) == set(TeachRun.__dataclass_fields__)


def bad_npz(tmp_path, **changes):
    data = dataset()
    arrays = {
        "train_images": data.train.images, "train_labels": data.train.labels,
        "test_images": data.test.images, "test_labels": data.test.labels,
    }  # fmt: skip
    arrays |= {k: v for k, v in changes.items() if v is not None}
    for k, v in changes.items():
        if v is None:
            del arrays[k]
    np.savez(tmp_path / "bad.npz", **arrays)
    return str(tmp_path / "bad.npz")


BAD = {
    "unknown command": (lambda t, r, n: ["distil"], "did you mean 'distill'"),
    "unknown model": (lambda t, r, n: ["teach", "--data", n, "--model", "wrn28_44"], "did you mean 'wrn28_4'"),
    "unknown dataset": (lambda t, r, n: ["teach", "--data", "digit"], "did you mean 'digits'"),
    "unknown perturbation": (lambda t, r, n: ["distill", "--perturbation", "tdiv_sdiv"], "did you mean 'tdiv-sdiv'"),
    "unknown student": (lambda t, r, n: ["distill", "--student", "latentbe"], "did you mean 'latent-be'"),
    "unknown setting in YAML": (
        lambda t, r, n: ["teach", "--config", yaml_file(t, "epoch: 3")], "did you mean 'epochs'",
    ),
    "YAML that is a list": (lambda t, r, n: ["teach", "--config", yaml_file(t, "- 3")], "expected a mapping"),
    "missing config": (lambda t, r, n: ["teach", "--config", str(t / "none.yaml")], "cannot read config"),
    "no teachers": (lambda t, r, n: ["distill", "--data", n], "no teachers given"),
    "missing checkpoint": (lambda t, r, n: distill(n, t / "none.safetensors"), "no such file"),
    "truncated checkpoint": (lambda t, r, n: distill(n, truncated(t, r)), "truncated"),
    "teachers of other classes": (lambda t, r, n: distill(n, other(t, 7)), "teacher 0 returns 7 values"),
    "teachers that disagree": (
        lambda t, r, n: [*distill(n, r / "teachers" / "teacher-0.safetensors"), str(other(t, 7))],
        "teacher 1 returns 7 values",
    ),
    "one teacher": (lambda t, r, n: distill(n, r / "teachers" / "teacher-0.safetensors"), "at least 2 teachers"),
    "no branches": (lambda t, r, n: [*distill(n, r / "teachers"), "--branches", "0"], "branches=0"),
    "batch larger than the set": (lambda t, r, n: ["teach", "--data", n, "--batch-size", "99"], "batch size is 99"),
    "labels out of range": (
        lambda t, r, n: ["teach", "--data", bad_npz(t, test_labels=np.full(24, 9))], "label",
    ),
    "npz without keys": (lambda t, r, n: ["teach", "--data", bad_npz(t, train_labels=None)], "train_labels"),
    "float images": (
        lambda t, r, n: ["teach", "--data", bad_npz(t, train_images=np.zeros((40, 8, 8, 3)))], "uint8",
    ),
    "wrong shape": (
        lambda t, r, n: ["teach", "--data", bad_npz(t, train_images=np.zeros((40, 8, 8), np.uint8))], r"\(N, H, W, C\)",
    ),
    "folder of another run": (
        lambda t, r, n: ["teach", "--data", n, *SMALL, "--out", str(r / "teachers")], "not empty",
    ),
    "nothing to evaluate": (lambda t, r, n: ["evaluate", "--data", n], "nothing to evaluate"),
    "folder without a run": (lambda t, r, n: ["evaluate", str(t), "--data", n], "finished run"),
    "export of a folder without a run": (lambda t, r, n: ["export", str(t)], "holds no network"),
    "unknown format": (
        lambda t, r, n: ["export", str(r / "student-0"), "--data", n, "--formats", "onnix"], "did you mean 'onnx'",
    ),
    "CIFAR without a root": (lambda t, r, n: ["teach", "--data", "cifar100"], "root"),
}  # fmt: skip


def yaml_file(folder, text):
    (folder / "c.yaml").write_text(text)
    return str(folder / "c.yaml")


def distill(npz, teachers):
    return ["distill", "--data", npz, "--batch-size", "8", "--epochs", "1", "--teachers", str(teachers)]


def truncated(folder, runs):
    data = (runs / "teachers" / "teacher-0.safetensors").read_bytes()
    (folder / "t.safetensors").write_bytes(data[:-50])
    return folder / "t.safetensors"


def other(folder, classes):
    save_network(folder / "o.safetensors", create_model("preresnet", classes, blocks=(1,), in_planes=4))
    return folder / "o.safetensors"


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line_and_nothing_is_written(name, runs, npz, tmp_path, capsys, monkeypatch):
    make, words = BAD[name]
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (tmp_path / "made").mkdir()
    arguments = make(tmp_path / "made", runs, npz)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert re.search(words, lines[0]), lines[0]
    assert not list(work.rglob("*.safetensors"))
    assert not (work / "runs").exists(), list(work.rglob("*"))


def test_wrong_type_on_a_flag_exits_with_2():
    with pytest.raises(SystemExit) as stop:
        main(["teach", "--epochs", "many"])
    assert stop.value.code == 2


def test_teachers_without_a_card_need_their_architecture(npz, tmp_path):
    network = create_model("preresnet", 4, blocks=(1, 1), in_planes=4)
    torch.save(network.state_dict(), tmp_path / "t.pt")
    with pytest.raises(InputError, match="pass model="):
        load_network(tmp_path / "t.pt")


def test_a_run_that_is_interrupted_says_how_to_go_on(npz, tmp_path):
    code = (
        "import signal, sys; from fastensdistill.train.trainer import TeachTrainer as T; inner = T.train_step\n"
        "def step(self):\n    self.step_index == 3 and signal.raise_signal(signal.SIGTERM)\n    return inner(self)\n"
        "T.train_step = step\nfrom fastensdistill.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    out = str(tmp_path / "run")
    arguments = ["teach", "--data", npz, *SMALL, "--members", "1", "--out", out]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + 15, done.stderr
    assert "stopped at step 4" in done.stderr
    assert main(["teach", "--out", out, "--resume"]) == 0


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for command in ("demo", "teach", "distill", "evaluate", "export", "plan", "doctor"):
        assert f"  {command}" in printed
    assert main([]) == 2


def test_doctor_names_versions_and_the_extension(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert re.search(r"^extension +\S", printed, re.M)
