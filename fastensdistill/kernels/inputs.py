"""Checks of the operands of an op, made before dispatch: no host sync, one sentence that names the value."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastensdistill.errors import InputError

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an op computes in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
