"""Ops of a plan as plain PyTorch, with the arguments that their kernels take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastensdistill.kernels.general_conv import general_conv
from fastensdistill.kernels.grouped_conv import ConvOutput
from fastensdistill.kernels.operands import accumulator


def depthwise_conv(
    x: Tensor, weight: Tensor, weight_index: Tensor, *, center: Tensor | None = None, **options: Any
) -> ConvOutput:
    """``general_conv``, and the sums about ``center`` (S or 1, C)."""
    result = general_conv(x, weight, weight_index, **options)
    if center is None:
        return result
    wide = accumulator(result.z.dtype)
    rest = result.z.to(wide) - center.expand(weight.shape[0], -1).index_select(0, weight_index)[:, None, None, None]
    return result._replace(statistics=torch.stack([rest.sum((1, 2, 3)), rest.square().sum((1, 2, 3))], 1)[:, None])
