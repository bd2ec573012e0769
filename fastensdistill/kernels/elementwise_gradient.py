"""What a data gradient's epilogue does to a gradient, where no convolution made it: after pooling, a sum, the head.

    u = d;   u += residual (residual_first);   u = mask · u;   u = scale · u;   u += residual (otherwise)
    mask: bits, or (mask_scale · z + mask_shift > 0), which is the ReLU behind a training-mode BatchNorm of z
    statistics = Σ u, Σ u · (z − mean) · inv_std per channel, one row per program, no atomics

Here scale, mean and inv_std are by group: (Q, C), Q = G or 1. ``gradient_epilogue``, ``gradient_sums`` and
``check_epilogue`` serve the data gradients of convolutions and of the head too, where they are by weight slot;
``finish_gradient`` is those of convolutions in Triton.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.gather import load_bits, load_spread
from fastensdistill.kernels.launch import BATCH_SIZES, launch, row_stride, sizes, tl, triton
from fastensdistill.kernels.operands import accumulator, check_pair, check_rows, check_tensor
from fastensdistill.kernels.ops import absent, define, present
from fastensdistill.kernels.reference import partial_rows, pick, unpack_mask
from fastensdistill.kernels.tiles import rows_tile

ROWS_BLOCK = 512  # positions of one program, and of one row of sums


class GradientEpilogue(NamedTuple):
    """What is done to a gradient u (G, N, H, W, C). Rows are by group or, of a convolution, by weight slot."""

    residual: Tensor | None = None  # (G, N, ceil(H/s), ceil(W/s), Cr), added to the first min(C, Cr) channels
    residual_stride: int = 1  # s: it is added at every such position
    residual_first: bool = False  # before mask and scale, else after them
    mask: Tensor | None = None  # (G, N, H, W, ceil(C/8)) uint8
    scale: Tensor | None = None  # (Q or 1, C) float32
    z: Tensor | None = None  # (G, N, H, W, C): with it, mean and inv_std statistics are made
    mean: Tensor | None = None  # (Q or 1, C) float32
    inv_std: Tensor | None = None
    mask_scale: Tensor | None = None  # like mean: the mask comes from z instead of bits
    mask_shift: Tensor | None = None


class ElementwiseGradient(NamedTuple):
    """The gradient after the steps, and its partial sums."""

    d: Tensor  # (G, N, H, W, C)
    statistics: Tensor | None  # (G, P, 2, C) float32


def gradient_epilogue(u: Tensor, weight_index: Tensor | None, o: GradientEpilogue) -> Tensor:
    """u of the equations (G, N, H, W, C) from its first value; without ``weight_index`` the scale is by group."""

    def with_residual(u: Tensor) -> Tensor:
        if o.residual is not None:
            u, s = u.clone(), o.residual_stride
            u[:, :, ::s, ::s, : o.residual.shape[4]] += o.residual[..., : u.shape[4]]
        return u

    u = with_residual(u) if o.residual_first else u
    if o.mask is not None:
        u = u * unpack_mask(o.mask, u.shape[4])
    if o.z is not None and o.mask_scale is not None and o.mask_shift is not None:
        u = u * (o.z.to(u.dtype) * pick(o.mask_scale, weight_index) + pick(o.mask_shift, weight_index) > 0)
    if o.scale is not None:
        u = u * pick(o.scale, weight_index)
    return u if o.residual_first else with_residual(u)


def gradient_sums(u: Tensor, weight_index: Tensor | None, o: Any, rows: Callable[[Tensor], Tensor]) -> Tensor:
    """The statistics of the equations, of ``u`` as stored; without z, mean and inv_std of ``o`` nothing.

    ``rows`` makes the rows of partial sums, (G, N, H, W, C) → (G, P, C).
    """
    u = u.to(accumulator(u.dtype))
    if o.z is None or o.mean is None or o.inv_std is None:
        return absent(u)
    standard = (o.z.to(u.dtype) - pick(o.mean, weight_index)) * pick(o.inv_std, weight_index)
    return torch.stack([rows(u), rows(u * standard)], 2)


def elementwise_gradient_reference(d: Tensor, o: GradientEpilogue) -> tuple[Tensor, Tensor]:
    u = gradient_epilogue(d.to(accumulator(d.dtype)), None, o).to(d.dtype)
    sums = gradient_sums(u, None, o, lambda values: partial_rows(values.flatten(1, 3), ROWS_BLOCK))
    return u.clone() if u is d else u, sums


@triton.jit
def finish_gradient(
    acc, p_residual, p_mask, p_scale, p_z, p_mean, p_inv_std, p_mask_scale, p_mask_shift, p_out,
    image, i_h, i_w, m_m, i_first,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, HR: tl.constexpr, WR: tl.constexpr, CR: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr, RESIDUAL_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Do all that and store u, of a convolution's gradient ``acc`` (BLOCK_M, BLOCK_N), channels from ``i_first``.

    Pointers are the group's, of rows the slot's. Returns what the statistics add up: u as stored, in float32 and 0
    where nothing is, and that times the standardised z; without z it is u twice.
    """
    o_n = i_first + tl.arange(0, BLOCK_N)
    m_n = o_n < C
    o_position = (image * H + i_h) * W + i_w
    o_out = o_position[:, None] * C + o_n[None, :]
    m_out = m_m[:, None] & m_n[None, :]
    if p_residual is not None and RESIDUAL_FIRST:
        acc += load_spread(p_residual, image, i_h, i_w, m_m, o_n, m_n, HR, WR, CR, RESIDUAL_STRIDE)
    if p_mask is not None:
        acc = tl.where(load_bits(p_mask, o_position, m_m, i_first, C, BLOCK_M, BLOCK_N), acc, 0.0)
    if p_mask_scale is not None:
        b_z = tl.load(p_z + o_out, mask=m_out, other=0.0).to(tl.float32)
        b_mask_scale = tl.load(p_mask_scale + o_n, mask=m_n, other=0.0)
        b_mask_shift = tl.load(p_mask_shift + o_n, mask=m_n, other=0.0)
        acc = tl.where(b_z * b_mask_scale[None, :] + b_mask_shift[None, :] > 0, acc, 0.0)
    if p_scale is not None:
        acc *= tl.load(p_scale + o_n, mask=m_n, other=0.0)[None, :]
    if p_residual is not None and not RESIDUAL_FIRST:
        acc += load_spread(p_residual, image, i_h, i_w, m_m, o_n, m_n, HR, WR, CR, RESIDUAL_STRIDE)
    b_out = acc.to(p_out.dtype.element_ty)
    tl.store(p_out + o_out, b_out, mask=m_out)
    b_d = tl.where(m_out, b_out.to(tl.float32), 0.0)
    b_product = b_d
    if p_z is not None:
        b_mean = tl.load(p_mean + o_n, mask=m_n, other=0.0)
        b_inv = tl.load(p_inv_std + o_n, mask=m_n, other=0.0)
        if p_mask_scale is None:
            b_z = tl.load(p_z + o_out, mask=m_out, other=0.0).to(tl.float32)
        b_product = b_d * ((b_z - b_mean[None, :]) * b_inv[None, :])
    return b_d, b_product


@triton.jit(do_not_specialize=BATCH_SIZES)
def elementwise_gradient_kernel(
    p_d, p_residual, p_mask, p_scale, p_z, p_mean, p_inv_std, p_mask_scale, p_mask_shift, p_out, p_sums,
    N, n_partials, s_scale, s_mean,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, HR: tl.constexpr, WR: tl.constexpr, CR: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr, RESIDUAL_FIRST: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(1)
    i_g = tl.program_id(2).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < C
    if p_scale is not None:
        b_scale = tl.load(p_scale + i_g * s_scale + o_n, mask=m_n, other=0.0)
    if p_z is not None:
        b_mean = tl.load(p_mean + i_g * s_mean + o_n, mask=m_n, other=0.0)
        b_inv = tl.load(p_inv_std + i_g * s_mean + o_n, mask=m_n, other=0.0)
        first = tl.zeros((BLOCK_N,), tl.float32)
        second = tl.zeros((BLOCK_N,), tl.float32)
    if p_mask_scale is not None:
        b_mask_scale = tl.load(p_mask_scale + i_g * s_mean + o_n, mask=m_n, other=0.0)
        b_mask_shift = tl.load(p_mask_shift + i_g * s_mean + o_n, mask=m_n, other=0.0)
    positions = N * (H * W)
    o_group = i_g * positions
    for i in range(0, ROWS, BLOCK_M):
        o_m = tl.program_id(0) * ROWS + i + tl.arange(0, BLOCK_M)
        m_m = o_m < positions
        m_d = m_m[:, None] & m_n[None, :]
        o_d = o_m[:, None] * C + o_n[None, :]
        b_d = tl.load(p_d + o_group * C + o_d, mask=m_d, other=0.0).to(tl.float32)
        if p_residual is not None:
            p_r = p_residual + i_g * N * (HR * WR * CR)
            image, i_h, i_w = o_m // (H * W), (o_m % (H * W)) // W, o_m % W
            b_residual = load_spread(p_r, image, i_h, i_w, m_m, o_n, m_n, HR, WR, CR, RESIDUAL_STRIDE)
            if RESIDUAL_FIRST:
                b_d += b_residual
        if p_mask is not None:
            p_bits = p_mask + o_group * ((C + 7) // 8)
            b_d = tl.where(load_bits(p_bits, o_m, m_m, i_n * BLOCK_N, C, BLOCK_M, BLOCK_N), b_d, 0.0)
        if p_mask_scale is not None:
            b_z = tl.load(p_z + o_group * C + o_d, mask=m_d, other=0.0).to(tl.float32)
            b_d = tl.where(b_z * b_mask_scale[None, :] + b_mask_shift[None, :] > 0, b_d, 0.0)
        if p_scale is not None:
            b_d *= b_scale[None, :]
        if p_residual is not None and not RESIDUAL_FIRST:
            b_d += b_residual
        b_out = b_d.to(p_out.dtype.element_ty)
        tl.store(p_out + o_group * C + o_d, b_out, mask=m_d)
        if p_z is not None:
            b_d = b_out.to(tl.float32)
            if p_mask_scale is None:
                b_z = tl.load(p_z + o_group * C + o_d, mask=m_d, other=0.0).to(tl.float32)
            first += tl.sum(b_d, 0)
            second += tl.sum(b_d * ((b_z - b_mean[None, :]) * b_inv[None, :]), 0)
    if p_z is not None:
        p_sums += (i_g * n_partials + tl.program_id(0)) * (2 * C)
        tl.store(p_sums + o_n, first, mask=m_n)
        tl.store(p_sums + C + o_n, second, mask=m_n)


def _empty(d, o):
    groups, images, height, width, channels = d.shape
    rows = -(-images * height * width // ROWS_BLOCK)
    shape = (groups, rows, 2, channels) if o.z is not None else (0,)
    return torch.empty_like(d), d.new_empty(shape, dtype=accumulator(d.dtype))


def _launch(d, o):
    out, sums = _empty(d, o)
    groups, images, height, width, channels = d.shape
    rows = -(-images * height * width // ROWS_BLOCK)
    tile = rows_tile(channels)
    launch(
        elementwise_gradient_kernel,
        (rows, -(-channels // tile.BLOCK_N), groups),
        tile,
        o,
        p_d=d,
        p_out=out,
        p_sums=present(sums),
        N=images,
        n_partials=rows,
        s_scale=row_stride(o.scale),
        s_mean=row_stride(o.mean),
        **sizes("H W C", d),
        **sizes("HR WR CR", o.residual),
        ROWS=ROWS_BLOCK,
        BLOCK_M=min(tile.BLOCK_M, ROWS_BLOCK),
    )
    return out, sums


_elementwise_gradient = define("elementwise_gradient", elementwise_gradient_reference, _empty, _launch)


def check_epilogue(shape: tuple[int, ...], count: int, o: GradientEpilogue) -> None:
    """Refuse what does not go with a gradient of ``shape`` (G, N, H, W, C) and ``count`` slots or groups."""
    if (o.z is None) != (o.mean is None):
        raise InputError("z, mean and inv_std must be given together")
    if o.z is not None:
        good = o.z.shape == shape and o.z.is_contiguous()
        if not good:
            raise InputError(f"z has shape {tuple(o.z.shape)}, expected {shape}, contiguous")
    check_pair("mean and inv_std", o.mean, o.inv_std, count, shape[4])
    check_rows("scale", o.scale, count, shape[4])
    check_pair("mask_scale and mask_shift", o.mask_scale, o.mask_shift, count, shape[4])
    if o.mask_scale is not None:
        if o.mask is not None:
            raise InputError("mask and mask_scale are given; expected one of them")
        if o.mean is None or o.mask_scale.shape != o.mean.shape:
            rows = None if o.mean is None else tuple(o.mean.shape)
            raise InputError(f"mask_scale has shape {tuple(o.mask_scale.shape)}, expected mean's, which is {rows}")
    if o.mask is not None:
        wanted = (*shape[:4], -(-shape[4] // 8))
        if not (o.mask.shape == wanted and o.mask.is_contiguous() and o.mask.dtype == torch.uint8):
            raise InputError(
                f"mask is {o.mask.dtype} of shape {tuple(o.mask.shape)}, expected uint8 {wanted}, contiguous"
            )
    if o.residual is not None:
        check_tensor("residual", o.residual, 5)
        small = (*shape[:2], *(-(-size // o.residual_stride) for size in shape[2:4]))
        good = o.residual.shape[:4] == small
        if not good:
            raise InputError(f"residual has shape {tuple(o.residual.shape)}, expected {small} and channels")


def elementwise_gradient(d: Tensor, *, residual_first: bool = True, **options: Any) -> ElementwiseGradient:
    """Mask, scale and residual of a gradient, and the partial sums that ``batch_norm_backward`` needs.

    Args:
        d: (G, N, H, W, C), float32, float16 or bfloat16, which the result is too (float64: reference only).
        residual_first: whether the residual is added before mask and scale.
        options: the further fields of :class:`GradientEpilogue`.

    Raises:
        InputError: shapes that disagree.
    """
    check_tensor("d", d, 5)
    o = GradientEpilogue(residual_first=residual_first, **options)
    check_epilogue(tuple(d.shape), d.shape[0], o)
    out, sums = _elementwise_gradient(d, *o)
    return ElementwiseGradient(out, present(sums))
