"""A pixel of the cropped and mirrored image, which ``augment`` and ``lookup_tables`` read out of a set of bytes.

    x[b, h, w] = images[picks[b], h + dy[b], w' + dx[b]], 0 outside the image;   w' = W − 1 − w if flipped

With ``crops``, a box (top, left, height, width) of the image is enlarged to the image's size instead, bilinearly:

    x[b, h, w] = the image at (top + (h + ½) · height / H − ½, left + (w' + ½) · width / W − ½), inside the box

in whole numbers, as torchvision's resize does it for bytes on a CPU: weights of 14 bits, along the rows first, each of
the two passes rounded to a byte. Boxes, and whatever else is drawn for an image, come out of ``numbers``: 31 random
bits u each, of which u · n >> 31 is one of n choices.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import tl, triton
from fastensdistill.kernels.operands import check_tensor

# What an image's random numbers choose, in this order, whether it is asked for or not: switching one kind of change on
# leaves the others' draws as they are
NUMBERS = (
    "crop size", "crop top", "crop left", "change", "cutout row", "cutout column", "erase", "erased size",
    "erased top", "erased left",
)  # fmt: skip
_PLACES = {name: place for place, name in enumerate(NUMBERS)}
NUMBER_BITS = 31
WEIGHT = 1 << 14  # of a pixel that is taken as it is


class CropOperands(NamedTuple):
    """The images of a batch, and what is cropped out of each."""

    images: Tensor  # uint8 (count, H, W, C)
    picks: Tensor  # int32 or int64 (B,), which of the images
    shifts: Tensor  # int32 (B, 2): down and right, in pixels; not read with crops
    flips: Tensor  # uint8 (B,): non-zero mirrors left to right
    numbers: Tensor | None = None  # int32 (B, 10), 0 to 2^31 − 1: see NUMBERS
    crops: Tensor | None = None  # int32 (n, 2): equally likely (height, width) of the box


def chosen(numbers: Tensor, name: str, count: Tensor | int) -> Tensor:
    """int64 (B,), 0 to ``count`` − 1: which of as many choices the random number ``name`` takes."""
    return numbers[:, _PLACES[name]].long() * count >> NUMBER_BITS


def crop_box(o: CropOperands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height and width, int64 (B,) each, of the boxes that are enlarged; needs ``crops``."""
    assert o.numbers is not None
    assert o.crops is not None
    height, width = o.crops[chosen(o.numbers, "crop size", o.crops.shape[0])].long().unbind(1)
    top = chosen(o.numbers, "crop top", o.images.shape[1] - height + 1)
    return top, chosen(o.numbers, "crop left", o.images.shape[2] - width + 1), height, width


def _taps(position: Tensor, start: Tensor, size: Tensor, full: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two pixels (B, full) that each position is made of, and the weight of the second in ``WEIGHT``-ths."""
    place = ((2 * position + 1) * size[:, None] - full).clamp(min=0)  # in 2·full-ths of a pixel
    first = place // (2 * full)
    weight = (place % (2 * full) * WEIGHT + full) // (2 * full)
    return start[:, None] + first, start[:, None] + torch.minimum(first + 1, size[:, None] - 1), weight


def crop_reference(o: CropOperands) -> Tensor:
    """The images, uint8 (B, H, W, C)."""
    batch, (height, width) = o.picks.shape[0], o.images.shape[1:3]
    index = o.picks.long()[:, None, None]
    rows = torch.arange(height, device=o.images.device)[None]
    columns = torch.arange(width, device=o.images.device)[None].expand(batch, -1)
    columns = torch.where(o.flips[:, None].bool(), width - 1 - columns, columns)
    if o.crops is None:
        rows, columns = rows + o.shifts[:, :1], columns + o.shifts[:, 1:]
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
        r, c = rows.clamp(0, height - 1).long(), columns.clamp(0, width - 1).long()
        return o.images[index, r[:, :, None], c[:, None, :]] * inside[..., None]
    top, left, box_height, box_width = crop_box(o)
    *both_rows, down = _taps(rows, top, box_height, height)
    *both_columns, right = _taps(columns, left, box_width, width)

    def row(r: Tensor) -> Tensor:
        one, other = (o.images[index, r[:, :, None], c[:, None, :]].int() for c in both_columns)
        return _mixed(one, other, right[:, None, :, None])

    return _mixed(row(both_rows[0]), row(both_rows[1]), down[:, :, None, None]).to(torch.uint8)


def _mixed(one: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    return (one * (WEIGHT - weight) + other * weight + WEIGHT // 2) // WEIGHT


@triton.constexpr_function
def number(name):
    """Where among an image's random numbers ``name`` is; of "count", how many there are."""
    return len(_PLACES) if name == "count" else _PLACES[name]


@triton.jit
def choose(p_numbers, i_b, NAME: tl.constexpr, count):
    """``chosen`` for image ``i_b``."""
    u = tl.load(p_numbers + i_b * number("count") + number(NAME)).to(tl.int64)
    return (u * count >> 31).to(tl.int32)


@triton.jit
def load_box(p_shifts, p_numbers, p_crops, i_b, N_CROPS: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """Top, left, height and width of image ``i_b``'s crop; without ``p_crops`` a box of the image's size."""
    if p_crops is None:
        return tl.load(p_shifts + 2 * i_b), tl.load(p_shifts + 2 * i_b + 1), H, W
    else:
        i_size = choose(p_numbers, i_b, "crop size", N_CROPS)
        height = tl.load(p_crops + 2 * i_size)
        width = tl.load(p_crops + 2 * i_size + 1)
        top = choose(p_numbers, i_b, "crop top", H - height + 1)
        left = choose(p_numbers, i_b, "crop left", W - width + 1)
        return top, left, height, width


@triton.jit
def taps(i_position, size, FULL: tl.constexpr):
    """``_taps`` within the box."""
    place = tl.maximum((2 * i_position + 1) * size - FULL, 0)
    first = place // (2 * FULL)
    weight = (place % (2 * FULL) * 16384 + FULL) // (2 * FULL)
    return first, tl.minimum(first + 1, size - 1), weight


@triton.jit
def mixed_row(p_row, o_first, o_second, weight, m):
    """Two pixels of a row, mixed and rounded."""
    b_one = tl.load(p_row + o_first, mask=m, other=0).to(tl.int32)
    b_other = tl.load(p_row + o_second, mask=m, other=0).to(tl.int32)
    return (b_one * (16384 - weight) + b_other * weight + 8192) >> 14


@triton.jit
def crop_pixels(
    p_image, i_h, i_w, i_c, m, box, flip, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, RESIZED: tl.constexpr
):
    """Channel ``i_c`` of the cropped image at (i_h, i_w), bytes or int32; 0 where ``m`` is not set."""
    i_w = tl.where(flip, W - 1 - i_w, i_w)
    if RESIZED:
        i_top, i_bottom, down = taps(i_h, box[2], H)
        i_left, i_right, right = taps(i_w, box[3], W)
        o_left = (box[1] + i_left) * C + i_c
        o_right = (box[1] + i_right) * C + i_c
        b_top = mixed_row(p_image + (box[0] + i_top) * (W * C), o_left, o_right, right, m)
        b_bottom = mixed_row(p_image + (box[0] + i_bottom) * (W * C), o_left, o_right, right, m)
        return (b_top * (16384 - down) + b_bottom * down + 8192) >> 14
    else:
        i_w = i_w + box[1]
        i_h = i_h + box[0]
        m_x = m & (i_h >= 0) & (i_h < H) & (i_w >= 0) & (i_w < W)
        return tl.load(p_image + ((i_h * W + i_w) * C + i_c), mask=m_x, other=0)


def crop_constants(o: CropOperands) -> dict[str, int]:
    """The compile-time integers of a kernel that reads the cropped images."""
    _, height, width, channels = o.images.shape
    return {"H": height, "W": width, "C": channels, "N_CROPS": 0 if o.crops is None else o.crops.shape[0]}


def check_crop(o: CropOperands) -> None:
    """Raise InputError for operands of other shapes and dtypes."""
    check_tensor("images", o.images, 4)
    if o.images.dtype != torch.uint8:
        raise InputError(f"images is {o.images.dtype}, expected uint8")
    batch = o.picks.shape[0]
    check_small("shifts", o.shifts, torch.int32, (batch, 2))
    if not (o.flips.shape == (batch,) and o.flips.dtype == torch.uint8):
        raise InputError(f"flips is {o.flips.dtype} of shape {tuple(o.flips.shape)}, expected uint8 ({batch},)")
    if o.numbers is not None:
        check_small("numbers", o.numbers, torch.int32, (batch, len(NUMBERS)))
    if o.crops is not None:
        check_sizes("crops", o.crops)
        if o.numbers is None:
            raise InputError("crops are given without numbers, which choose among them")


def check_sizes(name: str, sizes: Tensor) -> None:
    """Raise InputError unless ``sizes`` is int32 (n, 2) with at least one size."""
    check_small(name, sizes, torch.int32, (max(1, sizes.shape[0]), 2))


def check_small(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise InputError unless ``x`` is contiguous, and of that dtype and shape."""
    if not (x.dtype == dtype and x.shape == shape and x.is_contiguous()):
        kind = str(dtype).removeprefix("torch.")
        raise InputError(f"{name} is {x.dtype} of shape {tuple(x.shape)}, expected contiguous {kind} {shape}")
