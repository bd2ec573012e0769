"""Trainers in several real processes (gloo, on the CPU): the run of one process, stopped, killed, resumed, refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from fastensdistill.cli import main
from fastensdistill.config import DistillConfig, DistillRun, TeachConfig
from fastensdistill.data.loader import EvaluationSet
from fastensdistill.engine import parallel, select
from fastensdistill.errors import InputError
from fastensdistill.method.student import LatentBE
from fastensdistill.method.teachers import Teachers
from fastensdistill.train.distill import DistillTrainer
from fastensdistill.train.record import DivergedError
from fastensdistill.train.seeds import train_seeds
from fastensdistill.train.setup import choose_device, seeded
from fastensdistill.train.stop import Interrupted
from fastensdistill.train.teach import TeachTrainer
from fastensdistill.train.trainer import Trainer
from fastensdistill.weights import load_network, read_tensors
from tests.compare import check_close
from tests.networks import tiny
from tests.runs import NETWORK, ROOT, At, StopAt, dataset, make
from tests.untyped import untyped

# Every network of the package in both engines, per-process pairs and noise, statistics of each process its own.
RUNS: dict[str, dict[str, Any]] = {
    "fused": {"engine": "fused", "perturbation": "tdiv-sdiv"},
    "reference": {"engine": "reference", "perturbation": "gaussian", "kind": "hydra", "ema_decay": 0.9},
}
EPOCHS = 3  # of five steps


def exact(kind, out, **changes):
    """A run in float64 that nothing random is drawn for but the images."""
    torch.set_default_dtype(torch.float64)
    settings: dict[str, Any] = {
        "epochs": EPOCHS,
        "batch_size": 8,
        "learning_rate": 0.05,
        "device": "cpu",
        "engine": "fused",
    }
    settings |= changes
    try:
        networks = [seeded(10 + i, lambda: tiny(4)) for i in range(2)]
        trainer: Trainer
        if kind == "teach":
            trainer = TeachTrainer(networks, dataset(), TeachConfig(members=2, **settings), out=out, quiet=True)
        else:
            student = seeded(0, lambda: LatentBE(tiny(4), 2))
            config = DistillConfig(perturbation="none", **settings)
            trainer = DistillTrainer(student, Teachers(networks), dataset(), config, out=out, quiet=True)
        trainer.validation = EvaluationSet(dataset().validation, "cpu", dtype=torch.float64)
        return trainer.fit()
    finally:
        torch.set_default_dtype(torch.float32)


def states(trainer):
    return {f"{n}: {k}": v.clone() for n, net in trainer.networks.items() for k, v in net.state_dict().items()}


def refused(run):
    """What was raised, as it can be saved."""
    try:
        run()
    except (InputError, Interrupted) as error:
        return type(error).__name__, str(error)
    return "", ""


def process(rank, folder):
    torch.set_num_threads(1)
    folder, found = Path(folder), {}

    def out(name):  # a folder of its own for each process, to see who writes
        return folder / (name if rank == 0 else f"{name} of process {rank}")

    dist.init_process_group("gloo", init_method=f"file://{folder}/first", rank=rank, world_size=2)
    for kind in ("teach", "distill"):
        found[kind] = states(exact(kind, out(f"{kind}-2"), sync_batch_norm=True))
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/second", rank=rank, world_size=2)
    for name, settings in RUNS.items():
        found[name] = states(make(out=out(name), epochs=EPOCHS, **settings).fit())
        stopped = make(out=out(f"{name}-stopped"), epochs=EPOCHS, **settings)
        if rank == 1:
            StopAt(stopped, 7)
        found[f"{name} stopped"] = (*refused(stopped.fit), stopped.step_index)
        make(out=out(f"{name}-stopped"), epochs=EPOCHS, resume=True, **settings).fit()

    run = DistillRun(seeds=(0, 1), epochs=1, student="single", out=out("seeds"))
    for resume in (False, True):  # the second time there is nothing left to do, of which only the first knows
        ended, _ = train_seeds(replace(run, resume=resume), one_seed)
        found[f"seeds {resume}"] = [path.name for path in ended]

    diverged = make(out=out("diverged"))
    if rank == 1:
        At(diverged, 6, lambda scalars: scalars | {"loss": scalars["loss"] * float("nan")})
    found["diverged"] = refused(diverged.fit)

    full, fsync = make(out=out("full")), os.fsync
    if rank == 0:
        At(full, 7, fill_the_disk)
    found["full"] = refused(full.fit)
    os.fsync = fsync
    found["other data"] = refused(make(out=out("other"), data=dataset(40 + 8 * rank)).fit)
    found["odd batch"] = refused(lambda: make(batch_size=9))
    found["odd parts"] = refused(lambda: make(batch_size=12, micro_batches=4))
    found["no such statistics"] = refused(lambda: make(engine="reference", sync_batch_norm=True))
    found["of one"] = refused(make(out=folder / "of one", epochs=1, resume=True).fit)
    if rank == 1:
        select.verify_distillation = no_kernel
    found["no kernel"] = refused(lambda: make(engine="fused"))
    select.choose_engine = lambda *_: select.EngineChoice("fused", "as on a GPU")
    found["engine"] = str(make(epochs=1).fit().engine)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def one_seed(run):
    assert not run.resume
    return make("single", out=run.out, seed=run.seed, epochs=run.epochs, perturbation="none")


def no_kernel(*_):
    raise RuntimeError("this kernel does not run")


def fill_the_disk(scalars: Any) -> Any:
    os.fsync = untyped(no_space)
    return scalars


def no_space(_descriptor):
    raise OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of one process, and of two."""
    folder = tmp_path_factory.mktemp("processes")
    for kind in ("teach", "distill"):
        torch.save(states(exact(kind, folder / f"{kind}-1")), folder / f"{kind}.pt")
    make(out=folder / "of one", epochs=1).fit()
    mp.spawn(process, (str(folder),), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", ["teach", "distill"])
def test_with_synchronised_statistics_two_processes_are_one(folder, results, kind):
    """Best weights, running statistics, momentum and the recorded losses; on both processes."""
    expected = torch.load(folder / f"{kind}.pt")
    for result in results:
        for name, value in expected.items():
            check_close(name, result[kind][name].double(), value.double(), 1e-9)
    one, two = (load_file(folder / f"{kind}-{n}" / "checkpoint.safetensors") for n in (1, 2))
    for name, value in one.items():
        check_close(name, two[name].double(), value.double(), 1e-9)
    of_one, of_two = (records(folder / f"{kind}-{n}") for n in (1, 2))
    assert len(of_one) == len(of_two) == 2 * EPOCHS + 1
    for a, b in zip(of_one, of_two, strict=True):
        key = "loss" if a["event"] == "train" else "accuracy"
        check_close(f"{key} of step {a['step']}", torch.tensor(b[key]), torch.tensor(a[key]), 1e-6)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_both_end_with_the_best_weights_of_the_first(folder, results, name):
    one, two = (result[name] for result in results)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    saved = load_network(folder / name / "student.safetensors").state_dict()
    assert all(torch.equal(one[f"student: {k}"], v) for k, v in saved.items())


@pytest.mark.parametrize("name", RUNS)
def test_a_signal_to_one_stops_both_and_they_resume_bit_for_bit(folder, results, name):
    (kind, words, step), other = (result[f"{name} stopped"] for result in results)
    assert (kind, step) == ("Interrupted", other[2]) == (other[0], step)
    assert 7 <= step <= 10, "the end of that epoch is the latest"
    assert f"step {step} of {5 * EPOCHS}" in words
    one, two = (load_file(folder / f / "checkpoint.safetensors") for f in (name, f"{name}-stopped"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    running = [k for k in one if k.startswith("processes/1/") and k.endswith("running_mean")]
    assert running
    for key in [*running, "processes/1/step/pick", "processes/1/step/noise"]:
        assert not torch.equal(one[key], one[key.removeprefix("processes/1/")]), f"{key} is each process's own"
    assert not [k for k in one if k.startswith("processes/1/") and ("momentum" in k or k.endswith("weight"))]


def test_several_seeds_are_shared_by_all_and_the_first_knows_which_are_done(folder, results):
    for result in results:
        assert result["seeds False"] == result["seeds True"] == ["seed-0", "seed-1"]
    assert (folder / "seeds" / "seed-1" / "network.safetensors").is_file()


def test_only_the_first_writes(folder, results):
    assert len(results) == 2
    assert not [path.name for path in folder.iterdir() if "of process" in path.name]
    assert sorted(p.name for p in (folder / "fused").iterdir()) == [
        "checkpoint.safetensors", "config.yaml", "last.safetensors", "metrics.jsonl", "network.safetensors",
        "student.safetensors",
    ]  # fmt: skip


REFUSED = {
    "diverged": ("DivergedError", "not finite since step 6", "not finite since step 6"),
    "full": ("InputError", "^cannot write .*No space left", "^process 0: cannot write .*No space left"),
    "other data": ("InputError", "^process 1 has images=", "process 1 has images="),
    "odd batch": ("InputError", "^batch_size=9 for 2 processes", "batch_size=9 for 2 processes"),
    "odd parts": ("InputError", "^6 images .* for each of 2 processes in micro_batches=4", "micro_batches=4"),
    "no such statistics": ("InputError", "^sync_batch_norm needs the fused engine", "sync_batch_norm needs the fused"),
    "no kernel": ("InputError", "cannot be used .* this kernel does not run", "this kernel does not run"),
    "of one": ("InputError", "processes=1, not 2", "^process 0: .*processes=1, not 2"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_goes_wrong_on_one_is_raised_on_both(results, what):
    kind, first, second = REFUSED[what]
    for result, words in zip(results, (first, second), strict=True):
        assert result[what][0] == kind
        assert re.search(words, result[what][1]), result[what][1]


def test_where_a_kernel_does_not_run_on_one_both_take_the_reference_engine(results):
    assert [result["engine"] for result in results] == ["reference engine: RuntimeError: this kernel does not run"] * 2


def test_divergence_keeps_the_last_good_checkpoint(folder, results):
    assert results[1]["diverged"][0] == DivergedError.__name__
    assert step_of(folder / "diverged" / "checkpoint.safetensors") == 5


def step_of(checkpoint):
    return read_tensors(checkpoint)[1]["values"]["step_index"]


def test_a_run_of_two_is_not_resumed_by_one(folder, results):
    assert results
    with pytest.raises(InputError, match="processes=2, not 1"):
        make(out=folder / "fused", epochs=EPOCHS, resume=True, **RUNS["fused"]).fit()


# ---- torchrun itself


def torchrun(count, *arguments, **popen):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **popen
    )


SCRIPT = f"""
import os, signal, sys
from tests.runs import At, make
out, resume, kill = sys.argv[1], sys.argv[2] == "resume", int(sys.argv[3])
trainer = make(out=out, resume=resume, epochs={EPOCHS}, **{RUNS["fused"]})
if os.environ["RANK"] == "1":
    At(trainer, kill, lambda scalars: os.kill(os.getpid(), signal.SIGKILL))
trainer.fit()
"""


def test_a_script_of_which_one_process_is_killed_resumes_bit_for_bit(folder, tmp_path):
    """At a random step; the run it is compared with was not started by torchrun."""
    script, out = tmp_path / "script.py", tmp_path / "run"
    script.write_text(SCRIPT)
    step = int(np.random.default_rng().integers(5, 5 * EPOCHS))
    killed = torchrun(2, str(script), str(out), "start", str(step))
    _, errors = killed.communicate(timeout=120)
    assert killed.returncode == 1, errors
    assert (out / "checkpoint.safetensors").is_file(), (step, errors)
    resumed = torchrun(2, str(script), str(out), "resume", "-1")
    _, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    one, two = (load_file(f / "checkpoint.safetensors") for f in (folder / "fused", out))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one), step


@pytest.fixture
def npz(tmp_path):
    data = dataset(80)
    np.savez(
        tmp_path / "quadrants.npz", train_images=data.train.images, train_labels=data.train.labels,
        test_images=data.test.images, test_labels=data.test.labels,
    )  # fmt: skip
    return str(tmp_path / "quadrants.npz")


def test_the_command_reports_once_and_a_signal_to_the_launcher_stops_it_with_a_checkpoint(npz, tmp_path):
    out = tmp_path / "run"
    arguments = ["-m", "fastensdistill", "teach", "--data", npz, *NETWORK, "--batch-size", "8", "--epochs", "5000",
                 "--device", "cpu", "--members", "2", "--out", str(out)]  # fmt: skip
    running = torchrun(2, *arguments)
    deadline = time.monotonic() + 100
    while not (out / "checkpoint.safetensors").exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    assert running.returncode != 0
    (stopped,) = re.findall(r"stopped at step (\d+) of", errors)
    assert step_of(out / "checkpoint.safetensors") == int(stopped)
    assert errors.count("reference engine:") == 1
    assert errors.count("teach: epoch 1/5000,") == 1


def test_the_command_refuses_what_cannot_be_shared_once(npz, tmp_path):
    out = tmp_path / "run"
    arguments = ["-m", "fastensdistill", "teach", "--data", npz, *NETWORK, "--device", "cpu", "--batch-size", "64",
                 "--out", str(out)]  # fmt: skip
    refused = torchrun(3, *arguments)
    _, errors = refused.communicate(timeout=120)
    assert refused.returncode != 0
    assert re.findall(r"^error: (.*)$", errors, re.M) == ["batch_size=64 for 3 processes: expected a multiple of 3"]
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "local", "count", "expected"),
    [("auto", 1, 2, "cuda:1"), ("cuda", 0, 2, "cuda:0"), ("cuda", 1, 1, "1 GPUs"), ("cuda:0", 1, 2, "'cuda:0' for 2")],
    ids=["auto-takes-its-own", "cuda-takes-its-own", "more-processes-than-gpus", "one-gpu-for-all"],
)
def test_each_process_takes_its_own_gpu(monkeypatch, name, local, count, expected):
    """With the driver's answers given: no GPU is touched."""
    chosen: list[torch.device] = []
    for variable, value in {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": local}.items():
        monkeypatch.setenv(variable, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    if expected.startswith("cuda"):
        assert str(choose_device(name)) == expected
        assert [str(device) for device in chosen] == [expected]
    else:
        with pytest.raises(InputError, match=expected):
            choose_device(name)


def test_an_environment_that_describes_no_group_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for variable in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(InputError, match="WORLD_SIZE=2, but no process group"):
        parallel.join()


def test_only_training_takes_several_processes(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["evaluate", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: evaluate in 2 processes: expected one")
