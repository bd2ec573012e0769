"""Input checks of all metrics: probabilities and labels that fit together, converted to float64 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastensdistill.errors import InputError

EPSILON = 1e-8
"""Added to a probability before its logarithm, everywhere in the evaluation."""

# A row of bfloat16 probabilities sums to one within 2**-8; logits handed over by mistake miss it by far more.
_SUM_TOLERANCE = 1e-2


def as_probabilities(p: Tensor, dimensions: int, name: str = "probabilities") -> Tensor:
    """``p`` as float64 on the CPU, after checking it.

    Args:
        p: (N, C) or, for ``dimensions`` = 3, (E, N, C): floating point, in [0, 1], summing to one over classes.
        dimensions: how many dimensions ``p`` must have.
        name: what the error calls it.

    Raises:
        InputError: another shape, nothing in it, integers, NaN, infinities, or rows that are not probabilities.
    """
    p = as_float64(p, dimensions, name)
    if not bool(torch.isfinite(p).all()):
        raise InputError(f"{name}: {int((~torch.isfinite(p)).sum())} values are NaN or infinite")
    if float(p.min()) < 0 or float((p.sum(-1) - 1).abs().max()) > _SUM_TOLERANCE:
        raise InputError(
            f"{name}: every row must be non-negative and sum to one; found a smallest value of {float(p.min()):.4g} "
            f"and sums from {float(p.sum(-1).min()):.4g} to {float(p.sum(-1).max()):.4g} (logits need a softmax first)"
        )
    return p


def as_float64(p: Tensor, dimensions: int, name: str) -> Tensor:
    """``p`` as float64 on the CPU; InputError unless floating point, of ``dimensions`` dimensions and not empty."""
    wanted = "(N, C)" if dimensions == 2 else "(E, N, C)"
    if not isinstance(p, Tensor) or not p.is_floating_point():
        found = p.dtype if isinstance(p, Tensor) else type(p).__name__
        raise InputError(f"{name}: expected a floating point tensor of shape {wanted}, found {found}")
    if p.ndim != dimensions or p.numel() == 0:
        raise InputError(f"{name}: expected a tensor of shape {wanted} with something in it, found {tuple(p.shape)}")
    return p.detach().to("cpu", torch.float64)


def as_labels(labels: Tensor, images: int, classes: int, name: str = "labels") -> Tensor:
    """``labels`` as int64 on the CPU, after checking that they are ``images`` integers in [0, ``classes``).

    Raises:
        InputError: another shape or dtype, or a label out of range.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise InputError(f"{name}: expected a tensor of integers, found {found}")
    if labels.shape != (images,):
        raise InputError(f"{name}: expected one for each of {images} images, found shape {tuple(labels.shape)}")
    labels = labels.detach().to("cpu", torch.int64)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InputError(f"{name}: expected values from 0 to {classes - 1}, found {low if low < 0 else high}")
    return labels
