"""Grouped convolution, forward: every group g convolves its own input with the weight of its own slot.

    u = relu?( in_scale · x + in_shift )                        (zero padding comes after it)
    z = relu?( Σ_taps u[tap] · W[weight_index[g], tap] + second[· second_stride] · V[weight_index[g]]
               + bias + second_bias + residual )
    activated = relu( next_scale · z + next_shift )
    mask = (activated > 0) or, without next_scale, (z > 0), one bit per value
    statistics = Σ (z − center), Σ (z − center)² per channel, one row per program, no atomics

Layouts: activations (G, N, H, W, C), weights (S, taps, Ci, Co), both contiguous. Accumulation in float32; u is computed
in float32 and rounded once, to the weight's dtype. ``second`` with its weights V is a 1x1 convolution, a block's
shortcut, whose products are further terms of the same sum: the Triton kernel has none.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastensdistill.errors import InputError
from fastensdistill.kernels.gather import gather_product, load_shortcut, store_bits
from fastensdistill.kernels.launch import (
    BATCH_SIZES,
    KernelLaunch,
    issue,
    kernel_launch,
    row_stride,
    sizes,
    tl,
    triton,
)
from fastensdistill.kernels.operands import (
    Window,
    accumulator,
    check_pair,
    check_precision,
    check_rows,
    check_second,
    check_shortcut,
    check_size,
    check_tensor,
    refuse_operands,
)
from fastensdistill.kernels.ops import absent, define, present
from fastensdistill.kernels.reference import as_channels, as_groups, pack_mask, partial_rows, pick, shortcut
from fastensdistill.kernels.tiles import Tile, conv_tile, device_arch


class ConvOperands(NamedTuple):
    """What a convolution is made of, beside its :class:`Window`. Rows are by slot, or one that all slots share."""

    x: Tensor  # (G, N, H, W, Ci), or (1, N, H, W, Ci) that all groups read; float32, or the weight's dtype
    weight: Tensor  # (S, taps, Ci, Co), of the dtype multiplied in and returned
    weight_index: Tensor  # int32 (G,), the slot of each group
    in_scale: Tensor | None = None  # (S or 1, Ci) float32
    in_shift: Tensor | None = None
    bias: Tensor | None = None  # (S or 1, Co) float32
    residual: Tensor | None = None  # (G, N, Hr, Wr, Cr ≤ Co), missing channels being 0
    residual_stride: int = 1  # the residual is read at every such position
    relu: bool = False
    next_scale: Tensor | None = None  # (S or 1, Co) float32: asks for ``activated``
    next_shift: Tensor | None = None
    center: Tensor | None = None  # (S or 1, Co) float32: asks for ``statistics`` about it, of z as stored
    mask: bool = False  # asks for the 1-bit ReLU mask
    in_relu: bool = False  # after in_scale and in_shift
    second: Tensor | None = None  # (G or 1, N, Hs, Ws, Cs), the weight's dtype, ceil(Hs / second_stride) = Ho
    second_weight: Tensor | None = None  # (S, 1, Cs, Co)
    second_bias: Tensor | None = None  # (S or 1, Co) float32
    second_stride: int = 1  # second is read at every such position


class ConvOutput(NamedTuple):
    """What a convolution's launch stores: its value, a second output, bits of the ReLU, partial sums."""

    z: Tensor  # (G, N, Ho, Wo, Co), the weight's dtype
    activated: Tensor | None  # like z
    mask: Tensor | None  # (G, N, Ho, Wo, ceil(Co/8)) uint8
    statistics: Tensor | None  # (G, P, 2, Co) float32: rows of partial sums


Results = tuple[Tensor, Tensor, Tensor, Tensor]  # of a ``ConvOutput``, what nobody asked for empty


def conv_tile_of(x: Tensor, weight: Tensor) -> Tile:
    """The tile of a convolution of ``x``, or of the data gradient of ``x`` with ``weight`` flipped."""
    return conv_tile(device_arch(x), weight.shape[2], weight.shape[3], weight.element_size())


def conv_input(
    x: Tensor,
    groups: int,
    weight_index: Tensor | None,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_relu: bool,
    dtype: torch.dtype,
) -> Tensor:
    """u of the equations (G, N, H, W, Ci) in ``dtype``; without ``weight_index`` scale and shift are by group."""
    if in_scale is not None and in_shift is not None:
        x = x.to(accumulator(dtype)) * pick(in_scale, weight_index) + pick(in_shift, weight_index)
        x = x.relu() if in_relu else x
    return x.to(dtype).expand(groups, -1, -1, -1, -1)


def conv_epilogue(y: Tensor, o: ConvOperands, rows: Callable[[Tensor], Tensor]) -> Results:
    """What follows the product ``y`` (G, N, Ho, Wo, Co), in plain PyTorch.

    ``rows`` makes the rows of partial sums, (G, N, Ho, Wo, Co) → (G, P, Co).
    """
    dtype, high = o.weight.dtype, accumulator(o.weight.dtype)
    if o.bias is not None:
        y = y + pick(o.bias, o.weight_index)
    if o.second_bias is not None:
        y = y + pick(o.second_bias, o.weight_index)
    if o.residual is not None:
        y = y + shortcut(o.residual, o.residual_stride, *y.shape[2:])
    z = (y.relu() if o.relu else y).to(dtype).contiguous()
    activated, bits, statistics = absent(z), absent(z, torch.uint8), absent(z, high)
    if o.next_scale is not None and o.next_shift is not None:
        activated = z.to(high) * pick(o.next_scale, o.weight_index) + pick(o.next_shift, o.weight_index)
        activated = activated.relu().to(dtype)
    if o.mask:
        bits = pack_mask((z if o.next_scale is None else activated) > 0)
    if o.center is not None:
        rest = z.to(high) - pick(o.center, o.weight_index)
        statistics = torch.stack([rows(rest), rows(rest.square())], 2)
    return z, activated, bits, statistics


def grouped_conv_reference(o: ConvOperands, window: Window, precision: str) -> Results:
    groups, high, kernel = o.weight_index.shape[0], accumulator(o.weight.dtype), window.kernel
    u = conv_input(o.x, groups, o.weight_index, o.in_scale, o.in_shift, o.in_relu, o.weight.dtype)
    w = o.weight[o.weight_index.long()].to(high).unflatten(1, (kernel, kernel)).permute(0, 4, 3, 1, 2).flatten(0, 1)
    y = F.conv2d(as_channels(u.to(high)), w, stride=window.stride, padding=window.padding, groups=groups)
    if o.second is not None and o.second_weight is not None:
        v = o.second_weight[o.weight_index.long()].to(high).permute(0, 3, 2, 1).flatten(0, 1)[..., None]
        x = as_channels(o.second.to(high).expand(groups, -1, -1, -1, -1))
        y = y + F.conv2d(x, v, stride=o.second_stride, groups=groups)
    block = conv_tile_of(o.x, o.weight).BLOCK_M
    return conv_epilogue(as_groups(y, groups), o, lambda values: partial_rows(values.flatten(1, 3), block))


@triton.jit
def conv_program(
    i_g,
    p_x, p_weight, p_weight_index, p_in_scale, p_in_shift, p_bias, p_residual, p_next_scale, p_next_shift, p_center,
    p_z, p_activated, p_mask, p_statistics,
    N, n_partials, s_in, s_bias, s_next, s_center,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr, CO: tl.constexpr,
    HR: tl.constexpr, WR: tl.constexpr, CR: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    SHARED: tl.constexpr, IN_RELU: tl.constexpr, RELU: tl.constexpr, ROW_TAPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The program of group ``i_g``, int64; its position in the grid's first axis says which of the group's blocks."""
    # blocks of channels are neighbours in the grid: they read the same positions out of L2
    N_BLOCKS: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N
    i_m = tl.program_id(0) // N_BLOCKS
    i_n = tl.program_id(0) % N_BLOCKS
    i_slot = tl.load(p_weight_index + i_g).to(tl.int64)
    if not SHARED:
        p_x += i_g * N * (H * W * C)

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
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), p_x, p_weight + i_slot * (KERNEL * KERNEL * C * CO),
        p_in_scale, p_in_shift, o_x, i_row, i_column, m_m, o_n, m_n, 0, 0, KERNEL, KERNEL,
        H, W, C, CO, KERNEL, 1, BLOCK_K, ROW_TAPS, PRECISION, IN_RELU,
    )  # fmt: skip

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


@triton.jit(do_not_specialize=BATCH_SIZES)
def grouped_conv_kernel(
    p_x, p_weight, p_weight_index, p_in_scale, p_in_shift, p_bias, p_residual, p_next_scale, p_next_shift, p_center,
    p_z, p_activated, p_mask, p_statistics,
    N, n_partials, s_in, s_bias, s_next, s_center,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr, CO: tl.constexpr,
    HR: tl.constexpr, WR: tl.constexpr, CR: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    SHARED: tl.constexpr, IN_RELU: tl.constexpr, RELU: tl.constexpr, ROW_TAPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    conv_program(
        tl.program_id(1).to(tl.int64),
        p_x, p_weight, p_weight_index, p_in_scale, p_in_shift, p_bias, p_residual, p_next_scale, p_next_shift, p_center,
        p_z, p_activated, p_mask, p_statistics,
        N, n_partials, s_in, s_bias, s_next, s_center,
        H, W, C, HO, WO, CO,
        HR, WR, CR, RESIDUAL_STRIDE,
        KERNEL, STRIDE, PADDING,
        SHARED, IN_RELU, RELU, ROW_TAPS, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


def conv_results(o: ConvOperands, window: Window, rows: int) -> Results:
    """The results unwritten, with so many rows of partial sums per group."""
    channels = o.weight.shape[3]
    z = o.weight.new_empty(o.weight_index.shape[0], o.x.shape[1], *window.sizes(o.x), channels)
    return (
        z,
        torch.empty_like(z) if o.next_scale is not None else absent(z),
        z.new_empty((*z.shape[:4], -(-channels // 8)) if o.mask else (0,), dtype=torch.uint8),
        z.new_empty((z.shape[0], rows, 2, channels) if o.center is not None else (0,), dtype=accumulator(z.dtype)),
    )


def _rows(o: ConvOperands, window: Window) -> int:
    height, width = window.sizes(o.x)
    return -(-o.x.shape[1] * height * width // conv_tile_of(o.x, o.weight).BLOCK_M)


def conv_empty(o: ConvOperands, window: Window, precision: str) -> Results:
    """The results unwritten."""
    return conv_results(o, window, _rows(o, window))


def conv_launch(o: ConvOperands, window: Window, precision: str) -> tuple[KernelLaunch, Results]:
    """The kernel's launch, and the results that it writes."""
    refuse_operands("grouped_conv's Triton kernel", second=o.second)
    rows, tile, taps = _rows(o, window), conv_tile_of(o.x, o.weight), window.kernel * o.x.shape[4]
    z, activated, bits, statistics = conv_results(o, window, rows)
    row_taps = window.kernel > 1 and taps <= 32  # 48 of 64: 15% more instructions, a program fewer
    if o.center is None or o.in_scale is not None:
        # Statistics need the limit (132 registers at 64 → 128 channels) and fit it. Most others hold two programs by
        # themselves; the rest would spill within it, 2 to 4 times behind ResNet-18's residuals, 19 in its 7x7 stem.
        tile = tile._replace(maxnreg=None, programs=0)
    one = kernel_launch(
        grouped_conv_kernel,
        (rows * -(-z.shape[4] // tile.BLOCK_N), z.shape[0]),
        tile,
        o,
        window,
        p_z=z,
        p_activated=present(activated),
        p_mask=present(bits),
        p_statistics=present(statistics),
        N=z.shape[1],
        n_partials=rows,
        s_in=row_stride(o.in_scale),
        s_bias=row_stride(o.bias),
        s_next=row_stride(o.next_scale),
        s_center=row_stride(o.center),
        **sizes("H W C", o.x),
        **sizes("HO WO CO", z),
        **sizes("HR WR CR", o.residual),
        SHARED=o.x.shape[0] == 1,
        ROW_TAPS=row_taps,
        PRECISION=precision,
        BLOCK_K=(16 if taps <= 16 else 32) if row_taps else tile.BLOCK_K,
    )
    return one, (z, activated, bits, statistics)


def _launch(o: ConvOperands, window: Window, precision: str) -> Results:
    one, results = conv_launch(o, window, precision)
    issue(one)
    return results


_grouped_conv = define("grouped_conv", grouped_conv_reference, conv_empty, _launch)


def conv_operands(
    x: Tensor,
    weight: Tensor,
    weight_index: Tensor,
    *,
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    precision: str = "ieee",
    **options: Any,
) -> tuple[ConvOperands, Window, str]:
    """The operands of a convolution, checked; ``options`` are the further fields of :class:`ConvOperands`."""
    o, window = ConvOperands(x, weight, weight_index, **options), Window(kernel, stride, padding)
    check_tensor("x", x, 5)
    check_tensor("weight", weight, 4)
    check_precision(precision)
    if not (weight.shape[1] == kernel * kernel and weight.shape[2] == x.shape[4]):
        raise InputError(
            f"weight has shape {tuple(weight.shape)}, expected (slots, {kernel * kernel}, {x.shape[4]}, channels)"
        )
    if not (weight_index.dtype == torch.int32 and weight_index.dim() == 1):
        raise InputError(
            f"weight_index is {weight_index.dtype} of {weight_index.dim()} dimensions, expected int32 (groups,)"
        )
    groups, slots, channels = weight_index.shape[0], weight.shape[0], weight.shape[3]
    if x.shape[0] not in (1, groups):
        raise InputError(f"x has {x.shape[0]} groups, expected {groups} or 1")
    if x.dtype not in (weight.dtype, torch.float32):
        raise InputError(f"x is {x.dtype}, expected float32 or the weight's {weight.dtype}")
    check_pair("in_scale and in_shift", o.in_scale, o.in_shift, slots, x.shape[4])
    check_pair("next_scale and next_shift", o.next_scale, o.next_shift, slots, channels)
    check_rows("bias", o.bias, slots, channels)
    check_rows("center", o.center, slots, channels)
    shape = (groups, x.shape[1], *window.sizes(x), channels)
    check_size("the result", shape)
    check_shortcut(o.residual, o.residual_stride, shape)
    if o.in_relu and o.in_scale is None:
        raise InputError("in_relu is given without in_scale and in_shift, after which it comes")
    check_second(o.second, o.second_weight, o.second_stride, shape, slots, weight.dtype)
    if o.second_bias is not None and o.second is None:
        raise InputError("second_bias is given without second")
    check_rows("second_bias", o.second_bias, slots, channels)
    return o, window, precision


def conv_output(z: Tensor, *rest: Tensor) -> ConvOutput:
    """An op's results, what is empty as None."""
    return ConvOutput(z, *map(present, rest))


def grouped_conv(x: Tensor, weight: Tensor, weight_index: Tensor, *, kernel: int, **options: Any) -> ConvOutput:
    """One convolution per group, with its own weight slot and a fused prologue and epilogue (equations above).

    Args:
        x, weight, weight_index: see :class:`ConvOperands`; group g reads ``x[g]``, or ``x[0]`` where there is one.
        kernel: its side. Further options: ``stride`` 1, ``padding`` 0, ``precision`` (how float32 is multiplied: "ieee"
            or "tf32"), and the other fields of :class:`ConvOperands`.

    Raises:
        InputError: shapes that disagree, dtypes not among float32, float16 and bfloat16 (float64: reference only), and
            groups past 2^31 elements.
    """
    o, window, precision = conv_operands(x, weight, weight_index, kernel=kernel, **options)
    return conv_output(*_grouped_conv(*o, *window, precision))
