"""Depthwise convolution, forward: every group g convolves each channel of its input with a filter of its own slot.

    y[g, n, p, c] = f( Σ_taps x[g, n, p · stride − padding + tap · dilation, c] · W[weight_index[g], tap, c] + bias )
    statistics = Σ (y − center), Σ (y − center)² per channel, one row per program, no atomics

f is an activation (``activation.KINDS``) or nothing: a launch of its own would read and write every value once more.
Layouts: activations (G, N, H, W, C), weights (S, taps, 1, C), both contiguous. Products and sums are float32 on CUDA
cores: with one channel to a filter there is no matrix to multiply.

Memory decides: in bf16 a value is 2 bytes read and 2 written, to which a window adds what neighbouring programs read
twice, out of L2: strips of 8 rows (``strips.py``) read 10 for a 3x3 and 14 for a 7x7 window, 2.5 and 3.5 bytes a value.
Out of L1 come 2 · taps · 10/8/3 = 7.5 bytes a value for 3x3, 24.5 for 7x7 (18 and 98 if every tap were loaded for every
result), and the weights, once per strip. By that arithmetic L1 (128 bytes a clock of a multiprocessor) needs less time
than memory for up to 5x5 taps, and the products for up to 7x7 about the same.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastensdistill.errors import InputError
from fastensdistill.kernels.activation import activated, activation_value, parsed
from fastensdistill.kernels.launch import BATCH_SIZES, launch, row_stride, sizes, tl, triton
from fastensdistill.kernels.operands import (
    Rectangle,
    accumulator,
    check_precision,
    check_rows,
    check_size,
    check_tensor,
    rectangle,
)
from fastensdistill.kernels.ops import absent, define, present
from fastensdistill.kernels.reference import as_channels, as_groups, pick
from fastensdistill.kernels.strips import strip_product, strip_rows, zero_strip
from fastensdistill.kernels.tiles import Tile, depthwise_tile, device_arch


class DepthwiseOperands(NamedTuple):
    """What a depthwise convolution is made of, beside its :class:`Rectangle`. Rows are by slot, or one for all."""

    x: Tensor  # (G, N, H, W, C), or (1, N, H, W, C) that all groups read; float32, or the weight's dtype
    weight: Tensor  # (S, taps, 1, C), of the dtype multiplied in and returned
    weight_index: Tensor  # int32 (G,), the slot of each group
    bias: Tensor | None = None  # (S or 1, C) float32
    center: Tensor | None = None  # (S or 1, C) float32: asks for ``statistics`` about it, of y as stored
    activation: str = ""  # a kind of ``activation.KINDS``, or nothing


class DepthwiseOutput(NamedTuple):
    """The result, and partial sums."""

    z: Tensor  # (G, N, Ho, Wo, C), the weight's dtype
    statistics: Tensor | None  # (G, P, 2, C) float32: rows of partial sums


def filters(weight: Tensor, window: Rectangle) -> Tensor:
    """Weights of each group (G, taps, C), as PyTorch's convolution takes them: (G·C, 1, *kernel)."""
    return weight.transpose(1, 2).reshape(-1, 1, *window.kernel)


def _tile(o: DepthwiseOperands, window: Rectangle) -> Tile:
    height, _ = window.sizes(*o.x.shape[2:4])
    halo = (window.kernel_h - 1) * window.dilation_h + 1 - window.stride_h
    return depthwise_tile(device_arch(o.x), o.x.shape[4], height, window.stride_h, halo, o.weight.element_size())


def depthwise_conv_reference(o: DepthwiseOperands, window: Rectangle) -> tuple[Tensor, Tensor]:
    groups, high, dtype = len(o.weight_index), accumulator(o.weight.dtype), o.weight.dtype
    x = o.x.to(dtype).to(high).expand(groups, -1, -1, -1, -1)
    w = filters(o.weight[o.weight_index.long()].to(high).flatten(2), window)
    y = F.conv2d(as_channels(x), w, None, window.stride, window.padding, window.dilation, len(w))
    y = as_groups(y, groups)
    if o.bias is not None:
        y = y + pick(o.bias, o.weight_index)
    y = activated(y, o.activation).to(dtype).contiguous()
    if o.center is None:
        return y, absent(y, high)
    rest, tile = y.to(high) - pick(o.center, o.weight_index), _tile(o, window)
    return y, torch.stack([strip_rows(v, tile.BLOCK_K, 1, tile.BLOCK_M) for v in (rest, rest.square())], 2)


@triton.jit(do_not_specialize=BATCH_SIZES)
def depthwise_conv_kernel(
    p_x, p_weight, p_weight_index, p_bias, p_center, p_y, p_statistics,
    N, n_partials, s_bias, s_center,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    KIND: tl.constexpr, A: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    N_BLOCKS: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    STRIPS: tl.constexpr = (HO + BLOCK_K - 1) // BLOCK_K
    i_m = tl.program_id(0) // N_BLOCKS
    i_n = tl.program_id(0) % N_BLOCKS
    i_g = tl.program_id(1).to(tl.int64)
    i_slot = tl.load(p_weight_index + i_g).to(tl.int64)
    if not SHARED:
        p_x += i_g * N * (H * W * C)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < N * (STRIPS * WO)
    image = o_m // (STRIPS * WO)
    i_oh = (o_m % (STRIPS * WO)) // WO * BLOCK_K
    i_ow = o_m % WO
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < C
    i_row = i_oh * STRIDE_H - PADDING_H
    i_column = i_ow * STRIDE_W - PADDING_W
    accs = strip_product(
        zero_strip(BLOCK_K, BLOCK_M, BLOCK_N), p_x, p_weight + i_slot * (KERNEL_H * KERNEL_W * C),
        ((image * H + i_row) * W + i_column) * C, i_row, i_column, m_m, o_n, m_n, H, W, C, KERNEL_H, KERNEL_W,
        BLOCK_K, 0, (BLOCK_K - 1) * STRIDE_H + (KERNEL_H - 1) * DILATION_H + 1, 1, -STRIDE_H, 0, DILATION_H,
        0, 1, DILATION_W, False,
    )  # fmt: skip

    p_y += i_g * N * (HO * WO * C)
    if p_bias is not None:
        b_bias = tl.load(p_bias + i_slot * s_bias + o_n, mask=m_n, other=0.0)[None, :]
    if p_center is not None:
        b_center = tl.load(p_center + i_slot * s_center + o_n, mask=m_n, other=0.0)[None, :]
        first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in tl.static_range(BLOCK_K):
        b_y = accs[j]
        if p_bias is not None:
            b_y += b_bias
        if KIND != "":
            b_y = activation_value(b_y, KIND, A)
        m_y = (m_m & (i_oh + j < HO))[:, None] & m_n[None, :]
        o_y = ((image * HO + i_oh + j) * WO + i_ow) * C
        b_stored = b_y.to(p_y.dtype.element_ty)
        tl.store(p_y + (o_y[:, None] + o_n[None, :]), b_stored, mask=m_y)
        if p_center is not None:
            b_rest = tl.where(m_y, b_stored.to(tl.float32) - b_center, 0.0)
            first += b_rest
            second += b_rest * b_rest
    if p_center is not None:
        p_statistics += (i_g * n_partials + i_m) * (2 * C)
        tl.store(p_statistics + o_n, tl.sum(first, 0), mask=m_n)
        tl.store(p_statistics + C + o_n, tl.sum(second, 0), mask=m_n)


def _rows(o: DepthwiseOperands, window: Rectangle, tile: Tile) -> int:
    """Programs of a group's positions, and rows of partial sums."""
    height, width = window.sizes(*o.x.shape[2:4])
    return -(-o.x.shape[1] * -(-height // tile.BLOCK_K) * width // tile.BLOCK_M)


def _empty(o: DepthwiseOperands, window: Rectangle) -> tuple[Tensor, Tensor]:
    groups, channels = o.weight_index.shape[0], o.x.shape[4]
    y = o.weight.new_empty(groups, o.x.shape[1], *window.sizes(*o.x.shape[2:4]), channels)
    shape = (groups, _rows(o, window, _tile(o, window)), 2, channels) if o.center is not None else (0,)
    return y, y.new_empty(shape, dtype=accumulator(y.dtype))


def _launch(o: DepthwiseOperands, window: Rectangle) -> tuple[Tensor, Tensor]:
    y, statistics = _empty(o, window)
    tile = _tile(o, window)
    rows, (kind, a) = _rows(o, window, tile), parsed(o.activation) if o.activation else ("", 0.0)
    launch(
        depthwise_conv_kernel,
        (rows * -(-y.shape[4] // tile.BLOCK_N), y.shape[0]),
        tile,
        o,
        window,
        p_y=y,
        p_statistics=present(statistics),
        N=y.shape[1],
        n_partials=rows,
        s_bias=row_stride(o.bias),
        s_center=row_stride(o.center),
        **sizes("H W C", o.x),
        HO=y.shape[2],
        WO=y.shape[3],
        KIND=kind,
        A=a,
        SHARED=o.x.shape[0] == 1,
    )
    return y, statistics


_depthwise_conv = define("depthwise_conv", depthwise_conv_reference, _empty, _launch)


def check_filters(name: str, weight: Tensor, weight_index: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse weights that are not (slots, \\*shape), contiguous, with an int32 slot for each group."""
    check_tensor(name, weight, 4)
    if tuple(weight.shape[1:]) != shape:
        raise InputError(f"{name} has shape {tuple(weight.shape)}, expected (slots, {', '.join(map(str, shape))})")
    if not (weight_index.dtype == torch.int32 and weight_index.dim() == 1):
        raise InputError(
            f"weight_index is {weight_index.dtype} of {weight_index.dim()} dimensions, expected int32 (groups,)"
        )


def depthwise_operands(
    x: Tensor,
    weight: Tensor,
    weight_index: Tensor,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    precision: str = "ieee",
    **options: Any,
) -> tuple[DepthwiseOperands, Rectangle]:
    """The operands of a depthwise convolution, checked; ``options``: the further ones of :class:`DepthwiseOperands`."""
    o, window = DepthwiseOperands(x, weight, weight_index, **options), rectangle(kernel, stride, padding, dilation)
    check_tensor("x", x, 5)
    check_filters("weight", weight, weight_index, (window.taps, 1, x.shape[4]))
    check_precision(precision)
    groups, slots, channels = weight_index.shape[0], weight.shape[0], x.shape[4]
    if x.shape[0] not in (1, groups):
        raise InputError(f"x has {x.shape[0]} groups, expected {groups} or 1")
    if x.dtype not in (weight.dtype, torch.float32):
        raise InputError(f"x is {x.dtype}, expected float32 or the weight's {weight.dtype}")
    check_rows("bias", o.bias, slots, channels)
    check_rows("center", o.center, slots, channels)
    if o.activation:
        parsed(o.activation)
    size = window.sizes(*x.shape[2:4])
    if min(size) < 1:
        raise InputError(f"x has size {tuple(x.shape[2:4])}, on which no window {window.kernel} fits")
    check_size("the result", (groups, x.shape[1], *size, channels))
    return o, window


def depthwise_conv(
    x: Tensor, weight: Tensor, weight_index: Tensor, *, kernel: tuple[int, int], **options: Any
) -> DepthwiseOutput:
    """One depthwise convolution per group, with its own weight slot (equations above).

    Args:
        x, weight, weight_index: see :class:`DepthwiseOperands`; group g reads ``x[g]``, or ``x[0]`` where there is one.
        kernel: rows and columns of taps. Further options: the pairs ``stride`` (1, 1), ``padding`` (0, 0) and
            ``dilation`` (1, 1), ``precision`` as of every convolution ("ieee" or "tf32": float32 is never rounded
            here), and the other fields of :class:`DepthwiseOperands`.

    Raises:
        InputError: shapes that disagree, dtypes not among float32, float16 and bfloat16 (float64: reference only), and
            groups past 2^31 elements.
    """
    y, statistics = _depthwise_conv(*sum(depthwise_operands(x, weight, weight_index, kernel=kernel, **options), ()))
    return DepthwiseOutput(y, present(statistics))
