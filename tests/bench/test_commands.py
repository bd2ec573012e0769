"""Every command at tiny sizes: it runs, checks, and writes a file from which the report draws."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from bench import kernels, loader, report, roof, scaling, startup, throughput
from bench.common import ROOT, Meter, interleave, quantile, table
from fastensdistill import cli, commands
from fastensdistill.config import DistillRun
from fastensdistill.engine.dispatch import Choice, ConvShape, Dispatch

CPU = torch.device("cpu")
COMMANDS = {
    "throughput": throughput, "kernels": kernels, "loader": loader, "scaling": scaling, "startup": startup,
    "roof": roof,
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """One smoke run of every command."""
    folder = tmp_path_factory.mktemp("results")
    for name, module in COMMANDS.items():
        more = ["--dispatch", str(folder / "kernels.rows")] if name == "kernels" else []
        assert module.main(["--smoke", "--json", str(folder / f"{name}.json"), *more]) == 0, name
    return folder


def load(results: Path, name: str) -> dict:
    return json.loads((results / f"{name}.json").read_text())


@pytest.mark.parametrize("name", COMMANDS)
def test_results_say_where_they_come_from(results, name):
    run = load(results, name)
    assert run["kind"] == name
    assert run["smoke"]
    assert {"commit", "date", "device", "torch", "python"} <= run["host"].keys()


def test_everybody_is_timed_or_has_a_reason(results):
    rows = load(results, "throughput")["rows"]
    assert {row["contender"] for row in rows} == set(throughput.CONTENDERS)
    assert {row["method"] for row in rows} == {"kd", "latentbe", "tdiv-sdiv", "teach"}
    for row in rows:
        if row["status"] == "timed":
            assert 0 < row["p20"] <= row["images_per_second"] <= row["p80"]
            assert row["images_per_second"] * row["seconds"] == pytest.approx(8 if row["method"] == "teach" else 4)
            assert all(error <= row["bounds"][kind] for kind, error in row["errors"].items())
        else:
            assert row["status"].startswith("not timed: ")
            assert "images_per_second" not in row
    timed = {row["contender"] for row in rows if row["status"] == "timed"}
    assert {"reference", "eager", "as-written", "vmap", "grouped"} <= timed


def test_a_launch_is_counted_as_often_as_the_step_has_it(results):
    run = load(results, "kernels")
    rows, step = run["rows"], throughput.Setting("tiny", "tdiv-sdiv", 2, 2)
    assert sum(row["count"] for row in rows) == len(step.launches)
    assert sum(row["flops"] * row["count"] for row in rows) == step.flops
    assert all(row["us"] > 0 for row in rows)
    convolutions = [row for row in rows if row["op"] in kernels.CONVS]
    assert all(row["dense"] > 0 and row["grouped"] > 0 and row["vendor"] > 0 for row in convolutions)
    assert Dispatch.load(results / "kernels.rows").table == tuple(kernels.choices(
        [row | ({"shape": ConvShape(*row["shape"])} if "shape" in row else {}) for row in rows], None,
        f"{run['host']['device']}, tiny, batch 2, M = K = 2",
    ))  # fmt: skip


def test_what_fails_its_check_is_not_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(loader, "LOADERS", {
        "device": loader.LOADERS["device"],
        "wrong": ("wrong", lambda split, batch, *rest: lambda: next(iter([loader_batch(split, batch)]))),
    })  # fmt: skip
    assert loader.main(["--smoke", "--json", str(tmp_path / "x.json")]) == 1
    wrong = load(tmp_path, "x")["rows"][1]
    assert "images_per_second" not in wrong
    assert "an epoch does not have every image once" in capsys.readouterr().out


def loader_batch(split, batch):
    return torch.zeros(batch, 3, 5, 5), torch.zeros(batch, dtype=torch.int64)


def test_report(results, tmp_path, capsys):
    earlier = load(results, "throughput")
    for row in earlier["rows"]:
        if "images_per_second" in row:
            row["images_per_second"] /= 2
    earlier["host"]["torch"] = "1.0"
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    with pytest.raises(SystemExit, match="smoke run"):
        report.main([str(results)])
    against = ["--against", str(tmp_path / "earlier.json"), "--plots", str(tmp_path / "plots")]
    assert report.main([str(results), "--smoke", *against]) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert f"### {name}: {name}.json" in text
    assert "torch 1.0 → " in text
    compared = text.split("Against commit")[1].split("###")[0]
    ratios = [line.split("|")[-2].strip() for line in compared.splitlines() if line.startswith("| tiny")]
    assert set(ratios) == {"2"}
    assert "Not timed: fused engine (not on cpu)" in text
    plots = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert plots == [f"{name}.{kind}" for name in ("kernels", "scaling", "throughput") for kind in ("png", "svg")]


def test_report_without_results(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 1
    assert "no results" in capsys.readouterr().out


class Counter:
    """An NVML whose device draws 100 W idle and 5 J for every step."""

    NVMLError = ValueError

    def __init__(self):
        self.time, self.steps = 0.0, 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return 1000 * (100 * self.time + 5 * self.steps)

    def nvmlDeviceGetPower(self, handle):
        raise ValueError("not supported")


def test_energy_is_the_counter_less_what_idles(monkeypatch):
    counter, meter = Counter(), Meter(CPU)
    assert meter.idle_watts() is None, "no counter, no reading"
    assert meter.joules_per_call(lambda: None, CPU, None) is None
    meter.nvml, meter.handle = counter, object()
    monkeypatch.setattr("time.perf_counter", lambda: counter.time)
    monkeypatch.setattr("time.sleep", lambda seconds: setattr(counter, "time", counter.time + seconds))

    def step():
        counter.time, counter.steps = counter.time + 0.01, counter.steps + 1

    assert meter.read("Power") is None
    idle = meter.idle_watts()
    assert idle == pytest.approx(100)
    assert meter.joules_per_call(step, CPU, idle) == pytest.approx(5)
    assert counter.time >= 3 + 5


def test_exponent():
    assert scaling.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_quantiles_and_table():
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile([0, 10], 0.2) == pytest.approx(2)
    assert table([{"a": "x", "b": 1234.5}, {"a": "yy"}], {"a": "A", "b": "B"}) == "A       B\nx   1,234\nyy      –"


def test_interleaved_turns():
    order: list[str] = []
    times = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, CPU)
    assert order == [*"aabb", *"ab", *"ba", *"ab"]  # warm-up and estimate, then turns, back and forth
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}


def accuracy_commands(folder: Path, **environment: str) -> list[list[str]]:
    """The command lines that bench/accuracy.sh gives to Python, noted by a stand-in: to start Python takes seconds."""
    noted, stand_in = folder / "noted", folder / "python"
    stand_in.write_text('#!/bin/sh\necho "$@" >> "$NOTED"\n')
    stand_in.chmod(0o755)
    noted.unlink(missing_ok=True)
    more = {"PYTHON": str(stand_in), "NOTED": str(noted), "EPOCHS": "1"} | environment
    script = str(ROOT / "bench" / "accuracy.sh")
    command = ["bash", script, "digits", str(folder), "--device", "cpu", "--batch-size", "100"]
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in noted.read_text().splitlines()]
    assert all(line[:2] == ["-m", "fastensdistill"] for line in lines)
    return [line[2:] for line in lines]


def test_the_comparison_of_the_paper_runs_by_one_command(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "summarize", lambda *_: None)  # reports of their own
    monkeypatch.setattr(commands, "conclude", lambda *_: None)
    for line in accuracy_commands(tmp_path, TEACH="--model preresnet --blocks 1 --in-planes 4 --members 2"):
        assert cli.main(line) == 0, line
    rows = json.loads((tmp_path / "report" / "results.json").read_text())
    assert all(name in json.dumps(rows) for name in ("teachers", "ensemble of 2", "kd", "latentbe", "tdiv-sdiv"))
    assert len(list(tmp_path.glob("*/seed-0/student.safetensors"))) == 3


def test_the_comparison_has_seeds_recipes_and_says_what_it_takes(tmp_path):
    usage = subprocess.run(["bash", ROOT / "bench" / "accuracy.sh"], capture_output=True, text=True, check=False)
    assert usage.returncode == 2
    assert "bench/accuracy.sh DATA OUT" in usage.stdout
    lines = accuracy_commands(tmp_path, SEEDS="3 5", RECIPES="paper strong")
    assert [line[0] for line in lines] == [*["teach", *["distill"] * 3] * 2, "evaluate"]
    runs = [cli.parse(line[0], line[1:]) for line in lines]
    assert [list(run.seeds) for run in runs if isinstance(run, DistillRun)] == [[3, 5]] * 6
    assert [run.augment for run in runs[:-1]] == ["standard"] * 4 + ["strong"] * 4
    assert [run.standardize_logits for run in runs if isinstance(run, DistillRun)] == [False] * 3 + [True, False, False]
    assert runs[4].mixup > 0
    folders = [run.out for run in runs[:-1]]
    assert list(runs[-1].paths) == folders
    assert len(set(folders)) == 8
    (folders[5] / "config.yaml").parent.mkdir(parents=True)
    (folders[5] / "config.yaml").touch()
    again = accuracy_commands(tmp_path, SEEDS="3 5", RECIPES="paper strong")
    assert [line for line in again if "--resume" in line] == [[*lines[5], "--resume"]]
    environment = os.environ | {"RECIPES": "weak"}
    script = ["bash", ROOT / "bench" / "accuracy.sh", "digits", tmp_path]
    refused = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr) == (2, "RECIPES=weak: expected paper, strong, or both\n")


def test_a_table_of_implementations_is_what_was_faster_in_all_launches_of_a_shape():
    one, other = ConvShape(3, 1, 64, 64, 32, 32), ConvShape(3, 1, 128, 128, 16, 16)
    same = {"op": "conv", "shape": one, "count": 2}
    rows = [
        same | {"us": 100.0, "vendor": 90.0, "cuda": 60.0},
        same | {"us": 50.0, "vendor": 10.0, "cuda": 45.0},
        {"op": "conv gradient", "shape": one, "count": 1, "us": 100.0, "vendor": 99.0, "cuda": None},
        {"op": "conv", "shape": other, "count": 1, "us": 100.0, "vendor": 80.0, "cuda": None},
        {"op": "conv", "shape": other, "count": 1, "us": 100.0, "vendor": None, "cuda": 1.0},
        {"op": "weight gradient", "shape": other, "count": 3, "us": 100.0, "vendor": 50.0},
        {"op": "norm", "count": 3, "us": 100.0},
    ]
    found = kernels.choices(rows, 90, "here")
    assert found == [
        Choice("conv", "cudnn", "300 → 200 us a step, here", shape=one, arch=90),
        Choice("weight gradient", "cudnn", "300 → 150 us a step, here", shape=other, arch=90),
    ]
