"""Images per second of loaders: 32x32 images, random crop after padding by 4, flip, batch on the device as float32.

    python -m bench.loader [--batch 128] [--images 45000] [--workers 4] [--json FILE] [--smoke]

The device-resident loader (its steps, and its one-kernel op) against torch's DataLoader over the same bytes, with a
transform per image and with the whole batch cropped at once. Before timing, each of them with augmentation off has to
deliver every image of an epoch exactly once, and with augmentation only crops of its images.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bench.common import arguments, describe_host, interleave, quantile, save, start, table
from fastensdistill.data.augment import Augment, draw
from fastensdistill.data.loader import DeviceLoader
from fastensdistill.data.sources import Split
from fastensdistill.kernels.augment import augment as augment_op

COLUMNS = {
    "title": "loader", "images_per_second": "images/s", "p20": "p20", "p80": "p80", "ratio": "ours faster by",
    "status": "",
}  # fmt: skip
PAD = 4


class PerImage(Dataset):
    """What a torchvision pipeline does to one image, without its PIL conversions."""

    def __init__(self, images: Tensor, labels: Tensor, pad: int, flip: bool):
        self.images, self.labels, self.pad, self.flip = images, labels, pad, flip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x = self.images[i]
        if self.pad:
            dy, dx = torch.randint(0, 2 * self.pad + 1, (2,)).tolist()
            x = F.pad(x, (self.pad,) * 4)[:, dy : dy + x.shape[1], dx : dx + x.shape[2]]
        if self.flip and torch.rand(()) < 0.5:
            x = x.flip(2)
        return x.float().div(255), self.labels[i]


def endless(loader: DataLoader, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def device_loader(
    split: Split, batch: int, device: torch.device, pad: int, flip: bool, workers: int
) -> Callable[[], Any]:
    generator = torch.Generator(device).manual_seed(0)
    return DeviceLoader(split, batch, device=device, generator=generator, augment=Augment(pad, flip)).next


def device_op(split: Split, batch: int, device: torch.device, pad: int, flip: bool, workers: int) -> Callable[[], Any]:
    """The same draws, and one kernel instead of the loader's gathers."""
    generator = torch.Generator(device).manual_seed(0)
    images, labels = torch.tensor(split.images, device=device), torch.tensor(split.labels, device=device).long()
    order = itertools.cycle(range(len(labels) // batch))
    state: dict[str, Tensor] = {}

    def call() -> tuple[Tensor, Tensor]:
        i = next(order)
        if i == 0:
            state["order"] = torch.randperm(len(labels), generator=generator, device=device)
        index = state["order"][i * batch : (i + 1) * batch]
        dy, dx, flips, _ = draw(batch, Augment(pad, flip), generator)
        shifts = torch.zeros(batch, 2, dtype=torch.int32, device=device)
        if dy is not None and dx is not None:
            shifts = torch.stack([dy, dx], 1).int() - pad
        flips = torch.zeros(batch, dtype=torch.uint8, device=device) if flips is None else flips.to(torch.uint8)
        return augment_op(images, index, shifts, flips).permute(0, 3, 1, 2), labels[index]

    return call


def torch_loader(
    split: Split, batch: int, device: torch.device, pad: int, flip: bool, workers: int
) -> Callable[[], Any]:
    images = torch.tensor(split.images).permute(0, 3, 1, 2).contiguous()
    data = PerImage(images, torch.tensor(split.labels).long(), pad, flip)
    loader = DataLoader(data, batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0,
                        pin_memory=device.type == "cuda")  # fmt: skip
    return endless(loader, device).__next__


def torch_batched(
    split: Split, batch: int, device: torch.device, pad: int, flip: bool, workers: int
) -> Callable[[], Any]:
    """A DataLoader that only reads; crop and flip of the batch on the device, one offset a batch (as is often done)."""
    images = torch.tensor(split.images).permute(0, 3, 1, 2).contiguous()
    loader = DataLoader(TensorDataset(images, torch.tensor(split.labels).long()), batch, shuffle=True, drop_last=True,
                        pin_memory=device.type == "cuda")  # fmt: skip
    source = endless(loader, device)

    def call() -> tuple[Tensor, Tensor]:
        x, labels = next(source)
        size = x.shape[2]
        if pad:
            dy, dx = torch.randint(0, 2 * pad + 1, (2,)).tolist()
            x = F.pad(x, (pad,) * 4)[:, :, dy : dy + size, dx : dx + size]
        if flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(3), x)
        return x.float().div(255), labels

    return call


LOADERS: dict[str, tuple[str, Callable[..., Callable[[], Any]]]] = {
    "device": ("device loader", device_loader),
    "op": ("device loader, augmentation as one op", device_op),
    "torch": ("DataLoader, image by image", torch_loader),
    "torch-batched": ("DataLoader, one crop a batch", torch_batched),
}


def crops(image: Tensor, pad: int) -> Tensor:
    """Every crop of a (C, H, W) image and its mirror."""
    _, H, W = image.shape
    padded = F.pad(image, (pad,) * 4)
    every = [padded[:, y : y + H, x : x + W] for y in range(2 * pad + 1) for x in range(2 * pad + 1)]
    return torch.stack([*every, *(crop.flip(2) for crop in every)])


def check(build: Callable[..., Callable[[], Any]], device: torch.device) -> str | None:
    """What is wrong with a loader, if anything: an epoch of 12 images, whose label is their number."""
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (12, 5, 5, 3), dtype=np.uint8), np.arange(12))
    images = torch.tensor(split.images).permute(0, 3, 1, 2)
    call = build(split, 4, device, 0, False, 0)
    got = [call() for _ in range(3)]
    x, labels = (torch.cat(part).cpu() for part in zip(*got, strict=True))
    if sorted(labels.tolist()) != list(range(12)):
        return "an epoch does not have every image once"
    if (x * 255).round().to(torch.uint8).ne(images[labels]).any():
        return "images are changed with augmentation off"
    call = build(split, 4, device, 2, True, 0)
    for x, labels in (call() for _ in range(3)):
        for image, label in zip((x.cpu() * 255).round().to(torch.uint8), labels.tolist(), strict=True):
            if not (crops(images[label], 2) == image).flatten(1).all(1).any():
                return "an augmented image is no crop of its own"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=45_000)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="of the DataLoader")
    options = start(parser, argv)
    if options.smoke:
        options.batch, options.images, options.workers = 8, 64, 0
    device = torch.device(options.device)
    rng = np.random.default_rng(0)
    shape = (options.images, 32, 32, 3)
    split = Split(rng.integers(0, 256, shape, dtype=np.uint8), rng.integers(0, 100, options.images))
    rows: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], object]] = {}
    for name, (title, build) in LOADERS.items():
        wrong = check(build, device)
        rows.append({"loader": name, "title": title, "status": "" if wrong is None else f"not timed: {wrong}"})
        if wrong is None:
            calls[name] = build(split, options.batch, device, PAD, True, options.workers)
    times = interleave(calls, options.rounds, device, least=0.0 if options.smoke else 0.3)
    for row in rows:
        if t := times.get(row["loader"]):
            median, best = quantile(t, 0.5), quantile(times["device"], 0.5) if "device" in times else None
            row |= {
                "images_per_second": options.batch / median, "p20": options.batch / quantile(t, 0.8),
                "p80": options.batch / quantile(t, 0.2), "ratio": median / best if best else None,
            }  # fmt: skip
    print(f"batch {options.batch} of {options.images} images, {options.workers} workers")
    print(table(rows, COLUMNS))
    setting = {"batch": options.batch, "images": options.images, "workers": options.workers}
    save(options.json, "loader", describe_host(device), options.smoke, setting=setting, rows=rows)
    return 1 if any(row["status"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
