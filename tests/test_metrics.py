"""Metrics and temperature against loops written from the definitions, cases solved by hand, and properties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastensdistill.data.loader import EvaluationSet
from fastensdistill.data.sources import Split
from fastensdistill.errors import InputError
from fastensdistill.evaluate import (
    Metrics,
    accuracy,
    agreement,
    apply_temperature,
    brier,
    ece,
    ensemble,
    evaluate,
    fit_temperature,
    nll,
    pairwise_kl,
)
from fastensdistill.evaluate.metrics import calibration_bins
from fastensdistill.evaluate.predict import predict
from fastensdistill.evaluate.temperature import LARGEST, SMALLEST
from tests.compare import check_close
from tests.untyped import untyped


def predictions(seed: int, images: int, classes: int, members: int = 1, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """(E, N, C) probabilities of members that share a part of their logits, and (N,) labels drawn from the first."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(1, images, classes, generator=g, dtype=torch.float64)
    own = torch.randn(members, images, classes, generator=g, dtype=torch.float64)
    labels = torch.multinomial(torch.softmax(1.5 * (shared + own)[0], -1), 1, generator=g)[:, 0]
    return torch.softmax(scale * (shared + own), -1), labels


# --- the definitions, once more, as loops over Python numbers


def loop_accuracy(p: list[list[float]], y: list[int]) -> float:
    return sum(row.index(max(row)) == label for row, label in zip(p, y, strict=True)) / len(y)


def loop_nll(p: list[list[float]], y: list[int]) -> float:
    return sum(-math.log(row[label] + 1e-8) for row, label in zip(p, y, strict=True)) / len(y)


def loop_ece(p: list[list[float]], y: list[int], bins: int) -> float:
    total = 0.0
    for i in range(bins):
        inside = [(r, t) for r, t in zip(p, y, strict=True) if i / bins < max(r) <= (i + 1) / bins]
        if inside:
            hits = sum(r.index(max(r)) == t for r, t in inside) / len(inside)
            total += len(inside) / len(y) * abs(hits - sum(max(r) for r, _ in inside) / len(inside))
    return total


def loop_brier(p: list[list[float]], y: list[int]) -> float:
    return sum((v - (c == t)) ** 2 for r, t in zip(p, y, strict=True) for c, v in enumerate(r)) / len(y)


def loop_kl(members: list[list[list[float]]]) -> float:
    values = [
        sum(u * (math.log(u + 1e-8) - math.log(v + 1e-8)) for u, v in zip(p, q, strict=True))
        for a, b in itertools.permutations(members, 2)
        for p, q in zip(a, b, strict=True)
    ]
    return sum(values) / len(values)


def loop_agreement(members: list[list[list[float]]]) -> float:
    values = [
        p.index(max(p)) == q.index(max(q))
        for a, b in itertools.permutations(members, 2)
        for p, q in zip(a, b, strict=True)
    ]
    return sum(values) / len(values)


SIZES = [
    pytest.param(1, 2, 2, 1.0, id="one-image-two-classes"),
    pytest.param(7, 3, 3, 2.0, id="odd"),
    pytest.param(128, 10, 4, 2.0, id="round"),
    pytest.param(61, 100, 5, 0.1, id="many-classes-unsure"),
    pytest.param(64, 5, 2, 60.0, id="saturated"),  # zeros among the probabilities
]


@pytest.mark.parametrize(("images", "classes", "members", "scale"), SIZES)
def test_metrics_equal_loops(images: int, classes: int, members: int, scale: float) -> None:
    p, labels = predictions(3, images, classes, members, scale)
    first, y = p[0], labels.tolist()
    rows, all_rows = first.tolist(), p.tolist()
    assert accuracy(first, labels) == pytest.approx(loop_accuracy(rows, y), abs=1e-15)
    assert nll(first, labels) == pytest.approx(loop_nll(rows, y), rel=1e-12)
    assert brier(first, labels) == pytest.approx(loop_brier(rows, y), rel=1e-12, abs=1e-15)
    for bins in (1, 4, 15):
        assert ece(first, labels, bins) == pytest.approx(loop_ece(rows, y, bins), abs=1e-13)
    assert pairwise_kl(p) == pytest.approx(loop_kl(all_rows), rel=1e-11)
    assert agreement(p) == pytest.approx(loop_agreement(all_rows), abs=1e-15)


@pytest.mark.parametrize(("images", "classes", "members", "scale"), SIZES)
def test_ensemble_is_the_mean_of_softmaxes(images: int, classes: int, members: int, scale: float) -> None:
    p, _ = predictions(4, images, classes, members, scale)
    check_close("from log-probabilities", ensemble(p.log()), p.mean(0), 1e-14)  # log 0 = -inf among them
    check_close("from logits", ensemble(p.clamp_min(1e-300).log() + 7.5), p.mean(0), 1e-13)
    check_close("from float32", ensemble(p.float().log()), p.mean(0), 1e-6)


# --- cases solved by hand


def test_bin_edges_belong_to_the_lower_bin() -> None:
    # Two bins: 0.5 lies in (0, 0.5], 0.75 in (0.5, 1]. Were it [lo, hi), both would share the upper bin,
    # 1 and 0 hits would average to 0.5, and the error would be |0.5 - 0.625| = 0.125 instead.
    p = torch.tensor([[0.5, 0.5], [0.75, 0.25]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    assert ece(p, labels, bins=2) == pytest.approx(0.5 * (1 - 0.5) + 0.5 * 0.75, abs=1e-15)
    counts, confidence, correct = calibration_bins(p, labels, 2)
    assert counts.tolist() == [1, 1]
    assert confidence.tolist() == [0.5, 0.75]
    assert correct.tolist() == [1, 0]


@pytest.mark.parametrize("bins", [1, 3, 7, 15, 100])
def test_every_edge_of_every_bin(bins: int) -> None:
    top = torch.arange(1, bins + 1, dtype=torch.float64) / bins
    C = 2 * bins + 1  # enough other classes for the rest of the mass to stay below the top
    rest = (1 - top)[:, None].expand(-1, C - 1) / (C - 1)
    counts, _, _ = calibration_bins(torch.cat([top[:, None], rest], 1), torch.zeros(bins, dtype=torch.int64), bins)
    assert counts.tolist() == [1] * bins


def test_a_top_probability_just_above_one_counts() -> None:
    p = torch.tensor([[1 + 1e-9, 0.0], [1.0, 0.0]], dtype=torch.float64)
    counts, _, _ = calibration_bins(p, torch.tensor([0, 0]))
    assert counts.tolist() == [0.0] * 14 + [2.0]


def test_certain_and_right_or_wrong() -> None:
    p = torch.eye(4, dtype=torch.float32)
    right, wrong = torch.arange(4), torch.arange(4).roll(1)
    assert (accuracy(p, right), ece(p, right), brier(p, right)) == (1.0, 0.0, 0.0)
    assert nll(p, right) == pytest.approx(-math.log(1 + 1e-8))
    assert (accuracy(p, wrong), ece(p, wrong), brier(p, wrong)) == (0.0, 1.0, 2.0)
    assert nll(p, wrong) == pytest.approx(-math.log(1e-8))


def test_uniform() -> None:
    C = 8
    p, labels = torch.full((16, C), 1 / C), torch.arange(16) % C
    assert accuracy(p, labels) == 1 / C  # the first of equals: class 0
    assert nll(p, labels) == pytest.approx(math.log(C), rel=1e-6)
    assert brier(p, labels) == pytest.approx(1 - 1 / C)
    assert ece(p, labels) == pytest.approx(0, abs=1e-15)
    assert fit_temperature(p, labels) == 1.0


def test_calibrated_in_every_bin() -> None:
    # Of ten images predicted at 0.7, seven are right; of ten at 0.9, nine.
    p = torch.tensor([[0.7, 0.3]] * 10 + [[0.9, 0.1]] * 10, dtype=torch.float64)
    labels = torch.tensor([0] * 7 + [1] * 3 + [0] * 9 + [1])
    assert ece(p, labels) == pytest.approx(0, abs=1e-12)


def test_diversity_by_hand() -> None:
    a, b = [0.5, 0.5], [0.25, 0.75]
    members = torch.tensor([[a], [b]], dtype=torch.float64)
    forward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    backward = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert pairwise_kl(members) == pytest.approx((forward + backward) / 2, abs=1e-7)
    same = members[:1].expand(5, -1, -1)
    assert pairwise_kl(same) == pytest.approx(0, abs=1e-14)
    assert agreement(same) == 1.0
    # Three members, two of them agree: 2 of 6 ordered pairs.
    assert agreement(torch.tensor([[[0.9, 0.1]], [[0.8, 0.2]], [[0.1, 0.9]]])) == pytest.approx(1 / 3)


# --- temperature


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("images", "classes"), [(33, 3), (500, 10), (100, 101)])
def test_temperature_is_the_minimum(seed: int, images: int, classes: int) -> None:
    p, labels = predictions(seed, images, classes, scale=4.0)
    T = fit_temperature(p[0], labels)
    assert SMALLEST < T < LARGEST

    def exact(b: float) -> Tensor:
        """The loss in b = 1/T as it is written, differentiated by autograd."""
        scaled = torch.tensor(b, dtype=torch.float64, requires_grad=True)
        torch.nn.functional.cross_entropy((p[0] + 1e-8).log() * scaled, labels).backward()
        assert scaled.grad is not None
        return scaled.grad

    # The derivative changes its sign within a relative 1e-6 of T.
    assert exact(1 / (T * (1 + 1e-6))) < 0 < exact(1 / (T * (1 - 1e-6)))


def test_temperature_agrees_with_a_fine_grid_of_nll() -> None:
    p, labels = predictions(5, 400, 10, scale=3.0)
    T = fit_temperature(p[0], labels)
    grid = [T * (1 + i * 1e-3) for i in range(-300, 301)]
    best = min(grid, key=lambda t: nll(apply_temperature(p[0], t), labels))
    assert best == pytest.approx(T, rel=1e-3)


@pytest.mark.parametrize("factor", [0.2, 1.0, 1.7, 3.0])
def test_temperature_recovers_the_factor_of_the_logits(factor: float) -> None:
    z = torch.randn(300, 6, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    labels = torch.multinomial(torch.softmax(z, 1), 1, generator=torch.Generator().manual_seed(9))[:, 0]
    own = fit_temperature(torch.softmax(z * 0.5, 1), labels)
    # Softmax of factor * z wants a temperature factor / 0.5 times as large, as long as no p comes near the 1e-8.
    assert fit_temperature(torch.softmax(factor * z, 1), labels) == pytest.approx(own * factor / 0.5, rel=2e-3)


def test_labels_drawn_from_the_prediction_want_a_temperature_of_one() -> None:
    # 1000 images of (0.8, 0.2), 800 of class 0: the minimum is where the prediction is 0.8 again.
    p = torch.tensor([[0.8, 0.2]], dtype=torch.float64).expand(1000, -1)
    labels = (torch.arange(1000) >= 800).long()
    assert fit_temperature(p, labels) == pytest.approx(1.0, rel=1e-6)
    # The same with 600: b log 4 = log(6/4).
    labels = (torch.arange(1000) >= 600).long()
    assert fit_temperature(p, labels) == pytest.approx(math.log(4) / math.log(1.5), rel=1e-6)


EXTREMES = [
    pytest.param([[0.9, 0.1], [0.2, 0.8]], [0, 1], SMALLEST, id="all-right"),
    pytest.param([[1.0, 0.0], [0.0, 1.0]], [0, 1], SMALLEST, id="all-right-and-certain"),
    pytest.param([[0.9, 0.1], [0.2, 0.8]], [1, 0], LARGEST, id="all-wrong"),
    pytest.param([[1.0, 0.0], [0.0, 1.0]], [1, 0], LARGEST, id="all-wrong-and-certain"),
    pytest.param([[0.6, 0.4]], [0], SMALLEST, id="one-image"),
    pytest.param([[1.0]], [0], 1.0, id="one-class"),
    pytest.param([[0.5, 0.5], [0.9, 0.1]], [0, 0], SMALLEST, id="a-tie-and-a-hit"),
]


@pytest.mark.parametrize(("p", "labels", "expected"), EXTREMES)
def test_temperature_stays_in_its_range(p: list[list[float]], labels: list[int], expected: float) -> None:
    predicted, y = torch.tensor(p, dtype=torch.float64), torch.tensor(labels)
    assert fit_temperature(predicted, y) == expected
    scaled = apply_temperature(predicted, expected)
    assert bool(torch.isfinite(scaled).all())
    assert nll(scaled, y) <= nll(predicted, y) + 1e-7


def test_apply_temperature_by_hand() -> None:
    p = torch.tensor([[0.8, 0.2]], dtype=torch.float64)
    check_close("T = 2", apply_temperature(p, 2.0), torch.tensor([[2 / 3, 1 / 3]], dtype=torch.float64), 1e-7)
    check_close("T = 1", apply_temperature(p, 1.0), p, 1e-7)


# --- properties

cases = st.tuples(
    st.integers(0, 2**31 - 1),
    st.integers(1, 40),
    st.integers(2, 12),
    st.integers(2, 4),
    st.floats(0.01, 40.0),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases, st.integers(1, 20))
@example((0, 1, 2, 2, 40.0), 15)
def test_properties(case: tuple[int, int, int, int, float], bins: int) -> None:
    seed, images, classes, members, scale = case
    p, labels = predictions(seed, images, classes, members, scale)
    first = p[0]
    assert 0 <= ece(first, labels, bins) <= 1
    # With one bin the ECE is the gap of the totals, and finer bins can only see more of it.
    gap = abs(accuracy(first, labels) - float(first.max(1).values.mean()))
    assert gap <= ece(first, labels, bins) + 1e-12
    assert 0 <= brier(first, labels) <= 2
    assert pairwise_kl(p) >= -classes * 1e-8

    T = fit_temperature(first, labels)
    assert SMALLEST <= T <= LARGEST
    assert nll(apply_temperature(first, T), labels) <= nll(first, labels) + classes * 1e-8
    # Averaging cannot raise the likelihood loss or the Brier score above the members' mean (both are convex).
    mean = p.mean(0)
    assert nll(mean, labels) <= sum(nll(m, labels) for m in p) / members + 1e-12
    assert brier(mean, labels) <= sum(brier(m, labels) for m in p) / members + 1e-12

    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    new_labels = torch.argsort(order)[labels]
    shuffled = p[:, :, order]
    a = evaluate(p, labels, p, labels).to_dict()
    b = evaluate(shuffled, new_labels, shuffled, new_labels).to_dict()
    ties = bool((mean.topk(2, 1).values.diff(dim=1) == 0).any()) or bool((p.topk(2, 2).values.diff(dim=2) == 0).any())
    for key, value in a.items():
        # Which of equal classes comes first depends on their order; temperature is flat where the loss is.
        if key in ("nll", "brier", "diversity_kl") or not (ties or key in ("temperature", "cnll", "cece")):
            assert b[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key


def test_evaluate_puts_the_parts_together() -> None:
    p, labels = predictions(11, 700, 7, members=3, scale=3.0)
    test, validation = p[:, :400], p[:, 400:]
    y, yv = labels[:400], labels[400:]
    m = evaluate(test.float(), y.int(), validation.float(), yv)
    mean, T = test.float().double().mean(0), fit_temperature(validation.float().double().mean(0), yv)
    calibrated = apply_temperature(mean, T)
    assert m == Metrics(
        accuracy=accuracy(mean, y),
        nll=nll(mean, y),
        ece=ece(mean, y),
        cnll=nll(calibrated, y),
        cece=ece(calibrated, y),
        brier=brier(mean, y),
        temperature=T,
        diversity_kl=pairwise_kl(test.float()),
        agreement=agreement(test.float()),
    )
    # Sharpened predictions that are evaluated on held-out images: calibration must help here.
    assert m.cnll < m.nll
    assert m.cece < m.ece
    assert untyped(Metrics)(**m.to_dict()) == m
    single = evaluate(test[:1], y, validation[:1], yv)
    assert (single.diversity_kl, single.agreement) == (None, None)
    assert single.nll == nll(test[0], y)
    # The temperature comes from the validation split alone.
    assert evaluate(test, y, validation.roll(1, 1), yv).temperature != m.temperature
    assert evaluate(test.roll(1, 1), y, validation.float(), yv).temperature == m.temperature


# --- refusals

GOOD, Y = torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 1])
PAIR = torch.stack([GOOD, GOOD])

REFUSED = [
    pytest.param(lambda: accuracy(GOOD[0], Y), r"shape \(N, C\)", id="one-dimension"),
    pytest.param(lambda: nll(PAIR, Y), r"shape \(N, C\)", id="members-where-one-is-wanted"),
    pytest.param(lambda: nll(GOOD, Y[:1]), "each of 2 images", id="too-few-labels"),
    pytest.param(lambda: ece(GOOD, torch.tensor([0, 2])), "0 to 1, found 2", id="label-too-large"),
    pytest.param(lambda: brier(GOOD, torch.tensor([-1, 0])), "0 to 1, found -1", id="label-negative"),
    pytest.param(lambda: accuracy(GOOD, Y.float()), "integers", id="float-labels"),
    pytest.param(lambda: untyped(accuracy)(GOOD, [0, 1]), "integers", id="labels-in-a-list"),
    pytest.param(lambda: accuracy(GOOD.long(), Y), "floating point", id="integer-probabilities"),
    pytest.param(lambda: untyped(accuracy)(GOOD.numpy(), Y), "floating point", id="numpy"),
    pytest.param(lambda: nll(GOOD * math.nan, Y), "4 values are NaN", id="nan"),
    pytest.param(lambda: nll(GOOD[:0], Y[:0]), "something in it", id="empty"),
    pytest.param(lambda: nll(GOOD * 2, Y), "sum to one", id="not-normalised"),
    pytest.param(lambda: nll(torch.tensor([[1.5, -0.5]]), Y[:1]), "non-negative", id="logits"),
    pytest.param(lambda: ece(GOOD, Y, bins=0), "at least 1", id="no-bins"),
    pytest.param(lambda: pairwise_kl(PAIR[:1]), "at least 2 members", id="kl-of-one"),
    pytest.param(lambda: agreement(PAIR[:1]), "at least 2 members", id="agreement-of-one"),
    pytest.param(lambda: ensemble(GOOD), r"shape \(E, N, C\)", id="ensemble-without-members"),
    pytest.param(lambda: ensemble(torch.full((2, 3, 4), -math.inf)), "NaN", id="ensemble-of-nothing"),
    pytest.param(lambda: fit_temperature(GOOD, Y[:1]), "each of 2 images", id="fit-shapes"),
    pytest.param(lambda: apply_temperature(GOOD, 0.0), "positive", id="temperature-zero"),
    pytest.param(lambda: apply_temperature(GOOD, math.nan), "positive", id="temperature-nan"),
    pytest.param(lambda: evaluate(PAIR, Y, PAIR[:1], Y), "same members", id="other-members"),
    pytest.param(lambda: evaluate(PAIR, Y, torch.full((2, 2, 4), 0.25), Y), "same members", id="other-classes"),
    pytest.param(lambda: evaluate(PAIR, Y, PAIR, torch.tensor([0, 7])), "validation labels", id="validation-labels"),
    pytest.param(lambda: evaluate(PAIR, torch.tensor([0, 7]), PAIR, Y), "test labels", id="test-labels"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_predict_takes_splits_and_images_and_leaves_the_mode():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    split = Split(np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3)).astype(np.uint8), np.zeros(7, np.int64))
    images = torch.from_numpy(split.images).permute(0, 3, 1, 2) / 255
    expected = network.eval()(images).softmax(-1).detach()[None]
    network.train()
    for images_given in (split, EvaluationSet(split, "cpu"), images):
        check_close(type(images_given).__name__, predict(network, images_given, batch_size=3), expected, 1e-6)
    assert network.training
    for wrong, words in ((images[0], r"\(3, 5, 6\)"), (split.images, "ndarray"), (images[:0], "no images")):
        with pytest.raises(InputError, match=words):
            predict(network, untyped(wrong))
