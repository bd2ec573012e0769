"""The augmentation of a run: what its settings say, and else what a preset has and is safe for the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple, Protocol

from fastensdistill.data.augment import Augment
from fastensdistill.errors import InputError, unknown
from fastensdistill.kernels.trivial_augment import BINS, OPERATIONS, magnitude

NOTABLE = 0.01  # share of images that are all black
SWITCHES = tuple(f.name for f in fields(Augment))
"""The settings that override a preset. Each is unset where it is None; mixup and cutmix, which no preset has, at 0."""


class Images(Protocol):
    """What an augmentation depends on; a Dataset says it."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width)."""

    @property
    def channels(self) -> int:
        """1 or 3."""

    @property
    def mirrors(self) -> bool:
        """Whether an image and its mirror image are known to be of one class."""


class Photographs(NamedTuple):
    """Images that may be mirrored, without a data set."""

    image_size: tuple[int, int]
    channels: int = 3
    mirrors: bool = True


def choose_augment(data: Images, preset: str = "standard", given: Augment | None = None, **switches: Any) -> Augment:
    """The augmentation of a run: ``given``, or the ``preset`` for the data with the ``switches`` that are set.

    ``standard`` moves an image by up to an eighth of its size (4 pixels at 32x32), with zeros around it. It mirrors
    images only where an image and its mirror image are known to be of one class (``mirrors``: CIFAR, ImageNet
    and its parts); a mirrored digit, hand or arrow is another symbol. ``strong`` also has TrivialAugment and a cutout
    of half an image's side.
    Raises ``InputError`` for what does not fit the images, and where ``given`` is not what is set.
    """
    own = {name: value for name, value in switches.items() if value is not None}
    if isinstance(own.get("resized_crop"), list):  # as a file has it
        own["resized_crop"] = tuple(own["resized_crop"])
    if given is not None:
        asked = {name: own[name] for name in own if own[name] != getattr(given, name) and _is_set(name, own[name])}
        asked |= {"augment": preset} if preset != "standard" else {}
        if asked:
            told = ", ".join(f"{name}={value!r}" for name, value in asked.items())
            raise InputError(f"augment is {given}, and the config says {told}; expected one of them")
    chosen = given or Augment(**(of_preset(data, preset) | own))
    if chosen.resized_crop is not None:
        chosen = replace(chosen, pad=0)  # it is in the place of moving images, and config.yaml should say so
    chosen.check(data.image_size, data.channels)
    return chosen


def recorded(settings: Mapping[str, Any], data: Images) -> Augment | None:
    """The augmentation of a run that saved these settings; None where they do not say it, or do not fit the data."""
    try:
        return choose_augment(data, **switches(settings)) if "pad" in settings else None
    except InputError:
        return None


def of_preset(data: Images, preset: str) -> dict[str, Any]:
    """The switches that a preset turns on for the data. Raises ``InputError`` for an unknown one."""
    smallest = min(data.image_size)
    standard = {"pad": smallest // 8, "flip": data.mirrors}
    presets = {
        "none": {"pad": 0, "flip": False},
        "standard": standard,
        "strong": standard | {"trivial_augment": True, "cutout": smallest // 2},
    }
    if preset not in presets:
        raise unknown("augment", preset, presets)
    return presets[preset]


def switches(settings: Any) -> dict[str, Any]:
    """Of a config, or a run's saved settings, what :func:`choose_augment` takes."""
    values = settings if isinstance(settings, Mapping) else vars(settings)
    return {"preset": values.get("augment", "standard"), **{name: values.get(name) for name in SWITCHES}}


def _is_set(name: str, value: Any) -> bool:
    return bool(value) or name not in ("mixup", "cutmix")


def augmentation(augment: Augment) -> str:
    """What is done to an image at random, in words."""
    moved = f"moved by up to {augment.pad} pixel{'s' * (augment.pad != 1)}" if augment.pad else "not moved"
    if augment.resized_crop is not None:
        least, largest = (f"{100 * share:g}" for share in augment.resized_crop)
        moved = f"a box of {least} to {largest} % enlarged"
    told = [moved, "mirrored at random" if augment.flip else "not mirrored"]
    told += ["TrivialAugment"] * augment.trivial_augment
    told += [f"a cutout of {augment.cutout} pixels"] if augment.cutout else []
    told += [f"a box erased from {100 * augment.erasing:g} %"] if augment.erasing else []
    told += [f"mixup {augment.mixup:g}"] if augment.mixup else []
    told += [f"cutmix {augment.cutmix:g}"] if augment.cutmix else []
    return ", ".join(told)


def doubts(augment: Augment, data: Images) -> list[str]:
    """What to say of an augmentation that may change what an image shows."""
    if not augment.trivial_augment:
        return []
    told = []
    if not data.mirrors:
        told.append("TrivialAugment shears images and turns them by up to 135 degrees; where that changes the class (a "
                    "turned 6 is a 9), set trivial_augment to false")  # fmt: skip
    height, width = data.image_size
    offsets = [int(magnitude("translate-x", bin_, False)) for bin_ in range(BINS)]  # of rows alike
    black = sum(offset >= size for size in data.image_size for offset in offsets) / (BINS * len(OPERATIONS))
    if black > NOTABLE:
        told.append(f"TrivialAugment moves images by up to {max(offsets)} pixels: of images of {height}x{width} about "
                    f"{100 * black:.0f} % are all black")  # fmt: skip
    return told
