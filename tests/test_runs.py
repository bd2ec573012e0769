"""What is evaluated, exported and learned from: which data, which classes, which runs, and what rows are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from fastensdistill.cli import main
from fastensdistill.commands import EvaluateRun
from fastensdistill.config import DistillConfig
from fastensdistill.data.sources import load_dataset
from fastensdistill.errors import InputError
from fastensdistill.evaluate.classes import Reordered, match_classes, reordered
from fastensdistill.evaluate.comparison import check_writable, compare
from fastensdistill.evaluate.names import Label, distinct
from fastensdistill.evaluate.origin import choose_data, origin, origins
from fastensdistill.evaluate.predict import predict
from fastensdistill.evaluate.runs import ensemble_of, find_candidates
from fastensdistill.method.student import LatentBE
from fastensdistill.models import create_model
from fastensdistill.train.checkpoint import save_checkpoint
from fastensdistill.train.distill import DistillTrainer
from fastensdistill.weights import load_network, load_teachers, save_network
from tests.untyped import untyped

CLASSES = ("ant", "bee", "cat")


def write_npz(path: Path, classes: tuple[str, ...] | None = CLASSES, size: int = 8, channels: int = 3) -> Path:
    """Images that are the same whatever their classes are called; class i of CLASSES is that of images i, i + 3, ..."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, size, size, channels), dtype=np.uint8)
    labels = np.arange(60) % 3
    if classes and set(classes) == set(CLASSES):
        labels = np.array([classes.index(CLASSES[label]) for label in labels])
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(path, **untyped(arrays | ({"classes": np.array(classes)} if classes else {})))
    return path


def network(seed: int = 0, classes: int = 3, channels: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(
        "preresnet", classes, blocks=(1,), in_planes=4, mean=(0.5,) * channels, std=(0.25,) * channels
    ).eval()  # fmt: skip


def card(**changes: Any) -> dict[str, Any]:
    return {"data": "d.npz", "classes": list(CLASSES), "image_size": [8, 8], "channels": 3, **changes}


def make_run(
    folder: Path, data: Path | str, *, seeds: tuple[int, ...] = (0, 1), reached: int = 2, **settings: Any
) -> Path:
    """A folder as ``teach`` (of several networks), or ``distill`` (of one), would have left it after ``reached``."""
    folder.mkdir(parents=True)
    distilled = len(seeds) == 1
    config: dict[str, Any] = {"data": str(data), "epochs": 2, "seed": seeds[0], **settings}
    config |= {"student": "single", "teachers": []} if distilled else {"members": len(seeds)}
    for i, seed in enumerate(seeds):
        for name in ("student", "network") if distilled else (f"teacher-{i}",):
            save_network(folder / f"{name}.safetensors", network(seed), card(step=7, validation_accuracy=0.5))
    records = [{"event": "validation", "step": 4 * e, "epoch": e, "accuracy": 0.5} for e in range(1, reached + 1)]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that ``arguments`` end with."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "d.npz")


# --- which data


@pytest.mark.parametrize("what", ["folder", "file in it", "card alone"])
def test_the_data_is_the_run_s_where_none_is_named(what, npz, tmp_path, capsys):
    run = make_run(tmp_path / "teachers", npz, validation=9)
    path = run if what == "folder" else run / "teacher-0.safetensors"
    if what == "card alone":
        path = tmp_path / "alone.safetensors"
        save_network(path, network(), card(source={"data": str(npz), "validation": 9}))
    asked, line = choose_data(EvaluateRun(), origins([path]))
    assert (asked.data, asked.validation) == (str(npz), 9)
    assert line == f"data: {npz}, validation 9 (from {path})"
    assert main(["evaluate", str(path)]) == 0
    told = capsys.readouterr()
    assert "d.npz, 60 test images" in told.out
    assert line in told.err


def test_settings_of_the_run_s_data_hold_where_that_data_is_named(npz, tmp_path):
    run = make_run(tmp_path / "teachers", npz, validation=9, limit=12)
    other = write_npz(tmp_path / "other.npz")
    named, _ = choose_data(EvaluateRun(data=str(npz)), origins([run]))
    assert (named.validation, named.limit) == (9, 12)
    named, _ = choose_data(EvaluateRun(data=str(npz), validation=5), origins([run]))
    assert (named.validation, named.limit) == (5, 12)
    named, line = choose_data(EvaluateRun(data=str(other)), origins([run]))
    assert (named.validation, named.limit, line) == (None, None, "")


@pytest.mark.parametrize("key", ["data", "validation"])
def test_runs_of_unlike_data_are_refused(key, npz, tmp_path, capsys):
    first = make_run(tmp_path / "a", npz, validation=9)
    changed = {"data": write_npz(tmp_path / "e.npz"), "validation": 9} if key == "data" else {"data": npz}
    second = make_run(tmp_path / "b", untyped(changed).pop("data"), seeds=(2, 3), **changed)
    line = refused(["evaluate", str(first), str(second)], capsys)
    assert f"made with {key} " in line
    assert str(first) in line
    assert str(second) in line
    assert f"--{key}" in line
    assert main(["evaluate", str(first), str(second), f"--{key}", str(npz) if key == "data" else "9"]) == 0


@pytest.mark.parametrize("command", ["evaluate", "export", "distill"])
def test_data_that_has_moved_or_is_not_known_is_asked_for(command, npz, tmp_path, capsys):
    distilled = command == "export"
    gone = make_run(tmp_path / "gone", tmp_path / "moved.npz", seeds=(0,) if distilled else (0, 1))
    save_network(tmp_path / "silent.safetensors", network())
    before = ["distill", "--teachers"] if command == "distill" else [command]
    line = refused([*before, str(gone)], capsys)
    assert "moved.npz" in line
    assert "pass --data" in line
    line = refused([*before, str(tmp_path / "silent.safetensors")], capsys)
    assert "does not say where the data is: pass --data" in line


@pytest.mark.parametrize(
    ("changes", "data", "words"),
    [
        ({"image_size": [16, 16]}, {}, r"size .* (16, 16); d.npz has (8, 8)"),
        ({"channels": 1}, {}, "channels 1; d.npz has 3"),
        ({"classes": ["ant", "bee"]}, {}, "2 classes (ant, bee); d.npz has 3 (ant, bee, cat)"),
        ({"classes": ["ant", "bee", "cow"]}, {}, "it does not know 'cat'"),
    ],
    ids=["image size", "channels", "number of classes", "another class"],
)
@pytest.mark.parametrize("command", ["evaluate", "export", "distill"])
def test_data_other_than_the_card_s_is_refused(command, changes, data, words, npz, tmp_path, capsys):
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for i, file in enumerate(files):
        save_network(file, network(i), card(**changes))
    paths = {"evaluate": [files[0]], "export": [files[0]], "distill": ["--teachers", *files]}[command]
    line = refused([command, *map(str, paths), "--data", str(npz)], capsys)
    assert str(files[0]) in line
    assert words.replace("size .*", "size (height, width)") in line


# --- which classes


@pytest.mark.parametrize(
    ("own", "wanted", "order"),
    [
        (("cat", "dog"), ("cat", "dog"), None),
        (("cat", "dog"), ("dog", "cat"), [1, 0]),
        (("b", "c", "a"), ("a", "b", "c"), [2, 0, 1]),
        (("Sea_lion", "ant"), ("ant", "sea lion"), [1, 0]),
        (("0", "1", "10", "2"), ("0", "1", "2", "10"), [0, 1, 3, 2]),
        (("0", "1"), ("cat", "dog"), None),
        (("cat", "dog"), ("0", "1"), None),
        (("x", "0"), ("0", "1"), None),
        (("A", "a"), ("a", "A"), [1, 0]),
    ],
    ids=[
        "same",
        "swapped",
        "turned",
        "spelled otherwise",
        "folders of numbers",
        "numbers",
        "numbered data",
        "a number among names",
        "case",
    ],
)
def test_match_classes(own, wanted, order):
    assert match_classes(own, wanted, Path("f"), "d") == order


@pytest.mark.parametrize(
    ("own", "wanted"),
    [(("cat", "dog"), ("cat", "cow")), (("a", "b"), ("a", "b", "c")), (("a", "a"), ("a", "b"))],
    ids=["another", "more", "one twice"],
)
def test_other_classes_are_refused(own, wanted):
    with pytest.raises(InputError, match="classes"):
        match_classes(own, wanted, Path("f"), "d")


class Late(nn.Module):
    """A network that does something after its last linear layer."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale


@pytest.mark.parametrize("kind", ["rows of the last layer", "after the last layer", "student"])
def test_reordered_logits(kind):
    plain = {"rows of the last layer": network, "after the last layer": lambda: Late(network()),
             "student": lambda: LatentBE(network(), 2).eval()}[kind]  # fmt: skip
    one, two = untyped(plain)(), untyped(plain)()
    changed = reordered(two, [2, 0, 1], (3, 8, 8))
    x = torch.rand(5, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(changed(x), one(x)[..., [2, 0, 1]])
    assert isinstance(changed, Reordered) == (kind == "after the last layer")


@pytest.mark.parametrize("own", [("cat", "ant", "bee"), ("bee", "cat", "ant")])
def test_classes_in_another_order_are_mapped_and_that_is_said(own, npz, tmp_path, capsys):
    """The same network, asked about the same images, does as well whatever order the data names its classes in."""
    file = tmp_path / "n.safetensors"
    save_network(file, network(), card())
    turned = write_npz(tmp_path / "turned.npz", own)
    found = []
    for data in (npz, turned):
        loaded = load_dataset(data)
        notes: list[str] = []
        [row] = compare(find_candidates([file], loaded, notes=notes), loaded, torch.device("cpu"))
        found.append(row.row.metrics[0])
        assert any("another order" in note for note in notes) == (data == turned)
    for key in ("accuracy", "nll", "brier", "ece"):
        assert getattr(found[1], key) == pytest.approx(getattr(found[0], key), rel=1e-5), key
    assert main(["export", str(file), "--data", str(turned), "--out", str(tmp_path / "out")]) == 0
    assert "has its classes in another order" in capsys.readouterr().err
    about = json.loads((tmp_path / "out" / "network.json").read_text())
    assert about["classes"] == list(CLASSES), "the file's logits are in its own order"
    assert about["metrics"]["accuracy"] == found[0].accuracy
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(load_network(tmp_path / "out" / "network.safetensors")(x), network()(x))


def test_teachers_whose_classes_stand_in_another_order_are_mapped(tmp_path, capsys):
    data = write_npz(tmp_path / "turned.npz", ("cat", "ant", "bee"))
    for i in range(2):
        save_network(tmp_path / f"{i}.safetensors", network(i), card())
    files = [str(tmp_path / f"{i}.safetensors") for i in range(2)]
    assert main(["distill", "--data", str(data), "--teachers", *files, "--epochs", "1", "--batch-size", "9",
                 "--device", "cpu", "--out", str(tmp_path / "run")]) == 0  # fmt: skip
    told = " ".join(capsys.readouterr().err.split())  # whatever the lines
    assert "another order (ant, bee, cat) than turned.npz (cat, ant, bee)" in told
    loaded = load_dataset(data)
    expected = [predict(network(i), loaded.validation)[0][:, [2, 0, 1]].argmax(1) for i in range(2)]
    labels = torch.from_numpy(loaded.validation.labels)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    [record] = [r for r in records if r["event"] == "validation"]
    assert record["teacher_accuracy"] == [float((e == labels).double().mean()) for e in expected]


def test_numbers_for_classes_are_no_names(tmp_path, capsys):
    data = write_npz(tmp_path / "numbers.npz", None)
    save_network(tmp_path / "n.safetensors", network(), card())
    assert main(["evaluate", str(tmp_path / "n.safetensors"), "--data", str(data)]) == 0
    assert "cannot be seen, as numbers are no names" in capsys.readouterr().err


# --- which run


@pytest.mark.parametrize("command", ["evaluate", "export", "distill", "distill of a file"])
def test_an_unfinished_run_is_taken_only_when_asked_for(command, npz, tmp_path, capsys):
    run = make_run(tmp_path / "run", npz, seeds=(0,) if command == "export" else (0, 1), reached=1)
    arguments = {"evaluate": ["evaluate", run], "export": ["export", run],
                 "distill": ["distill", "--teachers", run, "--epochs", "1", "--batch-size", "9", "--device", "cpu"],
                 "distill of a file": ["distill", "--teachers", run / "teacher-0.safetensors"]}[command]  # fmt: skip
    text = [*map(str, arguments)]
    line = refused(text, capsys)
    assert f"the run in {run} is not finished (epoch 1 of 2)" in line
    assert "--unfinished" in line
    if command == "distill of a file":
        return
    assert main([*text, "--unfinished", *([] if command == "evaluate" else ["--out", str(tmp_path / "out")])]) == 0
    if command == "evaluate":
        rows = [c.name for c in find_candidates([run], load_dataset(npz), unfinished=True)]
        assert rows == [f"run: {what} (unfinished, epoch 1 of 2)" for what in ("teachers", "ensemble of 2")]


@pytest.mark.parametrize(("step", "expected"), [(8, None), (3, "epoch 0.75 of 2"), (0, "epoch 1 of 2")])
def test_a_run_s_checkpoint_says_whether_it_ended(step, expected, npz, tmp_path):
    """Also where its records end earlier, as those of a run stopped within an epoch; without one they decide."""
    run = make_run(tmp_path / "run", npz, reached=1)
    if step:
        save_checkpoint(run, {"step_index": step, "total_steps": 8}, {})
    assert origin(run).unfinished() == expected
    assert origin(run / "teacher-1.safetensors").unfinished() == expected


def test_teachers_from_python_are_compared_with_the_data(npz, tmp_path):
    for i in range(2):
        save_network(tmp_path / f"{i}.safetensors", network(i), card())
    teachers = load_teachers(files=[tmp_path / "0.safetensors", tmp_path / "1.safetensors"])
    config = DistillConfig(epochs=1, batch_size=9, device="cpu")
    DistillTrainer(LatentBE(network(), 2), teachers, npz, config, quiet=True)
    turned = write_npz(tmp_path / "turned.npz", ("cat", "ant", "bee"))
    with pytest.raises(InputError, match=r"teacher 0 has its classes in another order \(ant, bee, cat\)"):
        DistillTrainer(LatentBE(network(), 2), teachers, turned, config, quiet=True)


def test_a_student_without_its_network_is_unfinished(npz, tmp_path):
    run = make_run(tmp_path / "run", npz, seeds=(0,))
    assert origin(run).unfinished() is None
    (run / "network.safetensors").unlink()
    assert origin(run).unfinished() == "its network was not written"


@pytest.mark.parametrize("copy", ["path", "link", "content"])
def test_one_teacher_twice_is_refused(copy, npz, tmp_path, capsys):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_network(first, network(), card())
    if copy == "link":
        second.symlink_to(first)
    elif copy == "content":
        second.write_bytes(first.read_bytes())
    files = [first, first if copy == "path" else second]
    line = refused(["distill", "--data", str(npz), "--teachers", *map(str, files)], capsys)
    assert "given twice" in line or "is the same network as" in line
    assert all(str(f) in line for f in files)


def test_a_folder_whose_teachers_are_copies_is_refused(npz, tmp_path, capsys):
    run = make_run(tmp_path / "r", npz, seeds=(0, 1, 0))
    for arguments in (["evaluate", str(run)], ["distill", "--teachers", str(run)]):
        line = refused(arguments, capsys)
        assert f"{run / 'teacher-2.safetensors'} is the same network as {run / 'teacher-0.safetensors'}" in line


def test_copies_of_a_run_are_no_seeds(npz, tmp_path, capsys):
    one = make_run(tmp_path / "kd-0", npz, seeds=(0,))
    two = make_run(tmp_path / "kd-1", npz, seeds=(1,))
    again = make_run(tmp_path / "again" / "kd-1", npz, seeds=(1,))
    notes: list[str] = []
    rows = find_candidates([one, two, again], load_dataset(npz), notes=notes)
    assert [(c.name, len(c.networks)) for c in rows] == [("kd", 2), ("kd-1", 1)]
    assert notes == [f"{again} has the seed of another run of its row, so it counts as a row of its own"]
    config = yaml.safe_load((again / "config.yaml").read_text())
    (again / "config.yaml").write_text(yaml.safe_dump({**config, "seed": 5}))
    line = refused(["evaluate", str(two), str(again)], capsys)
    assert "is the same network as" in line
    files = [one / "network.safetensors", two / "network.safetensors", again / "network.safetensors"]
    with pytest.raises(InputError, match="is the same network as"):
        ensemble_of(find_candidates(files, load_dataset(npz)))
    assert len(untyped(ensemble_of(find_candidates(files[:2], load_dataset(npz)))).networks[0]) == 2


# --- what rows are called


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a/best.pt", "b/best.pt"], ["a/best.pt", "b/best.pt"]),
        (["a/best.pt", "a/best.safetensors"], ["best.pt", "best.safetensors"]),
        (["x/a/net.pt", "y/a/net.pt", "y/a/other.pt"], ["x/a/net.pt", "y/a/net.pt", "other"]),
        (["a/one.pt", "a/two.pt"], ["one", "two"]),
        (["best.pt", "b/best.pt"], ["/r/best.pt", "b/best.pt"]),
    ],
)
def test_names_are_as_short_as_they_can_be(paths, expected):
    names = distinct([Label(Path(p).stem, Path("/r") / p) for p in paths])
    assert [n.removeprefix("r/") if n.startswith("r/") else n for n in names] == [
        e.removeprefix("/r/") if e.startswith("/r/") else e for e in expected
    ]


def test_rows_without_paths_are_numbered():
    assert distinct([Label("a"), Label("a"), Label("a (2)"), Label("b")]) == ["a", "a (3)", "a (2)", "b"]


def test_runs_of_one_name_in_several_folders(npz, tmp_path):
    runs = [make_run(tmp_path / kind / f"run-{s}", npz, seeds=(s,), epochs=e, reached=e)
            for e, kind in ((2, "kd"), (3, "latent")) for s in (0, 1)]  # fmt: skip
    teachers = [make_run(tmp_path / t / "teachers", npz, seeds=(2 + i, 5 + i)) for i, t in enumerate("ab")]
    rows = find_candidates([*runs, *teachers], load_dataset(npz))
    assert [c.name for c in rows] == [
        "kd/run", "latent/run", "a/teachers", "a/teachers: ensemble of 2", "b/teachers", "b/teachers: ensemble of 2",
    ]  # fmt: skip


def test_files_of_one_name_have_rows_and_curves_of_their_own(npz, tmp_path):
    files = [tmp_path / run / "best.safetensors" for run in "ab"]
    for i, file in enumerate(files):
        save_network(file, network(i), card(step=40 + i, validation_accuracy=0.5))
    out = tmp_path / "report"
    assert main(["evaluate", *map(str, files), "--data", str(npz), "--ensemble", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["a/best.safetensors", "b/best.safetensors", "ensemble of 2"]
    assert [row["files"] for row in results["rows"]] == [[str(files[0])], [str(files[1])], [*map(str, files)]]
    assert results["rows"][1]["kept"] == [{"step": 41, "validation_accuracy": 0.5}]
    assert results["facts"]["test images per class"] == "20"
    assert "a/best" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    "paths", [["a", "a"], ["a", "./a"], ["a/teacher-0.safetensors", "a/../a/teacher-0.safetensors"]]
)
def test_a_path_given_twice_is_refused(paths, npz, tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "a", npz)
    monkeypatch.chdir(tmp_path)
    assert "is given twice" in refused(["evaluate", *paths], capsys)


# --- what is written


def test_a_table_is_not_lost_where_the_report_cannot_be_written(npz, tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "run", npz)

    def fail(*arguments: Any) -> None:
        raise InputError("cannot write results.json: No space left on device")

    monkeypatch.setattr("fastensdistill.evaluate.comparison.write_atomically", fail)
    assert main(["evaluate", str(run), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert "ensemble of 2" in told.out
    assert told.err.splitlines()[-1] == "error: cannot write results.json: No space left on device"


def test_where_nothing_can_be_written_nothing_is_computed(npz, tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "run", npz)
    monkeypatch.setattr("fastensdistill.evaluate.comparison.compare", lambda *a: pytest.fail("computed"))
    line = refused(["evaluate", str(run), "--out", str(npz / "report")], capsys)
    assert f"cannot write to {npz / 'report'}" in line
    check_writable(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


def test_a_folder_of_teachers_is_not_exported(npz, tmp_path, capsys):
    run = make_run(tmp_path / "teachers", npz)
    line = refused(["export", str(run)], capsys)
    assert "holds teachers" in line
    assert str(run / "teacher-0.safetensors") in line


def test_a_report_says_what_the_runs_said_and_that_their_teachers_are_gone(npz, tmp_path):
    gone = [str(tmp_path / "gone" / f"teacher-{i}.safetensors") for i in range(2)]
    run = make_run(tmp_path / "run", npz, seeds=(0,), teachers=gone)
    config = yaml.safe_load((run / "config.yaml").read_text())
    shown = {"optimizer": "adamw", "factor_rate": 1.0, "teacher_weights": [1.0, 2.5], "decay_norm_and_bias": False}
    (run / "config.yaml").write_text(yaml.safe_dump({**config, **shown, "target": None, "teachers": gone}))
    said = {"said": "kept epoch 2 of 3", "warnings": ["few images", "a low rate"]}
    end = {"event": "kept", "step": 2, "epoch": 2.0, **said}
    (run / "metrics.jsonl").write_text(json.dumps(end))
    assert main(["evaluate", str(run), "--out", str(tmp_path / "out")]) == 0
    facts = json.loads((tmp_path / "out" / "results.json").read_text())["facts"]
    notes = load_dataset(config["data"]).notes
    assert facts["note"] == "; ".join([*notes, f"the teachers of run are not in {tmp_path / 'gone'} any more"])
    assert facts["kept weights"] == "run: kept epoch 2 of 3"
    assert facts["warnings"] == "run: few images; run: a low rate"
    assert (facts["optimizer"], facts["teacher_weights"], facts["decay_norm_and_bias"]) == ("adamw", "1.0 2.5", "no")
    assert not {"factor_rate", "target", "label_smoothing"} & set(facts)  # as the paper has them
    assert not (tmp_path / "out" / "perturbation.png").exists()
