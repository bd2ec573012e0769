"""Per-channel mean and standard deviation: checks of given values, and those that published weights expect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fastensdistill.errors import InputError

Channels = tuple[float, ...]
IMAGENET: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# The published weights of these turn ImageNet's normalisation into this one themselves (transform_input)
HALVES: tuple[Channels, Channels] = ((0.5,) * 3, (0.5,) * 3)
FRESH: tuple[Channels, Channels] = ((0.5,) * 3, (0.25,) * 3)


def per_channel(mean: Any, std: Any) -> tuple[Channels, Channels]:
    """``mean`` and ``std`` as tuples of one number per channel, of pixels in [0, 1].

    Sequences, arrays and tensors (also of shape (C, 1, 1)) are taken; a single number beside a sequence stands for
    every channel. Raises InputError for anything else: lengths that differ, a std that is not above 0, values of
    pixels from 0 to 255.
    """
    if (mean is None) != (std is None):
        raise InputError(f"mean={mean}, std={std}: expected both, or neither")
    means, stds = _numbers("mean", mean), _numbers("std", std)
    if isinstance(means, float) and isinstance(stds, float):
        raise InputError(f"mean={mean}, std={std}: expected one of each per channel, such as mean=({mean},)")
    if isinstance(means, float):
        means = (means,) * len(stds)  # type: ignore[arg-type]
    if isinstance(stds, float):
        stds = (stds,) * len(means)
    if len(means) != len(stds) or not means or any(not 0 < s < math.inf for s in stds):
        raise InputError(f"mean={means}, std={stds}: expected one of each per channel, std above 0")
    if max(*means, *stds) > 1 or min(means) < 0:
        scaled = " (these look like values for 0 to 255: divide them by 255)" if max(*means, *stds) > 4 else ""
        raise InputError(f"mean={means}, std={stds}: expected values of pixels in [0, 1]{scaled}")
    return means, stds


def _numbers(name: str, value: Any) -> Channels | float:
    try:
        if isinstance(value, str | bytes | bool | dict | set):
            raise TypeError
        array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
        if array.dtype.kind not in "iuf" or not np.isfinite(array.astype(float)).all():
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name}={value!r}: expected one finite number per channel") from None
    if array.ndim > 1 and max(array.shape) != array.size:
        raise InputError(f"{name} of shape {array.shape}: expected one number per channel")
    return float(array) if array.ndim == 0 else tuple(float(v) for v in array.ravel().tolist())


def published(name: str) -> tuple[Channels, Channels] | None:
    """Mean and std that published weights of the model ``name`` expect; None for our own models, which have none."""
    if name.startswith("timm/"):
        config = timm_config(name)
        return (tuple(config.mean), tuple(config.std)) if config is not None else IMAGENET
    from fastensdistill.models import MODELS, TORCHVISION

    if name in MODELS and name not in TORCHVISION:
        return None
    return HALVES if name in ("googlenet", "inception_v3") else IMAGENET


def timm_config(name: str) -> Any:
    """What timm says of the published weights of ``timm/<name>``; None where there are none."""
    import timm

    try:
        return timm.get_pretrained_cfg(name.removeprefix("timm/"))
    except RuntimeError as error:  # no weights of that tag
        raise InputError(f"model {name!r}: {error}") from error


def same(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two normalisations are one, but for the rounding of float32."""
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=1e-5, abs_tol=1e-6) for x, y in zip(a, b, strict=True))
