"""Command lines that cannot be right: each ends in one line that names what is wrong, exit code 2, and no new file.

``python -m tests.test_bad_command_lines`` prints them all with what they get, and how many get one line and code 2.
"""

import contextlib
import io
import os
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from fastensdistill.cli import main

# What stands in the folder that they run in. DATA is an .npz file without faults.
FILES = {
    "fraction.yaml": "epochs: 2.7",
    "half.yaml": "precision: fp16",
    "twice.yaml": "epochs: 1\nseed: 3\nepochs: 2",
    "twice_in_a_line.yaml": "{epochs: 1, epochs: 2}",
    "nothing.yaml": "epochs:",
    "null.yaml": "learning_rate: null",
    "tab.yaml": "\tepochs: 3",
    "list.yaml": "- epochs",
    "text.yaml": "epochs",
    "colon.yaml": "epochs:3",
    "nested.yaml": "train: {epochs: 3}",
    "mapping.yaml": "epochs: {of: 3}",
    "listed.yaml": "epochs: [3]",
    "word.yaml": "epochs: many",
    "truth.yaml": "epochs: true",
    "maybe.yaml": "resume: maybe",
    "one.yaml": "resume: 1",
    "rate.yaml": "learning_rate: fast",
    "comma.yaml": "learning_rate: 0,1",
    "clock.yaml": "warmup_epochs: 1:30",
    "nan.yaml": "learning_rate: .nan",
    "negative.yaml": "weight_decay: -1e-4",
    "unknown.yaml": "epoch: 3",
    "dashed.yaml": "batch-size: 8",
    "other.yaml": "teachers: [a.pt]",
    "choice.yaml": "perturbation: tdiv_sdiv",
    "off.yaml": "perturbation: off",
    "model.yaml": "model: wrn28_44",
    "shape.yaml": "model: wrn28_4\nwiden: 2",
    "branches.yaml": "student: single\nbranches: 4",
    "parts.yaml": "batch_size: 8\nmicro_batches: 3",
    "open.yaml": "blocks: [1, 2",
    "object.yaml": "epochs: !!python/object/apply:os.getpid []",
    "documents.yaml": "epochs: 1\n---\nepochs: 2",
    "deep.yaml": "blocks: " + "[" * 1200,
    "anchor.yaml": "blocks: &b [*b]",
    "alias.yaml": "epochs: *nowhere",
    "empty_path.yaml": "out: ''",
    "nobody.yaml": "out: ~nobody-of-that-name/x",
    "latin.yaml": b"out: caf\xe9",
    "binary.yaml": bytes(range(256)),
    "a.pt": b"not a network",
    "folder/note.txt": "no class folders",
}

# A command line, and what its one line must name.
BAD = [
    # the command
    ("distil", "'distil'; did you mean 'distill'"),
    ("--epochs 3 teach", "'--epochs' before a command"),
    ("Teach", "did you mean 'teach'"),
    ("'teach --epochs 3'", "unknown command 'teach --epochs 3'"),
    # flags
    ("teach --epoch 3", "'--epoch' of teach; did you mean --epochs?"),
    ("teach -epochs 3", "'-epochs' of teach; did you mean --epochs?"),
    ("teach –epochs 3", "did you mean --epochs?"),
    ("teach —epochs 3", "did you mean --epochs?"),
    ("teach −-epochs 3", "did you mean --epochs?"),
    ("teach --Epochs 3", "did you mean --epochs?"),
    ("teach --epoch=3", "did you mean --epochs?"),
    ("teach --lr 3", "'--lr'"),
    ("teach --no-epochs", "'--no-epochs'"),
    ("teach --tensor-board", "did you mean --tensorboard?"),
    ("teach --teachers a.pt", "'--teachers' of teach"),
    ("doctor --verbose", "'--verbose' of doctor"),
    ("teach ---epochs 3", "did you mean --epochs?"),
    # values
    ("teach --epochs", "--epochs: expected a whole number"),
    ("teach --epochs=", "--epochs: expected a whole number from 1 to 1,000,000, got ''"),
    ("teach --epochs ''", "got ''"),
    ("teach --epochs --seed 3", "got the flag '--seed'"),
    ("teach --epochs many", "--epochs: expected a whole number from 1 to 1,000,000, got 'many'"),
    ("teach --epochs 2.7", "got 2.7"),
    ("teach --epochs 3x", "'3x'"),
    ("teach --epochs true", "'true'"),
    ("teach --epochs 0", "got 0"),
    ("teach --epochs -3", "got -3"),
    ("teach --epochs 1e99", "1e99"),
    ("teach --epochs " + "9" * 5000, "--epochs"),
    ("teach --epochs 3 --epochs 4", "--epochs: given twice"),
    ("teach --epochs 3 4", "unexpected '4' after --epochs 3"),
    ("teach --batch-size 0", "--batch-size"),
    ("teach --batch-size -8", "-8"),
    ("teach --batch-size 64,32", "'64,32'"),
    ("teach --learning-rate 0", "--learning-rate: expected a number above 0"),
    ("teach --learning-rate nan", "nan"),
    ("teach --learning-rate -inf", "-inf"),
    ("teach --learning-rate 1e400", "1e400"),
    ("teach --learning-rate 0,1", "'0,1'"),
    ("teach --learning-rate 1/0", "'1/0'"),
    ("teach --warmup-epochs inf", "--warmup-epochs"),
    ("teach --warmup-epochs 300", "warmup_epochs=300 of epochs=200"),
    ("teach --momentum 1", "--momentum: expected a number above 0 and below 1"),
    ("teach --weight-decay -1e-4", "-1e-4"),
    ("teach --seed -1", "--seed"),
    ("teach --seed 99999999999999999999", "--seed"),
    ("teach --members 0", "--members"),
    ("teach --members 1000000", "--members: expected a whole number from 1 to 1,000"),
    ("teach --micro-batches 3", "batch_size=128 in micro_batches=3"),
    ("teach --engine fuse", "--engine: unknown value 'fuse'; did you mean 'fused'"),
    ("teach --augment strongly", "--augment: unknown value 'strongly'; did you mean 'strong'"),
    ("distill --pad -1", "--pad: expected a whole number of at least 0, got -1"),
    ("teach --resized-crop", "--resized-crop: expected numbers above 0 and at most 1"),
    ("teach --resized-crop 0 1", "--resized-crop: expected numbers above 0 and at most 1, got 0"),
    ("teach --resized-crop 1 0.5", "resized_crop=1 0.5: expected two shares, the smaller one first"),
    ("distill --resized-crop 0.5", "resized_crop=0.5: expected two shares"),
    ("teach --trivial-augment maybe", "unexpected 'maybe' after --trivial-augment"),
    ("teach --cutout 1.5", "--cutout: expected a whole number of at least 0, got 1.5"),
    ("teach --data DATA --batch-size 8 --cutout 8", "cutout is 8; expected a whole number from 0 to"),
    ("teach --erasing 2", "--erasing: expected a number from 0 to 1, got 2"),
    ("distill --mixup -1", "--mixup: expected a number from 0 to 1,000, got -1"),
    ("distill --cutmix nan", "--cutmix: expected a number from 0 to 1,000, got nan"),
    ("plan --augment some", "--augment: unknown value 'some'"),
    ("plan --cutout 32", "cutout is 32; expected a whole number from 0 to 31 for images of 32x32"),
    ("teach --precision fp16", "--precision: precision 'fp16': float16 gradients of the loss underflow"),
    ("distill --precision Half", "expected auto, fp32, tf32 or bf16"),
    ("teach --precision float32", "--precision: unknown value 'float32'"),
    ("teach --precision tf32 --device cpu", "precision='tf32'"),
    ("teach --device gpu", "device 'gpu'"),
    ("teach --device mps", "device 'mps'"),
    ("teach --device cuda:x", "device 'cuda:x'"),
    ("teach --device cuda:99", "cuda:99"),
    ("teach --resume=maybe", "--resume: expected true or false, got 'maybe'"),
    ("teach --no-resume=true", "--no-resume: expected no value"),
    ("teach --resume --no-resume", "--no-resume: given twice"),
    ("teach --resume sometimes", "unexpected 'sometimes' after --resume"),
    ("teach --resume --out nowhere", "nothing to resume in nowhere"),
    ("distill --student latentbe", "did you mean 'latent-be'"),
    ("distill --perturbation tdiv_sdiv", "did you mean 'tdiv-sdiv'"),
    ("distill --branches 0", "--branches"),
    ("distill --student single --branches 4", "branches=4 for a single student"),
    ("distill --step-size 8", "--step-size: expected a number from 0 to 1, got 8"),
    ("distill --temperature 0", "--temperature: expected a number above 0"),
    ("distill --temperature inf", "--temperature"),
    ("distill --factor-rate -1", "--factor-rate: expected a number from 0 to 1,000,000, got -1"),
    ("distill --alpha 1.5", "--alpha: expected a number from 0 to 1, got 1.5"),
    ("distill --teacher-std 0 1 1", "--teacher-std: expected numbers above 0, got 0"),
    ("distill --teacher-mean nan", "--teacher-mean"),
    ("distill --teacher-model wrn28_44", "did you mean 'wrn28_4'"),
    ("demo --seeds 0", "--seeds"),
    ("demo --epochs 0", "--epochs"),
    ("plan --gpu h300", "--gpu: unknown value 'h300'"),
    ("plan --batch 0", "--batch"),
    ("plan nothing", "unknown model 'nothing'"),
    # networks
    ("teach --model wrn28_44", "did you mean 'wrn28_4'"),
    ("teach --model ''", "--model"),
    ("teach --model resnet18 --widen 2", "widen=2 for model 'resnet18'"),
    ("teach --model wrn28_4 --widen 2", "widen=2 for model 'wrn28_4'"),
    ("teach --model resnet32 --blocks 1 1", "blocks=(1, 1) for model 'resnet32'"),
    ("teach --blocks", "--blocks: expected whole numbers"),
    ("teach --blocks 2 0", "--blocks: expected whole numbers from 1 to 1,000, got 0"),
    ("teach --blocks [1,1]", "'[1'"),
    ("teach --widen 100000", "--widen"),
    ("teach --in-planes 0", "--in-planes"),
    # data
    ("teach --data digit", "did you mean 'digits'"),
    ("teach --data ''", "--data"),
    ("teach --data missing.npz", "missing.npz"),
    ("teach --data missing/folder", "missing/folder"),
    ("teach --data a.pt", "a.pt"),
    ("teach --data folder", "folder"),
    ("teach --data cifar100", "root"),
    ("teach --data cifar10 --root nowhere", "nowhere"),
    ("teach --data ~nobody-of-that-name/x", "~nobody-of-that-name"),
    ("teach --limit 0", "--limit"),
    ("teach --limit -1", "--limit"),
    ("teach --validation -1", "--validation"),
    ("teach --image-size 1", "--image-size: expected a whole number from 4 to 4,096, got 1"),
    ("teach --image-size 100000", "--image-size"),
    ("teach --data DATA --image-size 8", "image_size"),
    ("teach --data DATA --limit 999", "999"),
    ("teach --data DATA --validation 999", "999"),
    ("teach --data DATA --batch-size 99", "99"),
    # teachers and files
    ("distill", "no teachers given"),
    ("distill --teachers", "--teachers: expected paths after it"),
    ("distill a.pt b.pt", "unexpected 'a.pt': distill takes flags; did you mean --teachers a.pt"),
    ("distill --teachers missing.pt", "missing.pt"),
    ("distill --teachers folder", "folder"),
    ("distill --teachers ''", "--teachers: expected paths, got ''"),
    ("distill --teachers a.pt a.pt --data DATA --teacher-model resnet32", "a.pt"),
    ("evaluate", "nothing to evaluate"),
    ("evaluate missing.safetensors --data DATA", "missing.safetensors"),
    ("evaluate --mean .5 .5 .5 missing.pt", "'missing.pt'"),
    ("evaluate --model wrn28_4 missing.pt", "'missing.pt'"),
    ("evaluate --formats onnx a.pt", "'--formats' of evaluate"),
    ("evaluate a.pt --paths a.pt", "'a.pt' and --paths"),
    ("evaluate folder --data DATA", "folder"),
    ("evaluate a.pt --device tpu", "device 'tpu'"),
    ("export a.pt folder", "unexpected 'folder'"),
    ("export missing --data DATA", "missing"),
    ("export folder", "folder"),
    ("export a.pt --formats", "--formats: expected one of"),
    ("export a.pt --formats onnix", "did you mean 'onnx'"),
    ("export a.pt --data DATA", "a.pt"),
    # folders to write to
    ("teach --out ''", "--out: expected a path, got ''"),
    ("teach --out", "--out: expected a path after it"),
    ("teach --out --resume", "got the flag '--resume'"),
    ("teach --out=~nobody-of-that-name/x", "~nobody-of-that-name"),
    ("teach --data DATA --batch-size 8 --epochs 1 --out a.pt", "a.pt"),
    ("teach --data DATA --batch-size 8 --epochs 1 --out a.pt/run", "a.pt"),
    ("teach --data DATA --batch-size 8 --epochs 1 --out folder", "folder"),
    ("teach --data DATA --batch-size 8 --epochs 1 --out /", "/"),
    ("teach --data DATA --batch-size 8 --epochs 1 --out /proc/run", "/proc/run"),
    ("teach --data DATA --batch-size 8 --epochs 1 --out " + "n" * 300, "nnn"),
    # files of settings
    ("teach --config", "--config: expected a path after it"),
    ("teach --config=", "--config: expected a path, got ''"),
    ("teach --config missing.yaml", "missing.yaml: No such file"),
    ("teach --config folder", "folder: Is a directory"),
    ("teach --config DATA", "DATA: is not YAML"),
    ("teach --config twice.yaml --config null.yaml", "--config: given twice"),
    ("teach --config fraction.yaml", "fraction.yaml: epochs: expected a whole number from 1 to 1,000,000, got 2.7"),
    ("teach --config half.yaml", "half.yaml: precision: precision 'fp16': float16 gradients of the loss underflow"),
    ("teach --config=fraction.yaml", "fraction.yaml: epochs"),
    ("teach --config twice.yaml", "twice.yaml: 'epochs' stands twice, in lines 1 and 3"),
    ("teach --config twice_in_a_line.yaml", "'epochs' stands twice"),
    ("teach --config nothing.yaml", "nothing.yaml: epochs: expected a whole number from 1 to 1,000,000, got nothing"),
    ("teach --config null.yaml", "null.yaml: learning_rate"),
    ("teach --config tab.yaml", "tab.yaml: is not YAML: line 1"),
    ("teach --config list.yaml", "list.yaml: expected a mapping"),
    ("teach --config text.yaml", "text.yaml: expected a mapping"),
    ("teach --config colon.yaml", "colon.yaml: expected a mapping"),
    ("teach --config nested.yaml", "nested.yaml: unknown setting 'train'"),
    ("teach --config mapping.yaml", "mapping.yaml: epochs"),
    ("teach --config listed.yaml", "listed.yaml: epochs"),
    ("teach --config word.yaml", "'many'"),
    ("teach --config truth.yaml", "'true'"),
    ("teach --config maybe.yaml", "maybe.yaml: resume: expected true or false, got 'maybe'"),
    ("teach --config one.yaml", "one.yaml: resume"),
    ("teach --config rate.yaml", "'fast'"),
    ("teach --config comma.yaml", "comma.yaml: learning_rate"),
    ("teach --config clock.yaml", "'1:30'"),
    ("teach --config nan.yaml", "nan.yaml: learning_rate"),
    ("teach --config negative.yaml", "negative.yaml: weight_decay"),
    ("teach --config unknown.yaml", "unknown.yaml: unknown setting 'epoch'; did you mean 'epochs'"),
    ("teach --config dashed.yaml", "did you mean 'batch_size'"),
    ("teach --config other.yaml", "other.yaml: unknown setting 'teachers'"),
    ("distill --config choice.yaml", "choice.yaml: perturbation: unknown value 'tdiv_sdiv'; did you mean 'tdiv-sdiv'"),
    ("distill --config off.yaml", "off.yaml: perturbation: unknown value 'off'"),
    ("teach --config model.yaml", "model.yaml: model: unknown model 'wrn28_44'; did you mean 'wrn28_4'"),
    ("teach --config shape.yaml", "shape.yaml: widen=2 for model 'wrn28_4'"),
    ("distill --config branches.yaml", "branches.yaml: branches=4 for a single student"),
    ("teach --config parts.yaml", "parts.yaml: batch_size=8 in micro_batches=3"),
    ("teach --config open.yaml", "open.yaml: is not YAML"),
    ("teach --config object.yaml", "object.yaml: is not YAML: line 1"),
    ("teach --config documents.yaml", "documents.yaml: is not YAML"),
    ("teach --config deep.yaml", "deep.yaml"),
    ("teach --config anchor.yaml", "anchor.yaml: blocks"),
    ("teach --config alias.yaml", "alias.yaml: is not YAML: line 1"),
    ("teach --config empty_path.yaml", "empty_path.yaml: out: expected a path, got ''"),
    ("teach --config nobody.yaml", "nobody.yaml: out: '~nobody-of-that-name/x'"),
    ("teach --config latin.yaml", "latin.yaml: is not YAML"),
    ("teach --config binary.yaml", "binary.yaml: is not YAML"),
    ("teach --config fraction.yaml --epochs", "--epochs: expected"),
]


def make_files(folder):
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 8, 8, 3)).astype(np.uint8), np.arange(40) % 4
    np.savez(folder / "DATA", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    (folder / "DATA.npz").rename(folder / "DATA")


def run(line):
    """The exit code and the lines on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(shlex.split(line))
    return code, said.getvalue().splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    make_files(path)
    return path


@pytest.mark.parametrize(("line", "words"), BAD, ids=[line[:60] for line, _ in BAD])
def test_one_line_names_what_is_wrong(folder, monkeypatch, line, words):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    code, lines = run(line)
    assert code == 2
    (said,) = lines
    assert said.startswith("error: ")
    assert words in said
    assert "internal error" not in said
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("word", ["a\0b", "\udcff", "a\nb", "\x1b[31m", "%s", "{}", "'", "x" * 10**5])
@pytest.mark.parametrize("flag", ["--epochs", "--data", "--teachers", "--out", "--config", "--model", "--x", ""])
def test_odd_characters_stay_on_one_line(tmp_path, monkeypatch, flag, word):
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(["distill", *([flag] if flag else []), word])
    assert code == 2
    (line,) = said.getvalue().splitlines()
    assert line.startswith("error: ")
    assert line.isprintable()
    assert len(line) < 3000


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        make_files(Path(scratch))
        os.chdir(scratch)
        right = 0
        for line, _ in BAD:
            code, lines = run(line)
            right += code == 2 and len(lines) == 1
            print(f"{code} {len(lines)}  fastensdistill {line[:90]}\n      {lines[0][:160] if lines else ''}")
        print(f"{right} of {len(BAD)} command lines: one line and exit code 2")
        sys.exit(right != len(BAD))
