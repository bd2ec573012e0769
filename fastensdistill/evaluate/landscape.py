"""Whether the average of a student's branches is as good as they are (docs/method.md, Averaging and its barrier).

A network that has the branches' factors mixed by weights w, w_1 + … + w_K = 1, is a point of the space that the
branches span: the average is 1/K everywhere, branch k the unit vector e_k, and half-way between the two lies the k-th
midpoint. With NLL(w) a point's NLL, its excess over the branches is

    excess(w) = NLL(w) − Σ_k w_k NLL(e_k)

and the barrier is the largest excess of the average and the K midpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastensdistill.data.loader import EvaluationSet
from fastensdistill.evaluate import metrics
from fastensdistill.evaluate.inputs import EPSILON, as_labels, as_probabilities
from fastensdistill.evaluate.predict import predict
from fastensdistill.method.student import Student

BARRIER = 0.1  # nats: above it branches have parted (train/collapse.py)
MIDPOINT_IMAGES = 1000  # of a validation set, at most, on which the midpoints are measured


def spread(images: int, most: int = MIDPOINT_IMAGES) -> Tensor:
    """Indices (n,) of all ``images``, or of ``most`` at even distances: a set may be sorted by class."""
    return torch.arange(min(images, most)) * images // min(images, most)


def midpoints(branches: int) -> Tensor:
    """Weights (K, K) of the points half-way between the average and each branch."""
    unit = torch.eye(branches, dtype=torch.float64)
    return (unit.mean(0) + unit) / 2


@dataclass(frozen=True)
class Averaging:
    """What averaging does to a student, as measured on validation images; accuracies in [0, 1], NLL in nats.

    Attributes:
        accuracy, nll: of the average.
        branch_accuracy, branch_nll: of every branch.
        ensemble_accuracy, ensemble_nll: of the branches' mean prediction.
        midpoint_nll: at every midpoint.
        barrier: see above, and its standard error.
        gap: the branches' mean accuracy less the average's, and its standard error. Both errors are those of
            differences image by image, which are far smaller than those of either accuracy.
    """

    accuracy: float
    nll: float
    branch_accuracy: list[float]
    branch_nll: list[float]
    ensemble_accuracy: float
    ensemble_nll: float
    midpoint_nll: list[float]
    barrier: float
    barrier_error: float
    gap: float
    gap_error: float

    def record(self) -> dict[str, Any]:
        """What metrics.jsonl holds of it beside the accuracies and NLL of average and branches."""
        return {"midpoint_nll": self.midpoint_nll, "barrier": self.barrier, "barrier_error": self.barrier_error}


def averaging(average: Tensor, branches: Tensor, way: Tensor, labels: Tensor, sample: Tensor) -> Averaging:
    """From probabilities (N, C) of the average and (K, N, C) of the branches, and (K, n, C) at the midpoints.

    ``sample`` are the indices (n,) of the images that the midpoints were measured on. Raises InputError for what are no
    probabilities.
    """
    K = len(branches)
    p = as_probabilities(torch.cat([average[None], branches]), 3)
    labels = as_labels(labels, *p.shape[1:])
    right = (p.argmax(2) == labels).double()  # (1 + K, N)
    losses = -(p.gather(2, labels.expand(1 + K, -1)[..., None])[..., 0] + EPSILON).log()
    sample = sample.cpu()
    between = as_probabilities(way, 3)
    there = -(between.gather(2, labels[sample].expand(K, -1)[..., None])[..., 0] + EPSILON).log()
    points = torch.cat([losses[:1, sample], there])  # (1 + K, n): the average and the midpoints
    weights = torch.cat([torch.full((1, K), 1 / K, dtype=torch.float64), midpoints(K)])
    excess = points - weights @ losses[1:, sample]
    worst = int(excess.mean(1).argmax())
    lost = right[1:].mean(0) - right[0]
    ensemble = p[1:].mean(0)
    return Averaging(
        accuracy=float(right[0].mean()), nll=float(losses[0].mean()),
        branch_accuracy=right[1:].mean(1).tolist(), branch_nll=losses[1:].mean(1).tolist(),
        ensemble_accuracy=metrics.accuracy(ensemble, labels), ensemble_nll=metrics.nll(ensemble, labels),
        midpoint_nll=there.mean(1).tolist(), barrier=float(excess[worst].mean()), barrier_error=_error(excess[worst]),
        gap=float(lost.mean()), gap_error=_error(lost),
    )  # fmt: skip


@dataclass(frozen=True)
class Landscape:
    """NLL of the networks around a student's branches, as a report draws them (``landscape_plots``).

    Attributes:
        steps: positions (T,) along the lines: 0 is the average, 1 the branch.
        ways: NLL (K, T) along the straight line from the average to each branch, and a little beyond both.
        chosen: the three branches that the plane goes through; () where there are only two.
        corners: where (3, 2) they lie in it: an equilateral triangle, whose centre is the average of the three.
        x, y: the grid's coordinates (X,) and (Y,).
        plane: NLL (Y, X) on it.
        images: on how many images.
        classes: how many there are: a guess among them has the NLL log(classes).
    """

    steps: Tensor
    ways: Tensor
    chosen: tuple[int, ...]
    corners: Tensor
    x: Tensor
    y: Tensor
    plane: Tensor
    images: int
    classes: int


GRIDS = ((13, 13), (13, 9), (7, 7))  # points of a way, and of the plane's side: the first that can be paid for
FEWEST_IMAGES, MOST_IMAGES = 80, 300
AT_ONCE = 8  # networks


def landscape(student: Student, images: EvaluationSet, macs: int, budget: float) -> Landscape | None:
    """Measure it with so many multiply-accumulates at most: as fine a grid, on as many images, as they allow.

    ``macs`` are those of one image in one branch. None where they do not suffice for the coarsest grid on 80 images,
    or on all that there are. Raises InputError for a student without factors.
    """
    K = student.branches
    for T, side in GRIDS:
        points = K * T + (side * side if K > 2 else 0)
        count = min(len(images), MOST_IMAGES, int(budget / (points * max(macs, 1))))
        if count >= min(FEWEST_IMAGES, len(images)):
            break
    else:
        return None
    index = spread(len(images), count).to(images.images.device)
    batch, labels = images.part(index), images.labels[index]
    unit = torch.eye(K, dtype=torch.float64)
    average, steps = unit.mean(0), torch.linspace(-0.25, 1.25, T, dtype=torch.float64)
    rows = [average + t * (unit[k] - average) for k in range(K) for t in steps]
    corners = torch.tensor([(-1, 0), (1, 0), (0, 3**0.5)], dtype=torch.float64)
    x, y = (torch.linspace(*ends, side, dtype=torch.float64) for ends in ((-1.8, 1.8), (-0.75, 2.4)))
    ways = _nll(student, torch.stack(rows), batch, labels).view(K, T)
    chosen: tuple[int, ...] = ()
    plane = torch.empty(0, 0, dtype=torch.float64)
    if K > 2:
        half, end = (int((steps - at).abs().argmin()) for at in (0.5, 1.0))
        worst = int((ways[:, half] - ways[:, end] / 2).nan_to_num(math.inf).argmax())  # of all, the highest barrier
        chosen = (worst, *[k for k in range(K) if k != worst][:2])
        column, row = torch.meshgrid(x, y, indexing="xy")
        places = torch.stack([column, row, torch.ones_like(row)]).flatten(1)
        weights = torch.zeros(side * side, K, dtype=torch.float64)  # what the three weigh to give these places
        weights[:, list(chosen)] = torch.linalg.solve(torch.cat([corners, torch.ones(3, 1)], 1).T, places).T
        plane = _nll(student, weights, batch, labels).view(side, side)
    return Landscape(steps, ways, chosen, corners, x, y, plane, count, len(predict(student, batch)[0, 0]))


def _nll(student: Student, weights: Tensor, images: EvaluationSet, labels: Tensor) -> Tensor:
    """NLL (P,) of the networks at ``weights`` (P, K), NaN where a prediction is not finite."""
    found = []
    for part in weights.split(AT_ONCE):
        p = predict(student.mixed(part), images).cpu().double()
        right = p.gather(2, labels.cpu().expand(len(part), -1)[..., None])[..., 0]
        found.append(-(right + EPSILON).log().mean(1))
    return torch.cat(found)


def _error(values: Tensor) -> float:
    """Standard error of the mean of ``values`` (n,); 0 for a single one."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0
