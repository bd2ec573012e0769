"""Which code computes each convolution of a plan: the op itself, the vendor library (cuDNN), or CUDA kernels.

    triton   the op: its Triton kernel where that runs, else its reference (``kernels.ops`` says in which order)
    cudnn    PyTorch's own convolution (``kernels.vendor_conv``), on any device
    cuda     the extension's halo convolution (``kernels.halo_conv``), for 3x3 convolutions at stride 1 and their data
             gradients (``halo_rows`` lists them); naming it for another launch is refused when that runs

The table is filled by measurement (``bench.kernels --dispatch FILE`` writes rows). A row matches a launch by its op
and, where given, its layer, its shape and the device's compute capability; the first that matches decides, and without
one the op itself computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastensdistill.errors import InputError, unknown
from fastensdistill.kernels import halo_conv
from fastensdistill.kernels.halo_conv import HALO
from fastensdistill.kernels.operands import Window
from fastensdistill.kernels.tiles import device_arch
from fastensdistill.kernels.vendor_conv import VENDOR
from fastensdistill.network.launch import Launch, Part
from fastensdistill.network.nodes import Conv, Layer, Network

IMPLEMENTATIONS = ("triton", "cudnn", "cuda")
OPS = ("conv", "conv gradient", "flat gradient", "weight gradient")


class ConvShape(NamedTuple):
    """Of a convolution; a linear layer is 1x1 over its positions. ``height`` and ``width`` are its input's."""

    kernel: int
    stride: int
    in_channels: int
    out_channels: int
    height: int
    width: int


def shape_of(part: Part, launch: Launch) -> ConvShape:
    """The shape of the layer that ``launch`` computes, forward or backward. Raises InputError where it has none."""
    node = part.network.by_name[launch.node]
    if not isinstance(node, Layer):
        raise InputError(f"{launch.op} {launch.node} is no convolution")
    kernel, stride = (node.kernel, node.stride) if isinstance(node, Conv) else (1, 1)
    C, H, W = node.in_shape
    return ConvShape(kernel, stride, C, node.shape[0], H, W)


@dataclass(frozen=True)
class Choice:
    """A row of the table. ``op`` is a launch's op; what is left out matches everything.

    ``layer`` is a layer's name, ``shape`` its :class:`ConvShape`, ``arch`` the compute capability as one number (90 for
    an H200). Raises InputError for an unknown op or implementation, and for one that does not exist for the op.
    """

    op: str
    implementation: str
    reason: str
    layer: str = ""
    shape: ConvShape | None = None
    arch: int | None = None

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise unknown("op", self.op, OPS)
        if self.implementation not in IMPLEMENTATIONS:
            raise unknown("implementation", self.implementation, IMPLEMENTATIONS)
        if self.implementation == "cuda" and self.op not in ("conv", "conv gradient"):
            raise InputError(f"{self.op} has no cuda implementation; expected triton or cudnn")

    @staticmethod
    def read(fields: Mapping[str, Any]) -> Choice:
        """The row of JSON ``fields``, whose shape is a list."""
        return Choice(**{**fields, "shape": ConvShape(*fields["shape"]) if fields.get("shape") else None})

    def matches(self, part: Part, launch: Launch, arch: int) -> bool:
        return (
            self.op == launch.op
            and self.layer in ("", launch.node)
            and self.arch in (None, arch)
            and (self.shape is None or self.shape == shape_of(part, launch))
        )


# Measured choices, with their numbers as the reason. None has been measured: every launch runs the op itself.
TABLE: tuple[Choice, ...] = ()


class Dispatch:
    """Picks what computes a launch, from a table of rows."""

    def __init__(self, table: Sequence[Choice] = TABLE):
        self.table = tuple(table)

    @staticmethod
    def load(path: str | Path) -> Dispatch:
        """The table in a file of ``bench.kernels --dispatch``. Raises InputError for anything else."""
        try:
            return Dispatch([Choice.read(row) for row in json.loads(Path(path).read_text())])
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is no table of implementations: {error}") from error

    def implementation(self, part: Part, launch: Launch, arch: int = 0) -> str:
        """The implementation of a ``launch`` of ``part``, one of ``IMPLEMENTATIONS``; ``arch`` 0 is a CPU.

        On a GPU "cuda" is passed over where the extension was not built with it for such a device: the next row that
        matches counts.
        """
        rows = (row for row in self.table if row.matches(part, launch, arch))
        usable = (row for row in rows if row.implementation != "cuda" or arch == 0 or halo_conv.built(arch))
        return next((row.implementation for row in usable), "triton")

    def missing(self, arch: int) -> bool:
        """Whether rows for this device name "cuda", and an extension built with it would have it."""
        named = any(row.implementation == "cuda" and row.arch in (None, arch) for row in self.table)
        return named and arch > 0 and not halo_conv.built() and not halo_conv.without_body(arch)

    def __call__(self, part: Part, launch: Launch, op: Callable[..., Any]) -> Callable[..., Any]:
        """What computes the ``launch``: takes the op's arguments, its tensor first, and gives its results."""

        def run(x: Tensor, *arguments: Any, **options: Any) -> Any:
            name = self.implementation(part, launch, device_arch(x))
            if name == "triton":
                return op(x, *arguments, **options)
            try:
                return (VENDOR if name == "cudnn" else HALO)[op](x, *arguments, **options)
            except InputError as error:
                raise InputError(f'the table names "{name}" for {launch.op} {launch.node}: {error}') from error

        return run


def halo_rows(network: Network, reason: str) -> list[Choice]:
    """Rows that name "cuda" for every convolution of ``network`` which the halo kernels cover in bf16."""
    rows = []
    for node in network.nodes:
        if isinstance(node, Conv):
            window = Window(node.kernel, node.stride, node.padding)
            if halo_conv.supports(node.in_shape[0], node.shape[0], window, torch.bfloat16):
                rows += [Choice(op, "cuda", reason, node.name) for op in ("conv", "conv gradient")]
    return rows
