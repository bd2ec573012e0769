"""Maximum pooling of grouped activations, and its backward.

y[p] = max over taps of x[p · stride − padding + tap],  taps[p] = the first tap that attains it
dx[q] = Σ over the windows p whose chosen tap lies on q of d[p]          (gathered: no atomics)
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import BATCH_SIZES, launch, sizes, tl, triton
from fastensdistill.kernels.operands import accumulator, check_tensor, out_size
from fastensdistill.kernels.ops import define
from fastensdistill.kernels.tiles import rows_tile


class MaxPoolOperands(NamedTuple):
    """What ``max_pool`` takes."""

    x: Tensor  # (G, N, H, W, C)
    kernel: int
    stride: int
    padding: int


class MaxPoolOutput(NamedTuple):
    """The maxima, and where in its window each one lies."""

    y: Tensor  # (G, N, Ho, Wo, C)
    taps: Tensor  # like y, uint8: row · kernel + column of the maximum in its window


class MaxPoolBackwardOperands(NamedTuple):
    """What ``max_pool_backward`` takes."""

    d: Tensor  # (G, N, Ho, Wo, C)
    taps: Tensor  # like d, uint8
    height: int  # H of x
    width: int
    kernel: int
    stride: int
    padding: int


def max_pool_reference(o: MaxPoolOperands) -> tuple[Tensor, Tensor]:
    around = (0, 0, o.padding, o.padding, o.padding, o.padding)
    padded = F.pad(o.x, around, value=float("-inf"))
    y, taps = padded.unfold(2, o.kernel, o.stride).unfold(3, o.kernel, o.stride).flatten(-2).max(-1)
    return y.contiguous(), taps.to(torch.uint8).contiguous()


def max_pool_backward_reference(o: MaxPoolBackwardOperands) -> Tensor:
    out_height, out_width = o.d.shape[2:4]
    full = (
        max(o.height + 2 * o.padding, (out_height - 1) * o.stride + o.kernel),
        max(o.width + 2 * o.padding, (out_width - 1) * o.stride + o.kernel),
    )
    dx = o.d.new_zeros(*o.d.shape[:2], *full, o.d.shape[4], dtype=accumulator(o.d.dtype))
    for tap in range(o.kernel**2):
        r, s = divmod(tap, o.kernel)
        rows = slice(r, r + (out_height - 1) * o.stride + 1, o.stride)
        columns = slice(s, s + (out_width - 1) * o.stride + 1, o.stride)
        dx[:, :, rows, columns] += torch.where(o.taps == tap, o.d, 0)
    inside = dx[:, :, o.padding : o.padding + o.height, o.padding : o.padding + o.width]
    return inside.to(o.d.dtype).contiguous()


@triton.jit(do_not_specialize=BATCH_SIZES)
def max_pool_kernel(
    p_x, p_y, p_taps,
    N,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr, KERNEL: tl.constexpr,
    STRIDE: tl.constexpr, PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(2).to(tl.int64)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < N * (HO * WO)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < C
    image = o_m // (HO * WO)
    i_row = (o_m % (HO * WO)) // WO * STRIDE - PADDING
    i_column = o_m % WO * STRIDE - PADDING
    p_x += i_g * N * (H * W * C)
    b_best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    b_tap = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for i_r in tl.static_range(KERNEL):
        for i_s in tl.static_range(KERNEL):
            i_h = i_row + i_r
            i_w = i_column + i_s
            inside = m_m & (i_h >= 0) & (i_h < H) & (i_w >= 0) & (i_w < W)
            o_x = ((image * H + i_h) * W + i_w) * C
            m_x = inside[:, None] & m_n[None, :]
            b_x = tl.load(p_x + (o_x[:, None] + o_n[None, :]), mask=m_x, other=float("-inf")).to(tl.float32)
            # NaN is passed on, as torch does: it compares greater than nothing, so it is asked for by name
            better = (b_x > b_best) | ((b_x != b_x) & (b_best == b_best))
            b_best = tl.where(better, b_x, b_best)
            b_tap = tl.where(better, i_r * KERNEL + i_s, b_tap)
    o_y = i_g * N * (HO * WO * C) + o_m[:, None] * C + o_n[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    tl.store(p_y + o_y, b_best.to(p_y.dtype.element_ty), mask=m_y)
    tl.store(p_taps + o_y, b_tap.to(tl.uint8), mask=m_y)


@triton.jit(do_not_specialize=BATCH_SIZES)
def max_pool_backward_kernel(
    p_d, p_taps, p_dx,
    N,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr, KERNEL: tl.constexpr,
    STRIDE: tl.constexpr, PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(2).to(tl.int64)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < N * (H * W)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < C
    image = o_m // (H * W)
    i_h = (o_m % (H * W)) // W + PADDING
    i_w = o_m % W + PADDING
    p_d += i_g * N * (HO * WO * C)
    p_taps += i_g * N * (HO * WO * C)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # the windows over a position: the last one starts at or before it, the others STRIDE earlier each
    REACH: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    for j_r in tl.static_range(REACH):
        for j_s in tl.static_range(REACH):
            i_oh = i_h // STRIDE - j_r
            i_ow = i_w // STRIDE - j_s
            i_r = i_h - i_oh * STRIDE
            i_s = i_w - i_ow * STRIDE
            inside = m_m & (i_oh >= 0) & (i_oh < HO) & (i_ow >= 0) & (i_ow < WO) & (i_r < KERNEL) & (i_s < KERNEL)
            o_d = (((image * HO + i_oh) * WO + i_ow) * C)[:, None] + o_n[None, :]
            m_d = inside[:, None] & m_n[None, :]
            b_tap = tl.load(p_taps + o_d, mask=m_d, other=255).to(tl.int32)
            b_d = tl.load(p_d + o_d, mask=m_d, other=0.0).to(tl.float32)
            acc += tl.where(b_tap == (i_r * KERNEL + i_s)[:, None], b_d, 0.0)
    o_x = i_g * N * (H * W * C) + o_m[:, None] * C + o_n[None, :]
    tl.store(p_dx + o_x, acc.to(p_dx.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


def _empty(o):
    groups, images, *size, channels = o.x.shape
    y = o.x.new_empty(groups, images, *(out_size(s, o.kernel, o.stride, o.padding) for s in size), channels)
    return y, torch.empty_like(y, dtype=torch.uint8)


def _empty_backward(o):
    return o.d.new_empty(*o.d.shape[:2], o.height, o.width, o.d.shape[4])


def _launch_windows(kernel, o, x, y, written, **pointers):
    """Launch over the positions of ``written``: of the input ``x`` or of the output ``y`` of the windows."""
    groups, images, *_, channels = x.shape
    tile = rows_tile(channels)
    launch(
        kernel,
        (-(-images * written.shape[2] * written.shape[3] // tile.BLOCK_M), -(-channels // tile.BLOCK_N), groups),
        tile,
        o,
        N=images,
        **sizes("H W C", x),
        HO=y.shape[2],
        WO=y.shape[3],
        **pointers,
    )


def _launch(o):
    y, taps = _empty(o)
    _launch_windows(max_pool_kernel, o, o.x, y, y, p_y=y, p_taps=taps)
    return y, taps


def _launch_backward(o):
    dx = _empty_backward(o)
    _launch_windows(max_pool_backward_kernel, o, dx, o.d, dx, p_dx=dx)
    return dx


_max_pool = define("max_pool", max_pool_reference, _empty, _launch)
_max_pool_backward = define("max_pool_backward", max_pool_backward_reference, _empty_backward, _launch_backward)


def max_pool(x: Tensor, *, kernel: int, stride: int, padding: int = 0) -> MaxPoolOutput:
    """Maximum over kernel x kernel windows of ``x`` (G, N, H, W, C), contiguous, and the tap that attains it.

    ``y`` (G, N, Ho, Wo, C) is in x's dtype, ``taps`` uint8 like it. Raises InputError for another number of
    dimensions, and where not 2·padding ≤ kernel ≤ 15.
    """
    check_tensor("x", x, 5)
    good = 0 <= 2 * padding <= kernel <= 15
    if not good:
        raise InputError(f"kernel {kernel} with padding {padding}: expected 2·padding ≤ kernel ≤ 15")
    return MaxPoolOutput(*_max_pool(x, kernel, stride, padding))


def max_pool_backward(
    d: Tensor, taps: Tensor, *, in_size: tuple[int, int], kernel: int, stride: int, padding: int = 0
) -> Tensor:
    """Gradient (G, N, H, W, C) of ``max_pool``'s input from its output's ``d`` and ``taps`` (G, N, Ho, Wo, C).

    ``in_size`` is (H, W) of the input; the gradient is in d's dtype. Raises InputError for taps that are not uint8 or
    not like d, and for a size that does not lead to d's.
    """
    check_tensor("d", d, 5)
    if not (taps.shape == d.shape and taps.dtype == torch.uint8):
        raise InputError(f"taps is {taps.dtype} of shape {tuple(taps.shape)}, expected uint8 {tuple(d.shape)}")
    size = tuple(out_size(s, kernel, stride, padding) for s in in_size)
    if size != tuple(d.shape[2:4]):
        raise InputError(f"d has size {tuple(d.shape[2:4])}, expected {size} for input {in_size}")
    return _max_pool_backward(d, taps, *in_size, kernel, stride, padding)
