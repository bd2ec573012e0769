"""Metrics, temperature, plots and the report."""

from fastensdistill.evaluate.metrics import (
    Metrics,
    accuracy,
    agreement,
    brier,
    ece,
    ensemble,
    evaluate,
    nll,
    pairwise_kl,
)
from fastensdistill.evaluate.temperature import apply_temperature, fit_temperature

__all__ = [
    "Metrics",
    "accuracy",
    "agreement",
    "apply_temperature",
    "brier",
    "ece",
    "ensemble",
    "evaluate",
    "fit_temperature",
    "nll",
    "pairwise_kl",
]
