"""Crops, boxes, cutouts and their draws: against torchvision, against plain loops, and through the loader."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from fastensdistill.data import Augment, DeviceLoader, Split
from fastensdistill.data.augment import Draws, augment_cost, augment_images, draw, make_tables
from fastensdistill.data.boxes import crop_sizes, erased_sizes
from fastensdistill.data.mixing import Mixing
from fastensdistill.errors import InputError
from fastensdistill.kernels.crop import NUMBERS, CropOperands, chosen, crop_box
from tests.kernels.changes import pictures

STRONG = Augment(2, True, trivial_augment=True, cutout=4, erasing=0.5)
RESIZED = Augment(0, True, resized_crop=(0.08, 1.0), trivial_augment=True)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def augmented(images: torch.Tensor, augment: Augment, draws: Draws) -> torch.Tensor:
    """Bytes (B, C, H, W): image 0 of ``images`` (H, W, C) for each draw, or one image each."""
    pixels = images.permute(0, 3, 1, 2)
    count = next(len(drawn) for drawn in draws if drawn is not None)
    tables = make_tables(augment, (images.shape[1], images.shape[2]), "cpu")
    out = augment_images(pixels, torch.arange(count) % len(images), draws, augment, tables, torch.float64)
    return (out * 255).round().to(torch.uint8)


def test_new_draws_follow_the_old_ones_and_leave_each_other_alone():
    generator = seeded(3)
    dy, dx = (torch.randint(0, 5, (9,), generator=generator) for _ in range(2))
    flips = torch.randint(0, 2, (9,), generator=generator)
    numbers = torch.randint(0, 2**31, (9, len(NUMBERS)), dtype=torch.int32, generator=generator)
    after = generator.get_state()
    for one in (STRONG, Augment(2, cutout=1), Augment(2, erasing=0.1), Augment(2, trivial_augment=True)):
        generator = seeded(3)
        for actual, expected in zip(draw(9, one, generator), (dy, dx, flips, numbers), strict=True):
            assert actual is not None
            assert torch.equal(actual, expected)
        assert torch.equal(generator.get_state(), after)
    resized = draw(9, RESIZED, seeded(3))
    assert resized.dy is resized.dx is None, "a resized crop is in the place of the padded one"
    assert draw(9, Augment(2), seeded(3)).numbers is None


@pytest.mark.parametrize(
    "shape", [(32, 32, 3), (28, 28, 1), (17, 40, 3), (224, 224, 1)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_resized_crop_is_torchvisions(shape):
    height, width, _ = shape
    augment = Augment(0, True, resized_crop=(0.08, 1.0))
    draws = draw(40 if height < 100 else 6, augment, seeded(1))
    images = pictures(5, *shape)
    actual = augmented(images, augment, draws)
    crops = make_tables(augment, (height, width), "cpu").crops
    assert draws.numbers is not None
    assert draws.flips is not None
    whole = torch.zeros(len(draws.flips))  # of what a box needs, only the numbers
    boxes = torch.stack(crop_box(CropOperands(images, whole, whole, whole, draws.numbers, crops)), 1).tolist()
    native = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")  # else it goes by way of float32
    for i, (box, flip) in enumerate(zip(boxes, draws.flips, strict=True)):
        image = images[i % 5].permute(2, 0, 1).contiguous()
        for given, most in ((image, 0 if native else 1), (image.float(), 1)):
            expected = F.resized_crop(given, *box, [height, width]).round()
            expected = F.horizontal_flip(expected) if flip else expected
            gap = (expected.int() - actual[i].int()).abs().max()
            assert gap <= most, (i, box)


def frequencies(sizes: torch.Tensor) -> dict[tuple[int, int], float]:
    values, counts = torch.unique(sizes, dim=0, return_counts=True)
    return {tuple(v): c / len(sizes) for v, c in zip(values.tolist(), counts.tolist(), strict=True)}


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Kolmogorov and Smirnov's, of whole numbers."""
    values = torch.unique(torch.cat([actual, expected]))
    share = [(sample[None] <= values[:, None]).double().mean(1) for sample in (actual, expected)]
    return float((share[0] - share[1]).abs().max())


@pytest.mark.parametrize("size", [(32, 32), (20, 50)], ids=["32x32", "20x50"])
@pytest.mark.parametrize("kind", ["crop", "erasing"])
def test_boxes_are_as_likely_as_torchvisions(kind, size):
    image, count = torch.zeros(3, *size), 3000
    torch.manual_seed(0)
    crop = kind == "crop"
    transform = v2.RandomResizedCrop(size, (0.1, 0.6)) if crop else v2.RandomErasing(1)
    made = [transform.make_params([image]) for _ in range(count)]
    if crop:
        expected = torch.tensor([[m["height"], m["width"]] for m in made])
    else:
        expected = torch.tensor([[m["h"], m["w"]] if m["v"] is not None else [0, 0] for m in made])
    height, width = size
    table = crop_sizes(height, width, (0.1, 0.6)) if crop else erased_sizes(height, width)
    bound = 1.95 / math.sqrt(count)  # passed by chance once in a thousand
    measures = {
        "height": lambda sizes: sizes[:, 0],
        "width": lambda sizes: sizes[:, 1],
        "area": lambda sizes: sizes.prod(1),
        "ratio": lambda sizes: sizes[:, 0] * 100 // sizes[:, 1].clamp(min=1),
    }
    for name, measure in measures.items():
        assert distance(measure(table), measure(expected)) < bound, name


def test_boxes_that_never_fit():
    assert crop_sizes(9, 9, (1.0, 1.0)).unique(dim=0).tolist() == [[9, 9]]
    tall = frequencies(crop_sizes(30, 10, (0.9, 1.0)))
    assert tall == {(13, 10): 1.0}, "the largest box of ratio 3/4"
    assert not erased_sizes(1, 1).any()
    table = crop_sizes(32, 32, (0.9, 1.0))
    fit = 1 - (1 - 0.237) ** 10  # in about a quarter of the tries, of which there are ten
    assert frequencies(table)[32, 32] > 1 - fit
    assert (table > 0).all()
    assert (table <= 32).all()


@pytest.mark.parametrize(("chance", "shape"), [(1.0, (12, 9, 3)), (0.3, (16, 16, 1))])
def test_erasing_is_torchvisions(chance, shape):
    height, width, _ = shape
    augment, count = Augment(0, False, erasing=chance), 600
    draws = draw(count, augment, seeded(2))
    assert draws.numbers is not None
    images = pictures(4, *shape) | 1  # no zeros but the erased ones
    actual = augmented(images, augment, draws)
    table = erased_sizes(height, width)
    sizes = table[chosen(draws.numbers, "erased size", len(table))]
    erased = draws.numbers[:, NUMBERS.index("erase")].double() < chance * 2**31
    places = set()
    for i, (h, w) in enumerate(sizes.tolist()):
        expected = images[i % 4].permute(2, 0, 1)
        if erased[i]:
            row, column = (
                int(int(draws.numbers[i, NUMBERS.index(name)]) / 2**31 * (full - side + 1))
                for name, full, side in (("erased top", height, h), ("erased left", width, w))
            )
            expected = F.erase(expected, row, column, h, w, torch.zeros(1))
            places |= {(row + h, column + w)}
        assert torch.equal(actual[i], expected), i
    assert (height, width) in places
    assert abs(float(erased.double().mean()) - chance) <= 5 * math.sqrt(chance * (1 - chance) / count)


@pytest.mark.parametrize("side", [1, 4, 5])
def test_cutout_is_a_square_around_a_random_pixel(side):
    height, width = 7, 6
    augment, count = Augment(0, False, cutout=side), 400
    draws = draw(count, augment, seeded(4))
    images = torch.full((1, height, width, 3), 9, dtype=torch.uint8)
    actual = augmented(images, augment, draws)
    assert draws.numbers is not None
    rows, columns = chosen(draws.numbers, "cutout row", height), chosen(draws.numbers, "cutout column", width)
    for out, row, column in zip(actual, rows.tolist(), columns.tolist(), strict=True):
        expected = np.full((height, width), 9)
        top, left = row - side // 2, column - side // 2
        expected[max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = 0
        assert (out.numpy() == expected).all()
    counts = torch.bincount(rows * width + columns, minlength=height * width)
    assert counts.min() > 0, "every pixel may be the centre"


REFUSED = [
    ({"resized_crop": (0.0, 1.0)}, r"resized_crop is \(0.0, 1.0\); expected \(least, largest\) share"),
    ({"resized_crop": (0.5, 0.4)}, r"0 < least <= largest <= 1, or None"),
    ({"resized_crop": (0.5, 1.1)}, r"resized_crop is \(0.5, 1.1\)"),
    ({"resized_crop": 0.5}, r"resized_crop is 0.5"),
    ({"resized_crop": (0.5,)}, r"resized_crop is \(0.5,\)"),
    ({"resized_crop": (float("nan"), 1)}, r"resized_crop is \(nan, 1\)"),
    ({"resized_crop": ("a", 1)}, r"resized_crop is \('a', 1\)"),
    ({"trivial_augment": 1}, "trivial_augment is 1; expected True or False"),
    ({"flip": "no"}, "flip is 'no'; expected True or False"),
    ({"cutout": -1}, "cutout is -1; expected a whole number from 0 to 4 for images of 6x5"),
    ({"cutout": 5}, "cutout is 5; expected"),
    ({"cutout": 2.0}, r"cutout is 2\.0; expected"),
    ({"cutout": True}, "cutout is True; expected"),
    ({"erasing": 1.5}, r"erasing is 1\.5; expected a probability from 0 to 1"),
    ({"erasing": -0.1}, r"erasing is -0\.1; expected"),
    ({"erasing": float("nan")}, "erasing is nan; expected"),
    ({"erasing": True}, "erasing is True; expected"),
]


@pytest.mark.parametrize(("setting", "message"), REFUSED)
def test_values_out_of_range_are_refused_in_one_line(setting, message):
    with pytest.raises(InputError, match=message) as caught:
        Augment(**({"pad": 0} | setting)).check((6, 5))
    assert "\n" not in str(caught.value)


def split_of(count: int, size: tuple[int, int] = (10, 8), channels: int = 3) -> Split:
    return Split(pictures(count, *size, channels).numpy(), np.arange(count, dtype=np.int64))


def loader_of(split: Split, batch: int, augment: Augment, seed: int = 0, **options) -> DeviceLoader:
    return DeviceLoader(split, batch, device="cpu", generator=seeded(seed), augment=augment, **options)


def test_a_loader_refuses_changes_of_colours_of_other_images():
    with pytest.raises(InputError, match="trivial_augment is for images of 1 or 3 channels; these have 4"):
        loader_of(split_of(4, channels=4), 2, Augment(0, trivial_augment=True))


@pytest.mark.parametrize("augment", [STRONG, RESIZED], ids=["strong", "resized"])
def test_shares_and_resumed_loaders_see_the_same_images(augment):
    split = split_of(17)
    whole = loader_of(split, 6, augment)
    parts = [loader_of(split, 6, augment, share=(rank, 3)) for rank in range(3)]
    assert whole.nbytes == whole.images.nbytes + whole.labels.nbytes + make_tables(augment, (10, 8), "cpu").nbytes
    for step in range(5):  # over the end of an epoch
        if step == 3:
            parts[1] = loader_of(split, 6, augment, seed=9, share=(1, 3))
            parts[1].load_state_dict(whole.state_dict())
        images, _ = whole.next()
        assert torch.equal(torch.cat([part.next()[0] for part in parts]), images)


class Launches(TorchDispatchMode):
    """Counts the operators that are work for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if not (function.is_view or name.startswith(("aten::empty", "aten::_unsafe_view", "aten::new_empty"))):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


COSTS = [
    pytest.param(Augment(0, False), id="none"),
    pytest.param(Augment(0, True), id="flip"),
    pytest.param(Augment(2, False), id="crop"),
    pytest.param(Augment(2, True), id="standard"),
    pytest.param(STRONG, id="strong"),
    pytest.param(RESIZED, id="resized"),
    pytest.param(Augment(0, False, cutout=2), id="cutout"),
    pytest.param(Augment(0, False, mixup=0.2), id="mixup"),
    pytest.param(Augment(2, True, mixup=0.2, cutmix=1.0), id="mixed"),
]


@pytest.mark.parametrize("augment", COSTS)
def test_cost_is_what_is_launched(augment):
    images = pictures(4, 10, 8, 3).permute(0, 3, 1, 2)
    tables = make_tables(augment, (10, 8), "cpu")
    index, mixing = torch.arange(4), Mixing(augment.mixup, augment.cutmix, 4, torch.device("cpu"), torch.float32)
    with Launches() as seen:
        augmented = augment_images(images, index, draw(4, augment, seeded()), augment, tables)
        if augment.mixes:
            mixing(augmented, index, mixing.draw(4, seeded()))
    cost = augment_cost(augment, (4, 3, 10, 8))
    assert cost.launches == len(seen.names), seen.names
    assert cost.held == tables.nbytes
    assert cost.moved >= 5 * 4 * 240, "a byte is read and a float32 written for each value"
