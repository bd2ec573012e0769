"""An image times one value per channel (squeeze-and-excitation), and its gradient.

    y = x · g                                          (g by image and channel)
    dx = d · g,   dg = Σ over H, W of d · x

The gradient reads d and x once: 4 bytes per value in bfloat16 and 2 written, where a product and a sum of their own
would move 6 more. A program sums one image's channels from the first position to the last, so the order is fixed.

The mean over H and W before such a gate stays PyTorch's: one read of x with sums in float32, and nothing to fuse into
it but the gradient's expansion, which is one write.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import launch, tl, triton
from fastensdistill.kernels.operands import accumulator, check_tensor
from fastensdistill.kernels.ops import define
from fastensdistill.kernels.tiles import Tile


class GateOperands(NamedTuple):
    """What ``gate`` takes."""

    x: Tensor  # (G, N, H, W, C)
    g: Tensor  # (G, N, 1, 1, C)


class GateGradientOperands(NamedTuple):
    """What ``gate_gradient`` takes."""

    d: Tensor  # (G, N, H, W, C)
    x: Tensor  # like d
    g: Tensor  # (G, N, 1, 1, C)


class GateGradient(NamedTuple):
    """The gradients of both factors."""

    dx: Tensor  # (G, N, H, W, C)
    dg: Tensor  # (G, N, 1, 1, C)


def gate_reference(o: GateOperands) -> Tensor:
    high = accumulator(o.x.dtype)
    return (o.x.to(high) * o.g.to(high)).to(o.x.dtype)


def gate_gradient_reference(o: GateGradientOperands) -> tuple[Tensor, Tensor]:
    high = accumulator(o.d.dtype)
    d = o.d.to(high)
    return (d * o.g.to(high)).to(o.d.dtype), (d * o.x.to(high)).sum((2, 3), keepdim=True).to(o.g.dtype)


@triton.jit
def gate_kernel(
    p_x, p_g, p_y, HW: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    BLOCKS: tl.constexpr = (HW + BLOCK_M - 1) // BLOCK_M
    i_image = (tl.program_id(0) // BLOCKS).to(tl.int64)
    o_m = tl.program_id(0) % BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < C
    m_x = (o_m < HW)[:, None] & m_n[None, :]
    o_x = i_image * (HW * C) + (o_m[:, None] * C + o_n[None, :])
    b_g = tl.load(p_g + i_image * C + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    tl.store(p_y + o_x, (b_x * b_g[None, :]).to(p_y.dtype.element_ty), mask=m_x)


@triton.jit
def gate_gradient_kernel(
    p_d, p_x, p_g, p_dx, p_dg, HW: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    i_image = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < C
    b_g = tl.load(p_g + i_image * C + o_n, mask=m_n, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(0, HW, BLOCK_M):
        o_m = i + tl.arange(0, BLOCK_M)
        m_d = (o_m < HW)[:, None] & m_n[None, :]
        o_d = i_image * (HW * C) + (o_m[:, None] * C + o_n[None, :])
        b_d = tl.load(p_d + o_d, mask=m_d, other=0.0).to(tl.float32)
        acc += b_d * tl.load(p_x + o_d, mask=m_d, other=0.0).to(tl.float32)
        tl.store(p_dx + o_d, (b_d * b_g[None, :]).to(p_dx.dtype.element_ty), mask=m_d)
    tl.store(p_dg + i_image * C + o_n, tl.sum(acc, 0).to(p_dg.dtype.element_ty), mask=m_n)


def image_tile(positions: int, channels: int) -> Tile:
    """Tile of a pass over one image: of a small one more channels, so that a program has 4096 values where it can."""
    rows = min(64, triton.next_power_of_2(positions))
    columns = min(triton.next_power_of_2(channels), 4096 // rows)
    return Tile(rows, max(8, columns), 0, 4, 1, "32 values a thread; below that, all channels of an image")


def _empty(o):
    return torch.empty_like(o.x)


def _empty_gradient(o):
    return torch.empty_like(o.d), torch.empty_like(o.g)


def _launch_images(kernel, x, whole, **pointers):
    """Launch over the images of ``x``: a program has all positions of one (``whole``), or a block of them."""
    groups, images, height, width, channels = x.shape
    positions = height * width
    tile = image_tile(positions, channels)
    blocks = 1 if whole else -(-positions // tile.BLOCK_M)
    grid = (groups * images * blocks, -(-channels // tile.BLOCK_N))
    launch(kernel, grid, tile, HW=positions, C=channels, **pointers)


def _launch(o):
    y = _empty(o)
    _launch_images(gate_kernel, o.x, False, p_x=o.x, p_g=o.g, p_y=y)
    return y


def _launch_gradient(o):
    dx, dg = _empty_gradient(o)
    _launch_images(gate_gradient_kernel, o.d, True, p_d=o.d, p_x=o.x, p_g=o.g, p_dx=dx, p_dg=dg)
    return dx, dg


_gate = define("gate", gate_reference, _empty, _launch)
_gate_gradient = define("gate_gradient", gate_gradient_reference, _empty_gradient, _launch_gradient)


def _check_gate(x: Tensor, g: Tensor) -> None:
    check_tensor("g", g, 5)
    wanted = (*x.shape[:2], 1, 1, x.shape[4])
    if tuple(g.shape) != wanted:
        raise InputError(f"g has shape {tuple(g.shape)}, expected {wanted}")


def gate(x: Tensor, g: Tensor) -> Tensor:
    """``x · g``: x (G, N, H, W, C), float32, float16 or bfloat16, which the result is too (float64: reference only).

    g is (G, N, 1, 1, C), of any of these. Raises InputError for other shapes.
    """
    check_tensor("x", x, 5)
    _check_gate(x, g)
    return _gate(x, g)


def gate_gradient(d: Tensor, x: Tensor, g: Tensor) -> GateGradient:
    """The gradients of ``gate``'s x and g, in the dtypes of d and g, from its result's ``d`` (G, N, H, W, C).

    Raises InputError for an x that is not like d, and for a g of another shape.
    """
    check_tensor("d", d, 5)
    if not (x.shape == d.shape and x.is_contiguous()):
        raise InputError(f"x has shape {tuple(x.shape)}, expected {tuple(d.shape)}, contiguous")
    _check_gate(d, g)
    return GateGradient(*_gate_gradient(d, x, g))
