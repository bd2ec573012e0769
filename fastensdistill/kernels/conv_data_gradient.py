"""Grouped convolution, gradient of the input, with what the backward pass does next.

    d = norm_a · d + norm_b · norm_z + norm_c                                             (zero padding comes after it)
    u = Σ_taps d[(position + padding − tap) / stride] · W[weight_index[g], tap]ᵀ          (only where it divides)
    u += second[position / second_stride] · V[weight_index[g]]ᵀ                           (only where it divides)
    u += residual (residual_first);   u = mask · u;   u = scale · u;   u += residual (otherwise)
    statistics = Σ u, Σ u · (z − mean) · inv_std per channel, one row per program, no atomics

``mask`` is the 1-bit ReLU mask of the forward pass, or comes from z. ``scale`` belongs to an eval BatchNorm in front of
that ReLU; in training mode ``z, mean, inv_std`` ask for the two sums which ``batch_norm_backward`` needs instead.
The first line is the gradient of a training-mode BatchNorm behind the convolution, computed in float32 and rounded
once, to d's dtype. ``second`` is the gradient of the output of a 1x1 convolution with weights V that reads the same
input, a block's shortcut. The Triton kernel has neither.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as nn_grad

from fastensdistill.errors import InputError, unknown
from fastensdistill.kernels.elementwise_gradient import (
    GradientEpilogue,
    check_epilogue,
    finish_gradient,
    gradient_epilogue,
    gradient_sums,
)
from fastensdistill.kernels.gather import column_halves, gather_product
from fastensdistill.kernels.grouped_conv import conv_tile_of
from fastensdistill.kernels.launch import BATCH_SIZES, launch, row_stride, sizes, tl, triton
from fastensdistill.kernels.operands import (
    DTYPE_NAMES,
    Window,
    accumulator,
    check_norm,
    check_precision,
    check_second,
    check_size,
    check_tensor,
    out_size,
    refuse_operands,
)
from fastensdistill.kernels.ops import define, present
from fastensdistill.kernels.reference import as_channels, as_groups, partial_rows, through_norm


class DataGradientOperands(NamedTuple):
    """What a data gradient is made of, beside its :class:`GradientEpilogue` (rows by slot) and :class:`Window`."""

    d: Tensor  # (G, N, Ho, Wo, Co), gradient of the convolution's output
    weight_flipped: Tensor  # (S, taps reversed, Co, Ci), as ``flip_weight`` packs it, in d's dtype
    weight_index: Tensor  # int32 (G,), the slot of each group
    height: int  # of the convolution's input, H
    width: int
    out_dtype: str  # of the result, such as "float32"
    second: Tensor | None = None  # (G, N, ceil(H / second_stride), ceil(W / second_stride), C2), in d's dtype
    second_weight: Tensor | None = None  # (S, 1, C2, Ci), packed as weight_flipped
    second_stride: int = 1  # its products are added at every such position
    norm_z: Tensor | None = None  # like d
    norm_a: Tensor | None = None  # (G or 1, Co) float32, by group, and so the next two
    norm_b: Tensor | None = None
    norm_c: Tensor | None = None


SOURCES = tuple(DataGradientOperands._field_defaults)  # what else there is to load than d


class DataGradient(NamedTuple):
    """The gradient of a convolution's input after the epilogue, and its partial sums."""

    d: Tensor  # (G, N, H, W, Ci)
    statistics: Tensor | None  # (G, P, 2, Ci) float32: rows of partial sums


def flip_weight(weight: Tensor) -> Tensor:
    """(S, taps, Ci, Co) → (S, taps reversed, Co, Ci): the packing that the data gradient reads."""
    return weight.flip(1).transpose(2, 3).contiguous()


def conv_data_gradient_reference(
    o: DataGradientOperands, epilogue: GradientEpilogue, window: Window, precision: str
) -> tuple[Tensor, Tensor]:
    groups, images = o.d.shape[:2]
    high, kernel = accumulator(o.d.dtype), window.kernel
    w = o.weight_flipped[o.weight_index.long()].to(high).flip(1).unflatten(1, (kernel, kernel))
    size = [images, groups * w.shape[4], o.height, o.width]
    w = w.permute(0, 3, 4, 1, 2).flatten(0, 1)
    d = through_norm(o.d, o.norm_z, o.norm_a, o.norm_b, o.norm_c).to(high)
    u = nn_grad.conv2d_input(size, w, as_channels(d), window.stride, window.padding, groups=groups)
    if o.second is not None and o.second_weight is not None:
        v = o.second_weight[o.weight_index.long()].to(high).permute(0, 2, 3, 1).flatten(0, 1)[..., None]
        u = u + nn_grad.conv2d_input(size, v, as_channels(o.second.to(high)), o.second_stride, 0, groups=groups)
    u = gradient_epilogue(as_groups(u, groups), o.weight_index, epilogue)
    out = u.to(DTYPE_NAMES[o.out_dtype]).contiguous()
    block = conv_tile_of(o.d, o.weight_flipped).BLOCK_M
    return out, gradient_sums(out, o.weight_index, epilogue, lambda values: class_rows(values, window.stride, block))


def class_rows(values: Tensor, stride: int, block: int) -> Tensor:
    """Partial sums of (G, N, H, W, C) as the kernel makes them: per parity class, over runs of ``block`` positions."""
    classes = [values[:, :, i::stride, j::stride].flatten(1, 3) for i in range(stride) for j in range(stride)]
    most = classes[0].shape[1]
    return torch.cat([partial_rows(F.pad(c, (0, 0, 0, most - c.shape[1])), block) for c in classes], 1)


@triton.jit(do_not_specialize=BATCH_SIZES)
def conv_data_gradient_kernel(
    p_d, p_weight_flipped, p_weight_index, p_residual, p_mask, p_scale, p_z, p_mean, p_inv_std, p_mask_scale,
    p_mask_shift, p_out, p_statistics,
    N, n_partials, s_scale, s_mean,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr, CO: tl.constexpr,
    HR: tl.constexpr, WR: tl.constexpr, CR: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr, RESIDUAL_FIRST: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    N_BLOCKS: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    i_m = tl.program_id(0) // N_BLOCKS
    i_n = tl.program_id(0) % N_BLOCKS
    i_g = tl.program_id(1).to(tl.int64)
    i_slot = tl.load(p_weight_index + i_g).to(tl.int64)
    # at stride s the positions of one residue (row % s, column % s) all use the same taps, 1 to ceil(KERNEL / s) a side
    i_class = tl.program_id(2)
    first_row = i_class // STRIDE
    first_column = i_class % STRIDE
    class_height = (H - first_row + STRIDE - 1) // STRIDE
    class_width = (W - first_column + STRIDE - 1) // STRIDE
    low_row = (first_row + PADDING) % STRIDE
    low_column = (first_column + PADDING) % STRIDE
    n_rows = (KERNEL - low_row + STRIDE - 1) // STRIDE
    n_columns = (KERNEL - low_column + STRIDE - 1) // STRIDE

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < N * class_height * class_width
    image = o_m // (class_height * class_width)
    i_h = (o_m % (class_height * class_width)) // class_width
    i_w = o_m % class_width
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < C
    # rows of d in ascending order are taps in descending order, which the flipped packing turns into ascending again
    i_row = i_h + (first_row + PADDING - low_row) // STRIDE - n_rows + 1
    i_column = i_w + (first_column + PADDING - low_column) // STRIDE - n_columns + 1
    acc = gather_product(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), p_d + i_g * N * (HO * WO * CO),
        p_weight_flipped + i_slot * (KERNEL * KERNEL * C * CO), None, None,
        ((image * HO + i_row) * WO + i_column) * CO, i_row, i_column, m_m, o_n, m_n,
        KERNEL - 1 - low_row - STRIDE * (n_rows - 1), KERNEL - 1 - low_column - STRIDE * (n_columns - 1),
        n_rows, n_columns, HO, WO, CO, C, KERNEL, STRIDE, BLOCK_K, False, PRECISION, False,
    )  # fmt: skip

    i_h = i_h * STRIDE + first_row
    i_w = i_w * STRIDE + first_column
    i_partial = i_class * (n_partials // (STRIDE * STRIDE)) + i_m
    HALF: tl.constexpr = BLOCK_N // 2 if BLOCK_N >= 128 else BLOCK_N
    if p_scale is not None:
        p_scale += i_slot * s_scale
    if p_z is not None:
        p_mean += i_slot * s_mean
        p_inv_std += i_slot * s_mean
        p_statistics += (i_g * n_partials + i_partial) * (2 * C)
        p_z += i_g * N * (H * W * C)
    if p_mask_scale is not None:
        p_mask_scale += i_slot * s_mean
        p_mask_shift += i_slot * s_mean
    if p_residual is not None:
        p_residual += i_g * N * (HR * WR * CR)
    if p_mask is not None:
        p_mask += i_g * N * (H * W) * ((C + 7) // 8)
    p_out += i_g * N * (H * W * C)
    # 64 columns at a time: with 128 the two sums took 220 registers, and one program a multiprocessor was left
    for i_half in tl.static_range(BLOCK_N // HALF):
        if HALF < BLOCK_N:
            left, right = column_halves(acc, BLOCK_M, BLOCK_N)
            b_half = right if i_half else left
        else:
            b_half = acc
        i_first = i_n * BLOCK_N + i_half * HALF
        b_d, b_product = finish_gradient(
            b_half, p_residual, p_mask, p_scale, p_z, p_mean, p_inv_std, p_mask_scale, p_mask_shift, p_out,
            image, i_h, i_w, m_m, i_first, H, W, C, HR, WR, CR, RESIDUAL_STRIDE, RESIDUAL_FIRST, BLOCK_M, HALF,
        )  # fmt: skip
        if p_z is not None:
            o_half = i_first + tl.arange(0, HALF)
            tl.store(p_statistics + o_half, tl.sum(b_d, 0), mask=o_half < C)
            tl.store(p_statistics + C + o_half, tl.sum(b_product, 0), mask=o_half < C)


def gradient_results(d: Tensor, shape: tuple[int, ...], rows: int, o: GradientEpilogue) -> tuple[Tensor, Tensor]:
    """The results unwritten, the first like ``d``, with so many rows of partial sums per group."""
    sums = (shape[0], rows, 2, shape[4]) if o.z is not None else (0,)
    return d.new_empty(shape), d.new_empty(sums, dtype=accumulator(d.dtype))


def _class_tiles(o: DataGradientOperands, stride: int) -> int:
    """Tiles of the largest residue class; the others get as many, some of them empty."""
    positions = o.d.shape[1] * -(-o.height // stride) * -(-o.width // stride)
    return -(-positions // conv_tile_of(o.d, o.weight_flipped).BLOCK_M)


def _empty(
    o: DataGradientOperands, epilogue: GradientEpilogue, window: Window, precision: str
) -> tuple[Tensor, Tensor]:
    shape = (o.weight_index.shape[0], o.d.shape[1], o.height, o.width, o.weight_flipped.shape[3])
    rows = window.stride**2 * _class_tiles(o, window.stride)
    return gradient_results(o.d.new_empty(0, dtype=DTYPE_NAMES[o.out_dtype]), shape, rows, epilogue)


def _launch(
    o: DataGradientOperands, epilogue: GradientEpilogue, window: Window, precision: str
) -> tuple[Tensor, Tensor]:
    refuse_operands("conv_data_gradient's Triton kernel", second=o.second, norm_z=o.norm_z)
    out, statistics = _empty(o, epilogue, window, precision)
    tile, tiles, classes = conv_tile_of(o.d, o.weight_flipped), _class_tiles(o, window.stride), window.stride**2
    launch(
        conv_data_gradient_kernel,
        (tiles * -(-out.shape[4] // tile.BLOCK_N), out.shape[0], classes),
        tile,
        o,
        epilogue,
        window,
        p_out=out,
        p_statistics=present(statistics),
        N=out.shape[1],
        n_partials=classes * tiles,
        s_scale=row_stride(epilogue.scale),
        s_mean=row_stride(epilogue.mean),
        **sizes("H W C", out),
        **sizes("HO WO CO", o.d),
        **sizes("HR WR CR", epilogue.residual),
        PRECISION=precision,
    )
    return out, statistics


_conv_data_gradient = define("conv_data_gradient", conv_data_gradient_reference, _empty, _launch)


def data_gradient_operands(
    d: Tensor,
    weight_flipped: Tensor,
    weight_index: Tensor,
    *,
    in_size: tuple[int, int],
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    out_dtype: torch.dtype | None = None,
    precision: str = "ieee",
    **options: Any,
) -> tuple[DataGradientOperands, GradientEpilogue, Window, str]:
    """The operands of a data gradient, checked.

    ``options`` are the fields of :class:`GradientEpilogue` and the optional ones of :class:`DataGradientOperands`.
    """
    name = str(out_dtype or d.dtype).removeprefix("torch.")
    sources = {key: options.pop(key) for key in SOURCES if key in options}
    o = DataGradientOperands(d, weight_flipped, weight_index, *in_size, name, **sources)
    epilogue, window = GradientEpilogue(**options), Window(kernel, stride, padding)
    check_tensor("d", d, 5)
    check_tensor("weight_flipped", weight_flipped, 4)
    check_precision(precision)
    groups, slots, channels = weight_index.shape[0], weight_flipped.shape[0], weight_flipped.shape[3]
    shape = (groups, d.shape[1], *in_size, channels)
    check_size("the result", shape)
    if not (weight_flipped.shape[1] == kernel * kernel and weight_flipped.shape[2] == d.shape[4]):
        raise InputError(
            f"weight_flipped has shape {tuple(weight_flipped.shape)}, expected "
            f"(slots, {kernel * kernel}, {d.shape[4]}, channels)"
        )
    if d.shape[0] != groups:
        raise InputError(f"d has {d.shape[0]} groups, expected {groups} as weight_index has")
    if d.dtype != weight_flipped.dtype:
        raise InputError(f"d is {d.dtype}, expected the weight's {weight_flipped.dtype}")
    out = tuple(out_size(size, *window) for size in in_size)
    if out != tuple(d.shape[2:4]):
        raise InputError(f"d has size {tuple(d.shape[2:4])}, expected {out} for input {in_size}")
    check_epilogue(shape, slots, epilogue)
    check_norm(d, o.norm_z, o.norm_a, o.norm_b, o.norm_c)
    check_second(o.second, o.second_weight, o.second_stride, shape, slots, d.dtype, spread=True)
    if name not in DTYPE_NAMES:
        raise unknown("out_dtype", name, DTYPE_NAMES)
    return o, epilogue, window, precision


def conv_data_gradient(
    d: Tensor, weight_flipped: Tensor, weight_index: Tensor, *, in_size: tuple[int, int], kernel: int, **options: Any
) -> DataGradient:
    """Gradient of a grouped convolution's input, with mask, scale, residual gradient and BatchNorm sums.

    Args:
        d, weight_flipped, weight_index: see :class:`DataGradientOperands`.
        in_size: (H, W) of the convolution's input. kernel: its side. Further options: ``stride`` 1, ``padding`` 0,
            ``out_dtype`` (d's), ``precision`` (how float32 is multiplied: "ieee" or "tf32"), the fields of
            :class:`GradientEpilogue`, rows by slot, and the optional ones of :class:`DataGradientOperands`.

    Raises:
        InputError: shapes or dtypes that disagree, and oversized groups.
    """
    operands = data_gradient_operands(d, weight_flipped, weight_index, in_size=in_size, kernel=kernel, **options)
    o, epilogue, window, precision = operands
    result, statistics = _conv_data_gradient(*o, *epilogue, *window, precision)
    return DataGradient(result, present(statistics))
