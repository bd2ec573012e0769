"""The demo's command lines and what it says of its results; `make demo` itself takes minutes."""

from pathlib import Path

import pytest

from fastensdistill import demo
from fastensdistill.cli import parse
from fastensdistill.config import DistillRun
from fastensdistill.evaluate.metrics import Metrics
from fastensdistill.evaluate.tables import Row


def row(name, accuracies, nlls):
    found = [Metrics(a, n, 0, 0, 0, 0, 1) for a, n in zip(accuracies, nlls, strict=True)]
    return Row(name, "student", found, 1, 1)


def test_its_command_lines_differ_in_kind_and_seed_alone():
    (teachers, teaching), *jobs = demo.command_lines(Path("here"), 2, 30).items()
    assert parse(teaching[0], teaching[1:]).out == teachers
    runs = [parse(line[0], line[1:]) for _, line in jobs]
    assert [run.out for run in runs] == [folder for folder, _ in jobs]
    assert len({run.out for run in runs}) == 2 * len(demo.STUDENTS)
    own = ("student", "perturbation", "seed", "out")
    same = [{k: v for k, v in vars(run).items() if k not in own} for run in runs]
    assert all(settings == same[0] for settings in same)
    method = next(run for run in runs if run.out == demo.folder_of(Path("here"), demo.METHOD, 1))
    assert isinstance(method, DistillRun)
    assert (method.student, method.perturbation, method.seed) == (DistillRun().student, DistillRun().perturbation, 1)


def test_differences_are_seed_by_seed():
    before, after = row("A", (0.90, 0.80, 0.70), (0.5, 0.6, 0.7)), row("B", (0.91, 0.82, 0.73), (0.4, 0.4, 0.4))
    assert demo.difference(before, after) == (
        "B against A: accuracy +2.00 ± 0.58 points, NLL -0.2000 ± 0.0577"  # 1/√3 and 0.1/√3
    )
    one = demo.difference(row("A", [0.5], [1.0]), row("B", [0.5], [1.25]))
    assert one == "B against A: accuracy +0.00 points, NLL +0.2500"


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_seed_has_every_kind_before_the_next(seeds):
    folders = [folder.name for folder in list(demo.command_lines(Path(), seeds, 9))[1:]]
    assert [name[-1] for name in folders] == [str(seed) for seed in range(seeds) for _ in demo.STUDENTS]
