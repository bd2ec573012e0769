"""Rank-one factors in parameter space: fold, un-fold, and the fused training step of all layers at once.

A branch of a BatchEnsemble network is an ordinary layer with (Nam et al., ICML 2022, section 2; Wen et al., ICLR 2020)

    W_k[o,i,t] = s_k[o] · W[o,i,t] · r_k[i]            b_k[o] = s_k[o] · b[o]

and, from the gradients dW_k, db_k of those ordinary layers,

    dW = Σ_k s_k ⊗ dW_k ⊗ r_k       dr_k[i] = Σ_{o,t} s_k[o] · W · dW_k
    db = Σ_k s_k · db_k             ds_k[o] = Σ_{i,t} r_k[i] · W · dW_k + b[o] · db_k[o]

No multiplication of activations by r or s is ever needed. All layers live in flat buffers described by a
:class:`RankOneLayout`; r and s are stored as deviations from one, [K, R], so that decay pulls them towards one.

The step is PyTorch's SGD with Nesterov momentum on every value p with buffer v, decay part of the gradient:

    g ← g + λ·p      v ← μ·v + g      p ← p − η·(g + μ·v)

with (η, λ) for W, b and the plain parameters (batch norm), and (K·η, λ/K) for the deviations: the K-fold gradient of
the authors' r and s. It ends by writing the next step's bf16 weights, per layer [slots, taps, Ci, Co] for the forward
pass and, taps reversed, [slots, taps, Co, Ci] for the data gradient (grouped layers: Ci/groups, Co and Co/groups, Ci).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels import extension
from fastensdistill.kernels.inputs import check_contiguous, check_device

# A packed layer starts at a multiple of this many elements: 128 bytes of bf16, which every kind of load accepts.
PACKED_ALIGNMENT = 64


@dataclass(frozen=True)
class RankOneLayer:
    """Where one convolution or linear layer lies in the flat buffers (offsets and sizes count elements).

    The order of the fields is that of the integers the ops receive, see :attr:`RankOneLayout.fields`.
    """

    name: str
    weight: int  # offset of W [Co, Ci/groups, taps] in the parameters
    bias: int  # offset of b [Co] in the parameters, or −1
    r: int  # offset of r [Ci] in a row of the deviations
    s: int  # offset of s [Co] in a row of the deviations
    packed: int  # offset of the layer's slots in either packing
    out_channels: int  # Co
    group_channels: int  # Ci/groups
    taps: int  # kh·kw
    groups: int

    @property
    def in_channels(self) -> int:
        return self.group_channels * self.groups

    @property
    def weight_size(self) -> int:
        return self.out_channels * self.group_channels * self.taps

    @property
    def fields(self) -> tuple[int, ...]:
        channels = (self.out_channels, self.group_channels, self.taps, self.groups)
        return self.weight, self.bias, self.r, self.s, self.packed, *channels


FIELDS = 9


@dataclass(frozen=True)
class RankOneLayout:
    """Table of the layers of a network in its flat buffers.

    parameters [size]: every layer's W and b first (``ranked`` values), then ``plain`` values without factors, such as
        those of batch norm.
    deviations [K, factors]: every layer's r − 1 and s − 1.
    packed, packed_gradient [packed_size] bf16: per layer ``slots`` weights, one after the other.
    """

    layers: tuple[RankOneLayer, ...]
    ranked: int
    plain: int
    factors: int
    slots: int
    packed_size: int

    @property
    def size(self) -> int:
        return self.ranked + self.plain

    @cached_property
    def fields(self) -> list[int]:
        """The table as the ops take it: ``FIELDS`` integers per layer."""
        return [value for layer in self.layers for value in layer.fields]

    @staticmethod
    def build(weights: Iterable[tuple[str, Sequence[int], int, bool]], plain: int = 0, slots: int = 1) -> RankOneLayout:
        """Lays the layers out one after the other.

        Args:
            weights: per layer its name, shape of its weight ([Co, Ci/groups, kh, kw], or [Co, Ci] for a linear layer),
                number of groups, and whether it has a bias.
            plain: number of parameters without factors, which follow the layers.
            slots: weights per layer in the packed buffers; K, or more where frozen networks share them.

        Raises:
            InputError: a shape that is not a layer's, or no layers.
        """
        layers: list[RankOneLayer] = []
        ranked = factors = packed = 0
        for name, shape, groups, has_bias in weights:
            if len(shape) not in (2, 4) or groups < 1 or min(shape) < 1 or shape[0] % groups:
                raise InputError(
                    f"layer {name!r} has weight shape {tuple(shape)} and {groups} groups; expected "
                    "[Co, Ci/groups, kh, kw] or [Co, Ci] with Co divisible by the groups"
                )
            Co, Ci, *kernel = shape
            taps = kernel[0] * kernel[1] if kernel else 1
            bias = ranked + Co * Ci * taps if has_bias else -1
            layers.append(
                RankOneLayer(name, ranked, bias, factors, factors + Ci * groups, packed, Co, Ci, taps, groups)
            )
            ranked += Co * Ci * taps + Co * has_bias
            factors += Ci * groups + Co
            packed += -(-slots * Co * Ci * taps // PACKED_ALIGNMENT) * PACKED_ALIGNMENT
        if not layers:
            raise InputError("the layout has no layers; expected at least one")
        return RankOneLayout(tuple(layers), ranked, plain, factors, slots, packed)


# ---- references


def _layers(fields: Sequence[int]) -> list[RankOneLayer]:
    return [RankOneLayer("", *fields[at : at + FIELDS]) for at in range(0, len(fields), FIELDS)]


def _weight(flat: Tensor, layer: RankOneLayer) -> Tensor:
    """[…, groups, Co/groups, Ci/groups, taps] view of the layer's weight in a flat buffer."""
    shape = (layer.groups, layer.out_channels // layer.groups, layer.group_channels, layer.taps)
    return flat[..., layer.weight : layer.weight + layer.weight_size].unflatten(-1, shape)


def _factors(deviations: Tensor, layer: RankOneLayer) -> tuple[Tensor, Tensor]:
    """r [K, groups, 1, Ci/groups, 1] and s [K, groups, Co/groups, 1, 1]."""
    r = 1 + deviations[:, layer.r : layer.r + layer.in_channels]
    s = 1 + deviations[:, layer.s : layer.s + layer.out_channels]
    return r.unflatten(1, (layer.groups, 1, layer.group_channels, 1)), s.unflatten(1, (layer.groups, -1, 1, 1))


def fold_rank_one_reference(parameters: Tensor, deviations: Tensor, fields: list[int], ranked: int) -> Tensor:
    """W_k and b_k of every layer, [K, ranked]."""
    folded = parameters.new_empty(deviations.shape[0], ranked)
    for layer in _layers(fields):
        r, s = _factors(deviations, layer)
        _weight(folded, layer).copy_(s * _weight(parameters, layer) * r)
        if layer.bias >= 0:
            b = slice(layer.bias, layer.bias + layer.out_channels)
            folded[:, b] = s.flatten(1) * parameters[b]
    return folded


def unfold_rank_one_reference(
    branch_gradients: Tensor, parameters: Tensor, deviations: Tensor, fields: list[int]
) -> tuple[Tensor, Tensor]:
    """dW and db of every layer, [ranked], and dr and ds, [K, R]."""
    gradient = parameters.new_zeros(branch_gradients.shape[1])
    factor_gradients = torch.zeros_like(deviations, memory_format=torch.contiguous_format)
    for layer in _layers(fields):
        r, s = _factors(deviations, layer)
        dW_k = _weight(branch_gradients, layer)
        _weight(gradient, layer).copy_((s * dW_k * r).sum(0))
        product = _weight(parameters, layer) * dW_k
        dr = (s * product).sum((2, 4)).flatten(1)
        ds = (r * product).sum((3, 4)).flatten(1)
        if layer.bias >= 0:
            b = slice(layer.bias, layer.bias + layer.out_channels)
            gradient[b] = (s.flatten(1) * branch_gradients[:, b]).sum(0)
            ds = ds + parameters[b] * branch_gradients[:, b]
        factor_gradients[:, layer.r : layer.r + layer.in_channels] = dr
        factor_gradients[:, layer.s : layer.s + layer.out_channels] = ds
    return gradient, factor_gradients


def pack_rank_one_reference(
    parameters: Tensor, deviations: Tensor, packed: Tensor, packed_gradient: Tensor, fields: list[int], first_slot: int
) -> None:
    """Writes slots first_slot … first_slot + K − 1 of both packings."""
    K = deviations.shape[0]
    for layer in _layers(fields):
        r, s = _factors(deviations, layer)
        folded = (s * _weight(parameters, layer) * r).to(packed.dtype)
        n = layer.weight_size
        for buffer, value in (
            (packed, folded.permute(0, 4, 3, 1, 2)),
            (packed_gradient, folded.flip(4).permute(0, 4, 2, 1, 3)),
        ):
            start = layer.packed + first_slot * n
            buffer[start : start + K * n].view(value.shape).copy_(value)


def _nesterov(p: Tensor, v: Tensor, g: Tensor, learning_rate: Tensor, momentum: float, weight_decay: float) -> None:
    g = g + weight_decay * p
    v.mul_(momentum).add_(g)
    p.sub_(learning_rate * (g + momentum * v))


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
    _nesterov(parameters, momentum_buffer, torch.cat([gradient, plain_gradients]), rate, momentum, weight_decay)
    _nesterov(deviations, deviation_buffer, factor_gradients, K * rate, momentum, weight_decay / K)
    pack_rank_one_reference(parameters, deviations, packed, packed_gradient, fields, first_slot)


# ---- registration


def _fold_fake(parameters, deviations, fields, ranked):
    return parameters.new_empty(deviations.shape[0], ranked)


def _unfold_fake(branch_gradients, parameters, deviations, fields):
    return parameters.new_empty(branch_gradients.shape[1]), deviations.new_empty(deviations.shape)


def _no_output_fake(*unused: Any) -> None:
    return None


def _fold_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    parameters, deviations, ctx.fields, _ = inputs
    ctx.save_for_backward(parameters, deviations)


def _fold_backward(ctx: Any, grad_folded: Tensor) -> tuple[Tensor | None, ...]:
    extension.refuse_second_derivative("fold_rank_one")
    parameters, deviations = ctx.saved_tensors
    gradient, factor_gradients = torch.ops.fastensdistill.unfold_rank_one(
        grad_folded, parameters, deviations, ctx.fields
    )
    plain = gradient.new_zeros(parameters.shape[0] - gradient.shape[0])
    return torch.cat([gradient, plain]), factor_gradients, None, None


extension.define(
    "fold_rank_one",
    "(Tensor parameters, Tensor deviations, int[] fields, int ranked) -> Tensor",
    fold_rank_one_reference,
    _fold_fake,
)
extension.define(
    "unfold_rank_one",
    "(Tensor branch_gradients, Tensor parameters, Tensor deviations, int[] fields) -> (Tensor, Tensor)",
    unfold_rank_one_reference,
    _unfold_fake,
)
extension.define(
    "pack_rank_one",
    "(Tensor parameters, Tensor deviations, Tensor(a!) packed, Tensor(b!) packed_gradient, int[] fields,"
    " int first_slot) -> ()",
    pack_rank_one_reference,
    _no_output_fake,
)
extension.define(
    "rank_one_step",
    "(Tensor(a!) parameters, Tensor(b!) momentum_buffer, Tensor(c!) deviations, Tensor(d!) deviation_buffer,"
    " Tensor branch_gradients, Tensor plain_gradients, Tensor learning_rate, Tensor(e!) packed,"
    " Tensor(f!) packed_gradient, int[] fields, int first_slot, float momentum, float weight_decay) -> ()",
    rank_one_step_reference,
    _no_output_fake,
)
torch.library.register_autograd("fastensdistill::fold_rank_one", _fold_backward, setup_context=_fold_setup)


# ---- public functions


def _check(
    layout: RankOneLayout, parameters: Tensor, deviations: Tensor, extra: Iterable[tuple[str, Tensor, tuple[int, ...]]]
) -> None:
    if parameters.dtype not in (torch.float32, torch.float64):
        raise InputError(f"parameters has dtype {parameters.dtype}; expected float32 or float64")
    if deviations.dim() != 2:
        raise InputError(f"deviations has shape {tuple(deviations.shape)}; expected [K, {layout.factors}]")
    for name, tensor, shape in (
        ("parameters", parameters, (layout.size,)),
        ("deviations", deviations, (deviations.shape[0], layout.factors)),
        *extra,
    ):
        if tuple(tensor.shape) != shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
        if tensor.dtype != parameters.dtype:
            raise InputError(f"{name} has dtype {tensor.dtype}; expected {parameters.dtype}, that of the parameters")
        check_device(name, tensor, "parameters", parameters)


def _check_packed(
    layout: RankOneLayout, parameters: Tensor, K: int, packed: Tensor, packed_gradient: Tensor, first_slot: int
) -> None:
    for name, tensor in (("packed", packed), ("packed_gradient", packed_gradient)):
        if tensor.dtype != torch.bfloat16 or tuple(tensor.shape) != (layout.packed_size,):
            raise InputError(
                f"{name} has dtype {tensor.dtype} and shape {tuple(tensor.shape)}; "
                f"expected torch.bfloat16 and ({layout.packed_size},)"
            )
        check_device(name, tensor, "parameters", parameters)
    check_contiguous(("packed", packed), ("packed_gradient", packed_gradient))
    if not 0 <= first_slot <= layout.slots - K:
        raise InputError(f"first_slot is {first_slot} with {K} branches; the layout has {layout.slots} slots per layer")


def fold_rank_one(parameters: Tensor, deviations: Tensor, layout: RankOneLayout) -> Tensor:
    """Weights and biases of every branch as ordinary layers.

    Args:
        parameters: [layout.size] float32 or float64, see :class:`RankOneLayout`.
        deviations: [K, layout.factors], r − 1 and s − 1, the same dtype and device.
        layout: the table of layers.

    Returns:
        [K, layout.ranked]: row k holds W_k and b_k of each layer where ``parameters`` holds W and b. Differentiable,
        once, in both tensors (the gradient is :func:`unfold_rank_one`).

    Raises:
        InputError: a dtype, shape or device that does not fit the layout.

    Source: Nam et al., ICML 2022, section 2; Wen et al., ICLR 2020, equation 1.
    """
    _check(layout, parameters, deviations, ())
    return torch.ops.fastensdistill.fold_rank_one(parameters, deviations, layout.fields, layout.ranked)


def unfold_rank_one(
    branch_gradients: Tensor, parameters: Tensor, deviations: Tensor, layout: RankOneLayout
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
    _check(layout, parameters, deviations, [("branch_gradients", branch_gradients, ranked)])
    op = torch.ops.fastensdistill.unfold_rank_one
    return op(branch_gradients.detach(), parameters.detach(), deviations.detach(), layout.fields)


def pack_rank_one(
    parameters: Tensor,
    deviations: Tensor,
    layout: RankOneLayout,
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
    _check(layout, parameters, deviations, ())
    _check_packed(layout, parameters, deviations.shape[0], packed, packed_gradient, first_slot)
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
    layout: RankOneLayout,
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
    _check(layout, parameters, deviations, extra)
    _check_packed(layout, parameters, K, packed, packed_gradient, first_slot)
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
