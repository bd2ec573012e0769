"""BatchNorm in training mode, from partial sums: statistics, application, and the backward pass.

The Q sets of groups which share statistics: one (all K branches of a student) or G (teachers, each its own).

    forward:  mean = center + S₁/n,  var = S₂/n − (S₁/n)²           (biased; S about center = the running mean)
              running = (1 − momentum) · running + momentum · (mean, var)
              scale = γ / √(var + ε),  shift = β − scale · mean
              y = scale · z + shift (+ residual), ReLU
    backward: dβ = Σ d,  dγ = Σ d · x̂,   x̂ = (z − mean) · inv_std
              dz = A·d + B·z + C (+ residual),  A = γ·inv_std,  B = −A·inv_std·dγ/n,  C = −A·dβ/n − B·mean
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.kernels.triton_utils import (
    absent,
    accumulator,
    check_pair,
    check_rows,
    check_tensor,
    pack_mask,
    partial_rows,
    present,
    require,
    shortcut,
    unpack_mask,
)

ROWS_BLOCK = 256  # positions that one program of batch_norm_backward_statistics sums


class NormStatistics(NamedTuple):
    mean: Tensor  # each (Q, C) float32
    inv_std: Tensor
    scale: Tensor
    shift: Tensor


class NormOutput(NamedTuple):
    y: Tensor  # (G, N, H, W, C)
    mask: Tensor | None  # (G, N, H, W, ceil(C/8)) uint8


class NormGradient(NamedTuple):
    d: Tensor  # (G, N, H, W, C)
    d_weight: Tensor  # (Q, C) float32
    d_bias: Tensor


class NormSums(NamedTuple):
    d: Tensor  # (G, N, H, W, C): the masked gradient
    statistics: Tensor  # (G, P, 2, C)


def _wide(rows: Tensor) -> Tensor:
    return rows[:, None, None, None, :]


def batch_norm_statistics_reference(
    partials: Tensor,
    count: int,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = partials.sum(1)
    if weight.shape[0] == 1:
        sums = sums.sum(0, keepdim=True)
    first, second = sums[:, 0] / count, sums[:, 1] / count
    mean, var = running_mean + first, (second - first.square()).clamp_min(0)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var, momentum)
    inv_std = (var + eps).rsqrt()
    return mean, inv_std, weight * inv_std, bias - weight * inv_std * mean


@torch.library.custom_op("fastensdistill::batch_norm_statistics", mutates_args=("running_mean", "running_var"))
def _batch_norm_statistics(
    partials: Tensor,
    count: int,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return batch_norm_statistics_reference(partials, count, weight, bias, running_mean, running_var, momentum, eps)


@_batch_norm_statistics.register_fake
def _batch_norm_statistics_fake(partials, count, weight, bias, running_mean, running_var, momentum, eps):
    return tuple(torch.empty_like(weight) for _ in range(4))


def batch_norm_statistics(
    partials: Tensor,
    count: int,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> NormStatistics:
    """Mean, inverse deviation, scale and shift of each set, and the running estimates moved in place (biased variance).

    ``partials`` (G, P, 2, C): ``grouped_conv``'s statistics about ``center=running_mean``; ``count`` values per channel
    and **set** (all groups together where Q = 1); ``weight, bias, running_mean, running_var`` (Q, C) float32.
    """
    require(partials.dim() == 4, f"partials has shape {tuple(partials.shape)}, expected (groups, rows, 2, channels)")
    for name, rows in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        check_rows(name, rows, partials.shape[0], partials.shape[3])
        require(rows.shape == weight.shape, f"{name} has shape {tuple(rows.shape)}, expected {tuple(weight.shape)}")
    return NormStatistics(
        *_batch_norm_statistics(partials, count, weight, bias, running_mean, running_var, momentum, eps)
    )


def batch_norm_apply_reference(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    residual_stride: int,
    relu: bool,
    mask: bool,
) -> tuple[Tensor, Tensor]:
    high = accumulator(z.dtype)
    y = z.to(high) * _wide(scale) + _wide(shift)
    if residual is not None:
        y = y + shortcut(residual, residual_stride, z.shape[2], z.shape[3], z.shape[4]).to(high)
    y = (y.relu() if relu else y).to(z.dtype)
    return y, pack_mask(y > 0) if mask else absent(z.new_empty(0, dtype=torch.uint8))


@torch.library.custom_op("fastensdistill::batch_norm_apply", mutates_args=())
def _batch_norm_apply(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    residual_stride: int,
    relu: bool,
    mask: bool,
) -> tuple[Tensor, Tensor]:
    return batch_norm_apply_reference(z, scale, shift, residual, residual_stride, relu, mask)


@_batch_norm_apply.register_fake
def _batch_norm_apply_fake(z, scale, shift, residual, residual_stride, relu, mask):
    shape = (*z.shape[:4], -(-z.shape[4] // 8)) if mask else (0,)
    return torch.empty_like(z), z.new_empty(shape, dtype=torch.uint8)


def batch_norm_apply(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    residual_stride: int = 1,
    relu: bool = True,
    mask: bool = False,
) -> NormOutput:
    """``relu(scale · z + shift + residual)`` and, with ``mask``, the bits where it is positive.

    ``z`` (G, N, H, W, C); ``scale, shift`` (Q, C) float32, Q = G or 1, by group; ``residual`` (G, N, Hr, Wr, Cr ≤ C) is
    read at every ``residual_stride``-th position, missing channels being 0.
    """
    check_tensor("z", z, 5)
    check_pair("scale and shift", scale, shift, z.shape[0], z.shape[4])
    if residual is not None:
        check_tensor("residual", residual, 5)
        size = tuple(-(-s // residual_stride) for s in residual.shape[2:4])
        require(
            residual.shape[:2] == z.shape[:2] and size == tuple(z.shape[2:4]) and residual.shape[4] <= z.shape[4],
            f"residual has shape {tuple(residual.shape)}, expected every {residual_stride}-th position of it to fit "
            f"{tuple(z.shape)}",
        )
    y, bits = _batch_norm_apply(z, scale, shift, residual, residual_stride, relu, mask)
    return NormOutput(y, present(bits))


def batch_norm_backward_statistics_reference(
    d: Tensor, z: Tensor, mean: Tensor, inv_std: Tensor, mask: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    high = accumulator(d.dtype)
    u = d.to(high) if residual is None else d.to(high) + residual.to(high)
    if mask is not None:
        u = u * unpack_mask(mask, d.shape[4])
    out = u.to(d.dtype)
    stored = out.to(high)
    product = stored * ((z.to(high) - _wide(mean)) * _wide(inv_std))
    sums = torch.stack([partial_rows(v.flatten(1, 3), ROWS_BLOCK) for v in (stored, product)], 2)
    return out.clone() if out is d else out, sums


@torch.library.custom_op("fastensdistill::batch_norm_backward_statistics", mutates_args=())
def _batch_norm_backward_statistics(
    d: Tensor, z: Tensor, mean: Tensor, inv_std: Tensor, mask: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    return batch_norm_backward_statistics_reference(d, z, mean, inv_std, mask, residual)


@_batch_norm_backward_statistics.register_fake
def _batch_norm_backward_statistics_fake(d, z, mean, inv_std, mask, residual):
    rows = -(-d.shape[1] * d.shape[2] * d.shape[3] // ROWS_BLOCK)
    return torch.empty_like(d), d.new_empty(d.shape[0], rows, 2, d.shape[4], dtype=accumulator(d.dtype))


def batch_norm_backward_statistics(
    d: Tensor,
    z: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    *,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
) -> NormSums:
    """``u = mask · (d + residual)`` with the partial Σu and Σu·x̂, where no data gradient made them on its way.

    ``d, z, residual`` (G, N, H, W, C); ``mean, inv_std`` (Q, C) float32; ``mask`` uint8 (G, N, H, W, ceil(C/8)).
    """
    check_tensor("d", d, 5)
    require(z.shape == d.shape, f"z has shape {tuple(z.shape)}, expected {tuple(d.shape)}")
    require(residual is None or residual.shape == d.shape, "residual and d have different shapes, expected the same")
    check_pair("mean and inv_std", mean, inv_std, z.shape[0], z.shape[4])
    return NormSums(*_batch_norm_backward_statistics(d, z, mean, inv_std, mask, residual))


def batch_norm_backward_reference(
    d: Tensor,
    z: Tensor,
    partials: Tensor,
    count: int,
    weight: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    high = accumulator(d.dtype)
    sums = partials.sum(1)
    if weight.shape[0] == 1:
        sums = sums.sum(0, keepdim=True)
    d_bias, d_weight = sums[:, 0].contiguous(), sums[:, 1].contiguous()
    a = weight * inv_std
    b = -a * inv_std * d_weight / count
    c = -a * d_bias / count - b * mean
    out = _wide(a) * d.to(high) + _wide(b) * z.to(high) + _wide(c)
    if residual is not None:
        out = out + residual.to(high)
    return out.to(d.dtype), d_weight, d_bias


@torch.library.custom_op("fastensdistill::batch_norm_backward", mutates_args=())
def _batch_norm_backward(
    d: Tensor,
    z: Tensor,
    partials: Tensor,
    count: int,
    weight: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return batch_norm_backward_reference(d, z, partials, count, weight, mean, inv_std, residual)


@_batch_norm_backward.register_fake
def _batch_norm_backward_fake(d, z, partials, count, weight, mean, inv_std, residual):
    return torch.empty_like(d), torch.empty_like(weight), torch.empty_like(weight)


def batch_norm_backward(
    d: Tensor,
    z: Tensor,
    partials: Tensor,
    count: int,
    weight: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    *,
    residual: Tensor | None = None,
) -> NormGradient:
    """Gradient of BatchNorm's input, weight γ and bias β, from the sums (G, P, 2, C) made with ``d``.

    ``d, z`` and the optional ``residual`` gradient, added last, (G, N, H, W, C); ``weight, mean, inv_std`` (Q, C)
    float32; ``count`` as in ``batch_norm_statistics``.
    """
    check_tensor("d", d, 5)
    require(z.shape == d.shape, f"z has shape {tuple(z.shape)}, expected {tuple(d.shape)}")
    require(residual is None or residual.shape == d.shape, "residual and d have different shapes, expected the same")
    for name, rows in (("weight", weight), ("mean", mean), ("inv_std", inv_std)):
        check_rows(name, rows, d.shape[0], d.shape[4])
        require(rows.shape == weight.shape, f"{name} has shape {tuple(rows.shape)}, expected {tuple(weight.shape)}")
    return NormGradient(*_batch_norm_backward(d, z, partials, count, weight, mean, inv_std, residual))
