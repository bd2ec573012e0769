"""For every image and channel of a batch, what TrivialAugment makes of each of the 256 values of a byte.

    brightness, contrast       blend(v, 0),   blend(v, mean of the grey image)       (kernels/trivial_augment.py)
    posterize, solarize        v & bits,      255 − v from the threshold on
    autocontrast               (v − least) / ((most − least) / 255), truncated; v where the channel has one value
    equalize                   (#{x < v} + step // 2) // step, step = #{x < most} // 255; v where step is 0
    the other operations       v

Least, most, mean and counts are those of the cropped image. ``augment`` looks its pixels up here.
"""

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.crop import (
    CropOperands,
    check_crop,
    check_small,
    choose,
    chosen,
    crop_constants,
    crop_pixels,
    crop_reference,
    load_box,
)
from fastensdistill.kernels.launch import launch, tl, triton
from fastensdistill.kernels.ops import define
from fastensdistill.kernels.tiles import Tile
from fastensdistill.kernels.trivial_augment import (
    BINS,
    COLUMNS,
    OPERATIONS,
    ROW_CONSTANTS,
    ROWS,
    blend,
    blend_reference,
    grey,
    grey_reference,
    operation,
)

TABLES_TILE = Tile(0, 2048, 0, 8, 1, "8 values a thread: one program counts a whole channel")


def lookup_tables_reference(crop: CropOperands, rows: Tensor) -> Tensor:
    assert crop.numbers is not None
    x = crop_reference(crop)
    batch, channels, pixels = x.shape[0], x.shape[3], x.shape[1] * x.shape[2]
    row = chosen(crop.numbers, "change", ROWS)
    kind, (first, second) = row // (2 * BINS), rows[row, :2].T[..., None, None]
    v = torch.arange(256, device=x.device)
    values = v.expand(batch, channels, 256)

    flat = x.flatten(1, 2).transpose(1, 2)
    counts = torch.zeros(batch, channels, 256, dtype=torch.int64, device=x.device)
    counts.scatter_add_(2, flat.long(), torch.ones_like(flat, dtype=torch.int64))
    least, most = flat.amin(2, keepdim=True).long(), flat.amax(2, keepdim=True).long()
    scale = (most - least).float() * (1 / 255)
    stretched = ((v - least).float() / torch.where(most > least, scale, 1.0)).clamp(0, 255).to(torch.uint8)
    step = (pixels - counts.gather(2, most)) // 255
    equal = ((counts.cumsum(2) - counts + step // 2) // step.clamp(min=1)).clamp(max=255)
    grey_image = grey_reference(*x.unbind(3)) if channels == 3 else x[..., 0].float()
    total = grey_image.long().sum((1, 2))
    mean = (total.float() / pixels)[:, None, None]

    out = values.to(torch.uint8)
    for name, table in (
        ("brightness", blend_reference(values, torch.zeros_like(mean), first, second)),
        ("contrast", blend_reference(values, mean, first, second)),
        ("posterize", values & first.long()),
        ("solarize", torch.where(values.float() >= first, 255 - values, values)),
        ("autocontrast", torch.where(most > least, stretched, values)),
        ("equalize", torch.where(step > 0, equal, values)),
    ):
        out = torch.where((kind == OPERATIONS.index(name))[:, None, None], table.to(torch.uint8), out)
    return out


@triton.jit
def lookup_tables_kernel(
    p_images, p_picks, p_shifts, p_flips, p_numbers, p_crops, p_rows, p_out,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, N_CROPS: tl.constexpr, N_ROWS: tl.constexpr,
    N_BINS: tl.constexpr, N_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    i_c = tl.program_id(1)
    i_row = choose(p_numbers, i_b, "change", N_ROWS)
    i_operation = i_row // (2 * N_BINS)
    first = tl.load(p_rows + i_row * N_COLUMNS)
    second = tl.load(p_rows + i_row * N_COLUMNS + 1)
    box = load_box(p_shifts, p_numbers, p_crops, i_b, N_CROPS, H, W)
    flip = tl.load(p_flips + i_b) != 0
    p_image = p_images + tl.load(p_picks + i_b).to(tl.int64) * (H * W * C)
    o_v = tl.arange(0, 256)
    b_y = o_v
    if i_operation == operation("brightness"):
        b_y = blend(o_v, first * 0, first, second)
    elif i_operation == operation("contrast"):
        total = tl.zeros((), tl.int64)
        for start in range(0, H * W, BLOCK_N):
            o_n = start + tl.arange(0, BLOCK_N)
            m_n = o_n < H * W
            b_x = crop_pixels(p_image, o_n // W, o_n % W, 0, m_n, box, flip, H, W, C, p_crops is not None)
            if C == 3:
                green = crop_pixels(p_image, o_n // W, o_n % W, 1, m_n, box, flip, H, W, C, p_crops is not None)
                blue = crop_pixels(p_image, o_n // W, o_n % W, 2, m_n, box, flip, H, W, C, p_crops is not None)
                total += tl.sum(grey(b_x, green, blue).to(tl.int32), 0)
            else:
                total += tl.sum(b_x.to(tl.int32), 0)
        b_y = blend(o_v, tl.div_rn(total.to(tl.float32), float(H * W)), first, second)
    elif i_operation == operation("posterize"):
        b_y = o_v & first.to(tl.int32)
    elif i_operation == operation("solarize"):
        b_y = tl.where(o_v.to(tl.float32) >= first, 255 - o_v, o_v)
    elif i_operation >= operation("autocontrast"):
        counts = tl.zeros((256,), tl.int32)
        for start in range(0, H * W, BLOCK_N):
            o_n = start + tl.arange(0, BLOCK_N)
            m_n = o_n < H * W
            b_x = crop_pixels(p_image, o_n // W, o_n % W, i_c, m_n, box, flip, H, W, C, p_crops is not None)
            counts += tl.histogram(b_x.to(tl.int32), 256, mask=m_n)
        least = tl.min(tl.where(counts > 0, o_v, 255), 0)
        most = tl.max(tl.where(counts > 0, o_v, 0), 0)
        if i_operation == operation("autocontrast"):
            if most > least:
                scale = (most - least).to(tl.float32) * (1 / 255)
                b_stretched = tl.div_rn((o_v - least).to(tl.float32), scale)
                b_y = tl.minimum(tl.maximum(b_stretched, 0.0), 255.0).to(tl.int32)
        else:
            step = (H * W - tl.sum(tl.where(o_v == most, counts, 0), 0)) // 255
            if step > 0:
                b_y = tl.minimum((tl.cumsum(counts, 0) - counts + step // 2) // step, 255)
    tl.store(p_out + (i_b * C + i_c) * 256 + o_v, b_y.to(tl.uint8))


def _empty(crop, rows):
    return crop.images.new_empty(crop.picks.shape[0], crop.images.shape[3], 256)


def _launch(crop, rows):
    out = _empty(crop, rows)
    launch(
        lookup_tables_kernel,
        (crop.picks.shape[0], crop.images.shape[3]),
        TABLES_TILE,
        crop,
        p_rows=rows,
        p_out=out,
        **crop_constants(crop),
        **ROW_CONSTANTS,
    )
    return out


_lookup_tables = define("lookup_tables", lookup_tables_reference, _empty, _launch)


def check_rows(rows: Tensor, channels: int) -> None:
    """Raise InputError for a table of other shape and dtype, and for images that are neither grey nor coloured."""
    check_small("rows", rows, torch.float32, (ROWS, COLUMNS))
    if channels not in (1, 3):
        raise InputError(f"images have {channels} channels; TrivialAugment expects 1 or 3")


def lookup_tables(crop: CropOperands, rows: Tensor) -> Tensor:
    """Tables uint8 (B, C, 256) of the images that ``crop`` says; ``rows`` is ``trivial_rows`` of their size.

    Raises InputError for other shapes and dtypes, and without the numbers that choose among the rows.
    """
    check_crop(crop)
    check_rows(rows, crop.images.shape[3])
    if crop.numbers is None:
        raise InputError("rows are given without numbers, which choose among them")
    return _lookup_tables(*crop, rows)
