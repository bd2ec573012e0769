"""Rank-one factors in parameter space: fold, un-fold, and the fused training step of all layers at once.

A branch of a BatchEnsemble network is an ordinary layer with (Nam et al., ICML 2022, section 2; Wen et al., ICLR 2020)

    W_k[o,i,t] = s_k[o] · W[o,i,t] · r_k[i]            b_k[o] = s_k[o] · b[o]

and, from the gradients dW_k, db_k of those ordinary layers,

    dW = Σ_k s_k ⊗ dW_k ⊗ r_k       dr_k[i] = Σ_{o,t} s_k[o] · W · dW_k
    db = Σ_k s_k · db_k             ds_k[o] = Σ_{i,t} r_k[i] · W · dW_k + b[o] · db_k[o]

No multiplication of activations by r or s is ever needed. All layers live in flat buffers described by a
:class:`Layout`; r and s are stored as deviations from one, [K, R], so that decay pulls them towards one.

The step is PyTorch's SGD with Nesterov momentum on every value p with buffer v, decay part of the gradient:

    g ← g + λ·p      v ← μ·v + g      p ← p − η·(g + μ·v)

with (η, λ) for W, b and the plain parameters (batch norm), and (K·η, λ/K) for the deviations: the K-fold gradient of
the authors' r and s. It ends by writing the next step's bf16 weights, per layer [slots, taps, Ci, Co] for the forward
pass and, taps reversed, [slots, taps, Co, Ci] for the data gradient (grouped layers: Ci/groups, Co and Co/groups, Ci).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastensdistill.kernels.layout import (
    Layout,
    check_buffers,
    check_packed,
    layer_factors,
    layer_weight,
    layers_of,
)
from fastensdistill.kernels.operands import check_contiguous
from fastensdistill.kernels.ops import define, refuse_second_derivative
from fastensdistill.kernels.pack import pack_rank_one_reference
from fastensdistill.kernels.sgd import sgd_reference
from fastensdistill.kernels.unfold import unfold_rank_one_reference

# ---- references


def fold_rank_one_reference(parameters: Tensor, deviations: Tensor, fields: list[int], ranked: int) -> Tensor:
    """W_k and b_k of every layer, [K, ranked]."""
    folded = parameters.new_empty(deviations.shape[0], ranked)
    for layer in layers_of(fields):
        r, s = layer_factors(deviations, layer)
        layer_weight(folded, layer).copy_(s * layer_weight(parameters, layer) * r)
        if layer.bias >= 0:
            b = slice(layer.bias, layer.bias + layer.out_channels)
            folded[:, b] = s.flatten(1) * parameters[b]
    return folded


def rank_one_step_reference(
    parameters: Tensor,
    momentum_buffer: Tensor,
    deviations: Tensor,
    deviation_buffer: Tensor,
    branch_gradients: Tensor,
    plain_gradients: Tensor,
    learning_rate: Tensor,
    packed: Tensor,
    packed_gradient: Tensor,
    fields: list[int],
    first_slot: int,
    momentum: float,
    weight_decay: float,
) -> None:
    """Un-fold, update, pack."""
    K = deviations.shape[0]
    gradient, factor_gradients = unfold_rank_one_reference(branch_gradients, parameters, deviations, fields)
    rate = learning_rate.to(parameters.dtype)
    sgd_reference(parameters, momentum_buffer, torch.cat([gradient, plain_gradients]), rate, 1, momentum, weight_decay)
    sgd_reference(deviations, deviation_buffer, factor_gradients, rate, K, momentum, weight_decay / K)
    pack_rank_one_reference(parameters, deviations, packed, packed_gradient, fields, first_slot)


# ---- registration


def _fold_fake(parameters, deviations, fields, ranked):
    return parameters.new_empty(deviations.shape[0], ranked)


def _unfold_fake(branch_gradients, parameters, deviations, fields):
    return parameters.new_empty(branch_gradients.shape[1]), deviations.new_empty(deviations.shape)


def _fold_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    parameters, deviations, ctx.fields, _ = inputs
    ctx.save_for_backward(parameters, deviations)


def _fold_backward(ctx: Any, grad_folded: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("fold_rank_one")
    parameters, deviations = ctx.saved_tensors
    gradient, factor_gradients = torch.ops.fastensdistill.unfold_rank_one(
        grad_folded, parameters, deviations, ctx.fields
    )
    plain = gradient.new_zeros(parameters.shape[0] - gradient.shape[0])
    return torch.cat([gradient, plain]), factor_gradients, None, None


define("fold_rank_one", fold_rank_one_reference, _fold_fake)
define("unfold_rank_one", unfold_rank_one_reference, _unfold_fake)
define(
    "rank_one_step",
    rank_one_step_reference,
    mutates=("parameters", "momentum_buffer", "deviations", "deviation_buffer", "packed", "packed_gradient"),
)
torch.library.register_autograd("fastensdistill::fold_rank_one", _fold_backward, setup_context=_fold_setup)


# ---- public functions


def fold_rank_one(parameters: Tensor, deviations: Tensor, layout: Layout) -> Tensor:
    """Weights and biases of every branch as ordinary layers.

    Args:
        parameters: [layout.size] float32 or float64, see :class:`Layout`.
        deviations: [K, layout.factors], r − 1 and s − 1, the same dtype and device.
        layout: the table of layers.

    Returns:
        [K, layout.ranked]: row k holds W_k and b_k of each layer where ``parameters`` holds W and b. Differentiable,
        once, in both tensors (the gradient is :func:`unfold_rank_one`).

    Raises:
        InputError: a dtype, shape or device that does not fit the layout.

    Source: Nam et al., ICML 2022, section 2; Wen et al., ICLR 2020, equation 1.
    """
    check_buffers(layout, parameters, deviations)
    return torch.ops.fastensdistill.fold_rank_one(parameters, deviations, layout.fields, layout.ranked)


def unfold_rank_one(
    branch_gradients: Tensor, parameters: Tensor, deviations: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Adjoint of :func:`fold_rank_one`: from the gradients of the folded layers to those of W, b, r and s.

    Args:
        branch_gradients: [K, layout.ranked], dW_k and db_k where ``parameters`` holds W and b.
        parameters, deviations, layout: as for :func:`fold_rank_one`.

    Returns:
        ``(gradient, factor_gradients)``: [layout.ranked] and [K, layout.factors]; not differentiable.

    Raises:
        InputError: a dtype, shape or device that does not fit the layout.
    """
    ranked = (deviations.shape[0], layout.ranked)
    check_buffers(layout, parameters, deviations, [("branch_gradients", branch_gradients, ranked)])
    op = torch.ops.fastensdistill.unfold_rank_one
    return op(branch_gradients.detach(), parameters.detach(), deviations.detach(), layout.fields)


def pack_rank_one(
    parameters: Tensor,
    deviations: Tensor,
    layout: Layout,
    packed: Tensor,
    packed_gradient: Tensor,
    first_slot: int = 0,
) -> None:
    """Writes W_k of every layer in bf16 into slots first_slot … first_slot + K − 1 of both packings, in place.

    Args:
        packed: [layout.packed_size] bf16; a layer's slot is [taps, Ci/groups, Co].
        packed_gradient: [layout.packed_size] bf16; a layer's slot is [taps reversed, Co/groups, Ci].
        first_slot: slot of branch 0; other slots are left as they are.
        parameters, deviations, layout: as for :func:`fold_rank_one`.

    Raises:
        InputError: a dtype, shape, device or slot that does not fit the layout.
    """
    check_buffers(layout, parameters, deviations)
    K = deviations.shape[0]
    check_packed(layout, parameters, K, packed, packed_gradient, first_slot, (torch.bfloat16,))
    op = torch.ops.fastensdistill.pack_rank_one
    op(parameters.detach(), deviations.detach(), packed, packed_gradient, layout.fields, first_slot)


def rank_one_step(
    parameters: Tensor,
    momentum_buffer: Tensor,
    deviations: Tensor,
    deviation_buffer: Tensor,
    branch_gradients: Tensor,
    plain_gradients: Tensor,
    learning_rate: Tensor,
    layout: Layout,
    packed: Tensor,
    packed_gradient: Tensor,
    *,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    first_slot: int = 0,
) -> None:
    """One optimiser step of all parameters, in place, and the packing of the next step's weights.

    Args:
        parameters, momentum_buffer: [layout.size] float32 or float64; the buffer starts at zero.
        deviations, deviation_buffer: [K, layout.factors].
        branch_gradients: [K, layout.ranked], gradients of the mean loss over branches and images in W_k and b_k.
        plain_gradients: [layout.plain].
        learning_rate: η of W, a scalar tensor of the same dtype on the device (a captured graph can change it).
        packed, packed_gradient, first_slot: as for :func:`pack_rank_one`.
        momentum: μ. weight_decay: λ; r and s are pulled towards one with λ/K at the rate K·η.

    Raises:
        InputError: a dtype, shape, device or slot that does not fit the layout.

    Source: Nam et al., ICML 2022, section 2 and the authors' optimiser.
    """
    K = deviations.shape[0]
    extra = [
        ("momentum_buffer", momentum_buffer, (layout.size,)),
        ("deviation_buffer", deviation_buffer, (K, layout.factors)),
        ("branch_gradients", branch_gradients, (K, layout.ranked)),
        ("plain_gradients", plain_gradients, (layout.plain,)),
        ("learning_rate", learning_rate, ()),
    ]
    check_buffers(layout, parameters, deviations, extra)
    check_packed(layout, parameters, K, packed, packed_gradient, first_slot, (torch.bfloat16,))
    check_contiguous(
        ("parameters", parameters),
        ("momentum_buffer", momentum_buffer),
        ("deviations", deviations),
        ("deviation_buffer", deviation_buffer),
    )
    torch.ops.fastensdistill.rank_one_step(
        parameters.detach(),
        momentum_buffer,
        deviations.detach(),
        deviation_buffer,
        branch_gradients.detach(),
        plain_gradients.detach(),
        learning_rate,
        packed,
        packed_gradient,
        layout.fields,
        first_slot,
        momentum,
        weight_decay,
    )
