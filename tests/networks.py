"""Networks that the tests share."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from fastensdistill.models import create_model

M = TypeVar("M", bound=nn.Module)


def tiny(classes: int = 5, **arguments: Any) -> nn.Module:
    """A PreResNet of two blocks and four channels; ``arguments`` change its shape."""
    return create_model("preresnet", classes, **{"blocks": (1, 1), "in_planes": 4, **arguments})


def scatter(module: M, seed: int = 0) -> M:
    """Move every parameter and statistic off its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in [*module.named_parameters(), *module.named_buffers()]:
            if not t.is_floating_point() or "normalize" in name:
                continue
            noise = torch.empty(t.shape, dtype=t.dtype).normal_(generator=generator)
            t.add_(0.2 * noise)
            if "running_var" in name:
                t.abs_().add_(0.5)
    return module
