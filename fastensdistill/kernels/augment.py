"""A training batch out of a device-resident uint8 set: shifted crop, horizontal flip, division by 255.

    out[b, h, w] = images[index[b], h + dy[b], w' + dx[b]] / 255, 0 outside the image;   w' = W − 1 − w if flipped

Shifts (dy, dx) in [−4, 4] are the zero-padded random crop of CIFAR recipes (docs/method.md, Recipe).
"""

import torch
from torch import Tensor

from fastensdistill.errors import InputError, unknown
from fastensdistill.kernels.launch import launch, tl, triton
from fastensdistill.kernels.operands import DTYPE_NAMES, accumulator, check_tensor
from fastensdistill.kernels.ops import define
from fastensdistill.kernels.tiles import Tile

AUGMENT_TILE = Tile(0, 1024, 0, 4, 1, "single bytes are read: latency decides, 8 values a thread")


def augment_reference(images: Tensor, index: Tensor, shifts: Tensor, flips: Tensor, dtype: str) -> Tensor:
    height, width = images.shape[1:3]
    rows = torch.arange(height, device=images.device)[None] + shifts[:, :1]
    columns = torch.arange(width, device=images.device)[None].expand(index.shape[0], -1)
    columns = torch.where(flips[:, None].bool(), width - 1 - columns, columns) + shifts[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    r, c = rows.clamp(0, height - 1).long(), columns.clamp(0, width - 1).long()
    picked = images[index.long()[:, None, None], r[:, :, None], c[:, None, :]] * inside[..., None]
    return picked.to(accumulator(DTYPE_NAMES[dtype])).div_(255).to(DTYPE_NAMES[dtype])


@triton.jit
def augment_kernel(
    p_images, p_index, p_shifts, p_flips, p_out,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < H * W * C
    i_image = tl.load(p_index + i_b).to(tl.int64)
    down = tl.load(p_shifts + 2 * i_b)
    right = tl.load(p_shifts + 2 * i_b + 1)
    flip = tl.load(p_flips + i_b) != 0
    i_w = (o_n // C) % W
    i_w = tl.where(flip, W - 1 - i_w, i_w) + right
    i_h = o_n // (C * W) + down
    m_x = m_n & (i_h >= 0) & (i_h < H) & (i_w >= 0) & (i_w < W)
    o_x = (i_h * W + i_w) * C + o_n % C
    b_x = tl.load(p_images + i_image * (H * W * C) + o_x, mask=m_x, other=0).to(tl.float32)
    tl.store(p_out + i_b * (H * W * C) + o_n, (b_x / 255.0).to(p_out.dtype.element_ty), mask=m_n)


def _empty(images, index, shifts, flips, dtype):
    return images.new_empty(index.shape[0], *images.shape[1:], dtype=DTYPE_NAMES[dtype])


def _launch(images, index, shifts, flips, dtype):
    out = _empty(images, index, shifts, flips, dtype)
    height, width, channels = images.shape[1:]
    launch(
        augment_kernel,
        (index.shape[0], -(-height * width * channels // AUGMENT_TILE.BLOCK_N)),
        AUGMENT_TILE,
        p_images=images,
        p_index=index,
        p_shifts=shifts,
        p_flips=flips,
        p_out=out,
        H=height,
        W=width,
        C=channels,
    )
    return out


_augment = define("augment", augment_reference, _empty, _launch)


def augment(
    images: Tensor, index: Tensor, shifts: Tensor, flips: Tensor, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Batch (B, H, W, C) in [0, 1] of the given ``dtype``.

    ``images`` uint8 (count, H, W, C), contiguous; ``index`` int32 or int64 (B,), rows of it; ``shifts`` int32 (B, 2),
    (down, right) offsets of the crop in pixels; ``flips`` uint8 (B,), non-zero mirrors the image left to right.
    Raises InputError for other shapes and dtypes.
    """
    check_tensor("images", images, 4)
    if images.dtype != torch.uint8:
        raise InputError(f"images is {images.dtype}, expected uint8")
    batch = index.shape[0]
    if not (shifts.shape == (batch, 2) and shifts.dtype == torch.int32 and shifts.is_contiguous()):
        raise InputError(
            f"shifts is {shifts.dtype} of shape {tuple(shifts.shape)}, expected contiguous int32 ({batch}, 2)"
        )
    if not (flips.shape == (batch,) and flips.dtype == torch.uint8):
        raise InputError(f"flips is {flips.dtype} of shape {tuple(flips.shape)}, expected uint8 ({batch},)")
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_NAMES:
        raise unknown("dtype", name, DTYPE_NAMES)
    return _augment(images, index, shifts, flips, name)
