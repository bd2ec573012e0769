"""Grouped convolution, gradient of the weights.

    u = relu?( in_scale · x + in_shift )                        (zero padding comes after it)
    d = norm_a · d + norm_b · norm_z + norm_c
    dW[g, tap, i, o] = Σ over images and positions  u[position · stride − padding + tap, i] · d[position, o]

Positions are split over programs; their float32 partial results are added in a fixed order (no atomics), here or, where
there is memory for several, by whoever reads them.
u and d are computed in float32 and rounded once, to d's dtype. The second line is the gradient of a training-mode
BatchNorm behind the convolution; the Triton kernel does not compute it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import grad as nn_grad

from fastensdistill.errors import InputError
from fastensdistill.kernels.grouped_conv import conv_input
from fastensdistill.kernels.launch import BATCH_SIZES, launch, row_stride, sizes, tl, triton
from fastensdistill.kernels.operands import (
    Window,
    accumulator,
    check_norm,
    check_out,
    check_pair,
    check_precision,
    check_tensor,
    out_size,
    refuse_operands,
)
from fastensdistill.kernels.ops import define, implementation
from fastensdistill.kernels.reference import as_channels, leave, through_norm
from fastensdistill.kernels.sums import add_rows
from fastensdistill.kernels.tiles import device_arch, weight_gradient_split


class WeightGradientOperands(NamedTuple):
    """What a weight gradient is made of, beside its :class:`Window`."""

    x: Tensor  # (G or 1, N, H, W, Ci), the forward pass's input, float32 or d's dtype
    d: Tensor  # (G, N, Ho, Wo, Co), gradient of its output
    in_scale: Tensor | None  # (G or 1, Ci) float32, here by group
    in_shift: Tensor | None
    in_relu: bool = False  # after in_scale and in_shift
    norm_z: Tensor | None = None  # like d
    norm_a: Tensor | None = None  # (G or 1, Co) float32, by group, and so the next two
    norm_b: Tensor | None = None
    norm_c: Tensor | None = None


def conv_weight_gradient_reference(
    o: WeightGradientOperands, window: Window, precision: str, out: Tensor, add: bool
) -> None:
    groups, channels, high, kernel = len(o.d), o.x.shape[4], accumulator(o.d.dtype), window.kernel
    u = conv_input(o.x, groups, None, o.in_scale, o.in_shift, o.in_relu, o.d.dtype)
    size = [groups * o.d.shape[4], channels, kernel, kernel]
    d = through_norm(o.d, o.norm_z, o.norm_a, o.norm_b, o.norm_c)
    u, d = as_channels(u.to(high)), as_channels(d.to(high))
    dw = nn_grad.conv2d_weight(u, size, d, window.stride, window.padding, groups=groups)
    leave(dw.view(groups, -1, channels, kernel * kernel).permute(0, 3, 2, 1), out, add)


@triton.jit(do_not_specialize=BATCH_SIZES)
def conv_weight_gradient_kernel(
    p_x, p_d, p_in_scale, p_in_shift, p_partial, N, steps, s_in,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr, CO: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, SHARED: tl.constexpr, IN_RELU: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # rows: taps x input channels; columns: output channels; depth: positions, a run of them per program
    N_BLOCKS: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N
    i_m = tl.program_id(0) // N_BLOCKS
    i_n = tl.program_id(0) % N_BLOCKS
    i_split = tl.program_id(1)
    i_g = tl.program_id(2).to(tl.int64)
    TAPS: tl.constexpr = KERNEL * KERNEL
    # few channels: one block of rows covers several taps, and the borders are tested per row
    SEVERAL_TAPS: tl.constexpr = C < BLOCK_M
    if SEVERAL_TAPS:
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < TAPS * C
        i_channel = o_m % C
        tap_row = ((o_m // C) // KERNEL)[None, :]
        tap_column = ((o_m // C) % KERNEL)[None, :]
        o_out = o_m
    else:
        C_BLOCKS: tl.constexpr = (C + BLOCK_M - 1) // BLOCK_M
        tap = i_m // C_BLOCKS
        i_channel = (i_m % C_BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = i_channel < C
        tap_row = tap // KERNEL
        tap_column = tap % KERNEL
        o_out = tap * C + i_channel
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < CO
    i_first = i_split * steps * BLOCK_K
    o_k = tl.arange(0, BLOCK_K)
    p_d += i_g * N * (HO * WO * CO)
    o_k += i_first
    # image, row and column of each position are carried from step to step instead of divided out again; where x is as
    # large as d, its offsets are as fixed as d's, and of the coordinates only those that change are carried
    SAME_SIZE: tl.constexpr = STRIDE == 1 and H == HO and W == WO
    STEP_IMAGES: tl.constexpr = BLOCK_K // (HO * WO)
    STEP_ROWS: tl.constexpr = (BLOCK_K % (HO * WO)) // WO
    STEP_COLUMNS: tl.constexpr = BLOCK_K % WO
    image = o_k // (HO * WO)
    i_oh = (o_k % (HO * WO)) // WO
    i_ow = o_k % WO
    o_tap = (tap_row * W + tap_column) * C
    if not SHARED:
        p_x += i_g * N * (H * W * C)
    if p_in_scale is not None:
        b_scale = tl.load(p_in_scale + i_g * s_in + i_channel, mask=m_m, other=0.0)[None, :]
        b_shift = tl.load(p_in_shift + i_g * s_in + i_channel, mask=m_m, other=0.0)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(steps):
        m_k = o_k < N * (HO * WO)
        i_row = i_oh * STRIDE - PADDING
        i_column = i_ow * STRIDE - PADDING
        o_x = (o_k - (PADDING * W + PADDING)) * C if SAME_SIZE else ((image * H + i_row) * W + i_column) * C
        m_x = m_k[:, None] & m_m[None, :]
        if KERNEL > 1 or PADDING > 0:
            i_h = i_row[:, None] + tap_row
            i_w = i_column[:, None] + tap_column
            m_x = m_x & (i_h >= 0) & (i_h < H) & (i_w >= 0) & (i_w < W)
        b_x = tl.load(p_x + ((o_x[:, None] + o_tap) + i_channel[None, :]), mask=m_x, other=0.0)
        if p_in_scale is not None:
            b_u = b_x.to(tl.float32) * b_scale + b_shift
            if IN_RELU:
                b_u = tl.maximum(b_u, 0.0, propagate_nan=tl.PropagateNan.ALL)
            b_x = tl.where(m_x, b_u, 0.0)
        b_d = tl.load(p_d + (o_k[:, None] * CO + o_n[None, :]), mask=m_k[:, None] & m_n[None, :], other=0.0)
        acc = tl.dot(tl.trans(b_x.to(b_d.dtype)), b_d, acc, input_precision=PRECISION)
        o_k += BLOCK_K
        if STEP_COLUMNS > 0:
            i_ow += STEP_COLUMNS
            wrap = i_ow >= WO
            i_ow = tl.where(wrap, i_ow - WO, i_ow)
            i_oh += STEP_ROWS + wrap.to(tl.int32)
        elif STEP_ROWS > 0:
            i_oh += STEP_ROWS
        image += STEP_IMAGES
        if STEP_ROWS > 0 or STEP_COLUMNS > 0:
            wrap = i_oh >= HO
            i_oh = tl.where(wrap, i_oh - HO, i_oh)
            image += wrap.to(tl.int32)
    p_partial += (i_split.to(tl.int64) * tl.num_programs(2) + i_g) * (TAPS * C * CO)
    tl.store(p_partial + (o_out[:, None] * CO + o_n[None, :]), acc, mask=m_m[:, None] & m_n[None, :])


def _launch(o: WeightGradientOperands, window: Window, precision: str, out: Tensor, add: bool) -> None:
    refuse_operands("conv_weight_gradient's Triton kernel", norm_z=o.norm_z)
    (groups, images, height, width, out_channels), channels = o.d.shape, o.x.shape[4]
    taps = window.kernel**2
    tile, blocks, steps, splits = weight_gradient_split(
        device_arch(o.d), groups, images * height * width, taps, channels, out_channels, o.d.element_size()
    )
    several = out.dim() == 5
    direct = not add and (several or splits == 1)
    if several and direct and len(out) != splits:
        splits = len(out)
        steps = -(-images * height * width // (tile.BLOCK_K * splits))
    # a kernel that could add would hold half the programs at 128 channels: 180 registers instead of 108
    partial = out if direct else o.d.new_empty(splits, groups, taps * channels, out_channels, dtype=torch.float32)
    launch(
        conv_weight_gradient_kernel,
        (blocks, splits, groups),
        tile,
        o,
        window,
        p_partial=partial,
        N=images,
        steps=steps,
        s_in=row_stride(o.in_scale),
        **sizes("H W C", o.x),
        **sizes("HO WO CO", o.d),
        SHARED=o.x.shape[0] == 1,
        PRECISION=precision,
    )
    if not direct:
        add_rows(partial.view(1, splits, -1), 1, (out[0] if several else out).view(1, 1, -1), add)


_conv_weight_gradient = define(
    "conv_weight_gradient", conv_weight_gradient_reference, launcher=_launch, mutates=("out",)
)


class WeightGradientShape(NamedTuple):
    """What decides how a weight gradient is split, before there is anything to compute it of."""

    x: tuple[int, ...]  # G or 1, N, H, W, Ci
    groups: int
    out_channels: int
    window: Window
    dtype: torch.dtype  # of d
    device: torch.device  # a meta device is taken for a GPU of the capability that is assumed (``assume_arch``)
    normed: bool = False  # norm_z and its coefficients are given


def weight_gradient_partials(shape: WeightGradientShape) -> int:
    """How many partial results ``conv_weight_gradient`` has of such operands: 1 where no kernel computes it."""
    _, images, height, width, channels = shape.x
    like = torch.empty(0, dtype=shape.dtype, device=shape.device)
    arch = device_arch(like)
    kernel = implementation("conv_weight_gradient", shape.device.type, shape.dtype) == "triton"
    if not kernel and not (shape.device.type == "meta" and arch and shape.dtype != torch.float64):
        return 1
    rows, columns = (out_size(size, *shape.window) for size in (height, width))
    positions, taps = images * rows * columns, shape.window.kernel**2
    return weight_gradient_split(
        arch, shape.groups, positions, taps, channels, shape.out_channels, like.element_size()
    ).splits


def weight_gradient_operands(
    x: Tensor,
    d: Tensor,
    *,
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    precision: str = "ieee",
    out: Tensor | None = None,
    add: bool = False,
    several: bool = False,
    **options: Any,
) -> tuple[WeightGradientOperands, Window, str, Tensor, bool]:
    """The operands of a weight gradient, checked, and where it goes.

    ``several``: ``out`` may have a first dimension more, for partial results. ``options`` are the further fields of
    :class:`WeightGradientOperands`.
    """
    o, window = WeightGradientOperands(x, d, in_scale, in_shift, **options), Window(kernel, stride, padding)
    check_tensor("x", x, 5)
    check_tensor("d", d, 5)
    check_precision(precision)
    groups, size = d.shape[0], window.sizes(x)
    if not (x.shape[0] in (1, groups) and x.shape[1] == d.shape[1]):
        raise InputError(f"x has shape {tuple(x.shape)}, expected {groups} or 1 groups of {d.shape[1]} images")
    if size != tuple(d.shape[2:4]):
        raise InputError(f"d has size {tuple(d.shape[2:4])}, expected {size} for this x")
    if x.dtype not in (d.dtype, torch.float32):
        raise InputError(f"x is {x.dtype}, expected float32 or d's {d.dtype}")
    check_pair("in_scale and in_shift", in_scale, in_shift, groups, x.shape[4])
    if o.in_relu and in_scale is None:
        raise InputError("in_relu is given without in_scale and in_shift, after which it comes")
    check_norm(d, o.norm_z, o.norm_a, o.norm_b, o.norm_c)
    count = (len(out),) if several and out is not None and out.dim() == 5 else ()
    out = check_out("out", out, (*count, groups, kernel * kernel, x.shape[4], d.shape[4]), d, add)
    return o, window, precision, out, add


def conv_weight_gradient(x: Tensor, d: Tensor, *, kernel: int, **options: Any) -> Tensor:
    """Weight gradient (G, taps, Ci, Co), float32, of a grouped convolution.

    Args:
        x, d: see :class:`WeightGradientOperands`.
        kernel: its side. Further options: ``stride`` 1, ``padding`` 0, the prologue ``in_scale, in_shift, in_relu`` of
            the forward pass and the other fields of :class:`WeightGradientOperands`, ``precision`` (how float32 is
            multiplied: "ieee" or "tf32"), ``out``, memory for the result, and ``add``: on top of what it holds. Memory
            (n, G, taps, Ci, Co) receives n partial results that add up to it, some of which may be 0; with ``add`` all
            goes on top of the first.

    Raises:
        InputError: shapes or dtypes that disagree.
    """
    o, window, precision, out, add = weight_gradient_operands(x, d, kernel=kernel, several=True, **options)
    _conv_weight_gradient(*o, *window, precision, out, add)
    return out
