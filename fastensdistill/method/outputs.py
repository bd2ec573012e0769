"""Find the logits in what a network returns, and check that they are logits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastensdistill.errors import InputError

NAMES = ("logits", "logit", "out", "output", "outputs", "pred", "preds", "prediction", "predictions", "scores")
"""Under which the logits are looked for in a mapping or an object, in this order."""


def logits_of(output: Any, name: str = "the network", *, auxiliary: bool = False) -> Tensor:
    """The logits in what a network returned: a floating tensor, (B, C) of one network.

    That is the tensor itself, an object's or a mapping's ``logits`` (or another of :data:`NAMES`), the only tensor of a
    mapping, or the first of a sequence, as in (logits, features). With ``auxiliary`` further outputs of the same shape
    are auxiliary heads, as many networks have in training; without, they leave open which are meant.

    Raises InputError, which begins with ``name``, for anything else.
    """
    if isinstance(output, Tensor):
        if not output.is_floating_point():
            raise InputError(f"{name} returns {output.dtype}; expected logits, which are floating")
        return output
    given = dict(output) if isinstance(output, Mapping) else {n: getattr(output, n, None) for n in NAMES}
    found = [given[n] for n in NAMES if isinstance(given.get(n), Tensor)]
    tensors = [value for value in given.values() if isinstance(value, Tensor)]
    if found or (isinstance(output, Mapping) and len(tensors) == 1):
        return logits_of(found[0] if found else tensors[0], name)
    if isinstance(output, Mapping):
        keys = ", ".join(map(repr, output)) or "nothing"
        raise InputError(f"{name} returns a mapping of {keys}; expected logits (B, classes), or the key 'logits'")
    if isinstance(output, tuple | list) and output:
        first = logits_of(output[0], name, auxiliary=auxiliary)
        if alike(output) > 1 and not auxiliary:
            raise InputError(
                f"{name} returns {alike(output)} tensors of shape {tuple(first.shape)}; expected the logits alone, or "
                "first among others"
            )
        return first
    raise InputError(f"{name} returns a {type(output).__name__}; expected logits, a tensor (B, classes)")


def alike(output: Any) -> int:
    """How many tensors of the first one's shape a network returned: more than one where it has auxiliary heads."""
    values = list(output.values()) if isinstance(output, Mapping) else output
    tensors = [t for t in values if isinstance(t, Tensor)] if isinstance(values, tuple | list) else []
    return sum(t.shape == tensors[0].shape for t in tensors)


def check_logits(logits: Tensor, name: str) -> None:
    """Raise InputError where the values (..., B, C) on several images show that they are no logits.

    NaN and infinities, probabilities (a softmax over the classes, or by mistake over the images; a sigmoid, where the
    graph shows it), and logarithms of probabilities over the images. Logarithms of probabilities are logits.
    """
    z = logits.detach().float()
    if not bool(torch.isfinite(z).all()):
        raise InputError(f"{name} returns values that are not finite on images of noise; expected logits")
    if z.shape[-1] < 2:
        return
    tolerance = 1e-2 if logits.dtype in (torch.float16, torch.bfloat16) else 1e-3
    several = z.ndim > 1 and z.shape[-2] > 1

    def sums_to_one(values: Tensor, dim: int) -> bool:
        return bool(((values.sum(dim) - 1).abs() < tolerance).all())

    kind = None
    if float(z.min()) >= 0 and float(z.max()) <= 1 + tolerance:
        if sums_to_one(z, -1):
            kind = "probabilities (each image's sum to one)"
        elif several and sums_to_one(z, -2):
            kind = "probabilities over the images of a batch (a softmax over the wrong dimension)"
        elif _made_by(logits).startswith("Sigmoid"):
            kind = "probabilities of a sigmoid"
    elif several and float(z.max()) <= tolerance and sums_to_one(z.exp(), -2) and not sums_to_one(z.exp(), -1):
        kind = "log-probabilities over the images of a batch (a softmax over the wrong dimension)"
    if kind:
        raise InputError(f"{name} returns {kind}; expected logits: take off what ends it, or return its logarithm")


def in_unit_interval(logits: Tensor) -> bool:
    """Whether every value lies in [0, 1], as those of probabilities do."""
    return float(logits.min()) >= 0 and float(logits.max()) <= 1


def _made_by(logits: Tensor) -> str:
    """The name of the last operation in the graph that does more than to arrange values; "" without a graph."""
    node = logits.grad_fn
    while node is not None and re.match(r"(Unsafe)?(View|Squeeze|Unsqueeze|Reshape|Clone|ToCopy|Cat)", node.name()):
        node = node.next_functions[0][0]
    return "" if node is None else node.name()
