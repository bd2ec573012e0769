"""What an expression costs: the products in it, counted on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastensdistill.network.expression import evaluate, logical

Shapes = tuple[tuple[int, ...], ...]
Tensors = tuple[tuple[str, tuple[int, ...]], ...]


@lru_cache(maxsize=4096)
def expression_macs(expression: Any, layouts: tuple[str, ...], shapes: Shapes, trained: Tensors, fixed: Tensors) -> int:
    """Multiply-accumulates for one image, of matrix products, convolutions and attention; all else counts as nothing.

    Values of these ``shapes`` (C, H, W) are taken as ``layouts`` say; ``trained`` and ``fixed`` tensors by name.
    """
    for dtype in (torch.float32, torch.int64):  # what is fixed may be positions in a table
        own = {name: _empty(shape) for name, shape in trained}
        own |= {name: _empty(shape).to(dtype) for name, shape in fixed}
        values = [logical(_empty((1, H, W, C)), layout) for (C, H, W), layout in zip(shapes, layouts, strict=True)]
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                evaluate(expression, values, own)
        except (RuntimeError, IndexError, TypeError):
            continue
        return int(counter.get_total_flops()) // 2
    return 0


def _empty(shape: Sequence[int]) -> torch.Tensor:
    return torch.empty(tuple(shape), device="meta")
