"""What a rounded result may err."""

from __future__ import annotations

import torch
from torch import Tensor


def rounding(expected: Tensor, dtype: torch.dtype) -> float:
    """Tolerance for check_close of values stored in ``dtype``: some rounding errors of its arithmetic, one of storage.

    Every value may err by 8 units in the last place of the arithmetic (float32 for narrower dtypes) and twice the
    rounding of the storage, both taken at the largest value; float64 by 1e-9 at least.
    """
    e = expected.detach().double()
    peak, rms = e.abs().max().item(), e.square().mean().sqrt().item()
    ulp = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    allowed = (8 * ulp + torch.finfo(dtype).eps) * peak / rms if rms > 0 else 0.0
    return max(allowed, 1e-9)
