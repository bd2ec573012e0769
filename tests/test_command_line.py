"""The parser: flags and YAML files say the same things in the same way, and help names every one of them."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastensdistill as fed
from fastensdistill import cli
from fastensdistill.cli import COMMANDS, main, parse
from fastensdistill.commands import EvaluateRun
from fastensdistill.config import DataConfig, DistillConfig, DistillRun, TeachConfig, TeachRun, TrainConfig
from fastensdistill.errors import InputError, one_line
from fastensdistill.settings import settings_of
from fastensdistill.settings_file import read_settings, to_yaml
from tests.untyped import untyped


def from_yaml(tmp_path, text, *flags, command="distill"):
    (tmp_path / "c.yaml").write_text(text)
    return parse(command, ["--config", str(tmp_path / "c.yaml"), *flags])


def test_settings_come_from_yaml_and_flags_win(tmp_path):
    settings = "epochs: 70\nlearning_rate: 1e-2\nteachers: [a.pt, b.pt]\nblocks: [2, 1]\nresume: false\n"
    run = from_yaml(tmp_path, settings, "--epochs", "9")
    assert isinstance(run, DistillRun)
    assert (run.epochs, run.learning_rate, run.blocks, run.branches) == (9, 0.01, (2, 1), None)
    assert [str(t) for t in run.teachers] == ["a.pt", "b.pt"]


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 1e-3", "learning_rate", 1e-3),  # YAML 1.1: a string
        ("learning_rate: .5", "learning_rate", 0.5),
        ("step_size: 8/255", "step_size", 8 / 255),
        ("epochs: 010", "epochs", 10),  # YAML 1.1: eight
        ("epochs: '30'", "epochs", 30),
        ("epochs: 1e3", "epochs", 1000),
        ("resume: no", "resume", False),
        ("tensorboard: On", "tensorboard", True),
        ("teachers: one.pt", "teachers", (Path("one.pt"),)),
        ("teachers: [2024, no]", "teachers", (Path("2024"), Path("no"))),
        ("blocks: 2", "blocks", (2,)),
        ("teacher_mean: [.5, 0.25]", "teacher_mean", (0.5, 0.25)),
        ("branches: ~", "branches", None),
        ("branches:", "branches", None),
        ("perturbation: none", "perturbation", "none"),
        ("data: 007", "data", "007"),
        ("a: &x 3", None, None),
        ("epochs: &x 30\nbranches: *x", "branches", 30),
        ("", "epochs", 200),
        ("# nothing yet\n", "epochs", 200),
    ],
)
def test_yaml_is_understood_as_flags_are(tmp_path, text, name, value):
    if name is None:
        with pytest.raises(InputError, match=r"c\.yaml: unknown setting 'a'"):
            from_yaml(tmp_path, text)
        return
    found = getattr(from_yaml(tmp_path, text), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("evaluate --mean .5 .5 .5 FILE", "paths", 1),
        ("evaluate --mean .5 .5 .5 FILE", "mean", (0.5, 0.5, 0.5)),
        ("evaluate --mean=.5,.25,.5 FILE FILE", "mean", (0.5, 0.25, 0.5)),
        ("evaluate --std .5 .5 .5 --data digits FILE FILE", "paths", 2),
        ("evaluate --model wrn28_1 resnet32 FILE FILE", "model", ("wrn28_1", "resnet32")),
        ("evaluate --model wrn28_1 resnet32 FILE FILE", "paths", 2),
        ("evaluate FILE --ensemble FILE", "paths", 2),
        ("evaluate FILE --ensemble", "ensemble", True),
        ("evaluate FILE --ensemble=false", "ensemble", False),
        ("evaluate FILE --ensemble no", "ensemble", False),
        ("evaluate --no-ensemble -- FILE", "paths", 1),
        ("evaluate --mean -1e-1 -.5 FILE", "mean", (-0.1, -0.5)),
        ("export --formats onnx FILE", "formats", ("onnx",)),
        ("export --formats onnx,torch FILE", "formats", ("onnx", "torch")),
        ("teach --blocks=2,1", "blocks", (2, 1)),
        ("teach --batch_size 64", "batch_size", 64),
        ("teach --warmup-epochs none", "warmup_epochs", 5.0),
        ("distill --step-size 1/255", "step_size", 1 / 255),
        ("distill --teachers a b --model resnet18", "teachers", (Path("a"), Path("b"))),
        ("plan resnet32 --batch=8", "model", "resnet32"),
    ],
)
def test_conventions_of_flags(tmp_path, line, name, value):
    file = tmp_path / "a.pt"
    file.touch()
    found = getattr(parse(line.split()[0], line.replace("FILE", str(file)).split()[1:]), name)
    assert (len(found) if name == "paths" else found) == value


@pytest.mark.parametrize("written", ["~/run", "~/deep/er/run"])
def test_a_tilde_is_the_home_folder_wherever_it_is_written(tmp_path, monkeypatch, written):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    expected = tmp_path / "home" / written[2:]
    for run in (
        parse("teach", [f"--out={written}", "--root", written, "--data", written]),
        from_yaml(tmp_path, f"out: {written}\nroot: {written}\ndata: {written}\n", command="teach"),
        TeachRun(out=written, root=written, data=written),
    ):
        assert run.out == expected
        assert str(run.root) == str(run.data) == str(expected)
    assert from_yaml(tmp_path, f"teachers: [{written}]").teachers == (expected,)
    assert parse("evaluate", [written]).paths == (expected,)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "c.yaml").write_text("epochs: 12")
    assert parse("teach", ["--config=~/c.yaml"]).epochs == 12


def test_a_tilde_is_the_home_folder_in_python_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    networks = [fed.create_model("preresnet", 3, blocks=(1,), in_planes=4) for _ in range(2)]
    for i, network in enumerate(networks):
        fed.save_network(f"~/teacher-{i}.safetensors", network)
    images, labels = np.zeros((12, 8, 8, 3), np.uint8), np.arange(12) % 3
    images[:] = labels[:, None, None, None]
    arrays = {f"{part}_{kind}": a for part in ("train", "test") for kind, a in (("images", images), ("labels", labels))}
    np.savez(tmp_path / "home" / "d.npz", **untyped(arrays))
    assert len(fed.load_teachers(files="~")) == 2
    assert len(fed.load_teachers(files=["~/teacher-0.safetensors", "~/teacher-1.safetensors"])) == 2
    network = fed.load_network("~/teacher-0.safetensors")
    config = TeachConfig(epochs=1, batch_size=4, members=2, device="cpu")
    fed.TeachTrainer(networks, "~/d.npz", config, out="~/run", quiet=True).fit()
    fed.export_network(network, "~/export", images=torch.rand(2, 3, 8, 8), formats="safetensors")
    found = {p.name for p in (tmp_path / "home").iterdir()}
    assert found == {"teacher-0.safetensors", "teacher-1.safetensors", "d.npz", "run", "export"}
    assert [p.name for p in tmp_path.iterdir()] == ["home"]
    for call in (fed.load_network, fed.load_dataset, lambda path: fed.load_teachers(files=[path])):
        with pytest.raises(InputError, match="no home folder of that name"):
            call("~nobody-of-that-name/x")


def test_a_resumed_run_keeps_its_settings_unless_flags_say_other(tmp_path):
    saved = TeachRun(epochs=33, out=tmp_path, blocks=(1, 1), learning_rate=1e-5, warmup_epochs=0)
    (tmp_path / "config.yaml").write_text(to_yaml(saved))
    (tmp_path / "c.yaml").write_text("seed: 4")
    run = parse("teach", ["--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path), "--resume", "--members", "2"])
    assert run == TeachRun(epochs=33, out=tmp_path, blocks=(1, 1), learning_rate=1e-5, warmup_epochs=0, seed=4,
                           members=2, resume=True)  # fmt: skip
    with pytest.raises(InputError, match=rf"^{re.escape(str(tmp_path / 'config.yaml'))}: unknown setting 'members'"):
        parse("distill", ["--out", str(tmp_path), "--resume"])


@pytest.mark.parametrize("cls", [TeachRun, DistillRun])
def test_what_is_saved_reads_back_as_it_was(tmp_path, cls):
    run = cls(warmup_epochs=0.1 + 0.2, weight_decay=1e-7, out="~x y/#1: é".replace("~", "."), blocks=(3,), data="null")
    (tmp_path / "c.yaml").write_text(to_yaml(run))
    assert cls(**read_settings(tmp_path / "c.yaml", settings_of(cls))) == run


# ---- Python


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", "3"), ("epochs", 2.7), ("epochs", True), ("epochs", None), ("epochs", [3]), ("epochs", 0),
        ("epochs", 10**400), ("epochs", float("nan")), ("epochs", np.float64(2.5)), ("learning_rate", "0.1"),
        ("learning_rate", True), ("learning_rate", None), ("learning_rate", 10**400), ("learning_rate", 1j),
        ("learning_rate", torch.ones(2)), ("batch_size", None), ("batch_size", -8), ("batch_size", {}), ("seed", -1),
        ("seed", 1.5), ("device", 0), ("device", "gpu"), ("engine", None), ("engine", "fuse"), ("precision", "fp16"),
        ("precision", torch.float32), ("sync_batch_norm", "yes"), ("sync_batch_norm", 1), ("momentum", 1.0),
        ("weight_decay", -1e-9), ("warmup_epochs", 200), ("micro_batches", 3),
    ],
    ids=lambda value: str(value)[:12],
)  # fmt: skip
def test_python_values_that_do_not_fit_are_named(name, value):
    with pytest.raises(InputError, match=rf"{name}|{str(value)!r}") as refused:
        TrainConfig(**{name: value})
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", np.int64(30), 30), ("epochs", torch.tensor(30), 30), ("epochs", 30.0, 30),
        ("learning_rate", 1, 1.0), ("learning_rate", np.float32(0.5), 0.5), ("weight_decay", 0, 0.0),
        ("sync_batch_norm", np.bool_(True), True), ("warmup_epochs", np.float64(2), 2.0),
    ],
)  # fmt: skip
def test_numbers_of_other_libraries_become_plain_ones(name, value, expected):
    found = getattr(TrainConfig(**{name: value}), name)
    assert found == expected
    assert type(found) is type(expected)


def test_tuples_are_made_of_what_stands_for_them():
    assert untyped(TeachRun)(blocks=[2, np.int32(1)]).blocks == (2, 1)
    assert untyped(TeachRun)(blocks=2).blocks == (2,)
    assert untyped(DistillRun)(teachers="a.pt").teachers == (Path("a.pt"),)
    assert untyped(EvaluateRun)(mean=np.array([0.5, 0.25])).mean == (0.5, 0.25)


@pytest.mark.parametrize("cls", [DistillConfig, TeachConfig, DataConfig, *(c for c, _ in COMMANDS.values())])
def test_help_of_a_config_says_what_each_field_means(cls):
    for s in settings_of(cls).values():
        assert len(s.meaning) > 1, s.name
        assert re.search(rf"^{s.name}: {re.escape(s.meaning.split()[0])}", cls.__doc__, re.M), s.name


# ---- the program


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for command in ("demo", "teach", "distill", "evaluate", "export", "plan", "doctor"):
        assert f"  {command}" in printed
    assert main([]) == 2


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == fed.__version__


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_flag_in_eighty_columns(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    settings = settings_of(COMMANDS[name][0])
    assert ("--config FILE" in text) == bool(settings)
    for s in settings.values():
        shown = s.name.upper() if s.positional else f"--[no-]{s.flag[2:]}" if s.kind is bool else s.flag
        assert re.search(rf"^  {re.escape(shown)}\b.*(\n {{26}})?.*\w", text, re.M), shown
        for choice in s.choices or ():
            assert choice in text, f"{shown} does not say {choice}"


FAULTS = {
    "memory": (MemoryError("Unable to allocate 9 TiB"), "not enough memory: Unable to allocate 9 TiB"),
    "memory of the GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB. GPU 0 has"), "Tried 9 GiB;"),
    "memory of PyTorch": (RuntimeError("DefaultCPUAllocator: can't allocate memory: 12"), "not enough memory"),
    "a full disk": (OSError(28, "No space left on device", "x.pt"), "No space left on device: x.pt"),
    "no permission": (PermissionError(13, "Permission denied", "/x"), "Permission denied: /x"),
    "an encoding": (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates"), "text in another encoding"),
    "a fault of ours": (KeyError("branch"), "internal error: KeyError: 'branch' (FASTENSDISTILL_TRACEBACK=1"),
    "one without words": (RecursionError(), "internal error: RecursionError: RecursionError"),
    "one of many lines": (RuntimeError("first\n  second\x1b[31m"), r"first second\x1b[31m"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_exception_ends_in_one_line(name, capsys, monkeypatch):
    error, words = FAULTS[name]

    def fail(run):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "demo", (COMMANDS["demo"][0], fail))
    assert main(["demo"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    monkeypatch.setenv("FASTENSDISTILL_TRACEBACK", "1")
    assert main(["demo"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "in fail" in shown


def test_long_and_unprintable_text_stays_one_line():
    assert one_line("a\n\n b\r\n\tc") == "a b c"
    assert one_line("\udcff\x00é") == r"\udcff\x00é"
    assert len(one_line("x" * 10**6)) < 3000


def test_ctrl_c_is_quiet_while_pytorch_is_being_imported():
    """SIGINT comes inside an import, where libraries would turn KeyboardInterrupt into errors of their own."""
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from fastensdistill.__main__ import main\nsys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code, "plan"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted\n", "")


def test_a_reader_that_has_seen_enough_is_no_error():
    """``fastensdistill plan | head -1``: the plan is longer than a pipe holds."""
    command = [sys.executable, "-m", "fastensdistill", "plan", "wrn28_1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait() == 128 + 13
