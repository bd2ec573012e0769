"""Mixed batches of a loader: what is drawn and when, in shares, resumed, and by a graph's replay."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastensdistill.data import Augment, DeviceLoader, Split
from fastensdistill.engine.host_reads import HostReads
from fastensdistill.errors import InputError
from fastensdistill.kernels.mix import MixDraws, mix
from tests.engine.meta import watched
from tests.engine.recorded_graph import RecordedGraphs
from tests.untyped import present, untyped

CLASSES = 5
BOTH = Augment(pad=2, flip=True, mixup=0.3, cutmix=1.0)


def loader(augment=BOTH, batch=6, seed=3, dtype=torch.float64, classes=CLASSES, **options) -> DeviceLoader:
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (17, 6, 5, 3), dtype=np.uint8), rng.integers(0, CLASSES, 17))
    own = torch.Generator().manual_seed(seed)
    return DeviceLoader(
        split, batch, device="cpu", generator=own, augment=augment, dtype=dtype, classes=classes, **options
    )


@pytest.mark.parametrize(
    "augment", [BOTH, Augment(0, False, mixup=1.0), Augment(1, False, cutmix=0.5)], ids=["both", "mixup", "cutmix"]
)
def test_batches_are_mixed_after_they_are_cropped(augment):
    """Gammas and then uniform draws come after all other draws, every batch."""
    mixed, plain = loader(augment), loader(Augment(augment.pad, augment.flip))
    mixup, cutmix = augment.mixup, augment.cutmix
    shapes = torch.tensor([mixup + 1, mixup + 1, cutmix + 1, cutmix + 1], dtype=torch.float64).expand(6, 4)
    for _ in range(5):  # two batches in an epoch
        images, labels = plain.next()
        gammas = torch._standard_gamma(shapes, generator=plain.generator)
        draws = MixDraws(gammas, torch.rand(6, 5, generator=plain.generator, dtype=torch.float64))
        expected = mix(images.permute(0, 2, 3, 1), labels, draws, classes=CLASSES, mixup=mixup, cutmix=cutmix)
        found = mixed.next()
        assert torch.equal(found[0], expected.images.permute(0, 3, 1, 2))
        assert torch.equal(found[1], expected.labels)
        assert found[0].is_contiguous(memory_format=torch.channels_last)
        assert not torch.equal(found[0], images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_labels_have_the_images_dtype_and_sum_to_one(dtype):
    images, labels = loader(dtype=dtype).next()
    assert images.dtype == labels.dtype == dtype
    assert labels.shape == (6, CLASSES)
    assert (labels.double().sum(1) - 1).abs().max() < 1e-2


def test_processes_draw_alike_and_mix_their_own_share():
    """Each share is a batch of its own to be mixed, with its images' draws out of the whole batch's."""
    plain = loader(Augment(BOTH.pad, BOTH.flip))
    parts = [loader(share=(rank, 3)) for rank in range(3)]
    for _ in range(3):
        images, labels = plain.next()
        draws = present(parts[0].mixing).draw(6, plain.generator)
        for rank, part in enumerate(parts):
            own = slice(2 * rank, 2 * rank + 2)
            expected = present(part.mixing)(images[own], labels[own], draws.of(own))
            for one, other in zip(part.next(), expected, strict=True):
                assert torch.equal(one, other)


def test_a_mixed_epoch_goes_on_bit_for_bit():
    whole, first, second = loader(), loader(), loader(seed=9)
    for _ in range(3):
        whole.next()
        first.next()
    second.load_state_dict(first.state_dict())
    for _ in range(4):
        for one, other in zip(whole.next(), second.next(), strict=True):
            assert torch.equal(one, other)


def test_a_replay_reads_mixed_batches():
    """Nothing is decided or read on the host, and replays draw on."""
    one, other = loader(), loader()
    graphs = RecordedGraphs(lambda: [], lambda: HostReads({}, torch.device("cpu"), refuse=True))
    for _ in range(5):
        other.advance()
        found = graphs.prepare("read", lambda: dict(zip("xy", other.read(), strict=True)), [other.generator])()
        for value, expected in zip(found.values(), one.next(), strict=True):
            assert torch.equal(value, expected)


def test_mixing_waits_for_nothing(monkeypatch):
    """On the meta device a value that is read back raises. What is drawn there has no values either."""
    own = loader(Augment(0, False, mixup=0.2, cutmix=1.0), dtype=torch.float32)
    own.images, own.labels, own._index = (t.to("meta") for t in (own.images, own.labels, own._index))
    draws = MixDraws(torch.empty(6, 4, device="meta"), torch.empty(6, 5, device="meta"))
    monkeypatch.setattr(own.mixing, "draw", lambda *_: draws)
    with watched() as watch:
        own.read()
    assert watch.syncs == []


REFUSED = {
    "classes unknown": (lambda: loader(classes=None), "mixup=0.3 and cutmix=1 need classes="),
    "below zero": (lambda: loader(Augment(mixup=-0.1)), "mixup is -0.1; expected a number of at least 0"),
    "no number": (lambda: loader(Augment(cutmix=float("nan"))), "cutmix is nan; expected a number of at least 0"),
    "a truth": (lambda: loader(Augment(cutmix=True)), "cutmix is True; expected a number of at least 0"),
    "text": (lambda: loader(untyped(Augment)(mixup="much")), "mixup is 'much'; expected a number of at least 0"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals(make, words):
    with pytest.raises(InputError, match=words):
        make()


@pytest.mark.parametrize(("batch", "share"), [(1, (0, 1)), (2, (1, 2))])
def test_an_image_with_none_to_be_blended_with_is_refused(batch, share):
    expected = f"batch size is {batch} for {share[1]} processes; expected at least {2 * share[1]} for mixup and cutmix"
    with pytest.raises(InputError, match=expected):
        loader(batch=batch, share=share)
    loader(Augment(pad=1), batch=batch, share=share)
    loader(batch=2 * share[1], share=share)
