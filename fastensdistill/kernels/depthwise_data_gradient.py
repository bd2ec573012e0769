"""Depthwise convolution, gradient of the input, with what the backward pass does next.

    u[p] = Σ_taps d[(p + padding − tap · dilation) / stride] · W[weight_index[g], tap]    (only where it divides)
    u += residual (residual_first);   u = mask · u;   u = scale · u;   u += residual (otherwise)
    statistics = Σ u, Σ u · (z − mean) · inv_std per channel, one row per program, no atomics

The epilogue is that of ``elementwise_gradient``, its rows by weight slot.

At stride s the positions of one residue (row % s, column % s) use the same taps, 1 / s² of them. A program owns a strip
of 2 or 8 rows of d and what they spread to, s² results for each: the residues one after the other, with each one's taps
known when the kernel is compiled, so that no product is made that is 0 and d is read once, out of L1 for all residues
but the first. In bf16 that is 2 / s² bytes read for each value and 2 written, and what the epilogue reads: 2 for a
residual, 2 for z, 1/8 for a mask. At stride 1 the traffic is the forward pass's (``depthwise_conv.py``).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import grad as nn_grad

from fastensdistill.errors import InputError, unknown
from fastensdistill.kernels.conv_data_gradient import DataGradient, gradient_results
from fastensdistill.kernels.depthwise_conv import check_filters, filters
from fastensdistill.kernels.elementwise_gradient import (
    GradientEpilogue,
    check_epilogue,
    finish_gradient,
    gradient_epilogue,
    gradient_sums,
)
from fastensdistill.kernels.launch import BATCH_SIZES, launch, row_stride, sizes, tl, triton
from fastensdistill.kernels.operands import (
    DTYPE_NAMES,
    Rectangle,
    accumulator,
    check_precision,
    check_size,
    check_tensor,
    rectangle,
)
from fastensdistill.kernels.ops import define, present
from fastensdistill.kernels.reference import as_channels, as_groups
from fastensdistill.kernels.strips import first_tap, strip_product, strip_rows, tap_step, zero_strip
from fastensdistill.kernels.tiles import Tile, depthwise_tile, device_arch


class DepthwiseGradientOperands(NamedTuple):
    """What it is made of, beside its :class:`GradientEpilogue` (rows by slot) and :class:`Rectangle`."""

    d: Tensor  # (G, N, Ho, Wo, C), gradient of the convolution's output
    weight_flipped: Tensor  # (S, taps reversed, C, 1), in d's dtype
    weight_index: Tensor  # int32 (G,), the slot of each group
    height: int  # of the convolution's input, H
    width: int
    out_dtype: str  # of the result, such as "float32"


def _tile(o: DepthwiseGradientOperands, window: Rectangle) -> Tile:
    rows = -(-o.height // window.stride_h)
    halo = (window.kernel_h - 1) * window.dilation_h // window.stride_h
    # the loop over residues and all of the epilogue spill with 4 or 8 rows; with 2 they take 128 registers
    most = 8 if window.stride == (1, 1) else 2
    return depthwise_tile(device_arch(o.d), o.d.shape[4], rows, 1, halo, o.d.element_size(), most)


def depthwise_data_gradient_reference(
    o: DepthwiseGradientOperands, epilogue: GradientEpilogue, window: Rectangle
) -> tuple[Tensor, Tensor]:
    groups, images, high = len(o.weight_index), o.d.shape[1], accumulator(o.d.dtype)
    w = filters(o.weight_flipped[o.weight_index.long()].to(high).flip(1).flatten(2), window)
    size, d = [images, len(w), o.height, o.width], as_channels(o.d.to(high))
    u = nn_grad.conv2d_input(size, w, d, window.stride, window.padding, window.dilation, len(w))
    u = gradient_epilogue(as_groups(u, groups), o.weight_index, epilogue)
    out, tile = u.to(DTYPE_NAMES[o.out_dtype]).contiguous(), _tile(o, window)
    rows = tile.BLOCK_K * window.stride_h
    return out, gradient_sums(
        out, o.weight_index, epilogue, lambda values: strip_rows(values, rows, window.stride_w, tile.BLOCK_M)
    )


@triton.jit
def _residue(
    accs, p_d, p_weight_flipped, image, i_row, i_column, m_m, o_n, m_n, ROW: tl.constexpr, COLUMN: tl.constexpr,
    HO: tl.constexpr, WO: tl.constexpr, C: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the products of the positions ROW = row % stride + padding, and so COLUMN, to the strip's sums.

    Row r of d, counted from the strip's first, meets the j-th row of the residue by the tap with
    tap · dilation = (j − r) · stride + ROW.
    """
    FIRST: tl.constexpr = first_tap(COLUMN, STRIDE_W, DILATION_W, KERNEL_W)
    STEP: tl.constexpr = tap_step(STRIDE_W, DILATION_W)
    i_from = i_column + (COLUMN - FIRST * DILATION_W) // STRIDE_W
    return strip_product(
        accs, p_d, p_weight_flipped, ((image * HO + i_row) * WO + i_from) * C, i_row, i_from, m_m, o_n, m_n,
        HO, WO, C, KERNEL_H, KERNEL_W, BLOCK_K,
        (ROW - (KERNEL_H - 1) * DILATION_H) // STRIDE_H, BLOCK_K + ROW // STRIDE_H, -STRIDE_H, STRIDE_H, ROW,
        DILATION_H, FIRST, STEP, -(STEP * DILATION_W // STRIDE_W), True,
    )  # fmt: skip


@triton.jit(do_not_specialize=BATCH_SIZES)
def depthwise_data_gradient_kernel(
    p_d, p_weight_flipped, p_weight_index, p_residual, p_mask, p_scale, p_z, p_mean, p_inv_std, p_mask_scale,
    p_mask_shift, p_out, p_statistics,
    N, n_partials, s_scale, s_mean,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr,
    HR: tl.constexpr, WR: tl.constexpr, CR: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr, RESIDUAL_FIRST: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    N_BLOCKS: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    STRIPS: tl.constexpr = (H + BLOCK_K * STRIDE_H - 1) // (BLOCK_K * STRIDE_H)
    COLUMNS: tl.constexpr = (W + STRIDE_W - 1) // STRIDE_W
    i_m = tl.program_id(0) // N_BLOCKS
    i_n = tl.program_id(0) % N_BLOCKS
    i_g = tl.program_id(1).to(tl.int64)
    i_slot = tl.load(p_weight_index + i_g).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < N * (STRIPS * COLUMNS)
    image = o_m // (STRIPS * COLUMNS)
    i_row = (o_m % (STRIPS * COLUMNS)) // COLUMNS * BLOCK_K
    i_column = o_m % COLUMNS
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < C
    p_d += i_g * N * (HO * WO * C)
    p_weight_flipped += i_slot * (KERNEL_H * KERNEL_W * C)
    p_out += i_g * N * (H * W * C)
    if p_residual is not None:
        p_residual += i_g * N * (HR * WR * CR)
    if p_mask is not None:
        p_mask += i_g * N * (H * W) * ((C + 7) // 8)
    if p_scale is not None:
        p_scale += i_slot * s_scale
    if p_mask_scale is not None:
        p_mask_scale += i_slot * s_mean
        p_mask_shift += i_slot * s_mean
    if p_z is not None:
        p_z += i_g * N * (H * W * C)
        p_mean += i_slot * s_mean
        p_inv_std += i_slot * s_mean
        first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # one residue after the other, in a loop: unrolled, the compiler kept values of all of them and spilled
    for i_residue in range(STRIDE_H * STRIDE_W):
        accs = zero_strip(BLOCK_K, BLOCK_M, BLOCK_N)
        for u_h in tl.static_range(STRIDE_H):
            for u_w in tl.static_range(STRIDE_W):
                if i_residue == u_h * STRIDE_W + u_w:
                    accs = _residue(
                        accs, p_d, p_weight_flipped, image, i_row, i_column, m_m, o_n, m_n, u_h + PADDING_H,
                        u_w + PADDING_W, HO, WO, C, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, DILATION_H, DILATION_W,
                        BLOCK_K,
                    )  # fmt: skip
        i_w = i_column * STRIDE_W + i_residue % STRIDE_W
        for j in tl.static_range(BLOCK_K):
            i_h = (i_row + j) * STRIDE_H + i_residue // STRIDE_W
            b_d, b_product = finish_gradient(
                accs[j], p_residual, p_mask, p_scale, p_z, p_mean, p_inv_std, p_mask_scale, p_mask_shift, p_out,
                image, i_h, i_w, m_m & (i_h < H) & (i_w < W), i_n * BLOCK_N,
                H, W, C, HR, WR, CR, RESIDUAL_STRIDE, RESIDUAL_FIRST, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            if p_z is not None:
                first += b_d
                second += b_product
    if p_z is not None:
        p_statistics += (i_g * n_partials + i_m) * (2 * C)
        tl.store(p_statistics + o_n, tl.sum(first, 0), mask=m_n)
        tl.store(p_statistics + C + o_n, tl.sum(second, 0), mask=m_n)


def _rows(o: DepthwiseGradientOperands, window: Rectangle, tile: Tile) -> int:
    """Programs of a group's positions, and rows of partial sums."""
    strips, columns = -(-o.height // (tile.BLOCK_K * window.stride_h)), -(-o.width // window.stride_w)
    return -(-o.d.shape[1] * strips * columns // tile.BLOCK_M)


def _empty(o: DepthwiseGradientOperands, epilogue: GradientEpilogue, window: Rectangle) -> tuple[Tensor, Tensor]:
    shape = (o.weight_index.shape[0], o.d.shape[1], o.height, o.width, o.d.shape[4])
    like = o.d.new_empty(0, dtype=DTYPE_NAMES[o.out_dtype])
    return gradient_results(like, shape, _rows(o, window, _tile(o, window)), epilogue)


def _launch(o: DepthwiseGradientOperands, epilogue: GradientEpilogue, window: Rectangle) -> tuple[Tensor, Tensor]:
    out, statistics = _empty(o, epilogue, window)
    tile = _tile(o, window)
    rows = _rows(o, window, tile)
    launch(
        depthwise_data_gradient_kernel,
        (rows * -(-out.shape[4] // tile.BLOCK_N), out.shape[0]),
        tile,
        o,
        epilogue,
        window,
        p_out=out,
        p_statistics=present(statistics),
        N=out.shape[1],
        n_partials=rows,
        s_scale=row_stride(epilogue.scale),
        s_mean=row_stride(epilogue.mean),
        **sizes("H W C", out),
        HO=o.d.shape[2],
        WO=o.d.shape[3],
        **sizes("HR WR CR", epilogue.residual),
    )
    return out, statistics


_depthwise_data_gradient = define("depthwise_data_gradient", depthwise_data_gradient_reference, _empty, _launch)


def depthwise_data_gradient(
    d: Tensor,
    weight_flipped: Tensor,
    weight_index: Tensor,
    *,
    in_size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    out_dtype: torch.dtype | None = None,
    precision: str = "ieee",
    **options: Any,
) -> DataGradient:
    """Gradient of a depthwise convolution's input, with mask, scale, residual gradient and BatchNorm sums.

    Args:
        d, weight_flipped, weight_index: see :class:`DepthwiseGradientOperands`.
        in_size: (H, W) of the convolution's input. kernel, stride, padding, dilation: of rows and of columns.
        out_dtype: of the result (d's). precision: as of ``depthwise_conv``.
        options: the fields of :class:`GradientEpilogue`, rows by slot.

    Raises:
        InputError: shapes or dtypes that disagree, and oversized groups.
    """
    name = str(out_dtype or d.dtype).removeprefix("torch.")
    o = DepthwiseGradientOperands(d, weight_flipped, weight_index, *in_size, name)
    epilogue, window = GradientEpilogue(**options), rectangle(kernel, stride, padding, dilation)
    check_tensor("d", d, 5)
    check_filters("weight_flipped", weight_flipped, weight_index, (window.taps, d.shape[4], 1))
    check_precision(precision)
    groups = weight_index.shape[0]
    shape = (groups, d.shape[1], *in_size, d.shape[4])
    check_size("the result", shape)
    if d.shape[0] != groups:
        raise InputError(f"d has {d.shape[0]} groups, expected {groups} as weight_index has")
    if d.dtype != weight_flipped.dtype:
        raise InputError(f"d is {d.dtype}, expected the weight's {weight_flipped.dtype}")
    size = window.sizes(*in_size)
    if size != tuple(d.shape[2:4]):
        raise InputError(f"d has size {tuple(d.shape[2:4])}, expected {size} for input {in_size}")
    check_epilogue(shape, weight_flipped.shape[0], epilogue)
    if name not in DTYPE_NAMES:
        raise unknown("out_dtype", name, DTYPE_NAMES)
    out, statistics = _depthwise_data_gradient(*o, *epilogue, *window)
    return DataGradient(out, present(statistics))
