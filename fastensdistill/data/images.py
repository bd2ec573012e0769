"""Image files: which ones are read, their sizes and modes, and decoding to uint8."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from fastensdistill.errors import InputError

# Formats that Pillow opens and that hold no pixels it can decode, or run a program to draw them.
NO_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}
# Images to everyone who sees the folder, which Pillow opens only with a plugin, or never.
FOREIGN = {
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcm", ".dng", ".eps", ".exr", ".hdr", ".heic", ".heif", ".hif", ".jxl",
    ".jxr", ".kdc", ".mrw", ".nef", ".nrrd", ".orf", ".pef", ".raf", ".raw", ".rw2", ".sr2", ".srw", ".svg", ".wdp",
    ".x3f",
}  # fmt: skip
# What lies beside images and is none.
BESIDE = {
    ".cfg", ".csv", ".db", ".doc", ".docx", ".html", ".ini", ".ipynb", ".json", ".jsonl", ".lnk", ".lock", ".log",
    ".mat", ".md", ".npy", ".npz", ".pkl", ".pdf", ".py", ".rst", ".toml", ".tsv", ".txt", ".url", ".xls", ".xlsx",
    ".xml", ".yaml", ".yml", ".zip",
}  # fmt: skip

GREY, COLOUR = {"1", "L", "LA"}, {"RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr"}


@cache
def suffixes() -> frozenset[str]:
    """The suffixes, in lower case, of the images that Pillow reads here (``.jfif`` and ``.avif`` among them)."""
    known = Image.registered_extensions()
    return frozenset(s for s, name in known.items() if name in Image.OPEN and name not in NO_PIXELS) - FOREIGN - BESIDE


def is_image(path: str) -> bool:
    """Whether a file whose suffix says nothing holds an image that Pillow reads."""
    try:
        with Image.open(path) as image:
            return image.format not in NO_PIXELS
    except Exception:  # whatever a plugin makes of bytes that are no image
        return False


def read_mode(path: str) -> str:
    """Pillow's mode of the pixels, without decoding them."""
    try:
        with Image.open(path) as image:
            return image.mode
    except Exception as error:
        raise unreadable(path, error) from error


def read_size(path: str) -> tuple[int, int]:
    """Height and width of an image as it is to be seen (EXIF orientation applied)."""
    try:
        with Image.open(path) as opened:
            width, height = upright(opened).size
            return height, width
    except Exception as error:
        raise unreadable(path, error) from error


def read_image(path: str, shape: tuple[int, int, int], image_size: int | None) -> tuple[np.ndarray, bool]:
    """One image as uint8 ``shape``, and whether it has transparent pixels, which are seen on white.

    Turned as its EXIF orientation says; of an animation the first frame; with ``image_size`` the largest centred square
    resized. Raises ``InputError`` for what cannot be decoded, has more than 8 bits, or is of another size.
    """
    H, W, C = shape
    try:
        with Image.open(path) as opened:
            if opened.mode not in GREY | COLOUR:
                raise InputError(f"{path} has pixels of mode {opened.mode!r}; expected 8-bit grey or colour")
            image, transparent = on_white(upright(opened))
            image = image.convert("RGB" if C == 3 else "L")
    except InputError:
        raise
    except Exception as error:  # decoders raise nearly everything: EOFError, struct.error, IndexError, ...
        raise unreadable(path, error) from error
    width, height = image.size
    if image_size is not None and (height, width) != (H, W):
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        # cropped before, because resize's own box lets the filter reach across the square's edge
        square = image.crop((left, top, left + side, top + side))
        image = square.resize((W, H), Image.Resampling.BICUBIC)
    elif (height, width) != (H, W):
        raise InputError(
            f"{path} is {height}x{width} pixels, another image is {H}x{W}; "
            "expected one size, or the option image_size to resize all to"
        )
    return np.asarray(image).reshape(shape), transparent


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; as it is where the EXIF block is damaged."""
    try:
        orientation = image.getexif().get(274, 1)
    except Exception:
        return image
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def on_white(image: Image.Image) -> tuple[Image.Image, bool]:
    """The image as viewers show it, transparent pixels over white; whether there are any.

    Without its transparency a black drawing on nothing would be black all over.
    """
    if not (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        return image, False
    whole = image.convert("RGBA")
    if whole.getchannel("A").getextrema()[0] == 255:
        return image, False
    seen = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole)
    return seen.convert("L" if image.mode in GREY else "RGB"), True


def unreadable(path: str | Path, error: Exception) -> InputError:
    """The error to raise for an image that could not be read because of ``error``."""
    if isinstance(error, MemoryError):
        return InputError(f"{path} does not fit into memory")
    return InputError(f"{path} is not a readable image ({' '.join(str(error).split()) or type(error).__name__})")
