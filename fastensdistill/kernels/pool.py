"""Pooling of grouped activations: maximum over windows, mean over all positions; and their backward.

y[p] = max over taps of x[p · stride − padding + tap],  taps[p] = the first tap that attains it
dx[q] = Σ over the windows p whose chosen tap lies on q of d[p]          (gathered: no atomics)
mean: y = Σ x / (H·W),  dx = d / (H·W)
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastensdistill.kernels.triton_utils import accumulator, check_tensor, require


class MaxPoolOutput(NamedTuple):
    y: Tensor  # (G, N, Ho, Wo, C)
    taps: Tensor  # like y, uint8: row · kernel + column of the maximum in its window


def pool_size(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


def _windows(x: Tensor, kernel: int, stride: int, padding: int, fill: float) -> Tensor:
    """(G, N, H, W, C) → (G, N, Ho, Wo, C, taps)."""
    padded = F.pad(x, (0, 0, padding, padding, padding, padding), value=fill)
    return padded.unfold(2, kernel, stride).unfold(3, kernel, stride).flatten(-2)


def max_pool_reference(x: Tensor, kernel: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    y, taps = _windows(x, kernel, stride, padding, float("-inf")).max(-1)
    return y.contiguous(), taps.to(torch.uint8).contiguous()


def max_pool_backward_reference(
    d: Tensor, taps: Tensor, height: int, width: int, kernel: int, stride: int, padding: int
) -> Tensor:
    out_height, out_width = d.shape[2:4]
    full = (
        max(height + 2 * padding, (out_height - 1) * stride + kernel),
        max(width + 2 * padding, (out_width - 1) * stride + kernel),
    )
    dx = d.new_zeros(*d.shape[:2], *full, d.shape[4], dtype=accumulator(d.dtype))
    for tap in range(kernel * kernel):
        r, s = divmod(tap, kernel)
        rows = slice(r, r + (out_height - 1) * stride + 1, stride)
        columns = slice(s, s + (out_width - 1) * stride + 1, stride)
        dx[:, :, rows, columns] += torch.where(taps == tap, d, 0)
    return dx[:, :, padding : padding + height, padding : padding + width].to(d.dtype).contiguous()


@torch.library.custom_op("fastensdistill::max_pool", mutates_args=())
def _max_pool(x: Tensor, kernel: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    return max_pool_reference(x, kernel, stride, padding)


@_max_pool.register_fake
def _max_pool_fake(x, kernel, stride, padding):
    height, width = (pool_size(size, kernel, stride, padding) for size in x.shape[2:4])
    y = x.new_empty(x.shape[0], x.shape[1], height, width, x.shape[4])
    return y, torch.empty_like(y, dtype=torch.uint8)


def max_pool(x: Tensor, *, kernel: int, stride: int, padding: int = 0) -> MaxPoolOutput:
    """Maximum over kernel x kernel windows of ``x`` (G, N, H, W, C), with the tap that attained it."""
    check_tensor("x", x, 5)
    good = 0 <= 2 * padding <= kernel <= 15
    require(good, f"kernel {kernel} with padding {padding}: expected 2·padding ≤ kernel ≤ 15")
    return MaxPoolOutput(*_max_pool(x, kernel, stride, padding))


@torch.library.custom_op("fastensdistill::max_pool_backward", mutates_args=())
def _max_pool_backward(
    d: Tensor, taps: Tensor, height: int, width: int, kernel: int, stride: int, padding: int
) -> Tensor:
    return max_pool_backward_reference(d, taps, height, width, kernel, stride, padding)


@_max_pool_backward.register_fake
def _max_pool_backward_fake(d, taps, height, width, kernel, stride, padding):
    return d.new_empty(d.shape[0], d.shape[1], height, width, d.shape[4])


def max_pool_backward(
    d: Tensor, taps: Tensor, *, in_size: tuple[int, int], kernel: int, stride: int, padding: int = 0
) -> Tensor:
    """Gradient (G, N, H, W, C) of ``max_pool``'s input from its output's ``d`` and ``taps`` (G, N, Ho, Wo, C)."""
    check_tensor("d", d, 5)
    require(
        taps.shape == d.shape and taps.dtype == torch.uint8,
        f"taps is {taps.dtype} of shape {tuple(taps.shape)}, expected uint8 {tuple(d.shape)}",
    )
    size = tuple(pool_size(s, kernel, stride, padding) for s in in_size)
    require(size == tuple(d.shape[2:4]), f"d has size {tuple(d.shape[2:4])}, expected {size} for input {in_size}")
    return _max_pool_backward(d, taps, *in_size, kernel, stride, padding)


def mean_pool_reference(x: Tensor) -> Tensor:
    return x.to(accumulator(x.dtype)).mean((2, 3))


@torch.library.custom_op("fastensdistill::mean_pool", mutates_args=())
def _mean_pool(x: Tensor) -> Tensor:
    return mean_pool_reference(x)


@_mean_pool.register_fake
def _mean_pool_fake(x):
    return x.new_empty(x.shape[0], x.shape[1], x.shape[4], dtype=accumulator(x.dtype))


def mean_pool(x: Tensor) -> Tensor:
    """Mean over all positions: (G, N, H, W, C) → (G, N, C) float32."""
    check_tensor("x", x, 5)
    return _mean_pool(x)


def mean_pool_backward(d: Tensor, *, in_size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Gradient (G, N, H, W, C) of ``mean_pool``'s input from ``d`` (G, N, C): the same value at every position."""
    height, width = in_size
    share = (d / (height * width)).to(dtype)
    return share[:, :, None, None, :].expand(-1, -1, height, width, -1).contiguous()
