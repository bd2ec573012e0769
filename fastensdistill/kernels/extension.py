"""Definition of the project's ops, and the compiled extension that may implement them.

Every op is defined here from Python with a reference that serves any device; the extension, where it was built, adds
kernels for CPU and CUDA tensors, which the dispatcher prefers. Nothing is compiled at import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

def define(name: str, schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines ``fastensdistill::name`` with its reference as the kernel of every device, and its fake."""
    qualified = f"fastensdistill::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "default", reference)
    torch.library.register_fake(qualified, fake)


def refuse_second_derivative(name: str) -> None:
    """For the top of a ``backward`` that hands out a saved gradient: as a constant it would be silently wrong there."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} is differentiable once: its gradient has no graph, so create_graph=True is refused")
