"""A training batch out of a device-resident uint8 set: crop, flip, TrivialAugment, erasing, division by 255.

    out[b, h, w] = 0 in the boxes that are erased, elsewhere change_b(x)[h, w] / 255

x is the cropped and mirrored image (``kernels/crop.py``) and change_b the operation that TrivialAugment chose for it
(``kernels/trivial_augment.py``), if it is asked for:

    shear, translate, rotate     x at the nearest pixel of the inverse map, 0 outside
    color                        blend(x, grey of x)
    sharpness                    x + (1 − f) · (smooth(x) − x), smooth = (Σ of the 3x3 pixels + 4 · x) / 13, to nearest
    other operations             a byte's value in the image's tables (``kernels/lookup_tables.py``)

A cutout is a square of ``cutout`` pixels around a random pixel, as far as it lies inside. A box of random erasing has
one of the sizes ``erased``, at a random place inside the image, with a chance of ``erasing`` / 2^31.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastensdistill.errors import InputError, unknown
from fastensdistill.kernels.crop import (
    CropOperands,
    check_crop,
    check_sizes,
    check_small,
    choose,
    chosen,
    crop_constants,
    crop_pixels,
    crop_reference,
    load_box,
    number,
)
from fastensdistill.kernels.launch import launch, tl, triton
from fastensdistill.kernels.lookup_tables import check_rows
from fastensdistill.kernels.operands import DTYPE_NAMES, accumulator
from fastensdistill.kernels.ops import define
from fastensdistill.kernels.tiles import Tile
from fastensdistill.kernels.trivial_augment import (
    BINS,
    OPERATIONS,
    ROW_CONSTANTS,
    ROWS,
    blend,
    blend_reference,
    grey,
    grey_reference,
    operation,
)

AUGMENT_TILE = Tile(0, 1024, 0, 4, 1, "single bytes are read: latency decides, 8 values a thread")


class ChangeOperands(NamedTuple):
    """What is changed of the cropped images."""

    rows: Tensor | None = None  # float32 (868, 6): TrivialAugment's, of ``trivial_rows``
    tables: Tensor | None = None  # uint8 (B, C, 256), of ``lookup_tables``; together with rows
    cutout: int = 0  # pixels of the square's side, 0 for none
    erased: Tensor | None = None  # int32 (n, 2): equally likely (height, width) of the box
    erasing: int = 0  # of 2^31: how often a box is erased


def augment_reference(crop: CropOperands, change: ChangeOperands, dtype: str) -> Tensor:
    x = crop_reference(crop)
    if crop.numbers is not None:
        x = _trivial_reference(x, crop.numbers, change) * _kept_reference(x, crop.numbers, change)[..., None]
    return x.to(accumulator(DTYPE_NAMES[dtype])).div_(255).to(DTYPE_NAMES[dtype])


def _trivial_reference(x: Tensor, numbers: Tensor, change: ChangeOperands) -> Tensor:
    if change.rows is None or change.tables is None:
        return x
    row = chosen(numbers, "change", ROWS)
    kind, parameters = (row // (2 * BINS))[:, None, None, None], change.rows[row]
    factor, rest = parameters[:, :2].T[..., None, None, None]
    looked_up = change.tables.gather(2, x.flatten(1, 2).transpose(1, 2).long()).transpose(1, 2).view_as(x)
    out = torch.where(kind >= OPERATIONS.index("brightness"), looked_up, x)
    if x.shape[3] == 3:
        gray = grey_reference(*x.unbind(3))[..., None]
        out = torch.where(kind == OPERATIONS.index("color"), blend_reference(x, gray, factor, rest), out)
    if min(x.shape[1:3]) > 2:
        inner = x[:, 1:-1, 1:-1].float()
        window = F.avg_pool2d(x.permute(0, 3, 1, 2).double(), 3, 1, divisor_override=1).permute(0, 2, 3, 1)
        smooth = (2 * (window + 4 * inner) + 13).div(26, rounding_mode="floor")
        sharp = x.clone()
        sharp[:, 1:-1, 1:-1] = (inner.double() + rest.double() * (smooth - inner)).float().clamp(0, 255)
        out = torch.where(kind == OPERATIONS.index("sharpness"), sharp, out)
    moves = (kind >= OPERATIONS.index("shear-x")) & (kind <= OPERATIONS.index("rotate"))
    return torch.where(moves, _moved_reference(x, parameters), out)


def _moved_reference(x: Tensor, parameters: Tensor) -> Tensor:
    (height, width), device = x.shape[1:3], x.device
    across = torch.arange(width, device=device).float() - (width - 1) / 2
    down = (torch.arange(height, device=device).float() - (height - 1) / 2)[:, None]
    sources = []
    for full, (a, b, c) in ((width, parameters[:, :3].T), (height, parameters[:, 3:].T)):
        a, b, c = (one[:, None, None] for one in (a, b, c))
        part = ((across * a).double() + down.double() * b.double()).float() + c
        sources.append(((part + 1).double() * (full / 2) - 0.5).float().round().long())
    columns, rows = sources
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    image = torch.arange(x.shape[0], device=device)[:, None, None]
    return x[image, rows.clamp(0, height - 1), columns.clamp(0, width - 1)] * inside[..., None]


def _kept_reference(x: Tensor, numbers: Tensor, change: ChangeOperands) -> Tensor:
    height, width = x.shape[1:3]
    rows = torch.arange(height, device=x.device)[:, None]
    columns = torch.arange(width, device=x.device)
    kept = torch.ones(x.shape[:3], dtype=torch.bool, device=x.device)

    def outside(top: Tensor, left: Tensor, tall: Tensor | int, wide: Tensor | int) -> Tensor:
        below, right = (rows - top[:, None, None], columns - left[:, None, None])
        tall, wide = (one if isinstance(one, int) else one[:, None, None] for one in (tall, wide))
        return (below < 0) | (below >= tall) | (right < 0) | (right >= wide)

    if change.cutout:
        top, left = chosen(numbers, "cutout row", height), chosen(numbers, "cutout column", width)
        kept &= outside(top - change.cutout // 2, left - change.cutout // 2, change.cutout, change.cutout)
    if change.erased is not None:
        tall, wide = change.erased[chosen(numbers, "erased size", change.erased.shape[0])].long().unbind(1)
        tall = torch.where(chosen(numbers, "erase", 1 << 31) < change.erasing, tall, 0)
        top = chosen(numbers, "erased top", height - tall + 1)
        kept &= outside(top, chosen(numbers, "erased left", width - wide + 1), tall, wide)
    return kept


@triton.jit
def source(i_h, i_w, p_row, FULL: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """Where along a side of FULL pixels the pixel (i_h, i_w) comes from: the nearest, of two the even one."""
    across = i_w.to(tl.float32) - (W - 1) / 2
    down = i_h.to(tl.float32) - (H - 1) / 2
    b = tl.load(p_row + 1).to(tl.float64)
    part = ((across * tl.load(p_row)).to(tl.float64) + down.to(tl.float64) * b).to(tl.float32) + tl.load(p_row + 2)
    place = ((part + 1.0).to(tl.float64) * (FULL / 2) - 0.5).to(tl.float32).to(tl.float64) + 0.5
    nearest = tl.floor(place)
    i_nearest = nearest.to(tl.int32)
    return tl.where((nearest == place) & (i_nearest % 2 != 0), i_nearest - 1, i_nearest)


@triton.jit
def changed_pixels(
    p_image, p_row, p_table, i_operation, i_h, i_w, i_c, m, box, flip,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, RESIZED: tl.constexpr,
):  # fmt: skip
    """``crop_pixels`` after TrivialAugment's operation, int32."""
    if (i_operation >= operation("shear-x")) & (i_operation <= operation("rotate")):
        i_column = source(i_h, i_w, p_row, W, H, W)
        i_h = source(i_h, i_w, p_row + 3, H, H, W)
        i_w = i_column
        m = m & (i_h >= 0) & (i_h < H) & (i_w >= 0) & (i_w < W)
    b_x = crop_pixels(p_image, i_h, i_w, i_c, m, box, flip, H, W, C, RESIZED).to(tl.int32)
    if i_operation == operation("color"):
        if C == 3:
            red = crop_pixels(p_image, i_h, i_w, 0, m, box, flip, H, W, C, RESIZED)
            green = crop_pixels(p_image, i_h, i_w, 1, m, box, flip, H, W, C, RESIZED)
            blue = crop_pixels(p_image, i_h, i_w, 2, m, box, flip, H, W, C, RESIZED)
            b_x = blend(b_x, grey(red, green, blue), tl.load(p_row), tl.load(p_row + 1))
    elif i_operation == operation("sharpness"):
        m_inner = m & (i_h > 0) & (i_h < H - 1) & (i_w > 0) & (i_w < W - 1)
        total = 4 * b_x
        for i_tap in range(9):
            i_y = i_h + i_tap // 3 - 1
            i_x = i_w + i_tap % 3 - 1
            total += crop_pixels(p_image, i_y, i_x, i_c, m_inner, box, flip, H, W, C, RESIZED).to(tl.int32)
        more = ((2 * total + 13) // 26 - b_x).to(tl.float64) * tl.load(p_row + 1).to(tl.float64)
        sharp = (b_x.to(tl.float64) + more).to(tl.float32)
        b_x = tl.where(m_inner, tl.minimum(tl.maximum(sharp, 0.0), 255.0).to(tl.int32), b_x)
    elif i_operation >= operation("brightness"):
        b_x = tl.load(p_table + i_c * 256 + b_x, mask=m, other=0).to(tl.int32)
    return b_x


@triton.jit
def augment_kernel(
    p_images, p_picks, p_shifts, p_flips, p_numbers, p_crops, p_rows, p_tables, p_erased, p_out,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, N_CROPS: tl.constexpr, N_ROWS: tl.constexpr,
    N_BINS: tl.constexpr, N_COLUMNS: tl.constexpr, CUTOUT: tl.constexpr, N_ERASED: tl.constexpr, ERASING: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < H * W * C
    p_image = p_images + tl.load(p_picks + i_b).to(tl.int64) * (H * W * C)
    box = load_box(p_shifts, p_numbers, p_crops, i_b, N_CROPS, H, W)
    flip = tl.load(p_flips + i_b) != 0
    i_c = o_n % C
    i_w = (o_n // C) % W
    i_h = o_n // (C * W)
    m_x = m_n
    if CUTOUT > 0:
        i_below = i_h - (choose(p_numbers, i_b, "cutout row", H) - CUTOUT // 2)
        i_right = i_w - (choose(p_numbers, i_b, "cutout column", W) - CUTOUT // 2)
        m_x = m_x & ((i_below < 0) | (i_below >= CUTOUT) | (i_right < 0) | (i_right >= CUTOUT))
    if p_erased is not None:
        i_size = choose(p_numbers, i_b, "erased size", N_ERASED)
        height = tl.load(p_erased + 2 * i_size)
        width = tl.load(p_erased + 2 * i_size + 1)
        height = tl.where(tl.load(p_numbers + i_b * number("count") + number("erase")) < ERASING, height, 0)
        i_below = i_h - choose(p_numbers, i_b, "erased top", H - height + 1)
        i_right = i_w - choose(p_numbers, i_b, "erased left", W - width + 1)
        m_x = m_x & ((i_below < 0) | (i_below >= height) | (i_right < 0) | (i_right >= width))
    if p_rows is not None:
        i_row = choose(p_numbers, i_b, "change", N_ROWS)
        b_x = changed_pixels(
            p_image, p_rows + i_row * N_COLUMNS, p_tables + i_b * (C * 256), i_row // (2 * N_BINS), i_h, i_w, i_c, m_x,
            box, flip, H, W, C, p_crops is not None,
        )  # fmt: skip
    else:
        b_x = crop_pixels(p_image, i_h, i_w, i_c, m_x, box, flip, H, W, C, p_crops is not None)
    b_x = b_x.to(tl.float32)
    tl.store(p_out + i_b * (H * W * C) + o_n, (b_x / 255.0).to(p_out.dtype.element_ty), mask=m_n)


def _empty(crop, change, dtype):
    return crop.images.new_empty(crop.picks.shape[0], *crop.images.shape[1:], dtype=DTYPE_NAMES[dtype])


def _launch(crop, change, dtype):
    out = _empty(crop, change, dtype)
    height, width, channels = crop.images.shape[1:]
    launch(
        augment_kernel,
        (crop.picks.shape[0], -(-height * width * channels // AUGMENT_TILE.BLOCK_N)),
        AUGMENT_TILE,
        crop,
        change,
        p_out=out,
        **crop_constants(crop),
        **ROW_CONSTANTS,
        N_ERASED=0 if change.erased is None else change.erased.shape[0],
    )
    return out


_augment = define("augment", augment_reference, _empty, _launch)


def augment(
    images: Tensor,
    index: Tensor,
    shifts: Tensor,
    flips: Tensor,
    numbers: Tensor | None = None,
    *,
    crops: Tensor | None = None,
    change: ChangeOperands | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Batch (B, H, W, C) in [0, 1] of the given ``dtype``.

    ``images`` uint8 (count, H, W, C), contiguous; ``index`` int32 or int64 (B,), rows of it; ``shifts`` int32 (B, 2),
    (down, right) offsets of the crop in pixels; ``flips`` uint8 (B,), non-zero mirrors the image left to right.
    ``numbers``, ``crops`` and ``change`` are those of ``CropOperands`` and ``ChangeOperands``.
    Raises InputError for other shapes and dtypes, and for what needs random numbers without ``numbers``.
    """
    crop = CropOperands(images, index, shifts, flips, numbers, crops)
    check_crop(crop)
    change = ChangeOperands() if change is None else change
    if change.rows is not None or change.tables is not None:
        if change.rows is None or change.tables is None:
            raise InputError("rows and tables must be given together")
        check_rows(change.rows, images.shape[3])
        check_small("tables", change.tables, torch.uint8, (index.shape[0], images.shape[3], 256))
    if change.erased is not None:
        check_sizes("erased", change.erased)
    asked = change.rows is not None or change.erased is not None or change.cutout > 0
    if numbers is None and asked:
        raise InputError("images are to be changed without numbers, which choose how")
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_NAMES:
        raise unknown("dtype", name, DTYPE_NAMES)
    return _augment(*crop, *change, name)
