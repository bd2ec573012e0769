"""Functions of each value, applied behind a BatchNorm or alone.

    y = f(scale · z + shift) (+ residual)

f is a ``kind`` of :data:`KINDS`, with x = scale · z + shift and σ(x) = 1/(1 + exp(−x)):

    relu         max(x, 0)                          f' = 1 above 0, else 0
    relu6        min(max(x, 0), 6)                  f' = 1 between 0 and 6, else 0 (at both ends too)
    sigmoid      σ(x)                               σ (1 − σ)
    silu         x σ(x)                             σ (1 + x (1 − σ))
    tanh         tanh(x)                            1 − tanh²
    gelu         x Φ(x), Φ(x) = (1 + erf(x/√2))/2   Φ + x exp(−x²/2)/√(2π)
    gelu_tanh    x σ(2v), v = √(2/π) (x + 0.044715 x³)   s + 2 x s (1 − s) v', s = σ(2v)
    mish         x t, t = tanh(log(1 + exp(x)))     t + x (1 − t²) σ
    hardsigmoid  min(max(x + 3, 0), 6) / 6          1/6 between −3 and 3, else 0 (at both ends too)
    hardswish    x hardsigmoid(x)                   0 up to −3, x/3 + 1/2, 1 from 3 on
    leaky_relu   x above 0, else a · x; a = 0.01    1 above 0, else a
    elu          x above 0, else a (exp(x) − 1); a = 1   1 above 0, else a exp(x)

The last two with another a are named "leaky_relu(0.2)". At a kink f' is PyTorch's.

The op moves 2 values per value (3 with a residual): 4 bytes in bfloat16. f is 1 to 30 instructions, of which exp is
the one that is not cheap; memory decides at all kinds but gelu_tanh and mish on the fastest devices.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastensdistill.errors import InputError, unknown
from fastensdistill.kernels.launch import BATCH_SIZES, launch, row_stride, tl, triton
from fastensdistill.kernels.operands import accumulator, check_pair, check_tensor
from fastensdistill.kernels.ops import define
from fastensdistill.kernels.reference import wide
from fastensdistill.kernels.tiles import rows_tile

aten = torch.ops.aten


class Kind(NamedTuple):
    """A function of each value in plain PyTorch: itself and its derivative, both of (x, a)."""

    value: Callable[[Tensor, float], Tensor]
    derivative: Callable[[Tensor, float], Tensor]
    a: float | None = None  # the parameter, where there is one, if nothing else is said


def _backward(op: Callable[..., Tensor], *more: object) -> Callable[[Tensor, float], Tensor]:
    """The derivative by what PyTorch's autograd calls, whose choice at a kink is its own."""
    return lambda x, a: op(torch.ones_like(x), x, *more)


KINDS: dict[str, Kind] = {
    "relu": Kind(lambda x, a: x.relu(), _backward(aten.threshold_backward, 0.0)),
    "relu6": Kind(lambda x, a: F.relu6(x), _backward(aten.hardtanh_backward, 0.0, 6.0)),
    "silu": Kind(lambda x, a: F.silu(x), _backward(aten.silu_backward)),
    "hardswish": Kind(lambda x, a: F.hardswish(x), _backward(aten.hardswish_backward)),
    "gelu": Kind(lambda x, a: F.gelu(x), _backward(aten.gelu_backward)),
    "gelu_tanh": Kind(
        lambda x, a: F.gelu(x, approximate="tanh"),
        # beyond ±40 it is 0 or 1, and PyTorch's is NaN where x³ overflows
        lambda x, a: aten.gelu_backward(torch.ones_like(x), x.clamp(-40, 40), approximate="tanh"),
    ),
    "sigmoid": Kind(lambda x, a: x.sigmoid(), lambda x, a: aten.sigmoid_backward(torch.ones_like(x), x.sigmoid())),
    "hardsigmoid": Kind(lambda x, a: F.hardsigmoid(x), _backward(aten.hardsigmoid_backward)),
    "tanh": Kind(lambda x, a: x.tanh(), lambda x, a: aten.tanh_backward(torch.ones_like(x), x.tanh())),
    "leaky_relu": Kind(F.leaky_relu, lambda x, a: aten.leaky_relu_backward(torch.ones_like(x), x, a, False), 0.01),
    "mish": Kind(lambda x, a: F.mish(x), _backward(aten.mish_backward)),
    "elu": Kind(F.elu, lambda x, a: aten.elu_backward(torch.ones_like(x), a, 1.0, 1.0, False, x), 1.0),
}


def named(name: str, a: float | None = None) -> str:
    """The kind's one name: ``named("elu", 1.0)`` is "elu", ``named("elu", 0.5)`` "elu(0.5)"."""
    return name if a is None or float(a) == KINDS[name].a else f"{name}({float(a)!r})"


def parsed(kind: str) -> tuple[str, float]:
    """(name, a) of a kind's name, a being 0 where it has no parameter. InputError for what is none."""
    match = re.fullmatch(r"(\w+)(?:\((.+)\))?", kind)
    name, given = match.groups() if match else (kind, None)
    if name not in KINDS:
        raise unknown("activation", kind, tuple(KINDS))
    if given is None:
        return name, KINDS[name].a or 0.0
    try:
        a = float(given)
    except ValueError:
        a = float("nan")
    if KINDS[name].a is None or a != a:
        raise InputError(f"activation {kind}: {name} takes {'no parameter' if KINDS[name].a is None else 'a number'}")
    return name, a


def activated(x: Tensor, kind: str) -> Tensor:
    """f(x) in x's dtype, in plain PyTorch; x itself without a kind."""
    if not kind:
        return x
    name, a = parsed(kind)
    return KINDS[name].value(x, a)


class ActivationOperands(NamedTuple):
    """What ``activation`` takes."""

    z: Tensor  # (G, N, H, W, C)
    kind: str
    scale: Tensor | None  # (Q, C) float32
    shift: Tensor | None
    residual: Tensor | None  # like z


def scaled(z: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """x of the equations, in what an op computes in."""
    x = z.to(accumulator(z.dtype))
    return x if scale is None or shift is None else x * wide(scale) + wide(shift)


def activation_reference(o: ActivationOperands) -> Tensor:
    y = activated(scaled(o.z, o.scale, o.shift), o.kind)
    return (y if o.residual is None else y + o.residual.to(y.dtype)).to(o.z.dtype)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _between(x, low, high):
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tanh(x):
    """By exp, and near 0, where that cancels, by its series: the first term left out is below 1e-8 of the value."""
    b_exp = tl.exp(-2.0 * tl.abs(x))
    b_large = (1.0 - b_exp) / (1.0 + b_exp)
    s = x * x
    b_small = x * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))))
    return tl.where(tl.abs(x) < 0.25, b_small, tl.where(x < 0, -b_large, b_large))


@triton.jit
def _exp_minus_one(x):
    """The same for exp(x) − 1 of x ≤ 0."""
    b_series = 1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0 + x * (1.0 / 720.0)))))
    return tl.where(x > -0.25, x * b_series, tl.exp(x) - 1.0)


@triton.jit
def _mish_tanh(x):
    """tanh(log(1 + exp(x))) = e (e + 2) / (e (e + 2) + 2), e = exp(x), which past 20 is 1 (and e² would overflow)."""
    b_exp = tl.exp(tl.minimum(x, 20.0, propagate_nan=tl.PropagateNan.ALL))
    b = b_exp * (b_exp + 2.0)
    return b / (b + 2.0)


@triton.jit
def activation_value(x, KIND: tl.constexpr, A: tl.constexpr):
    """f(x) of a block of float32."""
    if KIND == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif KIND == "relu6":
        y = _between(x, 0.0, 6.0)
    elif KIND == "silu":
        y = x * _sigmoid(x)
    elif KIND == "hardswish":
        y = x * (_between(x + 3.0, 0.0, 6.0) * (1.0 / 6.0))
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        y = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * (x * x * x)))
    elif KIND == "sigmoid":
        y = _sigmoid(x)
    elif KIND == "hardsigmoid":
        y = _between(x + 3.0, 0.0, 6.0) * (1.0 / 6.0)
    elif KIND == "tanh":
        y = _tanh(x)
    elif KIND == "leaky_relu":
        y = tl.where(x > 0, x, A * x)
    elif KIND == "mish":
        y = x * _mish_tanh(x)
    else:
        tl.static_assert(KIND == "elu", "an activation of KINDS")
        y = tl.where(x > 0, x, A * _exp_minus_one(x))
    return y


@triton.jit
def activation_derivative(x, KIND: tl.constexpr, A: tl.constexpr):
    """f'(x) of a block of float32."""
    if KIND == "relu":
        y = tl.where(x <= 0, 0.0, 1.0)
    elif KIND == "relu6":
        y = tl.where((x <= 0) | (x >= 6), 0.0, 1.0)
    elif KIND == "silu":
        b = _sigmoid(x)
        y = b * (1.0 + x * (1.0 - b))
    elif KIND == "hardswish":
        y = tl.where(x <= -3, 0.0, tl.where(x < 3, x * (1.0 / 3.0) + 0.5, 1.0))
    elif KIND == "gelu":
        b_density = tl.exp(-0.5 * x * x) * 0.3989422804014327
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * b_density
    elif KIND == "gelu_tanh":
        # beyond ±40 it is 0 or 1, and ∞ · 0 further on
        x = _between(x, -40.0, 40.0)
        b = _sigmoid(1.5957691216057308 * (x + 0.044715 * (x * x * x)))
        y = b + x * b * (1.0 - b) * (1.5957691216057308 * (1.0 + 0.134145 * (x * x)))
    elif KIND == "sigmoid":
        b = _sigmoid(x)
        y = b * (1.0 - b)
    elif KIND == "hardsigmoid":
        y = tl.where((x > -3) & (x < 3), 1.0 / 6.0, 0.0)
    elif KIND == "tanh":
        b = _tanh(x)
        y = 1.0 - b * b
    elif KIND == "leaky_relu":
        y = tl.where(x > 0, 1.0, A)
    elif KIND == "mish":
        b = _mish_tanh(x)
        y = b + x * (1.0 - b * b) * _sigmoid(x)
    else:
        tl.static_assert(KIND == "elu", "an activation of KINDS")
        y = tl.where(x > 0, 1.0, A * tl.exp(x))
    return y


@triton.jit(do_not_specialize=BATCH_SIZES)
def activation_kernel(
    p_z, p_scale, p_shift, p_residual, p_y,
    positions, s_scale,
    C: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(2).to(tl.int64)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < C
    m_z = (o_m < positions)[:, None] & m_n[None, :]
    o_z = o_m[:, None] * C + o_n[None, :]
    o_group = i_g * positions * C
    b_x = tl.load(p_z + o_group + o_z, mask=m_z, other=0.0).to(tl.float32)
    if p_scale is not None:
        b_scale = tl.load(p_scale + i_g * s_scale + o_n, mask=m_n, other=0.0)
        b_shift = tl.load(p_shift + i_g * s_scale + o_n, mask=m_n, other=0.0)
        b_x = b_x * b_scale[None, :] + b_shift[None, :]
    b_y = activation_value(b_x, KIND, A)
    if p_residual is not None:
        b_y += tl.load(p_residual + o_group + o_z, mask=m_z, other=0.0).to(tl.float32)
    tl.store(p_y + o_group + o_z, b_y.to(p_y.dtype.element_ty), mask=m_z)


def _empty(o):
    return torch.empty_like(o.z)


def _launch(o):
    y = _empty(o)
    groups, images, height, width, channels = o.z.shape
    positions, tile = images * height * width, rows_tile(channels)
    name, a = parsed(o.kind)
    launch(
        activation_kernel,
        (-(-positions // tile.BLOCK_M), -(-channels // tile.BLOCK_N), groups),
        tile,
        o,
        p_y=y,
        positions=positions,
        s_scale=row_stride(o.scale),
        C=channels,
        KIND=name,
        A=a,
    )
    return y


_activation = define("activation", activation_reference, _empty, _launch)


def activation(
    z: Tensor,
    *,
    kind: str,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``f(scale · z + shift) + residual``, f being of a ``kind`` of :data:`KINDS`.

    Args:
        z: (G, N, H, W, C), float32, float16 or bfloat16, which the result is too (float64: reference only).
        scale, shift: (Q, C) float32, Q = G or 1, by group; without them z itself goes in.
        residual: like z.

    Raises:
        InputError: shapes that disagree, or an unknown kind.
    """
    check_tensor("z", z, 5)
    parsed(kind)
    check_pair("scale and shift", scale, shift, z.shape[0], z.shape[4])
    if residual is not None and not (residual.shape == z.shape and residual.is_contiguous()):
        raise InputError(f"residual has shape {tuple(residual.shape)}, expected {tuple(z.shape)}, contiguous")
    return _activation(*ActivationOperands(z, kind, scale, shift, residual))
