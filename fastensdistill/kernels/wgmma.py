"""The wgmma kernels as one family: which convolutions they cover, what to call, and whether this build has them.

They take the arguments of the ops in whose place they can stand, and compute by wgmma on tiles that TMA brings
(compute capability 9.0 alone). Their references serve elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastensdistill.kernels import extension
from fastensdistill.kernels.conv_data_gradient import conv_data_gradient
from fastensdistill.kernels.conv_weight_gradient import conv_weight_gradient
from fastensdistill.kernels.grouped_conv import grouped_conv
from fastensdistill.kernels.operands import Window

ARCH = 90  # the only one: wgmma is not in 10.0
WINDOWS = (Window(3, 1, 1), Window(3, 2, 1), Window(1, 1, 0), Window(1, 2, 0))
CHANNELS = range(16, 641, 16)  # on both sides
# op → module and name of the kernel's function, which is the name of the extension's op, too
KERNELS: dict[Callable[..., Any], tuple[str, str]] = {
    grouped_conv: ("wgmma_conv", "wgmma_conv"),
    conv_data_gradient: ("wgmma_conv", "wgmma_data_gradient"),
    conv_weight_gradient: ("wgmma_weight_gradient", "wgmma_weight_gradient"),
}

_copies = False


@contextlib.contextmanager
def in_copies(wanted: bool = True) -> Iterator[None]:
    """Within, the kernels hold a copy of the input's tile for every shift along a row.

    That is right on every device. Without, a tap is the same tile read from another row on, which assumes that the unit
    swizzles the address that it has added up.
    """
    global _copies
    before, _copies = _copies, wanted
    try:
        yield
    finally:
        _copies = before


def keep_copies(wanted: bool) -> None:
    """From here on launches are made as within :func:`in_copies`, or not."""
    global _copies
    _copies = wanted


def copies() -> bool:
    """Whether launches are made as within :func:`in_copies`."""
    return _copies


def multiprocessors(x: Tensor) -> int:
    """Of the device of ``x``; 132, as on an H100 or H200, off CUDA."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def unsupported(channels: int, out_channels: int, window: Window, dtype: torch.dtype, arch: int = 0) -> str:
    """What of a convolution the kernels do not cover, in a few words; "" where they cover it. ``arch`` 0: any device"""
    if arch not in (0, ARCH):
        return f"compute capability {arch // 10}.{arch % 10}, expected 9.0"
    if window not in WINDOWS:
        return (
            f"kernel {window.kernel}, stride {window.stride}, padding {window.padding}, expected 3 and padding 1 or 1 "
            "and 0, at stride 1 or 2"
        )
    if channels not in CHANNELS or out_channels not in CHANNELS:
        return f"{channels} to {out_channels} channels, expected multiples of 16 up to {CHANNELS[-1]}"
    if dtype != torch.bfloat16:
        return f"{dtype}, expected torch.bfloat16"
    return ""


def covers(channels: int, out_channels: int, window: Window, dtype: torch.dtype, arch: int = 0) -> bool:
    """Whether the kernels cover a convolution from ``channels`` to ``out_channels``, its gradients included."""
    return not unsupported(channels, out_channels, window, dtype, arch)


@functools.cache
def kernel(op: Callable[..., Any]) -> Callable[..., Any] | None:
    """What takes the place of ``op``, with its arguments and results; None where there is no such kernel."""
    module, name = KERNELS.get(op, ("", ""))
    full = f"{__package__}.{module}"
    if not module or importlib.util.find_spec(full) is None:
        return None
    return getattr(importlib.import_module(full), name, None)


def built(op: Callable[..., Any], arch: int = ARCH) -> bool:
    """Whether the extension has the kernel for ``op`` on a device of compute capability ``arch``."""
    return arch == ARCH and kernel(op) is not None and extension.serves(KERNELS[op][1], "cuda")
