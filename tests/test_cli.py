"""The command line: the whole job, settings from YAML and flags, and one clear line with exit code 2 for bad input."""

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest
import torch
import yaml

from fastensdistill.cli import main
from fastensdistill.config import DistillConfig, DistillRun, TeachRun
from fastensdistill.data.sources import load_dataset
from fastensdistill.errors import InputError
from fastensdistill.evaluate.metrics import accuracy, nll
from fastensdistill.evaluate.predict import predict
from fastensdistill.evaluate.runs import find_candidates
from fastensdistill.kernels import extension, ops
from fastensdistill.method.student import LatentBE
from fastensdistill.models import create_model
from fastensdistill.train.distill import DistillTrainer
from fastensdistill.weights import load_network, read_tensors, save_network
from tests.runs import NETWORK, dataset
from tests.untyped import present, untyped

SMALL = [*NETWORK, "--batch-size", "8", "--epochs", "2", "--device", "cpu"]


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
    arguments = ["distill", "--data", npz, "--batch-size", "8", "--epochs", "2", "--teachers", str(folder / "teachers"),
                 "--device", "cpu"]  # fmt: skip
    assert main([*arguments, "--out", str(folder / "student-0")]) == 0
    assert main([*arguments, "--seed", "1", "--out", str(folder / "student-1")]) == 0
    return folder


def test_a_run_without_a_report_is_measured_when_it_goes_on_with_one(npz, tmp_path, capsys):
    out = tmp_path / "teachers"
    teaching = ["teach", "--data", npz, *SMALL, "--members", "2", "--out", str(out)]
    assert main([*teaching, "--no-report"]) == 0
    assert "ACC" not in capsys.readouterr().out
    assert (out / "teacher-1.safetensors").is_file()
    assert not {"report.html", "results.json"} & {p.name for p in out.iterdir()}
    assert main([*teaching, "--resume", "--report"]) == 0
    assert "ACC" in capsys.readouterr().out
    assert {"report.html", "results.json"} <= {p.name for p in out.iterdir()}


def test_the_whole_job(runs, npz, tmp_path, capsys):
    files = {p.name for p in (runs / "teachers").glob("*.safetensors")}
    assert files == {f"{name}.safetensors" for name in ("teacher-0", "teacher-1", "last-0", "last-1", "checkpoint")}
    for file in ("config.yaml", "checkpoint.safetensors", "metrics.jsonl", "network.safetensors", "results.json",
                 "report.html", "perturbation.png"):  # fmt: skip
        assert (runs / "student-0" / file).stat().st_size > 0, file
    for folder in ("teachers", "student-0"):  # what training warned of
        assert "have a standard error of" in (runs / folder / "report.html").read_text()
    student = load_network(runs / "student-0" / "student.safetensors")
    assert student.branches == 2
    assert untyped(student).module.spec.arguments["in_planes"] == 4, "the student's shape is its teachers'"

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
        assert torch.equal(
            load_network(tmp_path / "export" / "network.safetensors")(x), untyped(student).average().eval()(x)
        )


def test_a_finished_run_resumes_to_itself(runs, capsys):
    tensors, card = read_tensors(runs / "student-0" / "network.safetensors")
    assert main(["distill", "--out", str(runs / "student-0"), "--resume"]) == 0
    again, same = read_tensors(runs / "student-0" / "network.safetensors")
    assert same == card
    assert all(torch.equal(again[k], v) for k, v in tensors.items())


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
    np.savez(tmp_path / "bad.npz", **untyped(arrays))
    return str(tmp_path / "bad.npz")


BAD = {
    "missing checkpoint": (lambda t, r, n: distill(n, t / "none.safetensors"), "no such file"),
    "truncated checkpoint": (lambda t, r, n: distill(n, truncated(t, r)), "truncated"),
    "teachers of other classes": (lambda t, r, n: distill(n, other(t, 7)), "teacher 0 returns 7 values"),
    "teachers that disagree": (
        lambda t, r, n: [*distill(n, r / "teachers" / "teacher-0.safetensors"), str(other(t, 7))],
        "teacher 1 returns 7 values",
    ),
    "one teacher": (lambda t, r, n: distill(n, r / "teachers" / "teacher-0.safetensors"), "at least 2 teachers"),
    "batch larger than the set": (lambda t, r, n: ["teach", "--data", n, "--batch-size", "99"], "batch size is 99"),
    "labels out of range": (
        lambda t, r, n: ["teach", "--data", bad_npz(t, test_labels=np.full(24, 9))], r"label.*9",
    ),
    "npz without keys": (lambda t, r, n: ["teach", "--data", bad_npz(t, train_labels=None)], "train_labels"),
    "float images": (
        lambda t, r, n: ["teach", "--data", bad_npz(t, train_images=np.full((40, 8, 8, 3), -0.5))], "pixels 0 to 255",
    ),
    "wrong shape": (
        lambda t, r, n: ["teach", "--data", bad_npz(t, train_images=np.zeros((40, 64), np.uint8))], r"\(N, H, W, C\)",
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
    "a file where a folder should be": (lambda t, r, n: ["teach", "--data", n, *SMALL, "--out", n + "/x"], "npz"),
    "a report into a file": (lambda t, r, n: ["evaluate", str(r / "teachers"), "--data", n, "--out", n], "npz"),
    "an export into a file": (lambda t, r, n: ["export", str(r / "student-0"), "--data", n, "--out", n], "npz"),
    "a run with a broken config": (lambda t, r, n: ["evaluate", broken_run(t, r), "--data", n], "expected a mapping"),
}  # fmt: skip


def broken_run(folder, runs):
    shutil.copy(runs / "student-0" / "network.safetensors", folder)
    (folder / "config.yaml").write_text("- 1")
    return str(folder)


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


def test_teachers_without_a_card_need_their_architecture(npz, tmp_path):
    network = create_model("preresnet", 4, blocks=(1, 1), in_planes=4)
    torch.save(network.state_dict(), tmp_path / "t.pt")
    with pytest.raises(InputError, match="pass model="):
        load_network(tmp_path / "t.pt")


def test_foreign_teachers_of_one_channel_from_start_to_end(tmp_path):
    """State dicts that say nothing, of images with one channel: classes and normalisation are the data's throughout."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (30, 8, 8, 1)).astype(np.uint8), np.arange(30) % 3
    path = tmp_path / "grey.npz"
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    for i in range(2):
        network = create_model("resnet32", 3, mean=(0.5,), std=(0.3,))
        state = {k: v for k, v in network.state_dict().items() if not k.startswith("normalize")}
        torch.save(state, tmp_path / f"f{i}.pt")
    files = [str(tmp_path / "f0.pt"), str(tmp_path / "f1.pt")]
    arguments = ["--data", str(path), "--device", "cpu"]
    assert main(["distill", *arguments, "--teacher-model", "resnet32", "--teachers", *files, "--epochs", "1",
                 "--batch-size", "9", "--out", str(tmp_path / "run")]) == 0  # fmt: skip
    assert (tmp_path / "run" / "perturbation.png").is_file()
    both = [files[0], str(tmp_path / "run")]  # one that needs --model, and one that says what it is
    assert main(["evaluate", *both, *arguments, "--model", "resnet32", "--out", str(tmp_path / "report")]) == 0
    student = load_network(tmp_path / "run" / "student.safetensors")
    assert untyped(student).module.normalize.mean.numel() == 1
    assert len(json.loads((tmp_path / "report" / "results.json").read_text())["rows"]) == 2


def test_a_run_that_is_interrupted_says_how_to_go_on(npz, tmp_path):
    code = (
        "import signal, sys; from fastensdistill.train.teach import TeachTrainer as T; inner = T.train_step\n"
        "def step(self):\n    self.step_index == 3 and signal.raise_signal(signal.SIGTERM)\n    return inner(self)\n"
        "T.train_step = step\nfrom fastensdistill.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    out = str(tmp_path / "run")
    arguments = ["teach", "--data", npz, *SMALL, "--members", "1", "--out", out]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + 15, done.stderr
    assert "stopped at step 4" in done.stderr
    assert main(["teach", "--out", out, "--resume"]) == 0


def test_doctor_names_versions_and_the_extension(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^torch +{re.escape(metadata.version('torch'))}", printed, re.M)
    found = extension.describe()
    expected = "none; Triton kernels and references in Python serve" if not found["loaded"] else str(found["library"])
    assert re.search(rf"^extension .*{re.escape(expected)}", printed, re.M)
    assert re.search(rf"^ops on a CPU +{len(ops.PORTABLE)} reference$", printed, re.M)
    counts = re.findall(r"(\d+) (extension|triton|reference)", re.findall(r"^ops on CUDA.*$", printed, re.M)[0])
    assert sum(int(count) for count, _ in counts) == len(ops.PORTABLE)
    assert ("extension" in [who for _, who in counts]) == found["loaded"]
    assert re.search(r"^engines +reference; captured \(.*; fused", printed, re.M)


def test_foreign_teachers_of_unlike_architecture_and_normalisation(npz, tmp_path, capsys):
    """One model and one normalisation for each file; what distill trains with is what evaluate measures."""
    torch.manual_seed(0)
    made = {"a": ("preresnet", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), "b": ("resnet32", (0.5,) * 3, (0.25,) * 3)}
    networks = {}
    for name, (model, mean, std) in made.items():
        networks[name] = create_model(model, 4, mean=mean, std=std).eval()
        state = {k: v for k, v in networks[name].state_dict().items() if not k.startswith("normalize.")}
        torch.save(state, tmp_path / f"{name}.pt")
    files = [str(tmp_path / f"{name}.pt") for name in made]
    means = [str(v) for _, mean, _ in made.values() for v in mean]
    stds = [str(v) for _, _, std in made.values() for v in std]
    models = [model for model, _, _ in made.values()]
    out = tmp_path / "run"
    assert main(["distill", "--data", npz, *NETWORK, "--batch-size", "8", "--epochs", "1", "--device", "cpu",
                 "--teachers", *files, "--teacher-model", *models,
                 "--teacher-mean", *means, "--teacher-std", *stds, "--out", str(out)]) == 0  # fmt: skip
    data = load_dataset(npz)
    labels = torch.from_numpy(data.validation.labels)
    expected = [accuracy(predict(n, data.validation)[0], labels) for n in networks.values()]
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["teacher_accuracy"] for r in records if "teacher_accuracy" in r] == [expected]
    assert main(["evaluate", *files, "--data", npz, "--model", *models, "--mean", *means, "--std", *stds,
                 "--out", str(tmp_path / "report")]) == 0  # fmt: skip
    rows = json.loads((tmp_path / "report" / "results.json").read_text())["rows"]
    labels = torch.from_numpy(data.test.labels)
    nlls = [nll(predict(n, data.test)[0], labels) for n in networks.values()]
    assert [r["metrics"][0]["nll"] for r in rows] == pytest.approx(nlls, rel=1e-6)
    capsys.readouterr()
    arguments = ["evaluate", *files, "--data", npz, "--model", *models]
    assert main([*arguments, "--mean", *means[:2]]) == 2
    assert "mean has 2 values: expected 3 for all files, or 6" in capsys.readouterr().err
    assert main([*arguments[:-1]]) == 2
    assert "b.pt does not fit preresnet" in capsys.readouterr().err


def test_runs_from_python_share_no_row(npz, tmp_path):
    """They save neither data nor teachers, so that nothing says that they differ in the seed only."""
    paths = []
    for name, widen in (("narrow", 1), ("wide", 2)):
        networks = [create_model("preresnet", 4, blocks=(1,), in_planes=4, widen=widen) for _ in range(2)]
        config = DistillConfig(epochs=1, batch_size=8, device="cpu")
        DistillTrainer(LatentBE(networks[0], 2), networks, npz, config, out=tmp_path / name, quiet=True).fit()
        paths.append(tmp_path / name)
    assert [c.name for c in find_candidates(paths, load_dataset(npz))] == ["narrow", "wide"]


def test_plan_counts_graph_nodes_and_says_what_reading_and_updating_cost(capsys):
    """An update reads and writes each value and moment, and reads each gradient."""
    patterns = (
        r"^reading a batch, (.*): (\d+) launches, ([\d.]+) MB, at least [\d.]+ us on H200$",
        r"^update of ([\d,]+) values by (\w+): ([\d.]+) MB, at least [\d.]+ us on H200$",
        r"^(\d+) graph nodes: \d+ Triton, \d+ PyTorch, 5 extension$",
    )
    told = []
    for flags in ("", "--augment strong --mixup 0.2 --optimizer adamw --ema-decay 0.999 --clip-norm 1"):
        assert main(["plan", "wrn28_1", "--batch", "8", *flags.split()]) == 0
        out = capsys.readouterr().out
        told.append([present(re.search(pattern, out, re.M)) for pattern in patterns])
    (plain, sgd, nodes), (strong, adamw, more) = told
    assert " 6 PyTorch," in nodes[0]
    assert plain[1] == "moved by up to 4 pixels, mirrored at random"
    assert strong[1].endswith("TrivialAugment, a cutout of 16 pixels, mixup 0.2")
    assert int(strong[2]) > int(plain[2])
    assert float(strong[3]) > float(plain[3])
    values = sum(p.numel() for p in LatentBE(create_model("wrn28_1", 100), 4).parameters())
    assert sgd[1] == adamw[1] == f"{values:,}"
    assert (sgd[2], adamw[2]) == ("sgd", "adamw")
    assert (sgd[3], adamw[3]) == (f"{20 * values / 1e6:.2f}", f"{40 * values / 1e6:.2f}")
    assert int(more[1]) > int(nodes[1]), "clipping has launches of its own"
    assert main(["plan", "wrn28_1", "--teachers", "1"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("graph nodes not counted: perturbation 'tdiv-sdiv' needs at least 2 teachers")
