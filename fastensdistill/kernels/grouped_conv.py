"""Grouped convolution, forward: every group g convolves its own input with the weight of its own slot.

    u = in_scale · x + in_shift, then ReLU if in_relu          (zero padding comes after it)
    z = relu?( Σ_taps u[tap] · W[slots[g], tap] + bias + residual )
    activated = relu( next_scale · z + next_shift )
    mask = (activated > 0) or, without next_scale, (z > 0), one bit per value
    statistics = Σ (z − center), Σ (z − center)² per channel, one row per program, no atomics

Layouts: activations (G, N, H, W, C), weights (S, taps, Ci, Co), both contiguous. Accumulation in float32.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastensdistill.kernels.gather import gather_product, load_shortcut, store_bits
from fastensdistill.kernels.launch import BATCH_SIZES, launch, residual_sizes, row_stride, tl, triton
from fastensdistill.kernels.operands import (
    accumulator,
    check_pair,
    check_precision,
    check_rows,
    check_shortcut,
    check_tensor,
    out_size,
    require,
)
from fastensdistill.kernels.ops import absent, define, present
from fastensdistill.kernels.reference import pack_mask, partial_rows, pick, shortcut
from fastensdistill.kernels.tiles import Tile, conv_tile, device_arch


class ConvOutput(NamedTuple):
    z: Tensor  # (G, N, Ho, Wo, Co), the weight's dtype
    activated: Tensor | None  # like z
    mask: Tensor | None  # (G, N, Ho, Wo, ceil(Co/8)) uint8
    statistics: Tensor | None  # (G, P, 2, Co) float32: rows of partial sums


def _tile(x: Tensor, weight: Tensor) -> Tile:
    return conv_tile(device_arch(x), weight.shape[2], weight.shape[3], weight.element_size())


def conv_input(
    x: Tensor,
    slots: Tensor | None,
    inputs: Tensor | None,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_relu: bool,
    dtype: torch.dtype,
) -> Tensor:
    """u of the equations in ``dtype``, in plain PyTorch; without ``slots`` scale and shift are by group."""
    if inputs is not None:
        x = x[inputs.long()]
    if in_scale is not None and in_shift is not None:
        high = accumulator(dtype)
        x = x.to(high) * pick(in_scale, slots).to(high) + pick(in_shift, slots).to(high)
    return (x.relu() if in_relu else x).to(dtype)


def conv_epilogue(
    y: Tensor,
    slots: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_stride: int,
    relu: bool,
    next_scale: Tensor | None,
    next_shift: Tensor | None,
    center: Tensor | None,
    mask: bool,
    dtype: torch.dtype,
    rows: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What follows the product ``y`` (G, N, Ho, Wo, Co), in plain PyTorch: z in ``dtype``, activated, mask, statistics.

    ``rows`` makes the rows of partial sums, (G, N, Ho, Wo, Co) → (G, P, Co).
    """
    high = accumulator(dtype)
    if bias is not None:
        y = y + pick(bias, slots)
    if residual is not None:
        y = y + shortcut(residual, residual_stride, *y.shape[2:])
    z = (y.relu() if relu else y).to(dtype).contiguous()
    activated, bits, statistics = absent(z), z.new_empty(0, dtype=torch.uint8), z.new_empty(0, dtype=high)
    if next_scale is not None and next_shift is not None:
        activated = (z.to(high) * pick(next_scale, slots) + pick(next_shift, slots)).relu().to(dtype)
    if mask:
        bits = pack_mask((activated if next_scale is not None else z) > 0)
    if center is not None:
        rest = z.to(high) - pick(center, slots)
        statistics = torch.stack([rows(rest), rows(rest.square())], 2)
    return z, activated, bits, statistics


def grouped_conv_reference(
    x: Tensor,
    weight: Tensor,
    slots: Tensor,
    inputs: Tensor | None,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_relu: bool,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_stride: int,
    relu: bool,
    next_scale: Tensor | None,
    next_shift: Tensor | None,
    center: Tensor | None,
    mask: bool,
    kernel: int,
    stride: int,
    padding: int,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups, (slot_count, _, in_channels, out_channels) = slots.shape[0], weight.shape
    high = accumulator(weight.dtype)
    u = conv_input(x, slots, inputs, in_scale, in_shift, in_relu, weight.dtype).expand(groups, -1, -1, -1, -1)
    u = u.to(high).permute(1, 0, 4, 2, 3).flatten(1, 2)
    w = weight.to(high).view(slot_count, kernel, kernel, in_channels, out_channels).permute(0, 4, 3, 1, 2)
    y = F.conv2d(u, w[slots.long()].flatten(0, 1), stride=stride, padding=padding, groups=groups)
    y = y.unflatten(1, (groups, out_channels)).permute(1, 0, 3, 4, 2)
    return conv_epilogue(
        y, slots, bias, residual, residual_stride, relu, next_scale, next_shift, center, mask, weight.dtype,
        lambda values: partial_rows(values.flatten(1, 3), _tile(x, weight).BLOCK_M),
    )  # fmt: skip


@triton.jit(do_not_specialize=BATCH_SIZES)
def grouped_conv_kernel(
    p_x,
    p_w,
    p_slots,
    p_inputs,
    p_in_scale,
    p_in_shift,
    p_bias,
    p_residual,
    p_next_scale,
    p_next_shift,
    p_center,
    p_z,
    p_activated,
    p_mask,
    p_statistics,
    N,
    n_partials,
    s_in,
    s_bias,
    s_next,
    s_center,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    HO: tl.constexpr,
    WO: tl.constexpr,
    CO: tl.constexpr,
    HR: tl.constexpr,
    WR: tl.constexpr,
    CR: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    SHARED: tl.constexpr,
    IN_RELU: tl.constexpr,
    RELU: tl.constexpr,
    ROW_TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # blocks of channels are neighbours in the grid: they read the same positions out of L2
    N_BLOCKS: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N
    i_m = tl.program_id(0) // N_BLOCKS
    i_n = tl.program_id(0) % N_BLOCKS
    i_g = tl.program_id(1).to(tl.int64)
    i_slot = tl.load(p_slots + i_g).to(tl.int64)
    if not SHARED:
        i_input = i_g
        if p_inputs is not None:
            i_input = tl.load(p_inputs + i_g).to(tl.int64)
        p_x += i_input * N * (H * W * C)

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < N * (HO * WO)
    image = o_m // (HO * WO)
    i_oh = (o_m % (HO * WO)) // WO
    i_ow = o_m % WO
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < CO
    i_row = i_oh * STRIDE - PADDING
    i_column = i_ow * STRIDE - PADDING
    o_x = ((image * H + i_row) * W + i_column) * C
    if p_in_scale is not None:
        p_in_scale += i_slot * s_in
        p_in_shift += i_slot * s_in
    acc = gather_product(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
        p_x,
        p_w + i_slot * (KERNEL * KERNEL * C * CO),
        p_in_scale,
        p_in_shift,
        o_x,
        i_row,
        i_column,
        m_m,
        o_n,
        m_n,
        0,
        0,
        KERNEL,
        KERNEL,
        H,
        W,
        C,
        CO,
        KERNEL,
        1,
        BLOCK_K,
        ROW_TAPS,
        IN_RELU,
        PRECISION,
    )

    m_z = m_m[:, None] & m_n[None, :]
    if p_bias is not None:
        acc += tl.load(p_bias + i_slot * s_bias + o_n, mask=m_n, other=0.0)[None, :]
    if p_residual is not None:
        p_residual += i_g * N * (HR * WR * CR)
        acc += load_shortcut(p_residual, image, i_oh, i_ow, m_m, o_n, HR, WR, CR, RESIDUAL_STRIDE)
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    o_group = i_g * N * (HO * WO)
    o_z = o_m[:, None] * CO + o_n[None, :]
    b_z = acc.to(p_z.dtype.element_ty)
    tl.store(p_z + o_group * CO + o_z, b_z, mask=m_z)
    acc = b_z.to(tl.float32)
    if p_center is not None:
        b_center = tl.load(p_center + i_slot * s_center + o_n, mask=m_n, other=0.0)
        b_rest = tl.where(m_m[:, None], acc - b_center[None, :], 0.0)
        p_statistics += (i_g * n_partials + i_m) * (2 * CO)
        tl.store(p_statistics + o_n, tl.sum(b_rest, 0), mask=m_n)
        tl.store(p_statistics + CO + o_n, tl.sum(b_rest * b_rest, 0), mask=m_n)
    if p_next_scale is not None:
        b_scale = tl.load(p_next_scale + i_slot * s_next + o_n, mask=m_n, other=0.0)
        b_shift = tl.load(p_next_shift + i_slot * s_next + o_n, mask=m_n, other=0.0)
        acc = acc * b_scale[None, :] + b_shift[None, :]
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(p_activated + o_group * CO + o_z, acc.to(p_activated.dtype.element_ty), mask=m_z)
    if p_mask is not None:
        p_bits = p_mask + o_group * ((CO + 7) // 8)
        # the bit is of the value as stored: one too small for float16 is stored as 0
        b_positive = (acc.to(p_z.dtype.element_ty) > 0) & m_n[None, :]
        store_bits(p_bits, b_positive, o_m, m_m, i_n * BLOCK_N, CO, BLOCK_M, BLOCK_N)


def _launch(
    x, weight, slots, inputs, in_scale, in_shift, in_relu, bias, residual, residual_stride, relu,
    next_scale, next_shift, center, mask, kernel, stride, padding, precision,
):  # fmt: skip
    groups, (_, images, height, width, channels) = slots.shape[0], x.shape
    z, activated, bits, statistics = _empty_results(x, weight, slots, next_scale, center, mask, kernel, stride, padding)
    tile = _tile(x, weight)
    row_taps = kernel > 1 and kernel * channels <= 32  # 48 of 64: 15% more instructions, a program fewer
    if center is None or in_scale is not None:
        # Statistics need the limit (132 registers at 64 → 128 channels) and fit it. Most others hold two programs by
        # themselves; the rest would spill within it, 2 to 4 times behind ResNet-18's residuals, 19 in its 7x7 stem.
        tile = tile._replace(maxnreg=None, programs=0)
    rows = -(-images * z.shape[2] * z.shape[3] // tile.BLOCK_M)
    launch(
        grouped_conv_kernel,
        (rows * -(-z.shape[4] // tile.BLOCK_N), groups),
        tile,
        p_x=x,
        p_w=weight,
        p_slots=slots,
        p_inputs=inputs,
        p_in_scale=in_scale,
        p_in_shift=in_shift,
        p_bias=bias,
        p_residual=residual,
        p_next_scale=next_scale,
        p_next_shift=next_shift,
        p_center=center,
        p_z=z,
        p_activated=activated if next_scale is not None else None,
        p_mask=bits if mask else None,
        p_statistics=statistics if center is not None else None,
        N=images,
        n_partials=rows,
        s_in=row_stride(in_scale),
        s_bias=row_stride(bias),
        s_next=row_stride(next_scale),
        s_center=row_stride(center),
        H=height,
        W=width,
        C=channels,
        HO=z.shape[2],
        WO=z.shape[3],
        CO=z.shape[4],
        **residual_sizes(residual),
        RESIDUAL_STRIDE=residual_stride,
        KERNEL=kernel,
        STRIDE=stride,
        PADDING=padding,
        SHARED=x.shape[0] == 1,
        IN_RELU=in_relu,
        RELU=relu,
        ROW_TAPS=row_taps,
        PRECISION=precision,
        BLOCK_K=(16 if kernel * channels <= 16 else 32) if row_taps else tile.BLOCK_K,
    )
    return z, activated, bits, statistics


def _empty_results(x, weight, slots, next_scale, center, mask, kernel, stride, padding):
    groups, channels = slots.shape[0], weight.shape[3]
    height, width = (out_size(size, kernel, stride, padding) for size in x.shape[2:4])
    z = weight.new_empty(groups, x.shape[1], height, width, channels)
    rows = -(-x.shape[1] * height * width // _tile(x, weight).BLOCK_M)
    return (
        z,
        torch.empty_like(z) if next_scale is not None else absent(z),
        z.new_empty((*z.shape[:4], -(-channels // 8)) if mask else (0,), dtype=torch.uint8),
        z.new_empty((groups, rows, 2, channels) if center is not None else (0,), dtype=accumulator(weight.dtype)),
    )


def _grouped_conv_fake(
    x, weight, slots, inputs, in_scale, in_shift, in_relu, bias, residual, residual_stride, relu,
    next_scale, next_shift, center, mask, kernel, stride, padding, precision,
):  # fmt: skip
    return _empty_results(x, weight, slots, next_scale, center, mask, kernel, stride, padding)


_grouped_conv = define("grouped_conv", grouped_conv_reference, _grouped_conv_fake, _launch)


def grouped_conv(
    x: Tensor,
    weight: Tensor,
    slots: Tensor,
    *,
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    inputs: Tensor | None = None,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    in_relu: bool = False,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_stride: int = 1,
    relu: bool = False,
    next_scale: Tensor | None = None,
    next_shift: Tensor | None = None,
    center: Tensor | None = None,
    mask: bool = False,
    precision: str = "ieee",
) -> ConvOutput:
    """One convolution per group, with its own weight slot and a fused prologue and epilogue (equations above).

    ``x`` (Gx, N, H, W, Ci) in float32, or in the weight's dtype, which is also the dtype multiplied in and returned;
    ``weight`` (S, kernel², Ci, Co); ``slots`` int32 (G,), read on the device, gives each group's weight slot.
    Group g reads ``x[inputs[g]]`` (int32 (G,)), without ``inputs`` ``x[g]``, or ``x[0]`` where Gx = 1.
    ``in_scale, in_shift`` (S or 1, Ci), ``bias, next_scale, next_shift, center`` (S or 1, Co), float32, by slot.
    ``residual`` (G, N, Hr, Wr, Cr ≤ Co) is read at every ``residual_stride``-th position, missing channels being 0.
    ``center`` asks for ``statistics`` (G, P, 2, Co) about it, of z as stored; ``mask`` for the 1-bit ReLU mask.
    ``precision`` is how float32 is multiplied: "ieee" or "tf32". Raises InputError for shapes that disagree, dtypes
    not among float32, float16 and bfloat16 (float64: reference only), and groups past 2^31 elements.
    """
    check_tensor("x", x, 5)
    check_tensor("weight", weight, 4)
    check_precision(precision)
    groups, slot_count, out_channels = slots.shape[0], weight.shape[0], weight.shape[3]
    require(
        weight.shape[1] == kernel * kernel and weight.shape[2] == x.shape[4],
        f"weight has shape {tuple(weight.shape)}, expected (slots, {kernel * kernel}, {x.shape[4]}, channels)",
    )
    require(slots.dtype == torch.int32 and slots.dim() == 1, f"slots is {slots.dtype} of {slots.dim()} dimensions, "
            "expected int32 (groups,)")  # fmt: skip
    require(
        inputs is not None or x.shape[0] in (1, groups),
        f"x has {x.shape[0]} groups, expected {groups} or 1, or a map `inputs`",
    )
    require(
        x.dtype in (weight.dtype, torch.float32), f"x is {x.dtype}, expected float32 or the weight's {weight.dtype}"
    )
    check_pair("in_scale and in_shift", in_scale, in_shift, slot_count, x.shape[4])
    check_pair("next_scale and next_shift", next_scale, next_shift, slot_count, out_channels)
    check_rows("bias", bias, slot_count, out_channels)
    check_rows("center", center, slot_count, out_channels)
    height, width = (out_size(size, kernel, stride, padding) for size in x.shape[2:4])
    shape = (groups, x.shape[1], height, width, out_channels)
    check_tensor("the result", torch.empty(shape, device="meta"), 5)
    check_shortcut(residual, residual_stride, shape)
    z, activated, bits, statistics = _grouped_conv(
        x, weight, slots, inputs, in_scale, in_shift, in_relu, bias, residual, residual_stride, relu,
        next_scale, next_shift, center, mask, kernel, stride, padding, precision,
    )  # fmt: skip
    return ConvOutput(z, present(activated), present(bits), present(statistics))
