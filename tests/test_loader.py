"""The augmentation against a plain loop, and the loader's order, resumption and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastensdistill.data import (
    Augment,
    DeviceLoader,
    EvaluationSet,
    Split,
    augment,
)
from fastensdistill.errors import InputError
from tests.compare import check_close


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_split(count: int, size: tuple[int, int] = (6, 5), channels: int = 3, seed: int = 0) -> Split:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, *size, channels), dtype=np.uint8)
    return Split(images, np.arange(count, dtype=np.int64))


# --- augmentation


def plain_crop(image: np.ndarray, dy: int, dx: int, flip: bool, pad: int) -> np.ndarray:
    """One image (H, W, C): pad with zeros, crop at (dy, dx), flip."""
    H, W, _ = image.shape
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    crop = padded[dy : dy + H, dx : dx + W]
    return crop[:, ::-1] if flip else crop


AUGMENTATIONS = [
    pytest.param((32, 32, 3), 4, True, torch.float32, id="cifar"),
    pytest.param((8, 8, 1), 1, False, torch.float32, id="digits"),
    pytest.param((7, 5, 3), 4, True, torch.float64, id="odd-size-largest-pad"),
    pytest.param((5, 9, 1), 0, True, torch.float32, id="flip-only"),
    pytest.param((6, 7, 3), 2, True, torch.bfloat16, id="bf16"),
    pytest.param((6, 7, 3), 0, False, torch.float32, id="none"),
]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("shape", "pad", "flip", "dtype"), AUGMENTATIONS)
def test_augmentation_is_the_plain_loop(shape, pad, flip, dtype, layout):
    H, W, C = shape
    split = random_split(11, (H, W), C)
    images = torch.from_numpy(split.images).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    index = torch.tensor([3, 3, 10, 0, 7, 1, 9, 3, 5, 2, 2, 8, 4])

    actual = augment(images, index, seeded(5), pad, flip, dtype)

    B, draws = len(index), seeded(5)  # the documented order: row offsets, column offsets, flips
    dy = torch.randint(0, 2 * pad + 1, (B,), generator=draws) if pad else torch.zeros(B, dtype=torch.int64)
    dx = torch.randint(0, 2 * pad + 1, (B,), generator=draws) if pad else torch.zeros(B, dtype=torch.int64)
    flips = torch.randint(0, 2, (B,), generator=draws) if flip else torch.zeros(B, dtype=torch.int64)
    crops = [
        plain_crop(split.images[i], int(y), int(x), bool(f), pad)
        for i, y, x, f in zip(index, dy, dx, flips, strict=True)
    ]
    expected = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).to(dtype) / 255
    check_close("augmented images", actual, expected, 0.0)
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_every_offset_and_flip_is_equally_likely():
    pad, size, count = 2, 7, 20_000
    image = np.arange(1, size * size + 1, dtype=np.uint8).reshape(size, size, 1)  # all pixels differ: crops are telling
    crops = {
        plain_crop(image, dy, dx, flip, pad).tobytes(): (dy, dx, flip)
        for dy in range(2 * pad + 1)
        for dx in range(2 * pad + 1)
        for flip in (False, True)
    }
    out = augment(torch.from_numpy(image).view(1, 1, size, size), torch.zeros(count, dtype=torch.int64), seeded(), pad)
    pixels = (out * 255).round().to(torch.uint8).numpy()
    seen: dict[tuple[int, int, bool], int] = dict.fromkeys(crops.values(), 0)
    for crop in pixels:
        seen[crops[crop.tobytes()]] += 1
    share = 1 / len(seen)  # 5 x 5 offsets x 2
    five_sigma = 5 * (share * (1 - share) / count) ** 0.5
    assert max(abs(number / count - share) for number in seen.values()) < five_sigma


@pytest.mark.parametrize("pad", [-1, 5, 1.0, True], ids=["negative", "whole-image", "float", "bool"])
def test_augmentation_refuses_pad(pad):
    images = torch.zeros(2, 3, 6, 5, dtype=torch.uint8)
    with pytest.raises(InputError, match=rf"pad is {pad!r}; expected a whole number from 0 to 4"):
        augment(images, torch.tensor([0]), seeded(), pad)
    with pytest.raises(InputError, match="pad is"):
        DeviceLoader(random_split(4), 2, device="cpu", generator=seeded(), augment=Augment(pad=pad))


def test_augmentation_refuses_float_images():
    with pytest.raises(InputError, match=r"torch.float32 .*expected torch.uint8"):
        augment(torch.zeros(2, 3, 6, 5), torch.tensor([0]), seeded(), 1)


# --- loader


def make_loader(split: Split | EvaluationSet, batch_size: int, seed: int = 0, **options) -> DeviceLoader:
    return DeviceLoader(split, batch_size, device="cpu", generator=seeded(seed), **options)


@pytest.mark.parametrize("pad", [0, 2], ids=["flip-alone", "crop-and-flip"])
def test_shares_of_a_batch_are_the_batch(pad):
    split = random_split(17)
    whole = make_loader(split, 6, augment=Augment(pad))
    parts = [make_loader(split, 6, augment=Augment(pad), share=(rank, 3)) for rank in range(3)]
    for _ in range(5):  # over the end of an epoch
        images, labels = whole.next()
        shares = [part.next() for part in parts]
        assert torch.equal(torch.cat([s[0] for s in shares]), images)
        assert torch.equal(torch.cat([s[1] for s in shares]), labels)
    with pytest.raises(InputError, match="batch size is 6; expected a multiple of the 4 processes"):
        make_loader(split, 6, share=(0, 4))


def test_the_halves_of_next_read_from_memory_that_stays():
    whole, halves = (make_loader(random_split(17), 4, augment=Augment(2)) for _ in range(2))
    address = halves._index.data_ptr()
    for _ in range(6):
        halves.advance()
        images, labels = halves.read()
        expected, known = whole.next()
        assert torch.equal(images, expected)
        assert torch.equal(labels, known)
        assert halves._index.data_ptr() == address


def test_each_epoch_is_a_new_permutation():
    split = random_split(17)  # labels are 0..16, so they tell which image it is
    loader = make_loader(split, 5)
    assert loader.batches_per_epoch == 3
    epochs = []
    for _ in range(4):
        labels = torch.cat([loader.next()[1] for _ in range(loader.batches_per_epoch)]).tolist()
        assert len(labels) == 15
        assert len(set(labels)) == 15
        epochs.append(labels)
    assert len({tuple(labels) for labels in epochs}) == 4
    assert len({frozenset(labels) for labels in epochs}) > 1  # the dropped remainder changes too


def test_batches_without_augmentation_are_the_images():
    split = random_split(9)
    images, labels = make_loader(split, 9, dtype=torch.float64).next()
    expected = torch.from_numpy(split.images[labels.numpy()]).permute(0, 3, 1, 2).double() / 255
    check_close("batch", images, expected, 0.0)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64
    assert sorted(labels.tolist()) == list(range(9))


def test_same_seed_same_batches_other_seed_other_batches():
    split = random_split(40)
    first, again, other = (make_loader(split, 8, seed, augment=Augment(2)) for seed in (3, 3, 4))
    for _ in range(12):
        (x, y), (x2, y2), (_, y3) = first.next(), again.next(), other.next()
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
        assert not torch.equal(y, y3)


@pytest.mark.parametrize("steps", [0, 2, 4, 7], ids=["unused", "mid-epoch", "end-of-epoch", "second-epoch"])
def test_resume_is_bit_exact(steps):
    split = random_split(23)
    loader = make_loader(split, 5, augment=Augment(2))
    for _ in range(steps):
        loader.next()
    state = loader.state_dict()
    assert all(isinstance(value, int | torch.Tensor) for value in state.values())
    expected = [loader.next() for _ in range(9)]  # also proves that the state is a copy

    other = make_loader(split, 5, seed=99, augment=Augment(2))
    other.next()
    other.load_state_dict(state)
    for (x, y), (x2, y2) in zip(expected, [other.next() for _ in range(9)], strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


STATES = [
    pytest.param({"batch_size": 4}, "batch size 4; expected 5", id="batch-size"),
    pytest.param({"permutation": torch.arange(22)}, "22 images; expected 23", id="other-set"),
    pytest.param({"permutation": torch.zeros(23, dtype=torch.int64)}, "no permutation", id="repeated"),
    pytest.param({"position": 5}, "position 5; expected 0 to 4", id="position"),
    pytest.param({"generator": torch.zeros(3, dtype=torch.uint8)}, "no state of a cpu generator", id="generator"),
    pytest.param({"generator": None}, "lacks generator", id="missing"),
]


@pytest.mark.parametrize(("change", "message"), STATES)
def test_state_of_another_run_is_refused_and_nothing_changes(change, message):
    loader, untouched = make_loader(random_split(23), 5), make_loader(random_split(23), 5)
    loader.next(), untouched.next()
    state = make_loader(random_split(23), 5, seed=1).state_dict() | change
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(InputError, match=message):
        loader.load_state_dict(state)
    for _ in range(5):
        assert torch.equal(loader.next()[1], untouched.next()[1])


def test_memory_of_the_set():
    split = random_split(7, (6, 5), 3)
    expected = 7 * 6 * 5 * 3 + 7 * 8  # uint8 pixels, int64 labels
    assert make_loader(split, 2).nbytes == expected
    assert EvaluationSet(split, "cpu").nbytes == expected


def test_the_set_on_the_device_is_a_copy():
    split = random_split(4)
    evaluation = EvaluationSet(split, "cpu")
    before = next(evaluation.batches(4)).clone()
    split.images[:] = 0
    assert torch.equal(next(evaluation.batches(4)), before)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 50])
def test_evaluation_keeps_order_and_last_batch(batch_size):
    split = random_split(11)
    evaluation = EvaluationSet(split, "cpu", dtype=torch.float64)
    batches = list(evaluation.batches(batch_size))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    expected = torch.from_numpy(split.images).permute(0, 3, 1, 2).double() / 255
    check_close("evaluation images", torch.cat(batches), expected, 0.0)
    assert evaluation.labels.tolist() == list(range(11))
    assert all(batch.is_contiguous(memory_format=torch.channels_last) for batch in batches)


@pytest.mark.parametrize("batch_size", [0, -3, 2.0, True])
def test_batch_size_is_refused(batch_size):
    with pytest.raises(InputError, match=f"batch size is {batch_size!r}; expected a whole number of at least 1"):
        make_loader(random_split(4), batch_size)
    with pytest.raises(InputError, match="batch size is"):
        EvaluationSet(random_split(4), "cpu").batches(batch_size)


def test_batch_larger_than_the_set_is_refused():
    with pytest.raises(InputError, match="batch size is 5; expected at most the 4 training images"):
        make_loader(random_split(4), 5)


def test_loader_refuses_float_images_and_missing_labels():
    split = random_split(4)
    with pytest.raises(InputError, match=r"float64 .*expected uint8"):
        make_loader(Split(split.images / 255, split.labels), 2)
    with pytest.raises(InputError, match=r"shape \(3,\); expected \(4,\)"):
        make_loader(Split(split.images, split.labels[:3]), 2)


def test_loaders_may_share_one_copy_of_the_set():
    split = random_split(12)
    shared = EvaluationSet(split, "cpu")
    sharing, own = make_loader(shared, 5, augment=Augment(2)), make_loader(split, 5, augment=Augment(2))
    assert sharing.images.data_ptr() == shared.images.data_ptr()
    for _ in range(4):
        (x, y), (x2, y2) = sharing.next(), own.next()
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    with pytest.raises(InputError, match="the set is on cpu; expected it on meta"):
        DeviceLoader(shared, 5, device="meta", generator=seeded())
