"""Checks of the operands of an op, made before dispatch: no host sync, one sentence that names the value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.errors import InputError, unknown

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATING}
PRECISIONS = ("ieee", "tf32")
_LIMIT = 2**31


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What an op computes in and holds sums in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_size(name: str, shape: Sequence[int]) -> None:
    """A group's part of a tensor must fit int32 offsets."""
    count = math.prod(shape[1:])
    if count >= _LIMIT:
        raise InputError(
            f"{name} of shape {tuple(shape)} has {count} elements in one group, more than 32-bit offsets reach; "
            "use smaller batches"
        )


def check_tensor(name: str, x: Tensor, dimensions: int) -> None:
    """A contiguous tensor of so many dimensions, whose size per group fits int32 offsets."""
    if x.dim() != dimensions:
        raise InputError(f"{name} has shape {tuple(x.shape)}, expected {dimensions} dimensions")
    if not x.is_contiguous():
        raise InputError(f"{name} of shape {tuple(x.shape)} is not contiguous")
    check_size(name, x.shape)


def check_rows(name: str, rows: Tensor | None, count: int, channels: int) -> None:
    """Per-slot (or per-group) channel parameters: shape (count, channels), or (1, channels) where all share them."""
    if rows is not None:
        good = rows.dim() == 2 and rows.shape[0] in (1, count) and rows.shape[1] == channels and rows.is_contiguous()
        if not good:
            raise InputError(f"{name} has shape {tuple(rows.shape)}, expected ({count} or 1, {channels}), contiguous")


def check_sets(name: str, rows: Tensor, groups: int, channels: int) -> None:
    """Per-channel parameters of sets of groups, each as many neighbours: shape (Q, channels), Q a divisor of groups."""
    good = rows.dim() == 2 and rows.shape[1] == channels and rows.is_contiguous()
    if not (good and rows.shape[0] > 0 and groups % rows.shape[0] == 0):
        raise InputError(
            f"{name} has shape {tuple(rows.shape)}, expected (a divisor of {groups}, {channels}), contiguous"
        )


def check_pair(names: str, first: Tensor | None, second: Tensor | None, count: int, channels: int) -> None:
    """Two per-slot parameters that only make sense together: both absent, or both of one shape."""
    if (first is None) != (second is None):
        raise InputError(f"{names} must be given together")
    if first is not None and second is not None:
        check_rows(names, first, count, channels)
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        if not (first.shape == second.shape and second.is_contiguous()):
            raise InputError(f"{names} have shapes {shapes}, expected equal")


def refuse_operands(name: str, **operands: object) -> None:
    """Raise InputError for operands that are given (neither None nor False), which ``name`` does not have."""
    given = [operand for operand, value in operands.items() if value is not None and value is not False]
    if given:
        raise InputError(f"{name} has no {' and no '.join(given)}; another implementation computes it")


def check_shortcut(residual: Tensor | None, stride: int, shape: tuple[int, ...]) -> None:
    """A residual whose every ``stride``-th position fits ``shape`` (G, N, H, W, C), with at most C channels."""
    if residual is not None:
        check_tensor("residual", residual, 5)
        size = (*residual.shape[:2], *(-(-s // stride) for s in residual.shape[2:4]))
        if not (size == tuple(shape[:4]) and residual.shape[4] <= shape[4]):
            raise InputError(
                f"residual has shape {tuple(residual.shape)}, expected every {stride}-th position of it to fit "
                f"{tuple(shape)}"
            )


def check_second(
    second: Tensor | None,
    weight: Tensor | None,
    stride: int,
    shape: tuple[int, ...],
    slots: int,
    dtype: torch.dtype,
    spread: bool = False,
) -> None:
    """A second source of a result of ``shape`` (G, N, H, W, C), and its weights (slots, 1, its channels, C).

    Every ``stride``-th position of it, in one group or each, fits the result; with ``spread`` it fits every
    ``stride``-th position of the result, in each group.
    """
    if (second is None) != (weight is None):
        raise InputError("second and second_weight must be given together")
    if second is None or weight is None:
        return
    check_tensor("second", second, 5)
    check_tensor("second_weight", weight, 4)
    if stride < 1:
        raise InputError(f"second_stride is {stride}, expected at least 1")
    wanted = (slots, 1, second.shape[4], shape[4])
    if tuple(weight.shape) != wanted:
        raise InputError(f"second_weight has shape {tuple(weight.shape)}, expected {wanted}")
    wide, narrow = (shape, second.shape) if spread else (second.shape, shape)
    fits = second.shape[1] == shape[1] and second.shape[0] in ((shape[0],) if spread else (1, shape[0]))
    if not (fits and tuple(narrow[2:4]) == tuple(-(-size // stride) for size in wide[2:4])):
        raise InputError(f"second has shape {tuple(second.shape)}, which at stride {stride} does not fit {shape}")
    if not second.dtype == weight.dtype == dtype:
        raise InputError(f"second is {second.dtype} and second_weight {weight.dtype}, expected {dtype}")


def check_norm(d: Tensor, z: Tensor | None, a: Tensor | None, b: Tensor | None, c: Tensor | None) -> None:
    """Refuse the operands of a BatchNorm's gradient that do not go with ``d`` (G, N, H, W, C)."""
    if len({given is None for given in (z, a, b, c)}) > 1:
        raise InputError("norm_z, norm_a, norm_b and norm_c must be given together")
    if z is not None:
        if not (z.shape == d.shape and z.dtype == d.dtype and z.is_contiguous()):
            raise InputError(
                f"norm_z is {z.dtype} of shape {tuple(z.shape)}, expected {d.dtype} {tuple(d.shape)}, contiguous"
            )
        check_pair("norm_a and norm_b", a, b, d.shape[0], d.shape[4])
        check_pair("norm_b and norm_c", b, c, d.shape[0], d.shape[4])


def check_out(name: str, out: Tensor | None, shape: tuple[int, ...], like: Tensor, add: bool) -> Tensor:
    """Where sums of ``shape`` go that an op makes of ``like``: the given ``out``, or new memory, zeros to add to."""
    dtype = accumulator(like.dtype)
    if out is None:
        return like.new_zeros(shape, dtype=dtype) if add else like.new_empty(shape, dtype=dtype)
    if not (tuple(out.shape) == shape and out.dtype == dtype and out.is_contiguous()):
        raise InputError(f"{name} is {out.dtype} of shape {tuple(out.shape)}, expected {dtype} {shape}, contiguous")
    return out


def check_precision(precision: str) -> None:
    """Raise InputError for a precision other than those of :data:`PRECISIONS`."""
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)


def check_floating(name: str, tensor: Tensor, rank: int, axes: str) -> None:
    """Refuse a tensor that is not floating point of rank ``rank``; ``axes`` is how the message writes the shape."""
    if tensor.dtype not in FLOATING:
        raise InputError(f"{name} has dtype {tensor.dtype}; expected float32, bfloat16, float16 or float64")
    if tensor.dim() != rank:
        raise InputError(f"{name} has shape {tuple(tensor.shape)}; expected {axes}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse a tensor whose dtype or device differs from ``other``'s."""
    if tensor.dtype != other.dtype:
        raise InputError(f"{name} has dtype {tensor.dtype} but {other_name} has {other.dtype}; convert one of them")
    check_device(name, tensor, other_name, other)


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise InputError unless two operands are on one device."""
    if tensor.device != other.device:
        raise InputError(f"{name} is on {tensor.device} but {other_name} is on {other.device}")


def check_contiguous(*named: tuple[str, Tensor]) -> None:
    """Refuse to write in place into memory with gaps."""
    for name, tensor in named:
        if not tensor.is_contiguous():
            raise InputError(f"{name} is not contiguous (strides {tensor.stride()}); it is written in place")


def check_positive(name: str, value: float) -> None:
    """Refuse a number that is not finite and above zero."""
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} is {value}; expected a number above 0")


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """Positions along one side after a convolution or pooling."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


class Window(NamedTuple):
    """The kernel x kernel positions of the input, from position · stride − padding, that a result is made of."""

    kernel: int
    stride: int = 1
    padding: int = 0

    def sizes(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of the result of an input (G, N, H, W, C)."""
        return out_size(x.shape[2], *self), out_size(x.shape[3], *self)


class Rectangle(NamedTuple):
    """A window with sides, strides, padding and dilation of its own for rows and for columns.

    Position p of the result reads positions p · stride − padding + tap · dilation of the input.
    """

    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int

    @property
    def taps(self) -> int:
        """Positions of the input that one of the result is made of."""
        return self.kernel_h * self.kernel_w

    @property
    def kernel(self) -> tuple[int, int]:
        """Rows and columns of taps; stride, padding and dilation alike."""
        return self.kernel_h, self.kernel_w

    @property
    def stride(self) -> tuple[int, int]:
        """Of rows and of columns."""
        return self.stride_h, self.stride_w

    @property
    def padding(self) -> tuple[int, int]:
        """Of rows and of columns."""
        return self.padding_h, self.padding_w

    @property
    def dilation(self) -> tuple[int, int]:
        """Of rows and of columns."""
        return self.dilation_h, self.dilation_w

    def sizes(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the result of an input of that size."""
        return out_size(height, *self[::2]), out_size(width, *self[1::2])


def rectangle(
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Rectangle:
    """The window of these pairs, of rows and of columns. Raises InputError for what is no window."""
    least = {"kernel": 1, "stride": 1, "padding": 0, "dilation": 1}
    for (name, low), pair in zip(least.items(), (kernel, stride, padding, dilation), strict=True):
        if not (len(pair) == 2 and min(pair) >= low):
            raise InputError(f"{name} is {tuple(pair)}, expected a pair of at least {low}")
    return Rectangle(*kernel, *stride, *padding, *dilation)
