"""What a data gradient's epilogue does to a gradient, where no convolution made it: after pooling, a sum, the head.

    u = d;   u += residual (residual_first);   u = mask · u;   u = scale · u;   u += residual (otherwise)
    statistics = Σ u, Σ u · (z − mean) · inv_std per channel, one row per program, no atomics

Here scale, mean and inv_std are by group: (Q, C), Q = G or 1. ``gradient_epilogue``, ``gradient_sums`` and
``check_epilogue`` serve the data gradients of convolutions and of the head too, where they are by weight slot.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.kernels.gather import load_bits, load_spread
from fastensdistill.kernels.launch import BATCH_SIZES, launch, residual_sizes, row_stride, tl, triton
from fastensdistill.kernels.operands import accumulator, check_pair, check_rows, check_tensor, require
from fastensdistill.kernels.ops import absent, define, present
from fastensdistill.kernels.reference import partial_rows, pick, unpack_mask
from fastensdistill.kernels.tiles import rows_tile

ROWS_BLOCK = 512  # positions of one program, and of one row of sums


class ElementwiseGradientOperands(NamedTuple):
    d: Tensor  # (G, N, H, W, C)
    residual: Tensor | None  # (G, N, ceil(H/s), ceil(W/s), Cr), added at every s-th position to min(C, Cr) channels
    residual_stride: int  # s
    residual_first: bool  # before mask and scale, else after them
    mask: Tensor | None  # (G, N, H, W, ceil(C/8)) uint8
    scale: Tensor | None  # (Q, C) float32
    z: Tensor | None  # (G, N, H, W, C): with it statistics are made
    mean: Tensor | None  # (Q, C) float32
    inv_std: Tensor | None  # (Q, C) float32


class ElementwiseGradient(NamedTuple):
    d: Tensor  # (G, N, H, W, C)
    statistics: Tensor | None  # (G, P, 2, C) float32


def gradient_epilogue(
    u: Tensor,
    slots: Tensor | None,
    residual: Tensor | None,
    residual_stride: int,
    residual_first: bool,
    mask: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    """u of the equations (G, N, H, W, C) from its first value; without ``slots`` the scale is by group."""

    def with_residual(u: Tensor) -> Tensor:
        if residual is not None:
            u = u.clone()
            u[:, :, ::residual_stride, ::residual_stride, : residual.shape[4]] += residual[..., : u.shape[4]]
        return u

    u = with_residual(u) if residual_first else u
    if mask is not None:
        u = u * unpack_mask(mask, u.shape[4])
    if scale is not None:
        u = u * pick(scale, slots)
    return u if residual_first else with_residual(u)


def gradient_sums(
    u: Tensor,
    slots: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    inv_std: Tensor | None,
    rows: Callable[[Tensor], Tensor],
) -> Tensor:
    """The statistics of the equations, of ``u`` as stored; without z, mean and inv_std nothing.

    ``rows`` makes the rows of partial sums, (G, N, H, W, C) → (G, P, C).
    """
    u = u.to(accumulator(u.dtype))
    if z is None or mean is None or inv_std is None:
        return absent(u)
    standard = (z.to(u.dtype) - pick(mean, slots)) * pick(inv_std, slots)
    return torch.stack([rows(u), rows(u * standard)], 2)


def elementwise_gradient_reference(o: ElementwiseGradientOperands) -> tuple[Tensor, Tensor]:
    u = o.d.to(accumulator(o.d.dtype))
    d = gradient_epilogue(u, None, o.residual, o.residual_stride, o.residual_first, o.mask, o.scale).to(o.d.dtype)
    sums = gradient_sums(d, None, o.z, o.mean, o.inv_std, lambda v: partial_rows(v.flatten(1, 3), ROWS_BLOCK))
    return d.clone() if d is o.d else d, sums


@triton.jit(do_not_specialize=BATCH_SIZES)
def elementwise_gradient_kernel(
    p_d,
    p_residual,
    p_mask,
    p_scale,
    p_z,
    p_mean,
    p_inv_std,
    p_out,
    p_sums,
    N,
    n_partials,
    s_scale,
    s_mean,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    HR: tl.constexpr,
    WR: tl.constexpr,
    CR: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    RESIDUAL_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
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
        if p_scale is not None:
            b_d *= b_scale[None, :]
        if p_residual is not None and not RESIDUAL_FIRST:
            b_d += b_residual
        b_out = b_d.to(p_out.dtype.element_ty)
        tl.store(p_out + o_group * C + o_d, b_out, mask=m_d)
        if p_z is not None:
            b_d = b_out.to(tl.float32)
            b_z = tl.load(p_z + o_group * C + o_d, mask=m_d, other=0.0).to(tl.float32)
            first += tl.sum(b_d, 0)
            second += tl.sum(b_d * ((b_z - b_mean[None, :]) * b_inv[None, :]), 0)
    if p_z is not None:
        p_sums += (i_g * n_partials + tl.program_id(0)) * (2 * C)
        tl.store(p_sums + o_n, first, mask=m_n)
        tl.store(p_sums + C + o_n, second, mask=m_n)


def _empty(o):
    groups, images, height, width, channels = o.d.shape
    rows = -(-images * height * width // ROWS_BLOCK)
    shape = (groups, rows, 2, channels) if o.z is not None else (0,)
    return torch.empty_like(o.d), o.d.new_empty(shape, dtype=accumulator(o.d.dtype))


def _launch(o):
    out, sums = _empty(o)
    groups, images, height, width, channels = o.d.shape
    rows = -(-images * height * width // ROWS_BLOCK)
    tile = rows_tile(channels)
    launch(
        elementwise_gradient_kernel,
        (rows, -(-channels // tile.BLOCK_N), groups),
        tile,
        o,
        p_out=out,
        p_sums=present(sums),
        N=images,
        n_partials=rows,
        s_scale=row_stride(o.scale),
        s_mean=row_stride(o.mean),
        H=height,
        W=width,
        C=channels,
        **residual_sizes(o.residual),
        ROWS=ROWS_BLOCK,
        BLOCK_M=min(tile.BLOCK_M, ROWS_BLOCK),
    )
    return out, sums


_elementwise_gradient = define("elementwise_gradient", elementwise_gradient_reference, _empty, _launch)


def check_epilogue(
    shape: tuple[int, ...],
    count: int,
    residual: Tensor | None,
    residual_stride: int,
    mask: Tensor | None,
    scale: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    inv_std: Tensor | None,
) -> None:
    """Refuse operands that do not go with a gradient of ``shape`` (G, N, H, W, C) and ``count`` slots or groups."""
    require((z is None) == (mean is None), "z, mean and inv_std must be given together")
    if z is not None:
        require(z.shape == shape and z.is_contiguous(), f"z has shape {tuple(z.shape)}, expected {shape}, contiguous")
    check_pair("mean and inv_std", mean, inv_std, count, shape[4])
    check_rows("scale", scale, count, shape[4])
    if mask is not None:
        wanted = (*shape[:4], -(-shape[4] // 8))
        require(
            mask.shape == wanted and mask.is_contiguous() and mask.dtype == torch.uint8,
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}, expected uint8 {wanted}, contiguous",
        )
    if residual is not None:
        check_tensor("residual", residual, 5)
        small = (*shape[:2], *(-(-size // residual_stride) for size in shape[2:4]))
        require(
            residual.shape[:4] == small, f"residual has shape {tuple(residual.shape)}, expected {small} and channels"
        )


def elementwise_gradient(
    d: Tensor,
    *,
    residual: Tensor | None = None,
    residual_stride: int = 1,
    residual_first: bool = True,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    z: Tensor | None = None,
    mean: Tensor | None = None,
    inv_std: Tensor | None = None,
) -> ElementwiseGradient:
    """Mask, scale and residual of a gradient, and the partial sums that ``batch_norm_backward`` needs.

    ``d`` and ``z`` (G, N, H, W, C); ``residual`` (G, N, ceil(H/s), ceil(W/s), Cr) is added at every
    ``residual_stride``-th position to the first min(Cr, C) channels, before the mask unless ``residual_first`` is
    False; ``mask`` uint8 (G, N, H, W, ceil(C/8)); ``scale, mean, inv_std`` (G or 1, C) float32, by group. ``z, mean,
    inv_std`` together ask for ``statistics``. The result has d's dtype. Raises InputError for shapes that disagree.
    """
    check_tensor("d", d, 5)
    o = ElementwiseGradientOperands(d, residual, residual_stride, residual_first, mask, scale, z, mean, inv_std)
    check_epilogue(tuple(d.shape), d.shape[0], residual, residual_stride, mask, scale, z, mean, inv_std)
    out, sums = _elementwise_gradient(*o)
    return ElementwiseGradient(out, present(sums))
