"""The loss around a student's branches, as measured for the report, and its pictures."""

import math

import pytest
import torch

from fastensdistill.data.loader import EvaluationSet
from fastensdistill.errors import InputError
from fastensdistill.evaluate import landscape, metrics
from fastensdistill.evaluate.landscape_plots import barrier_over_training, loss_around_branches
from fastensdistill.evaluate.plots import png
from fastensdistill.evaluate.predict import predict
from fastensdistill.evaluate.report import write_report
from fastensdistill.method.student import LatentBE, Single
from tests.networks import scatter, tiny
from tests.runs import dataset
from tests.students import Quadrants, merged, pull_apart
from tests.untyped import present

VALIDATION = EvaluationSet(dataset().validation, "cpu", dtype=torch.float64)


def around(student, macs: int = 1, budget: float = 24 * (3 * 7 + 49)) -> landscape.Landscape:
    """Unless told otherwise the coarsest grid, with all images."""
    return present(landscape.landscape(student, VALIDATION, macs, budget))


def nll(student, weights, images=VALIDATION) -> float:
    p = predict(merged(student, torch.as_tensor(weights, dtype=torch.float64)), images)[0]
    return metrics.nll(p, images.labels)


def test_ways_and_plane_are_the_networks_that_they_say():
    student = scatter(LatentBE(tiny(4), 4)).double()
    found = around(student, budget=24 * (4 * 7 + 49))  # just enough for the coarsest grid
    assert (found.images, found.classes, found.ways.shape, found.plane.shape) == (24, 4, (4, 7), (7, 7))
    unit, average = torch.eye(4, dtype=torch.float64), torch.full((4,), 0.25, dtype=torch.float64)
    for i, t in enumerate(found.steps.tolist()):
        assert float(found.ways[2, i]) == pytest.approx(nll(student, average + t * (unit[2] - average)), rel=1e-5)
    assert {0.0, 0.5, 1.0} <= set(found.steps.tolist())
    excess = found.ways[:, 3] - found.ways[:, 5] / 2
    assert found.chosen[0] == int(excess.argmax())
    assert len(set(found.chosen)) == 3
    (ax, ay), (bx, by), (cx, cy) = found.corners.tolist()
    for i, j in ((0, 0), (3, 5), (6, 1)):
        x, y = float(found.x[j]), float(found.y[i])
        area = (by - cy) * (ax - cx) + (cx - bx) * (ay - cy)  # barycentric coordinates, as in any textbook
        first = ((by - cy) * (x - cx) + (cx - bx) * (y - cy)) / area
        second = ((cy - ay) * (x - cx) + (ax - cx) * (y - cy)) / area
        weights = torch.zeros(4, dtype=torch.float64)
        weights[list(found.chosen)] = torch.tensor([first, second, 1 - first - second], dtype=torch.float64)
        assert float(found.plane[i, j]) == pytest.approx(nll(student, weights), rel=1e-5)


def test_what_it_may_cost_decides_the_grid_and_the_images():
    student = LatentBE(Quadrants(), 2).double()
    coarse = around(student, 1000, 1000 * 24 * 14)
    assert (coarse.chosen, coarse.plane.numel(), coarse.ways.shape) == ((), 0, (2, 7))  # of two there is only the way
    assert around(student, 1000, 1e9).ways.shape == (2, 13)
    assert landscape.landscape(student, VALIDATION, 1000, 1000 * 24 * 14 - 1) is None
    with pytest.raises(InputError, match="a single student has no factors"):
        landscape.landscape(Single(tiny(4)).double(), VALIDATION, 1, 1e9)


def test_a_planted_wall_is_in_the_pictures(tmp_path):
    """Both students of one report; records of a run, and of one that has none."""
    healthy, apart = (LatentBE(Quadrants(), 3).double() for _ in range(2))
    pull_apart(apart, 1)
    found = {"one": around(healthy), "two": around(apart)}
    assert float(found["one"].ways.max()) < 0.1
    # between branch 1 and the average of all three lies the point where what is passed on is nothing
    way = found["two"].ways[1]
    assert float(way.max()) == pytest.approx(math.log(4), rel=0.1)
    assert float(way[5]) < 0.1
    records = [
        {"event": "validation", "epoch": e, "accuracy": 0.5, "nll": 1.0, "branch_accuracy": [0.6, 0.7],
         "branch_nll": [0.9, 0.8], "midpoint_nll": [1.5, 0.9], "barrier": barrier, "branch_kl": 0.1,
         "branch_agreement": 0.9}
        for e, barrier in enumerate((-0.2, 0.05, 2.0), 1)
    ]  # fmt: skip
    other = [{"event": "validation", "epoch": 1, "accuracy": 0.5, "nll": 1.0}]
    write_report(
        tmp_path, title="t", rows=[], curves={"one": records, "KD": other}, reliability={}, strip=None, facts={},
        landscapes=found,
    )  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    for stem, title in (("barrier", "The average and its branches"), ("landscape", "The loss around the branches")):
        assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert f"<h2>{title}</h2>" in page
    broken = found["two"]
    broken.plane[0, 0] = broken.ways[0, 0] = math.nan  # a network beyond the branches that overflows
    assert png(loss_around_branches({"two": broken, "of two": around(LatentBE(Quadrants(), 2).double())}))


def test_nothing_to_draw():
    with pytest.raises(InputError, match="at least one student"):
        loss_around_branches({})
    with pytest.raises(InputError, match="no run has a validation record with barrier"):
        barrier_over_training({"KD": [{"event": "validation", "epoch": 1, "accuracy": 0.5}]})


def test_a_part_of_a_set():
    part = VALIDATION.part(torch.tensor([3, 1]))
    assert torch.equal(part.labels, VALIDATION.labels[[3, 1]])
    assert torch.equal(next(part.batches(2)), next(VALIDATION.batches(24))[[3, 1]])
