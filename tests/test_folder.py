"""A run's folder: one run at a time, untouched before it is held, gone again where a run never made a step."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from fastensdistill.config import DistillConfig
from fastensdistill.errors import InputError
from fastensdistill.method.student import LatentBE
from fastensdistill.train import folder as folders
from fastensdistill.train.distill import DistillTrainer
from fastensdistill.train.folder import RunFolder
from fastensdistill.train.record import DivergedError
from fastensdistill.train.stop import Interrupted
from tests.networks import tiny
from tests.runs import ROOT, StopAt, dataset, make
from tests.untyped import untyped

CONFIG = DistillConfig(epochs=1)


def listing(path):
    return sorted((p.name, p.stat().st_mtime_ns) for p in path.iterdir())


@pytest.mark.parametrize("resume", [False, True], ids=["started-again", "resumed-twice"])
def test_a_second_run_in_a_folder_in_use_is_refused_and_touches_nothing(tmp_path, resume):
    first = RunFolder(tmp_path / "run")
    first.claim(CONFIG, False)
    (tmp_path / "run" / ".checkpoint.safetensors.1.tmp").write_bytes(b"half of what the first one is writing")
    before = listing(tmp_path / "run")
    second = RunFolder(tmp_path / "run")
    words = rf"run is in use by process {os.getpid()} on \S+: choose another --out, or wait until it has ended$"
    with pytest.raises(InputError, match=words):
        second.claim(CONFIG, resume)
    second.release(unused=True)
    assert listing(tmp_path / "run") == before
    first.release()
    assert second.claim(CONFIG, True) is False  # no checkpoint yet
    assert [name for name, _ in listing(tmp_path / "run")] == [".lock", "config.yaml"]
    second.release()
    assert [name for name, _ in listing(tmp_path / "run")] == ["config.yaml"]


def test_two_trainers_in_one_process(tmp_path):
    one, two = make(out=tmp_path / "run", epochs=1), make(out=tmp_path / "run", epochs=1, resume=True)
    inner, refused = one.train_step, []

    def step():
        with pytest.raises(InputError) as error:
            two.fit()
        refused.append(str(error.value))
        return inner()

    untyped(one).train_step = step
    one.fit()
    assert len(refused) == 5
    assert all("is in use by process" in line for line in refused)
    assert two.fit().step_index == 5  # when the first is done, it goes on


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from fastensdistill.config import DistillConfig
from fastensdistill.train.folder import RunFolder
RunFolder(__import__("pathlib").Path({out!r})).claim(DistillConfig(epochs=1), False)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_lets_go_of_its_folder(tmp_path):
    code = KILLED.format(root=str(ROOT), out=str(tmp_path / "run"))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "run" / ".lock").exists()
    again = RunFolder(tmp_path / "run")
    assert again.claim(CONFIG, True) is False
    again.release()


def test_a_folder_in_which_only_leftovers_are_is_empty(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on elsewhere\n")
    (tmp_path / ".config.yaml.12.tmp").write_text("epochs: ")
    held = RunFolder(tmp_path)
    assert held.claim(CONFIG, False) is False
    assert [p.name for p in sorted(tmp_path.iterdir())] == [".lock", "config.yaml"]
    held.release(unused=True)
    assert not list(tmp_path.iterdir())  # the folder was there before


def test_nothing_is_deleted_in_a_folder_that_is_refused(tmp_path):
    (tmp_path / ".notes.tmp").write_text("mine")
    (tmp_path / "thesis.tex").write_text("mine")
    before = listing(tmp_path)
    for resume, words in ((False, "not empty: choose another --out$"), (True, "nothing to resume")):
        held = RunFolder(tmp_path)
        with pytest.raises(InputError, match=words):
            held.claim(CONFIG, resume)
        held.release(unused=True)
    assert listing(tmp_path) == before
    held = RunFolder(tmp_path / "none")
    with pytest.raises(InputError, match="nothing to resume"):
        held.claim(CONFIG, True)
    assert not (tmp_path / "none").exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("mine")
    for out, words in ((tmp_path / "run", "run is a file"), (tmp_path / "run" / "inner", "cannot use .* Not a dir")):
        with pytest.raises(InputError, match=words):
            make(out=out, epochs=1).fit()
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("number", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(getattr(folders.errno, number), "no locks available")

    monkeypatch.setattr(folders.fcntl, "flock", flock)
    held = RunFolder(tmp_path / "run")
    assert held.claim(CONFIG, False) is False
    held.release()
    assert [name for name, _ in listing(tmp_path / "run")] == ["config.yaml"]


def test_a_platform_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "fcntl", None)
    held = RunFolder(tmp_path / "run")
    assert held.claim(CONFIG, False) is False
    held.release(unused=True)
    assert not (tmp_path / "run").exists()


def test_a_lock_removed_under_our_hands_is_taken_again(tmp_path, monkeypatch):
    """Whoever ended while we opened the file has removed it: the lock on it would be nobody's."""
    inner, calls = folders._taken, []

    def taken(descriptor):
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        return inner(descriptor)

    monkeypatch.setattr(folders, "_taken", taken)
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.claim(CONFIG, False)
    assert len(calls) == 2
    with pytest.raises(InputError, match="in use"):
        second.claim(CONFIG, True)
    first.release()


# ---- runs that never made a step


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize("there", [False, True], ids=["no-folder", "an-empty-folder"])
@pytest.mark.parametrize("error", [out_of_memory, lambda: 1 / 0], ids=["memory", "a-network's-own"])
def test_a_run_that_fails_in_its_first_step_leaves_no_folder(tmp_path, error, there):
    out = tmp_path / "run"
    if there:
        out.mkdir()
    trainer = make(out=out, epochs=1)
    untyped(trainer).train_step = error
    with pytest.raises((torch.OutOfMemoryError, ZeroDivisionError)):
        trainer.fit()
    assert out.exists() == there
    assert not there or not list(out.iterdir())
    with pytest.raises(InputError, match="ended with an error in step 0: make a new trainer"):
        trainer.fit()
    assert make(out=out, epochs=1).fit().step_index == 5


def test_a_missing_extra_is_said_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="--tensorboard needs its extra"):
        DistillTrainer(LatentBE(tiny(4), 2), [tiny(4), tiny(4)], dataset(), CONFIG, out=tmp_path / "run",
                       tensorboard=True)  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_tensorboard_needs_a_folder():
    with pytest.raises(InputError, match="tensorboard=True needs the run's folder"):
        DistillTrainer(LatentBE(tiny(4), 2), [tiny(4), tiny(4)], dataset(), CONFIG, tensorboard=True)


def test_a_run_that_made_steps_but_no_checkpoint_can_be_resumed_and_says_so(tmp_path):
    trainer = make(out=tmp_path / "run", epochs=1)
    inner = trainer.train_step

    def step():
        return inner() if trainer.step_index < 2 else out_of_memory()

    untyped(trainer).train_step = step
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit()
    assert [name for name, _ in listing(tmp_path / "run")] == ["config.yaml"]
    with pytest.raises(InputError, match="or --resume the run in it"):
        make(out=tmp_path / "run", epochs=1).fit()
    assert make(out=tmp_path / "run", epochs=1, resume=True).fit().step_index == 5


# ---- fit() again


@pytest.mark.parametrize("out", [False, True], ids=["in-memory", "with-a-folder"])
def test_fit_again_after_a_stop_is_bit_equal(tmp_path, out):
    settings = {"epochs": 3, "perturbation": "tdiv-sdiv"}
    whole = make(**untyped(settings)).fit()
    stopped = make(out=tmp_path / "run" if out else None, **untyped(settings))
    StopAt(stopped, 7)
    with pytest.raises(Interrupted):
        stopped.fit()
    torch.rand(3)  # what else a session draws in between
    stopped.fit()
    assert stopped.kept == whole.kept
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, stopped.student.state_dict()[name]), name


def test_fit_again_after_the_end_does_nothing(tmp_path):
    trainer = make(out=tmp_path / "run", epochs=1).fit()
    before = listing(tmp_path / "run")
    weights = {k: v.clone() for k, v in trainer.student.state_dict().items()}
    assert trainer.fit() is trainer
    assert listing(tmp_path / "run") == before
    assert all(torch.equal(v, weights[k]) for k, v in trainer.student.state_dict().items())


def test_fit_again_with_other_settings_or_another_checkpoint_is_refused(tmp_path):
    trainer = make(out=tmp_path / "run", epochs=3)
    StopAt(trainer, 7)
    with pytest.raises(Interrupted):
        trainer.fit()
    trainer.config.epochs = 5
    with pytest.raises(InputError, match="settings were changed after the run began"):
        trainer.fit()
    trainer.config.epochs = 3
    make(out=tmp_path / "run", epochs=3, resume=True).fit()
    with pytest.raises(InputError, match=r"stopped after step 7, but .*run holds a checkpoint of step 15"):
        trainer.fit()


def test_fit_again_after_divergence_is_refused(tmp_path):
    trainer = make(out=tmp_path / "run", learning_rate=1e30, epochs=1)
    with pytest.raises(DivergedError):
        trainer.fit()
    with pytest.raises(InputError, match=r"ended with an error in step .*: make a new trainer, with resume=True"):
        trainer.fit()
