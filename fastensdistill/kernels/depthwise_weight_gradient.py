"""Depthwise convolution, gradient of the weights.

    dW[g, tap, c] = Σ over images and positions  x[position · stride − padding + tap · dilation, c] · d[position, c]

Positions are split over programs; their float32 partial results are added in a fixed order (no atomics), here or, where
there is memory for several, by whoever reads them.

A thread holds the sums of all taps of 2 or 4 channels in registers, up to 100 of them, over a run of positions: strips
of 4 rows of d (``strips.py``), each row of x read once per column of taps and multiplied with every row of d that
a tap leads to. So x and d, 4 bytes a value in bf16, come from memory once, beside them (rows + kernel − 1) / rows of x
out of L2 and that times the columns of taps out of L1; sums over positions are adds of one thread until a program's
end. Windows of more than 49 taps take several passes, blocks of the grid of their own.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import grad as nn_grad

from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import BATCH_SIZES, launch, sizes, tl, triton
from fastensdistill.kernels.operands import (
    Rectangle,
    accumulator,
    check_out,
    check_precision,
    check_tensor,
    rectangle,
)
from fastensdistill.kernels.ops import define, implementation
from fastensdistill.kernels.reference import as_channels, leave
from fastensdistill.kernels.strips import added, is_read, tap_of, zero_strip
from fastensdistill.kernels.sums import add_rows
from fastensdistill.kernels.tiles import DepthwiseSplit, depthwise_split, device_arch

FEW = 32  # partial results that one launch adds up: more are first brought down to so many, by more programs


class DepthwiseWeightOperands(NamedTuple):
    """What it is made of, beside its :class:`Rectangle`."""

    x: Tensor  # (G or 1, N, H, W, C), the forward pass's input, float32 or d's dtype
    d: Tensor  # (G, N, Ho, Wo, C), gradient of its output


def depthwise_weight_gradient_reference(o: DepthwiseWeightOperands, window: Rectangle, out: Tensor, add: bool) -> None:
    groups, high, channels = len(o.d), accumulator(o.d.dtype), len(o.d) * o.d.shape[4]
    x = o.x.to(o.d.dtype).to(high).expand(groups, -1, -1, -1, -1)
    size, places = [channels, 1, *window.kernel], (window.stride, window.padding, window.dilation)
    dw = nn_grad.conv2d_weight(as_channels(x), size, as_channels(o.d.to(high)), *places, channels)
    leave(dw.view(groups, -1, 1, window.taps).permute(0, 3, 2, 1), out, add)


@triton.jit(do_not_specialize=BATCH_SIZES)
def depthwise_weight_gradient_kernel(
    p_x, p_d, p_partial, N, steps,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    SHARED: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    N_BLOCKS: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    STRIPS: tl.constexpr = (HO + BLOCK_K - 1) // BLOCK_K
    PASSES: tl.constexpr = (KERNEL_W + TAPS_W - 1) // TAPS_W
    i_n = tl.program_id(0) % N_BLOCKS
    i_pass = tl.program_id(0) // N_BLOCKS
    first_row = i_pass // PASSES * TAPS_H
    first_column = i_pass % PASSES * TAPS_W
    i_split = tl.program_id(1)
    i_g = tl.program_id(2).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < C
    p_d += i_g * N * (HO * WO * C)
    if not SHARED:
        p_x += i_g * N * (H * W * C)
    o_m = i_split * steps * BLOCK_M + tl.arange(0, BLOCK_M)
    accs = zero_strip(TAPS_H * TAPS_W, BLOCK_M, BLOCK_N)
    for _ in range(steps):
        m_m = o_m < N * (STRIPS * WO)
        image = o_m // (STRIPS * WO)
        i_oh = (o_m % (STRIPS * WO)) // WO * BLOCK_K
        i_ow = o_m % WO
        o_d = ((image * HO + i_oh) * WO + i_ow) * C
        gradients = ()
        for j in tl.static_range(BLOCK_K):
            m_d = (m_m & (i_oh + j < HO))[:, None] & m_n[None, :]
            b_d = tl.load(p_d + ((o_d + j * (WO * C))[:, None] + o_n[None, :]), mask=m_d, other=0.0)
            gradients += (b_d.to(tl.float32),)  # type: ignore[assignment]
        i_row = i_oh * STRIDE_H - PADDING_H + first_row * DILATION_H
        for i_s in tl.static_range(TAPS_W):
            i_w = i_ow * STRIDE_W - PADDING_W + (first_column + i_s) * DILATION_W
            m_w = m_m & (i_w >= 0) & (i_w < W)
            o_x = ((image * H + i_row) * W + i_w) * C
            for r in tl.static_range((BLOCK_K - 1) * STRIDE_H + (TAPS_H - 1) * DILATION_H + 1):
                if is_read(r, -STRIDE_H, BLOCK_K, DILATION_H, 0, TAPS_H, TAPS_H):
                    m_x = m_w & (i_row + r >= 0) & (i_row + r < H)
                    o_r = (o_x + r * (W * C))[:, None] + o_n[None, :]
                    b_x = tl.load(p_x + o_r, mask=m_x[:, None] & m_n[None, :], other=0.0)
                    b_x = b_x.to(p_d.dtype.element_ty).to(tl.float32)
                    for j in tl.static_range(BLOCK_K):
                        if tap_of(r - STRIDE_H * j, DILATION_H, 0, TAPS_H, TAPS_H) >= 0:
                            accs = added(
                                accs,
                                tap_of(r - STRIDE_H * j, DILATION_H, 0, TAPS_H, TAPS_H) * TAPS_W + i_s,
                                b_x * gradients[j],
                            )
        o_m += BLOCK_M
    p_partial += (i_split.to(tl.int64) * tl.num_programs(2) + i_g) * (KERNEL_H * KERNEL_W * C)
    for i_r in tl.static_range(TAPS_H):
        for i_s in tl.static_range(TAPS_W):
            m_tap = (first_row + i_r < KERNEL_H) & (first_column + i_s < KERNEL_W)
            o_tap = ((first_row + i_r) * KERNEL_W + first_column + i_s) * C
            tl.store(p_partial + (o_tap + o_n), tl.sum(accs[i_r * TAPS_W + i_s], 0), mask=m_n & m_tap)


def _split(
    arch: int, groups: int, images: int, size: tuple[int, int], channels: int, window: Rectangle, itemsize: int
) -> DepthwiseSplit:
    """Of a result of ``size``."""
    halo = (window.kernel_h - 1) * window.dilation_h + 1 - window.stride_h
    return depthwise_split(arch, groups, images, size, channels, window.kernel, window.stride_h, halo, itemsize)


def _launch(o: DepthwiseWeightOperands, window: Rectangle, out: Tensor, add: bool) -> None:
    groups, images, height, width, channels = o.d.shape
    split = _split(device_arch(o.d), groups, images, (height, width), channels, window, o.d.element_size())
    steps, splits = split.steps, split.splits
    several = out.dim() == 5
    direct = not add and (several or splits == 1)
    if several and direct and len(out) != splits:
        steps, splits = -(-split.steps * splits // len(out)), len(out)
    partial = out if direct else o.d.new_empty(splits, groups, window.taps, channels, dtype=torch.float32)
    launch(
        depthwise_weight_gradient_kernel,
        (split.blocks, splits, groups),
        split.tile,
        o,
        window,
        p_partial=partial,
        N=images,
        steps=steps,
        **sizes("H W C", o.x),
        HO=height,
        WO=width,
        SHARED=o.x.shape[0] == 1,
        TAPS_H=split.taps[0],
        TAPS_W=split.taps[1],
    )
    if not direct:
        rows = partial.view(1, splits, -1)
        rows = add_rows(rows, FEW) if splits > FEW else rows
        add_rows(rows, 1, (out[0] if several else out).view(1, 1, -1), add)


_depthwise_weight_gradient = define(
    "depthwise_weight_gradient", depthwise_weight_gradient_reference, launcher=_launch, mutates=("out",)
)


class DepthwiseWeightShape(NamedTuple):
    """What decides how such a weight gradient is split, before there is anything to compute it of."""

    x: tuple[int, ...]  # G or 1, N, H, W, C
    groups: int
    window: Rectangle
    dtype: torch.dtype  # of d
    device: torch.device  # a meta device is taken for a GPU of the capability that is assumed (``assume_arch``)


def depthwise_gradient_partials(shape: DepthwiseWeightShape) -> int:
    """How many partial results ``depthwise_weight_gradient`` has of such operands: 1 where no kernel computes it."""
    _, images, height, width, channels = shape.x
    like = torch.empty(0, dtype=shape.dtype, device=shape.device)
    arch = device_arch(like)
    kernel = implementation("depthwise_weight_gradient", shape.device.type, shape.dtype) == "triton"
    if not kernel and not (shape.device.type == "meta" and arch and shape.dtype != torch.float64):
        return 1
    size, window = shape.window.sizes(height, width), shape.window
    return _split(arch, shape.groups, images, size, channels, window, like.element_size()).splits


def depthwise_weight_gradient(
    x: Tensor,
    d: Tensor,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    precision: str = "ieee",
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """Weight gradient (G, taps, 1, C), float32, of a depthwise convolution.

    Args:
        x, d: see :class:`DepthwiseWeightOperands`.
        kernel, stride, padding, dilation: of rows and of columns. precision: as of ``depthwise_conv``.
        out, add: memory for the result, and whether it goes on top of what that holds. Memory (n, G, taps, 1, C)
            receives n partial results that add up to it, some of which may be 0; with ``add`` all goes on top of the
            first.

    Raises:
        InputError: shapes or dtypes that disagree.
    """
    o, window = DepthwiseWeightOperands(x, d), rectangle(kernel, stride, padding, dilation)
    check_tensor("x", x, 5)
    check_tensor("d", d, 5)
    check_precision(precision)
    groups, size = d.shape[0], window.sizes(*x.shape[2:4])
    if not (x.shape[0] in (1, groups) and x.shape[1] == d.shape[1]):
        raise InputError(f"x has shape {tuple(x.shape)}, expected {groups} or 1 groups of {d.shape[1]} images")
    if (*size, x.shape[4]) != tuple(d.shape[2:]):
        raise InputError(f"d has shape {tuple(d.shape)}, expected size {size} and {x.shape[4]} channels for this x")
    if x.dtype not in (d.dtype, torch.float32):
        raise InputError(f"x is {x.dtype}, expected float32 or d's {d.dtype}")
    count = (len(out),) if out is not None and out.dim() == 5 else ()
    out = check_out("out", out, (*count, groups, window.taps, 1, x.shape[4]), d, add)
    _depthwise_weight_gradient(*o, *window, out, add)
    return out
