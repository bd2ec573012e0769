"""Which implementation computes each convolution of a plan: Triton kernel, vendor library (cuDNN), or CUDA kernel.

The table is filled by measurement (``bench.kernels --dispatch FILE`` writes rows). A row matches a launch by its op
and, where given, its layer, its shape and the device's compute capability; the first that matches decides, and without
one the Triton kernel does. ``cudnn`` is PyTorch's own convolution, one call per group on channels-last memory
(activations [G, N, H, W, C] are G such batches), with the epilogue as separate operations; off a GPU it runs whatever
PyTorch has there, so it is tested everywhere. ``cuda`` is the extension's halo convolution, for 3x3 convolutions at
stride 1 and their data gradients (``halo_rows`` lists them); naming it for another launch is refused when that runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as nn_grad

from fastensdistill.errors import InputError, unknown
from fastensdistill.kernels import conv_data_gradient, conv_weight_gradient, grouped_conv, halo_conv
from fastensdistill.kernels.conv_data_gradient import DataGradient
from fastensdistill.kernels.elementwise_gradient import gradient_epilogue, gradient_sums
from fastensdistill.kernels.grouped_conv import ConvOutput, conv_epilogue, conv_input
from fastensdistill.kernels.operands import accumulator, check_out
from fastensdistill.kernels.ops import present
from fastensdistill.kernels.reference import leave
from fastensdistill.kernels.tiles import device_arch
from fastensdistill.network.launch import Launch, Part
from fastensdistill.network.nodes import Conv, Layer, Network

IMPLEMENTATIONS = ("triton", "cudnn", "cuda")
OPS = ("conv", "conv gradient", "flat gradient", "weight gradient")


class Shape(NamedTuple):
    """Of a convolution; a linear layer is 1x1 over its positions. ``height`` and ``width`` are its input's."""

    kernel: int
    stride: int
    in_channels: int
    out_channels: int
    height: int
    width: int


def shape_of(part: Part, launch: Launch) -> Shape:
    """The shape of the layer that ``launch`` computes, forward or backward. Raises InputError where it has none."""
    node = part.network.by_name[launch.node]
    if not isinstance(node, Layer):
        raise InputError(f"{launch.op} {launch.node} is no convolution")
    kernel, stride = (node.kernel, node.stride) if isinstance(node, Conv) else (1, 1)
    C, H, W = node.in_shape
    return Shape(kernel, stride, C, node.shape[0], H, W)


@dataclass(frozen=True)
class Row:
    """One choice. ``op`` is a launch's op; what is left out matches everything.

    ``layer`` is a layer's name, ``shape`` its :class:`Shape`, ``arch`` the compute capability as one number (90 for an
    H200). Raises InputError for an unknown op or implementation, and for one that does not exist for the op.
    """

    op: str
    implementation: str
    reason: str
    layer: str = ""
    shape: Shape | None = None
    arch: int | None = None

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise unknown("op", self.op, OPS)
        if self.implementation not in IMPLEMENTATIONS:
            raise unknown("implementation", self.implementation, IMPLEMENTATIONS)
        if self.implementation == "cuda" and self.op not in ("conv", "conv gradient"):
            raise InputError(f"{self.op} has no cuda implementation; expected triton or cudnn")

    def matches(self, part: Part, launch: Launch, arch: int) -> bool:
        return (
            self.op == launch.op
            and self.layer in ("", launch.node)
            and self.arch in (None, arch)
            and (self.shape is None or self.shape == shape_of(part, launch))
        )


# Measured choices, with their numbers as the reason. None has been measured: every launch runs its Triton kernel.
TABLE: tuple[Row, ...] = ()


class Dispatch:
    """Picks what computes a launch, from a table of rows."""

    def __init__(self, table: Sequence[Row] = TABLE):
        self.table = tuple(table)

    @staticmethod
    def load(path: str | Path) -> Dispatch:
        """The table in a file of ``bench.kernels --dispatch``. Raises InputError for anything else."""
        try:
            given = json.loads(Path(path).read_text())
            rows = [Row(**row | {"shape": Shape(*row["shape"]) if row.get("shape") else None}) for row in given]
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is no table of implementations: {error}") from error
        return Dispatch(rows)

    def choice(self, part: Part, launch: Launch, arch: int = 0) -> str:
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
        def run(x: Tensor, *arguments: Any, **options: Any) -> Any:
            choice = self.choice(part, launch, device_arch(x))
            if choice != "cuda":
                return (VENDOR[op] if choice == "cudnn" else op)(x, *arguments, **options)
            try:
                return HALO[op](x, *arguments, **options)
            except InputError as error:
                raise InputError(f'the table names "cuda" for {launch.op} {launch.node}: {error}') from error

        return run


def halo_rows(network: Network, reason: str) -> list[Row]:
    """Rows that name "cuda" for every convolution of ``network`` which the halo kernels cover in bf16."""
    rows = []
    for node in network.nodes:
        if isinstance(node, Conv):
            sizes = {"kernel": node.kernel, "stride": node.stride, "padding": node.padding}
            if halo_conv.supports(node.in_shape[0], node.shape[0], **sizes, dtype=torch.bfloat16):
                rows += [Row(op, "cuda", reason, node.name) for op in ("conv", "conv gradient")]
    return rows


def channels_last(x: Tensor) -> Tensor:
    """(N, H, W, C) as the (N, C, H, W) that PyTorch's convolutions take, without a copy."""
    return x.permute(0, 3, 1, 2)


def weights_channels_last(weight: Tensor, kernel: int) -> list[Tensor]:
    """(G, kernel², Cin, Cout) → G times (Cout, Cin, kernel, kernel), channels-last down to the strides of a 1x1.

    cuDNN's data gradient takes its memory format from the weight: the input, which it has not, stands there without
    one. With a weight in no format it copies ``d`` to channels-first and computes there.
    """
    weight = weight.unflatten(1, (kernel, kernel)).permute(0, 4, 1, 2, 3).contiguous()
    return [channels_last(one) for one in weight]


def one_row(values: Tensor) -> Tensor:
    """(G, N, H, W, C) → (G, 1, C): the sums over all positions as the one row of partials."""
    return values.sum((1, 2, 3))[:, None]


def vendor_conv(
    x: Tensor, weight: Tensor, slots: Tensor, *, kernel: int, stride: int = 1, padding: int = 0,
    inputs: Tensor | None = None, in_scale: Tensor | None = None, in_shift: Tensor | None = None,
    in_relu: bool = False, bias: Tensor | None = None, residual: Tensor | None = None, residual_stride: int = 1,
    relu: bool = False, next_scale: Tensor | None = None, next_shift: Tensor | None = None,
    center: Tensor | None = None, mask: bool = False, precision: str = "ieee",
) -> ConvOutput:  # fmt: skip
    """``kernels.grouped_conv`` (same arguments and results) by PyTorch's convolution; how float32 is multiplied is
    PyTorch's own setting."""
    G, dtype = len(slots), weight.dtype
    u = conv_input(x, slots, inputs, in_scale, in_shift, in_relu, dtype).expand(G, -1, -1, -1, -1)
    w = weights_channels_last(weight.index_select(0, slots), kernel)
    y = torch.stack(
        [F.conv2d(channels_last(u[g]), w[g], stride=stride, padding=padding).permute(0, 2, 3, 1) for g in range(G)]
    ).to(accumulator(dtype))
    z, activated, bits, statistics = conv_epilogue(
        y, slots, bias, residual, residual_stride, relu, next_scale, next_shift, center, mask, dtype, one_row
    )
    return ConvOutput(z, present(activated), present(bits), present(statistics))


def vendor_data_gradient(
    d: Tensor, weight_flipped: Tensor, slots: Tensor, *, in_size: tuple[int, int], kernel: int, stride: int = 1,
    padding: int = 0, residual: Tensor | None = None, residual_stride: int = 1, residual_first: bool = False,
    mask: Tensor | None = None, scale: Tensor | None = None, z: Tensor | None = None, mean: Tensor | None = None,
    inv_std: Tensor | None = None, out_dtype: torch.dtype | None = None, precision: str = "ieee",
) -> DataGradient:  # fmt: skip
    """``kernels.conv_data_gradient`` (same arguments and results) by PyTorch's convolution."""
    high, C = accumulator(d.dtype), weight_flipped.shape[3]
    w = weights_channels_last(weight_flipped.index_select(0, slots).flip(1).transpose(2, 3), kernel)
    size = (d.shape[1], C, *in_size)
    u = torch.stack([
        nn_grad.conv2d_input(size, w[g], channels_last(d[g]), stride, padding).permute(0, 2, 3, 1)
        for g in range(len(slots))
    ]).to(high)  # fmt: skip
    u = gradient_epilogue(u, slots, residual, residual_stride, residual_first, mask, scale)
    u = u.to(out_dtype or d.dtype).contiguous()
    return DataGradient(u, present(gradient_sums(u.to(high), slots, z, mean, inv_std, one_row)))


def vendor_weight_gradient(
    x: Tensor, d: Tensor, *, kernel: int, stride: int = 1, padding: int = 0, in_scale: Tensor | None = None,
    in_shift: Tensor | None = None, in_relu: bool = False, precision: str = "ieee", out: Tensor | None = None,
    add: bool = False,
) -> Tensor:  # fmt: skip
    """``kernels.conv_weight_gradient`` (same arguments and results) by PyTorch's convolution."""
    G, high = len(d), accumulator(d.dtype)
    u = conv_input(x, None, None, in_scale, in_shift, in_relu, d.dtype).expand(G, -1, -1, -1, -1)
    size = (d.shape[4], x.shape[4], kernel, kernel)
    dw = torch.stack([
        nn_grad.conv2d_weight(channels_last(u[g]), size, channels_last(d[g]), stride, padding) for g in range(G)
    ])  # fmt: skip
    dw = dw.permute(0, 3, 4, 2, 1)
    out = check_out("out", out, (G, kernel * kernel, size[1], size[0]), d, add)
    leave(dw.to(high), out.view(dw.shape), add)
    return out


VENDOR: dict[Callable[..., Any], Callable[..., Any]] = {
    grouped_conv.grouped_conv: vendor_conv,
    conv_data_gradient.conv_data_gradient: vendor_data_gradient,
    conv_weight_gradient.conv_weight_gradient: vendor_weight_gradient,
}
HALO: dict[Callable[..., Any], Callable[..., Any]] = {
    grouped_conv.grouped_conv: halo_conv.halo_conv,
    conv_data_gradient.conv_data_gradient: halo_conv.halo_data_gradient,
}
