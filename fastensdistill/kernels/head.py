"""The classifier: BatchNorm by known scale and shift, ReLU, mean over positions, linear; and its backward.

pooled[c] = mean over positions of relu(scale · z + shift)            logits = pooled · W[slots[g]] + bias[slots[g]]
dpooled = dlogits · Wᵀ,   d = [scale · z + shift > 0] · dpooled / (H·W)   (· scale in eval mode)
dW = pooledᵀ · dlogits,   db = Σ dlogits
statistics = Σ d, Σ d · x̂ (training mode)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.kernels.triton_utils import (
    absent,
    accumulator,
    check_pair,
    check_precision,
    check_tensor,
    pick,
    present,
    require,
)

IMAGES_BLOCK = 16  # images of one program; one row of the backward's statistics each


class HeadOutput(NamedTuple):
    logits: Tensor  # (G, N, classes) float32
    pooled: Tensor  # (G, N, C) float32


class HeadGradient(NamedTuple):
    d: Tensor  # (G, N, H, W, C)
    d_weight: Tensor | None  # (G, C, classes) float32
    d_bias: Tensor | None  # (G, classes) float32
    statistics: Tensor | None  # (G, P, 2, C) float32


def _normalized(z: Tensor, slots: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    y = z.to(accumulator(z.dtype))
    return y if scale is None or shift is None else y * pick(scale, slots) + pick(shift, slots)


def head_reference(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    high = accumulator(z.dtype)
    y = _normalized(z, slots, scale, shift)
    pooled = (y.relu() if relu else y).mean((2, 3))
    logits = pooled.to(weight.dtype).to(high) @ weight[slots.long()].to(high)
    if bias is not None:
        logits = logits + bias[slots.long()][:, None].to(high)
    return logits, pooled


@torch.library.custom_op("fastensdistill::head", mutates_args=())
def _head(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    return head_reference(z, weight, bias, slots, scale, shift, relu, precision)


@_head.register_fake
def _head_fake(z, weight, bias, slots, scale, shift, relu, precision):
    high = accumulator(z.dtype)
    return (
        z.new_empty(z.shape[0], z.shape[1], weight.shape[2], dtype=high),
        z.new_empty(z.shape[0], z.shape[1], z.shape[4], dtype=high),
    )


def _check(
    z: Tensor, weight: Tensor, slots: Tensor, scale: Tensor | None, shift: Tensor | None, precision: str
) -> None:
    check_tensor("z", z, 5)
    check_tensor("weight", weight, 3)
    check_precision(precision)
    require(z.shape[0] == slots.shape[0], f"z has {z.shape[0]} groups, expected {slots.shape[0]} as slots has")
    require(
        weight.shape[1] == z.shape[4],
        f"weight has shape {tuple(weight.shape)}, expected (slots, {z.shape[4]}, classes)",
    )
    check_pair("scale and shift", scale, shift, weight.shape[0], z.shape[4])


def head(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = True,
    precision: str = "ieee",
) -> HeadOutput:
    """Logits (G, N, classes) and the pooled features they come from (G, N, C), both float32.

    ``z`` (G, N, H, W, C); ``weight`` (S, C, classes), its dtype is multiplied in; ``bias`` (S, classes) float32 or
    None; ``slots`` int32 (G,); ``scale, shift`` (S or 1, C) float32, by slot, or None. ``relu=False`` for a network
    whose last layer has its ReLU already. Raises InputError for shapes that disagree.
    """
    _check(z, weight, slots, scale, shift, precision)
    return HeadOutput(*_head(z, weight, bias, slots, scale, shift, relu, precision))


def head_backward_reference(
    d_logits: Tensor,
    z: Tensor,
    weight: Tensor,
    slots: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    mean: Tensor | None,
    inv_std: Tensor | None,
    pooled: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    high = accumulator(z.dtype)
    y = _normalized(z, slots, scale, shift)
    d_wide = d_logits.to(weight.dtype).to(high)
    d_pooled = d_wide @ weight[slots.long()].to(high).transpose(1, 2) / (z.shape[2] * z.shape[3])
    d = d_pooled[:, :, None, None, :] * (y > 0 if relu else torch.ones_like(y))
    if scale is not None and mean is None:
        d = d * pick(scale, slots)
    out = d.to(z.dtype)
    statistics = d_weight = d_bias = absent(d_logits)
    if mean is not None and inv_std is not None:
        stored = out.to(high)
        product = stored * ((z.to(high) - pick(mean, slots)) * pick(inv_std, slots))
        sums = torch.stack([stored.sum((2, 3)), product.sum((2, 3))], 2)
        padded = torch.nn.functional.pad(sums, (0, 0, 0, 0, 0, -z.shape[1] % IMAGES_BLOCK))
        statistics = padded.unflatten(1, (-1, IMAGES_BLOCK)).sum(2)
    if pooled is not None:
        d_weight = pooled.to(weight.dtype).to(high).transpose(1, 2) @ d_wide
        d_bias = d_logits.sum(1)
    return out, d_weight, absent(d_logits) if pooled is None else d_bias, statistics


@torch.library.custom_op("fastensdistill::head_backward", mutates_args=())
def _head_backward(
    d_logits: Tensor,
    z: Tensor,
    weight: Tensor,
    slots: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    mean: Tensor | None,
    inv_std: Tensor | None,
    pooled: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = head_backward_reference(d_logits, z, weight, slots, scale, shift, relu, mean, inv_std, pooled, precision)
    return tuple(r if r.numel() else absent(d_logits) for r in results)  # type: ignore[return-value]


@_head_backward.register_fake
def _head_backward_fake(d_logits, z, weight, slots, scale, shift, relu, mean, inv_std, pooled, precision):
    groups, channels, classes = z.shape[0], z.shape[4], weight.shape[2]
    weighted, counted = pooled is not None, mean is not None
    rows = -(-z.shape[1] // IMAGES_BLOCK)
    return (
        torch.empty_like(z),
        d_logits.new_empty((groups, channels, classes) if weighted else (0,)),
        d_logits.new_empty((groups, classes) if weighted else (0,)),
        d_logits.new_empty((groups, rows, 2, channels) if counted else (0,)),
    )


def head_backward(
    d_logits: Tensor,
    z: Tensor,
    weight: Tensor,
    slots: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = True,
    mean: Tensor | None = None,
    inv_std: Tensor | None = None,
    pooled: Tensor | None = None,
    precision: str = "ieee",
) -> HeadGradient:
    """Gradient of ``head``: of z, and, where ``pooled`` is given, of weight and bias per group.

    ``d_logits`` (G, N, classes) float32; the rest as in ``head``. Without ``mean`` the gradient is of z itself (eval
    mode: times scale); with ``mean, inv_std`` (S or 1, C) it is of the BatchNorm's output, with its partial sums for
    ``batch_norm_backward``.
    """
    _check(z, weight, slots, scale, shift, precision)
    check_pair("mean and inv_std", mean, inv_std, weight.shape[0], z.shape[4])
    wanted = (z.shape[0], z.shape[1], weight.shape[2])
    require(
        d_logits.shape == wanted and d_logits.is_contiguous(),
        f"d_logits has shape {tuple(d_logits.shape)}, expected {wanted}, contiguous",
    )
    d, d_weight, d_bias, statistics = _head_backward(
        d_logits, z, weight, slots, scale, shift, relu, mean, inv_std, pooled, precision
    )
    return HeadGradient(d, present(d_weight), present(d_bias), present(statistics))
