"""Data sets for the tests: splits to compare, arrays for ``.npz`` files, images in folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastensdistill.data import Dataset, Split
from fastensdistill.errors import InputError


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def same(a: Split, images: np.ndarray, labels: np.ndarray) -> None:
    assert a.images.dtype == np.uint8
    assert a.labels.dtype == np.int64
    np.testing.assert_array_equal(a.images, images)
    np.testing.assert_array_equal(a.labels, labels)


def arrays(seed: int = 0, count: int = 30, shape: tuple[int, ...] = (5, 6, 3)) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    return {
        "train_images": generator.integers(0, 256, (count, *shape), dtype=np.uint8),
        "train_labels": generator.permutation(labels),
        "test_images": generator.integers(0, 256, (7, *shape), dtype=np.uint8),
        "test_labels": generator.integers(0, 4, 7),
    }


def save(path: Path, content: dict) -> str:
    np.savez(path, **content)
    return str(path)


def pairs(*splits: Split) -> list[tuple[bytes, int]]:
    """Every image with its label, sorted: two sets of splits that hold the same images are equal."""
    every = [pair for s in splits for pair in zip(s.images, s.labels, strict=True)]
    return sorted((image.tobytes(), int(label)) for image, label in every)


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(path)


def write_classes(folder: Path, counts: dict[str, int], seed: int = 0, channels: int = 3) -> dict[bytes, str]:
    """PNGs of 6x5 in class folders; returns the class of every image."""
    generator, written = np.random.default_rng(seed), {}
    for name, count in counts.items():
        for i in range(count):
            pixels = generator.integers(0, 256, (6, 5, channels), dtype=np.uint8)
            write_image(folder / name / f"{i:03}.png", pixels)
            written[pixels.tobytes()] = name
    return written


def classes_of(split: Split, data: Dataset) -> dict[bytes, str]:
    found = {image.tobytes(): data.classes[label] for image, label in zip(split.images, split.labels, strict=True)}
    assert len(found) == len(split)
    return found
