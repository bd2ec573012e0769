"""Image files as cameras, browsers and other programs write them: read right, or refused by name."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastensdistill.data import load_dataset, sources
from fastensdistill.data import memory as memory_module
from fastensdistill.data.images import read_image, read_size
from fastensdistill.errors import InputError
from tests.datasets import one_line, write_classes, write_image
from tests.untyped import present

SHADES = np.arange(30, dtype=np.uint8).reshape(6, 5) * 8
COLOURS = np.stack([SHADES, 255 - SHADES, SHADES // 2], 2)


@pytest.mark.parametrize(("suffix", "kind"), [
    (".jfif", "JPEG"), (".jpe", "JPEG"), (".JPG", "JPEG"), (".png", "PNG"), (".apng", "PNG"), (".tga", "TGA"),
    (".tif", "TIFF"), (".webp", "WEBP"), (".bmp", "BMP"), (".dib", "DIB"), (".ppm", "PPM"), (".jp2", "JPEG2000"),
    (".avif", "AVIF"), (".ico", "PNG"), (".jpg_large", "JPEG"), ("", "PNG"), (".heic", "JPEG"), (".123", "PNG"),
])  # fmt: skip
def test_images_of_every_suffix_are_read(suffix, kind, tmp_path):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    write_classes(tmp_path, {"cat": 5, "dog": 5})
    for i in range(10):
        Image.fromarray(COLOURS).save(tmp_path / "dog" / f"name{i}{suffix}", kind)
    data = load_dataset(tmp_path)
    assert len(data.train) + len(data.validation) + len(data.test) == 20
    dogs = data.train.images[data.train.labels == 1].astype(int)
    close = np.abs(dogs - COLOURS).mean((1, 2, 3)) < 30
    assert close.sum() >= 7


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_exif_orientation_is_applied(orientation, suffix, tmp_path):
    corner = np.zeros((16, 24, 3), np.uint8)
    corner[:8, :8] = 255  # as a viewer shows it: white at the upper left
    mirrored = corner[:, ::-1]
    stored = [corner, mirrored, corner[::-1, ::-1], corner[::-1], corner.transpose(1, 0, 2), np.rot90(corner),
              corner[::-1, ::-1].transpose(1, 0, 2), np.rot90(corner, 3)][orientation - 1]  # fmt: skip
    exif = Image.Exif()
    exif[274] = orientation
    path = str(tmp_path / f"turned.{suffix}")
    Image.fromarray(stored).save(path, exif=exif)
    assert read_size(path) == (16, 24)
    image, _ = read_image(path, (16, 24, 3), None)
    assert np.abs(image.astype(int) - corner).max() < 40


def test_a_damaged_exif_block_does_not_matter(tmp_path):
    path = str(tmp_path / "0.jpg")
    Image.fromarray(COLOURS).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    assert read_size(path) == (6, 5)


def modes(path: Path) -> dict[str, np.ndarray]:
    """Files of many modes and what is seen of them."""
    cut = np.where(SHADES[..., None] > 60, COLOURS, 0)
    alpha = np.where(SHADES > 60, 255, 0).astype(np.uint8)
    white = np.where(SHADES[..., None] > 60, COLOURS, 255)
    palette = Image.fromarray(COLOURS // 64 * 64).convert("P", palette=Image.Palette.ADAPTIVE)
    grey = np.repeat(SHADES[..., None], 3, 2)
    bits = np.where(SHADES > 100, 255, 0).astype(np.uint8)
    made = {
        "rgba.png": (Image.fromarray(np.dstack([cut, alpha]), "RGBA"), white),
        "opaque.png": (Image.fromarray(np.dstack([COLOURS, alpha * 0 + 255]), "RGBA"), COLOURS),
        "la.png": (Image.fromarray(np.dstack([SHADES, alpha]), "LA"), np.where(alpha[..., None] > 0, grey, 255)),
        "l.png": (Image.fromarray(SHADES), grey),
        "p.png": (palette, np.asarray(palette.convert("RGB"))),
        "1.png": (Image.fromarray(bits).convert("1"), np.repeat(bits[..., None], 3, 2)),
        "cmyk.tif": (Image.fromarray(COLOURS).convert("CMYK"), COLOURS),
    }
    for name, (image, _) in made.items():
        image.save(path / name)
    first, second = Image.fromarray(bits), Image.fromarray(255 - bits)
    first.save(path / "moving.gif", save_all=True, append_images=[second])
    first.convert("RGB").save(path / "moving.webp", save_all=True, append_images=[second.convert("RGB")], lossless=True)
    return {name: seen for name, (_, seen) in made.items()} | dict.fromkeys(
        ("moving.gif", "moving.webp"), np.repeat(bits[..., None], 3, 2)
    )


def test_modes_are_read_as_they_are_seen(tmp_path):
    for name, seen in modes(tmp_path).items():
        image, transparent = read_image(str(tmp_path / name), (6, 5, 3), None)
        np.testing.assert_array_equal(image, seen, err_msg=name)
        assert transparent == (name in ("rgba.png", "la.png")), name


def test_transparency_is_noted_and_grey_stays_grey(tmp_path):
    for i in range(10):
        path = tmp_path / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.dstack([SHADES, SHADES]), "LA").save(path)
    data = load_dataset(tmp_path)
    assert data.channels == 1
    assert "transparent pixels are read as they are seen on white" in data.notes


def huge_header() -> bytes:
    """A PNG that says it is 60,000 pixels high and wide, and holds none."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize(("name", "content"), [
    ("page.jpg", b"<html>not found</html>"), ("empty.png", b""), ("bomb.png", huge_header()), ("cut.gif", b"GIF89a"),
    ("cut.tif", b"II*\0\x08\0\0\0\xff\xff"), ("cut.ico", b"\0\0\1\0\1\0"), ("cut.webp", b"RIFF\x20\0\0\0WEBPVP8 "),
    ("cut.tga", b"\0" * 9), ("cut.jp2", b"\0\0\0\x0cjP  \r\n\x87\n"), ("cut.psd", b"8BPS\0\1"), ("a.heic", b"ftypheic"),
])  # fmt: skip
def test_what_is_no_image_is_refused_by_its_path(name, content, tmp_path):
    write_classes(tmp_path, {"a": 4, "b": 4})
    (tmp_path / "a" / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        load_dataset(tmp_path)


def test_truncated_and_deep_images_are_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    write_image(tmp_path / "whole.jpg", noise)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    Image.fromarray(np.full((64, 64), 999, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.full((64, 64), 0.5, np.float32)).save(tmp_path / "float.tif")
    messages = {"cut.jpg": "not a readable image", "deep.png": "mode 'I;16'; expected 8-bit", "float.tif": "mode 'F'"}
    for name, message in messages.items():
        with pytest.raises(InputError, match=message) as error:
            read_image(str(tmp_path / name), (64, 64, 3), None)
        assert name in one_line(error)


@pytest.mark.parametrize("size", [1, 3, 4097, 100_000])
def test_image_sizes_are_bounded(size, tmp_path):
    write_classes(tmp_path, {"a": 4, "b": 4})
    with pytest.raises(InputError, match=f"image_size is {size}; expected 4 to 4096 pixels"):
        load_dataset(tmp_path, image_size=size)


def test_data_beyond_the_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    write_classes(tmp_path / "set", {"a": 4, "b": 4})
    np.savez(tmp_path / "set.npz", x_train=np.zeros((50, 8, 8), np.uint8), y_train=np.arange(50) % 2)
    monkeypatch.setattr(memory_module, "available_memory", lambda: 2000)
    with pytest.raises(InputError, match=r"the images of set take 24.0 MB of memory, and 2.0 kB are left") as error:
        load_dataset(tmp_path / "set", image_size=1000)
    one_line(error)
    with pytest.raises(InputError, match=r"the arrays in .*set.npz take 3.* kB of memory, and 2.0 kB are left"):
        load_dataset(tmp_path / "set.npz")
    monkeypatch.undo()
    assert present(memory_module.available_memory()) > 10**6

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(sources, "read_source", fail)
    with pytest.raises(InputError, match="does not fit into memory"):
        load_dataset(tmp_path / "set")


def test_grey_images_are_repeated_for_colour_networks(tmp_path):
    write_classes(tmp_path, {"a": 8, "b": 8}, channels=1)
    grey = load_dataset(tmp_path)
    colour = grey.repeated(3)
    assert (colour.channels, colour.mean, colour.std) == (3, grey.mean * 3, grey.std * 3)
    for ours, theirs in ((colour.train, grey.train), (colour.validation, grey.validation), (colour.test, grey.test)):
        np.testing.assert_array_equal(ours.images, np.repeat(theirs.images, 3, 3))
        np.testing.assert_array_equal(ours.labels, theirs.labels)
    assert "grey images, their channel repeated 3 times for the network" in colour.notes
    assert grey.repeated(1) is grey
    for wrong in (lambda: colour.repeated(3), lambda: grey.repeated(2)):
        with pytest.raises(InputError, match="channels"):
            wrong()
