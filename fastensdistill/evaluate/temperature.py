"""Fit one temperature to a set of predictions, for calibrated NLL and ECE (Guo et al. 2017, "On Calibration").

    p_T = softmax(log(p + 1e-8) / T),      T = argmin mean_n -log p_T[n, label_n]  on the validation split

In b = 1/T the objective is mean_n logsumexp(b l_n) - b l_n[label], l = log(p + 1e-8): convex, so the one root of its
derivative is the minimum. (NLL as reported has a second 1e-8 inside the logarithm; it is left out here, because with it
the objective is no longer convex. The fitted NLL is still never above the unscaled one by more than C * 1e-8.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.evaluate.inputs import EPSILON, as_labels, as_probabilities

SMALLEST, LARGEST = 0.01, 100.0
"""The temperatures looked at. Predictions that are all right have their minimum at T -> 0, and those that are worse
than guessing theirs at infinity or below zero: they get the end of the range."""


def fit_temperature(p: Tensor, labels: Tensor) -> float:
    """The temperature in [0.01, 100] that minimises the negative log-likelihood, to a relative 1e-6 or better.

    Args:
        p: (N, C) probabilities, any floating dtype (of an ensemble: already averaged).
        labels: (N,) integers.

    Returns:
        T > 0. Where no temperature changes anything (every row uniform) it is 1; where the minimum lies outside
        the range it is the nearer end.

    Raises:
        InputError: see :func:`fastensdistill.evaluate.inputs.as_probabilities` and ``as_labels``.
    """
    p = as_probabilities(p, 2)
    labels = as_labels(labels, *p.shape)
    logs = (p + EPSILON).log()
    # Relative to the label's: the derivative is then a mean of numbers that vanish together with the loss.
    gaps = logs - logs.gather(1, labels[:, None])

    def slope(u: float) -> tuple[float, float]:
        """First and second derivative of the loss in b = 1/T, at b = exp(u)."""
        q = torch.softmax(math.exp(u) * gaps, dim=1)
        first = (q * gaps).sum(1)
        second = (q * gaps.square()).sum(1) - first.square()
        return float(first.mean()), float(second.mean())

    low, high = -math.log(LARGEST), -math.log(SMALLEST)
    at_low, at_high = slope(low)[0], slope(high)[0]
    if at_low == 0 == at_high:
        return 1.0
    if at_low >= 0:
        return LARGEST
    if at_high <= 0:
        return SMALLEST
    # Newton in u = log b, kept inside a bracket that every step shrinks; bisection where Newton would leave it.
    u = 0.0
    for _ in range(200):
        first, second = slope(u)
        if first == 0:
            break
        low, high = (u, high) if first < 0 else (low, u)
        b = math.exp(u)
        curvature = first * b + second * b * b  # d2/du2, which may be negative far from the minimum
        step = -first * b / curvature if curvature > 0 else math.inf
        after = u + step if low < u + step < high else (low + high) / 2
        if abs(after - u) < 1e-10:
            u = after
            break
        u = after
    return math.exp(-u)


def apply_temperature(p: Tensor, temperature: float) -> Tensor:
    """softmax(log(p + 1e-8) / T): (N, C) probabilities in, (N, C) float64 probabilities on the CPU out.

    Raises:
        InputError: ``p`` is not probabilities, or the temperature is not a positive finite number.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise InputError(f"temperature: expected a positive number, found {temperature}")
    return torch.softmax((as_probabilities(p, 2) + EPSILON).log() / temperature, dim=1)
