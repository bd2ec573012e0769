"""The one comparison every test uses: maximum and root-mean-square error, the tensor's name and the worst place."""

from __future__ import annotations

import numpy as np
import torch


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the root mean square of ``expected`` (NaN and inf give inf)."""
    a, e = actual.detach().cpu().double(), expected.detach().cpu().double()
    scale = e.square().mean().sqrt().item() if e.numel() else 0.0
    worst = (a - e).abs().max().item() if e.numel() else 0.0
    if not np.isfinite(worst):
        return float("inf")
    return worst / scale if scale > 0 else worst


def check_close(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Assert that ``actual`` equals ``expected``: :func:`relative_error` is at most ``tolerance``."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = relative_error(actual, expected)
    if error <= tolerance:
        return
    a, e = actual.detach().cpu().double(), expected.detach().cpu().double()
    gap = torch.nan_to_num((a - e).abs(), nan=float("inf"))
    place = np.unravel_index(int(gap.argmax()), tuple(gap.shape) or (1,))
    raise AssertionError(
        f"{name}: relative error {error:.3e} > {tolerance:.1e}; worst at {tuple(int(i) for i in place)}: "
        f"{a.flatten()[int(gap.argmax())]:.9g}, expected {e.flatten()[int(gap.argmax())]:.9g}; "
        f"rms error {gap.square().mean().sqrt():.3e}, {int((~torch.isfinite(a)).sum())} not finite"
    )
