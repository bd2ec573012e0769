"""Accuracy, likelihood, calibration and diversity of classifiers and of ensembles of them.

With p[n] the predicted probabilities of image n, y[n] its label, N images, C classes, E members:

    prediction of an ensemble   mean over members of their softmaxes
    accuracy                    share of argmax p[n] = y[n]                                    in [0, 1]
    NLL                         mean_n -log(p[n, y] + 1e-8)                                    nats
    ECE                         sum over 15 bins of n_bin/N |accuracy_bin - mean top probability_bin|; bin i holds
                                top probabilities in (i/15, (i+1)/15]
    cNLL, cECE                  the same after one temperature fitted on the validation split, after averaging
    Brier                       mean_n sum_c (p[n, c] - [c = y[n]])^2: summed over classes, so in [0, 2]
    diversity                   mean over ordered pairs a != b and images of KL(p_a || p_b), with log(p + 1e-8); nats
    agreement                   mean over the same pairs and images of [argmax p_a = argmax p_b]

Definitions: Ashukha et al. 2020 (calibrated likelihood), Guo et al. 2017 (ECE, temperature), and the evaluation of Nam
et al. 2022. Everything is computed in float64 on the CPU from tensors of any floating dtype on any device, and raises
``InputError`` for shapes that disagree, labels out of range, NaN, emptiness, and rows that are not probabilities.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.evaluate.inputs import EPSILON, as_float64, as_labels, as_probabilities
from fastensdistill.evaluate.temperature import apply_temperature, fit_temperature


def ensemble(log_probs: Tensor) -> Tensor:
    """Mean of the members' softmaxes.

    Args:
        log_probs: (E, N, C) log-probabilities, -inf allowed. Logits serve as well: the softmax taken here leaves
            log-probabilities as they are.

    Returns:
        (N, C) probabilities, float64 on the CPU.
    """
    p = torch.softmax(as_float64(log_probs, 3, "log-probabilities"), dim=-1)
    return as_probabilities(p, 3, "softmax of the log-probabilities").mean(0)


def accuracy(p: Tensor, labels: Tensor) -> float:
    """Share of images whose label has the largest probability (the first, where several are equal): in [0, 1].

    Args:
        p: (N, C) probabilities.
        labels: (N,) integers.
    """
    p, labels = _checked(p, labels)
    return float((p.argmax(1) == labels).double().mean())


def nll(p: Tensor, labels: Tensor) -> float:
    """Mean -log(p_label + 1e-8), in nats; at most 18.43. Arguments as for :func:`accuracy`."""
    p, labels = _checked(p, labels)
    return float(-(p.gather(1, labels[:, None]) + EPSILON).log().mean())


def ece(p: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error over ``bins`` equal bins (lo, hi] of the top probability: in [0, 1].

    Arguments as for :func:`accuracy`. The top probability is never zero, so every image lies in a bin.
    """
    counts, confidence, correct = calibration_bins(p, labels, bins)
    filled = counts > 0
    return float((counts * (correct - confidence).abs())[filled].sum() / counts.sum())


def calibration_bins(p: Tensor, labels: Tensor, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """What the ECE sums and a reliability diagram draws, in ``bins`` equal bins (lo, hi] of the top probability.

    Returns:
        Three float64 tensors of shape (bins,): how many images, their mean top probability, and their accuracy
        (NaN, both, where a bin is empty).
    """
    p, labels = _checked(p, labels)
    if bins < 1:
        raise InputError(f"bins: expected at least 1, found {bins}")
    top, predicted = p.max(1)
    upper = torch.arange(1, bins + 1, dtype=torch.float64) / bins
    # The first upper edge not below the top probability; rounding may have put the sum, and so the top, above one.
    place = torch.searchsorted(upper, top).clamp_max(bins - 1)
    counts = torch.bincount(place, minlength=bins).double()
    confidence = torch.bincount(place, weights=top, minlength=bins) / counts
    correct = torch.bincount(place, weights=(predicted == labels).double(), minlength=bins) / counts
    return counts, confidence, correct


def brier(p: Tensor, labels: Tensor) -> float:
    """Mean over images of sum_c (p_c - onehot_c)^2: the sum over classes, not their mean, in [0, 2].

    Arguments as for :func:`accuracy`.
    """
    p, labels = _checked(p, labels)
    # sum_c (p_c - onehot_c)^2 = sum_c p_c^2 - 2 p_label + 1, without building the one-hot rows
    return float((p.square().sum(1) - 2 * p.gather(1, labels[:, None])[:, 0] + 1).mean())


def pairwise_kl(members: Tensor) -> float:
    """Mean over ordered pairs a != b of members, and over images, of KL(p_a || p_b) in nats.

    Args:
        members: (E, N, C) probabilities, E >= 2. Logarithms are of p + 1e-8, so zeros are harmless (and the value may
            fall below zero by some C * 1e-8).
    """
    p = _several(members)
    E, N, _ = p.shape
    logs = (p + EPSILON).log()
    # sum_{a,b} p_a (log p_a - log p_b); the terms with a = b are zero
    total = E * (p * logs).sum() - (p.sum(0) * logs.sum(0)).sum()
    return float(total) / (N * E * (E - 1))


def agreement(members: Tensor) -> float:
    """Share of images, over ordered pairs of members, on which both have the same argmax: in [0, 1].

    Args:
        members: (E, N, C) probabilities, E >= 2.
    """
    p = _several(members)
    E, N, C = p.shape
    # With v_c votes for class c, sum_c v_c (v_c - 1) ordered pairs agree.
    votes = torch.nn.functional.one_hot(p.argmax(2), C).sum(0)
    return float((votes * (votes - 1)).sum()) / (N * E * (E - 1))


@dataclass(frozen=True)
class Metrics:
    """The quality of one network, or of one ensemble; see the head of this module for the definitions.

    ``temperature`` is the one fitted on the validation split. Both diversity figures are None for a single network.
    """

    accuracy: float
    nll: float
    ece: float
    cnll: float
    cece: float
    brier: float
    temperature: float
    diversity_kl: float | None = None
    agreement: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """The fields by name; ``Metrics(**d)`` is the way back."""
        return asdict(self)


def evaluate(test: Tensor, test_labels: Tensor, validation: Tensor, validation_labels: Tensor) -> Metrics:
    """All metrics on the test split, with the temperature fitted on the validation split.

    Args:
        test: (E, N, C) probabilities of the members on the test split; E = 1 for a single network.
        test_labels: (N,) integers.
        validation: (E, Nv, C) probabilities of the same members on the validation split.
        validation_labels: (Nv,) integers.

    Returns:
        Metrics of the averaged probabilities, with the members' diversity where E > 1. One temperature, fitted and
        applied after averaging.

    Raises:
        InputError: also where the two splits disagree about E or C.
    """
    test = as_probabilities(test, 3, "test probabilities")
    validation = as_probabilities(validation, 3, "validation probabilities")
    E, N, C = test.shape
    if (validation.shape[0], validation.shape[2]) != (E, C):
        raise InputError(
            f"test and validation probabilities must have the same members and classes, "
            f"found shapes {tuple(test.shape)} and {tuple(validation.shape)}"
        )
    labels = as_labels(test_labels, N, C, "test labels")
    validation_labels = as_labels(validation_labels, validation.shape[1], C, "validation labels")
    mean = test.mean(0)
    temperature = fit_temperature(validation.mean(0), validation_labels)
    calibrated = apply_temperature(mean, temperature)
    return Metrics(
        accuracy=accuracy(mean, labels),
        nll=nll(mean, labels),
        ece=ece(mean, labels),
        cnll=nll(calibrated, labels),
        cece=ece(calibrated, labels),
        brier=brier(mean, labels),
        temperature=temperature,
        diversity_kl=pairwise_kl(test) if E > 1 else None,
        agreement=agreement(test) if E > 1 else None,
    )


def _checked(p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C) probabilities in float64 and their (N,) labels, both checked."""
    p = as_probabilities(p, 2)
    return p, as_labels(labels, *p.shape)


def _several(members: Tensor) -> Tensor:
    """(E, N, C) probabilities of at least two members, in float64."""
    p = as_probabilities(members, 3, "members' probabilities")
    if p.shape[0] < 2:
        raise InputError("diversity: expected the probabilities of at least 2 members, found 1")
    return p
