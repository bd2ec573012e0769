"""Training images as a run saw them: some images, and what its augmentation can make of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fastensdistill.data.augment import Augment, augment_images, draw, make_tables, to_float
from fastensdistill.data.loader import to_device
from fastensdistill.data.mixing import Mixing
from fastensdistill.data.presets import augmentation, recorded
from fastensdistill.data.sources import Dataset
from fastensdistill.evaluate.origin import read_config
from fastensdistill.evaluate.strips import Augmented

IMAGES, VERSIONS = 8, 3


def augmented(folders: Sequence[Path], data: Dataset) -> Augmented | None:
    """Images augmented as in the last of the runs in ``folders`` that can say how; None without such a run."""
    for folder in reversed(folders):
        augment = recorded(read_config(folder), data)
        if augment is not None:
            return augmented_images(augment, data)
    return None


def augmented_images(augment: Augment, data: Dataset) -> Augmented | None:
    """A few training images, spread over the set, and the same augmented; the same draws every time.

    None where nothing is changed.
    """
    if augment == Augment(pad=0, flip=False):
        return None
    images, labels = to_device(data.train, torch.device("cpu"))
    index = torch.linspace(0, len(labels) - 1, min(IMAGES, len(labels))).long()
    generator = torch.Generator().manual_seed(0)
    tables = make_tables(augment, data.image_size, "cpu")
    mixing = None
    if augment.mixes:
        mixing = Mixing(augment.mixup, augment.cutmix, data.num_classes, images.device, torch.float32)
    versions = []
    for _ in range(VERSIONS):
        one = augment_images(images, index, draw(len(index), augment, generator), augment, tables)
        if mixing is not None:
            one, _ = mixing(one, labels[index], mixing.draw(len(index), generator))
        versions.append(one)
    titles = [data.classes[int(label)] for label in labels[index]]
    return Augmented(
        to_float(images[index].permute(0, 2, 3, 1), torch.float32), versions, titles, augmentation(augment)
    )
