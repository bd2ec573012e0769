"""The measurement for a GPU machine, rehearsed: whatever happens to one stage, the others are measured and kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.backends.nvidia import driver

from bench import kernels, report
from bench.common import ROOT
from bench.gpu_run import __main__ as parent
from bench.gpu_run import faults, stage, stages, timing
from bench.gpu_run.context import REHEARSED, Context
from bench.gpu_run.findings import as_runs, findings, newest, summary
from bench.gpu_run.record import Record, read
from bench.gpu_run.stages import CALLS, STAGES, Stage, of_call, stated, words
from bench.launches import distance, exactly, prepare
from bench.setting import Setting
from fastensdistill.engine.dispatch import OPS
from fastensdistill.network.gpu import GPUS
from tests.untyped import untyped


def rehearse(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    command = [sys.executable, "-m", "bench.gpu_run", "--rehearse", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done, read(out / "results.jsonl")


def of(rows: list[dict], kind: str, name: str = "") -> list[dict]:
    return [row for row in rows if row["kind"] == kind and name in ("", row["stage"])]


def test_whatever_happens_to_a_stage_the_others_are_measured(tmp_path, capsys):
    """A stage that raises, one that hangs, one that is killed, a contender without memory, a capture that differs."""
    out = tmp_path
    planted = ["raise=extension", "hang=first", "kill=kernels", "memory=table", "captured"]
    chosen = ["device", "extension", "step", "captures", "first", "table", "kernels", "tuned", "pack"]
    disturbed = (out, *rehearse(out, "--stages", *chosen, "--commit", "abc123", "--plant", *planted))
    faults_cost_their_own_stages(disturbed)
    everybody_else_is_timed_and_says_how(disturbed)
    a_capture_that_differs_is_diagnosed_and_left_off(disturbed)
    results_say_where_they_come_from(disturbed)
    the_report_reads_a_rehearsal_only_as_one(disturbed, capsys)


def faults_cost_their_own_stages(disturbed) -> None:
    out, done, rows = disturbed
    assert done.returncode == 0, done.stdout + done.stderr
    status = {row["name"]: row["status"] for row in of(rows, "stage")}
    assert status == {
        "device": "ok", "extension": "failed: RuntimeError: planted: this stage raises", "step": "ok",
        "captures": "ok", "first": "ended after 15 s", "table": "ok", "kernels": "killed by signal 9 (SIGKILL)",
        "tuned": "left out: kernels did not end well", "pack": "ok",
    }  # fmt: skip
    lines = (out / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows, "the file is whole"
    assert rows[-1]["kind"] == "end"
    assert of(rows, "kernel"), "what was timed before the process was killed"


def everybody_else_is_timed_and_says_how(disturbed) -> None:
    table = newest(of(disturbed[2], "throughput", "table"), "contender")
    by_name = {row["contender"]: row for row in table}
    assert by_name["compiled"]["status"] == "not timed: out of memory"
    for name in ("fused", "fused-triton"):
        assert by_name[name]["status"] == "timed"
        assert by_name[name]["images_per_second"] > 0
        assert by_name[name]["captured"] is False
        assert by_name[name]["title"].endswith("launched from Python")
    rounds = [row["rounds"] for row in of(disturbed[2], "throughput", "table") if row["contender"] == "fused"]
    assert rounds[0] == 3, "alone, before anybody else was built"
    assert rounds[-1] == REHEARSED.rounds


def a_capture_that_differs_is_diagnosed_and_left_off(disturbed) -> None:
    rows = disturbed[2]
    assert all(row["ok"] for row in of(rows, "step"))
    assert {row["same"] for row in of(rows, "replay")} == {False}
    (found,) = of(rows, "capture")
    assert (found["launch"]["op"], found["launch"]["node"]) == ("conv gradient", "groups.1.0.conv1")
    assert of(rows, "in force", "table"), "later stages obey the remedy and say so"


def results_say_where_they_come_from(disturbed) -> None:
    rows = disturbed[2]
    (first,) = of(rows, "run")
    assert first["rehearsal"] is True
    assert first["plants"]
    (host,) = of(rows, "device")
    assert host["commit"] == "abc123"
    assert {"device", "torch", "triton", "python", "date", "extension", "nvidia_smi"} <= host.keys()
    (roof,) = of(rows, "roof")
    assert roof["flops_per_second"] > 0
    assert "REHEARSAL, NO RESULT" in disturbed[1].stdout
    assert disturbed[1].stdout.rstrip().splitlines()[-1].startswith("pack")


def the_report_reads_a_rehearsal_only_as_one(disturbed, capsys) -> None:
    out = disturbed[0]
    with pytest.raises(SystemExit, match="smoke run"):
        report.main([str(out / "results.jsonl")])
    assert report.main([str(out / "results.jsonl"), "--smoke", "--plots", str(out / "plots")]) == 0
    text = capsys.readouterr().out
    assert "### throughput: results.jsonl, table" in text
    assert "### kernels: results.jsonl" in text
    assert sorted(path.name for path in (out / "plots").glob("*.png")) == [
        "results-kernels.png", "results-table.png",
    ]  # fmt: skip
    assert "commit abc123" in text
    assert "out of memory" in text


def test_a_launch_that_kills_its_process_is_passed_over_and_remedied(tmp_path):
    done, rows = rehearse(tmp_path, "--stages", "launches-odd", "table", "--plant", "launch-dies")
    assert done.returncode == 0, done.stdout + done.stderr
    statuses = [row["status"] for row in of(rows, "stage") if row["name"] == "launches-odd"]
    assert statuses[-1] == "ok"
    assert set(statuses[:-1]) == {"killed by signal 9 (SIGKILL)"}
    (final,) = of(rows, "launches")
    assert final["checked"] > 50
    assert (final["crashed"], final["remedied"], final["no_remedy"]) == (1, 1, 0)
    (remedy,) = of(rows, "remedy")
    assert "conv gradient groups.1.0.conv1" in remedy["launch"]
    assert of(rows, "in force", "table")
    timed = newest(of(rows, "throughput", "table"), "contender")[0]
    assert timed["status"] == "timed", "and the step is timed"
    assert timed["remedies"] == "conv_data_gradient_kernel 8 warps"
    assert "with conv_data_gradient_kernel 8 warps" in done.stdout


def test_the_stated_times_fit_the_calls():
    assert stated(of_call("A")) <= CALLS["A"] <= 420
    assert stated(of_call("B")) <= CALLS["B"] <= 300
    assert {one.name for one in STAGES if one.module == ()} == set(stage.RUN)
    assert all(one.expected <= one.limit for one in STAGES)
    names = [one.name for one in STAGES]
    assert len(set(names)) == len(names)
    for one in STAGES:
        for other in (*one.after, *one.needs):
            assert names.index(other) < names.index(one.name)


def test_what_goes_on_meanwhile_is_waited_for():
    def a(name: str, seconds: float, **more) -> Stage:
        return Stage(name, "A", "", 100, seconds, **more)

    assert stated([a("a", 5), a("b", 30, background=True), a("c", 7), a("d", 2, after=("b",))]) == 5 + 30 + 2
    assert stated([a("b", 30, background=True), a("c", 7)]) == 30


def test_the_plan_is_printed_and_nothing_is_run(capsys, tmp_path):
    assert parent.main(["--plan", "--call", "B", "--out", str(tmp_path / "x")]) == 0
    text = capsys.readouterr().out
    assert "expected in all" in text
    assert "counters" in text
    assert not (tmp_path / "x").exists()


def test_faults_are_not_planted_in_a_measurement(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        parent.main(["--out", str(tmp_path), "--plant", "launch"])
    assert error.value.code == 2
    assert "--plant is for a rehearsal" in capsys.readouterr().err


@pytest.mark.parametrize("plant", ["lunch", "hang", "hang=frist", "launch=first", "memory=first"])
def test_a_fault_that_does_not_exist_is_refused(tmp_path, capsys, plant):
    with pytest.raises(SystemExit) as error:
        parent.main(["--rehearse", "--out", str(tmp_path), "--plant", plant])
    assert error.value.code == 2
    assert f"--plant {plant}: expected launch, " in capsys.readouterr().err
    assert set(stages.FAULTS) == set(faults.FAULTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(tmp_path, capsys):
    assert parent.main(["--out", str(tmp_path), "--stages", "device", "smoke"]) == 3
    assert "no CUDA device" in capsys.readouterr().out
    assert [row["name"] for row in of(read(tmp_path / "results.jsonl"), "stage")] == ["device"]


def test_records_outlive_an_interruption(tmp_path):
    record = Record(tmp_path / "r.jsonl", "x")
    record.add("a", value=float("inf"), path=tmp_path, many=(1, None))
    with record.path.open("a") as file:
        file.write('{"stage": "x", "kind": "b", "val')
    (row,) = read(record.path)
    assert (row["value"], row["path"], row["many"]) == ("inf", str(tmp_path), [1, None])
    assert read(tmp_path / "none") == []


def run_of(tmp_path, monkeypatch, code: str, **more) -> tuple[parent.Run, Stage]:
    """A parent whose stage is a few lines of Python."""
    options = SimpleNamespace(
        out=tmp_path, seconds=60, rehearse=False, plant=[], call="A", packages="", commit="", stages=None
    )
    run = parent.Run(untyped(options), Record(tmp_path / "results.jsonl", "run"))
    begin = subprocess.Popen

    def popen(command, **keywords):
        return begin([sys.executable, "-c", code], **keywords)

    monkeypatch.setattr(parent.subprocess, "Popen", popen)
    return run, Stage("x", "A", "", more.pop("limit", 20), 1, **more)


def test_a_stage_that_hangs_without_a_record_is_ended(tmp_path, monkeypatch):
    run, one = run_of(tmp_path, monkeypatch, "import time; time.sleep(60)", restarts=2, stall=1)
    began = time.monotonic()
    run.do(one)
    assert run.status["x"] == "hung: no record for 1 s"
    assert time.monotonic() - began < 10
    assert len(of(read(run.record.path), "stage")) == 1, "it has recorded nothing that it could go on from"


def test_a_stage_that_dies_is_started_again_as_often_as_it_may(tmp_path, monkeypatch):
    code = (
        f"import sys, os; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nfrom bench.gpu_run.record import Record\n"
        f"Record(Path({str(tmp_path / 'results.jsonl')!r}), 'x').add('tried')\nos.abort()"
    )
    run, one = run_of(tmp_path, monkeypatch, code, restarts=2)
    run.do(one)
    rows = read(run.record.path)
    assert [row["status"] for row in of(rows, "stage")] == ["killed by signal 6 (SIGABRT)"] * 3
    assert len(of(rows, "tried")) == 3


def test_what_a_stage_leaves_running_is_ended(tmp_path, monkeypatch):
    mark = tmp_path / "alive"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    run, one = run_of(tmp_path, monkeypatch, code)
    run.do(one)
    assert run.status["x"] == "ok"
    time.sleep(3)
    assert not mark.exists()


def test_no_stage_begins_without_time(tmp_path, monkeypatch):
    run, one = run_of(tmp_path, monkeypatch, "")
    run.options.seconds = parent.RESERVED + 2
    run.do(one)
    assert run.status["x"] == "left out: no time left"


def test_findings_call_for_further_stages():
    assert findings([]) == set()
    assert findings([{"kind": "step", "ok": False}]) == {"step wrong"}
    assert findings([{"kind": "step", "ok": True}, {"kind": "smoke", "same": False}]) == {"capture differs"}
    assert findings([{"kind": "replay", "same": True, "twice_same": False}]) == {"capture differs"}
    assert summary([]) == ["", "stage  s  status"]
    assert as_runs([]) == []


def test_no_measurement_fails_for_a_prediction(tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("no such network")

    monkeypatch.setattr(timing, "predicted", broken)
    monkeypatch.setattr(timing.proof, "trouble", lambda device: "")
    record = Record(tmp_path / "r.jsonl", "first")
    record.add("roof", name="NVIDIA H100 80GB HBM3", flops_per_second=1.0, bytes_per_second=1.0)
    assert timing.expected_ms(Context(tmp_path, record), Setting("wrn28_1", "tdiv-sdiv", 4, 2)) is None
    assert read(record.path)[-1]["error"] == "ValueError: no such network"
    monkeypatch.setattr(timing, "predicted", lambda *given: given)
    assert timing.expected_ms(Context(tmp_path, record), Setting("wrn28_1", "tdiv-sdiv", 4, 2)) == (
        "wrn28_1", 4, 2, "h100", False,
    )  # fmt: skip
    assert timing.expected_ms(Context(tmp_path, record), Setting("wrn28_1", "kd", 4, 2)) is None


def test_the_documents_state_the_times_of_the_plan():
    text = " ".join((ROOT / "docs/benchmarks.md").read_text().split())
    assert words("A") in text
    assert words("B") in text


def test_counters_are_read_from_the_profilers_table():
    text = (
        "==PROF== Connected\n"
        '"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"\n'
        '"","","us","register/thread"\n'
        '"0","grouped_conv_kernel","1,234.5","128"\n'
    )
    assert timing.read_counters(text) == [{"kernel": "grouped_conv_kernel", "us": 1234.5, "registers": 128.0}]
    assert timing.read_counters("==ERROR== no permission\n") == []


def test_a_profiler_that_does_not_know_a_counter_is_asked_for_its_sections(tmp_path, monkeypatch):
    profiler = tmp_path / "ncu"
    profiler.write_text(
        "#!/bin/sh\n"
        'case "$*" in *--metrics*) echo "Failed to find metric x" >&2; exit 1;; esac\n'
        'echo \'"ID","Kernel Name","launch__registers_per_thread"\'\n'
        'echo \'"0","head_kernel","40"\'\n'
        f'echo "$*" > {tmp_path}/asked\n'
    )
    profiler.chmod(0o755)
    monkeypatch.setattr(timing.shutil, "which", lambda name: str(profiler))
    record = Record(tmp_path / "results.jsonl", "counters")
    for index, us in ((0, 5.0), (1, 9.0), (2, 1.0), (3, 2.0)):
        record.add("kernel", index=index, launch=f"launch {index}", us=us, count=1)
    timing.counters(Context(tmp_path, record))
    *_, failed, found = read(record.path)
    assert failed["error"] == "Failed to find metric x"
    assert found["launches"] == ["launch 1", "launch 0", "launch 3"]
    assert found["kernels"] == [{"kernel": "head_kernel", "registers": 40.0}]
    asked = (tmp_path / "asked").read_text()
    assert "--section SpeedOfLight" in asked
    assert "--launch 1 0 3" in asked
    assert "--clock-control none" in asked


def test_the_slowest_launches_are_those_that_take_most_of_a_step():
    rows = [{"kind": "kernel", "index": i, "us": us, "count": n} for i, us, n in ((0, 10, 1), (1, 3, 9), (0, 2, 1))]
    assert [row["index"] for row in timing.slowest([*rows, {"kind": "kernel", "index": 2}], 5)] == [1, 0]


def test_caches_are_packed_in_pieces_and_carried_in_again(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "PIECE", 1000)
    out, again = tmp_path / "out", tmp_path / "again"
    (out / "caches" / "triton").mkdir(parents=True)
    again.mkdir()
    content = torch.randint(256, (5000,), dtype=torch.uint8).numpy().tobytes()
    (out / "caches" / "triton" / "kernel").write_bytes(content)
    stage.pack(Context(out, Record(out / "results.jsonl", "pack")))
    assert len(list(out.glob("caches.tgz.*"))) > 4
    parent.carry_in(untyped(SimpleNamespace)(caches=out, out=again))
    assert (again / "caches" / "triton" / "kernel").read_bytes() == content


def test_kernels_compiled_beforehand_are_those_that_are_launched(tmp_path):
    """Of a second run nothing is compiled anew: Triton's launch path finds every kernel and every launcher."""
    code = (
        "import sys\nfrom bench.gpu_run import warm\nfrom bench.setting import Setting\n"
        "launches = warm.recorded([Setting('tiny', 'tdiv-sdiv', 16, 2)], 90)[::12]\n"
        "found = warm.compile_all(launches, 90, 2)\n"
        "print(found['kernels'], found['errors'], found['launcher_processor_seconds'])\n"
    )

    def run() -> tuple[str, set[Path]]:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, {path for path in tmp_path.rglob("*") if path.is_file()}

    first, files = run()
    assert " [] " in first
    assert any(path.suffix == ".cubin" for path in files)
    if hasattr(driver, "make_launcher"):  # Triton 3.6 compiles one a kernel
        assert any(path.name.startswith("__triton_launcher") for path in files)
    assert run()[1] == files


@pytest.mark.parametrize("large", [0, 1e18], ids=["float32", "float64"])
def test_exact_convolutions_by_pytorch_group_by_group(monkeypatch, large):
    """What a GPU's launches are compared with is what the references compute in float64."""
    monkeypatch.setattr("bench.launches.LARGE", large)
    seen = set()
    for prepared, _ in prepare(Setting("tiny", "tdiv-sdiv", 3, 2), torch.device("cpu"), torch.float32):
        right, found = (exactly(prepared, on_gpu) for on_gpu in (False, True))
        narrow = large == 0 and prepared.launch.op in OPS
        seen.add((prepared.launch.op, narrow))
        assert found.keys() == right.keys()
        for name, value in found.items():
            assert distance(value, right[name]) < (1e-5 if narrow else 1e-12), (prepared.title, name)
            assert not narrow or value.dtype == torch.float32
    assert {op for op, _ in seen} >= set(OPS) - {"flat gradient"}


def test_a_rival_that_raises_leaves_the_launch_its_time(monkeypatch):
    prepared, count = next(
        (p, n) for p, n in prepare(Setting("tiny", "tdiv-sdiv", 3, 2), torch.device("cpu"), torch.float32)
        if p.launch.op == "conv"
    )  # fmt: skip

    def refuse(*arguments: object) -> None:
        raise RuntimeError("cuDNN has no engine")

    monkeypatch.setattr(kernels, "by_pytorch", refuse)
    found = kernels.row(prepared, count, kernels.timer(torch.device("cpu"), 2), GPUS["h100"], alone=False)
    assert found["us"] > 0
    assert (found["vendor"], found["vendor_error"]) == (None, "RuntimeError: cuDNN has no engine")

    def spoil(*arguments: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(kernels, "by_pytorch", spoil)
    with pytest.raises(RuntimeError, match="illegal"):
        kernels.row(prepared, count, kernels.timer(torch.device("cpu"), 2), GPUS["h100"], alone=False)


def test_a_stage_counts_its_time_from_its_process_and_not_from_its_imports(monkeypatch, tmp_path):
    for owner, name in ((torch.backends.cudnn, "benchmark"), (torch, "set_float32_matmul_precision")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    seen: list[Context] = []
    monkeypatch.setitem(stage.RUN, "device", seen.append)
    before = time.monotonic()
    stage.main(["device", "--out", str(tmp_path), "--seconds", "100"], began=5.0)
    stage.main(["device", "--out", str(tmp_path), "--seconds", "100"])
    assert seen[0].deadline == 90.0
    assert seen[1].began < before  # when this process imported the package
