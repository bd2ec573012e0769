import pytest
import torch
from torch.nn import functional as F

from fastensdistill.errors import InputError
from fastensdistill.kernels.augment import augment
from tests.kernels.both import DEVICE, check_op, run_kernel


def _batch(height: int, width: int, channels: int):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (9, height, width, channels), dtype=torch.uint8, generator=generator)
    index = torch.tensor([3, 8, 0, 3, 5])
    # none, corner, odd, everything outside, flip alone
    shifts = torch.tensor([[0, 0], [4, -4], [-2, 1], [height, 0], [0, 0]], dtype=torch.int32)
    return images, index, shifts, torch.tensor([0, 1, 1, 0, 1], dtype=torch.uint8)


def _one(image: torch.Tensor, shift: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Zero-pad, crop, flip, divide: the recipe in the usual order of operations."""
    height, width = image.shape[:2]
    pad = 4 + height + width
    padded = F.pad(image.permute(2, 0, 1).float(), (pad, pad, pad, pad))
    down, right = (pad + s for s in shift.tolist())
    crop = padded[:, down : down + height, right : right + width]
    return ((crop.flip(2) if flip else crop) / 255).permute(1, 2, 0)


@pytest.mark.parametrize("shape", [(7, 5, 3), (8, 8, 1), (6, 9, 4)], ids=["odd", "grey", "four-channels"])
def test_augment(shape):
    images, index, shifts, flips = _batch(*shape)
    expected = torch.stack([_one(images[i], s, f) for i, s, f in zip(index, shifts, flips, strict=True)])
    for kind in (torch.int64, torch.int32):
        assert torch.equal(augment(images, index.to(kind), shifts, flips), expected)
        on_device = (t.to(DEVICE) for t in (images, index.to(kind), shifts, flips))
        assert torch.equal(run_kernel(augment, *on_device).cpu(), expected)
    assert not expected[3].any(), "a crop that misses the image is black"


def test_half_precision_rounds_once():
    check_op(augment, *_batch(7, 5, 3), dtype=torch.float16, tolerance=0)


def test_refusals():
    images, index, shifts, flips = _batch(4, 4, 3)
    with pytest.raises(InputError, match="expected uint8"):
        augment(images.float(), index, shifts, flips)
    with pytest.raises(InputError, match="shifts is torch"):
        augment(images, index, shifts.long(), flips)
    with pytest.raises(InputError, match="flips is torch"):
        augment(images, index, shifts, flips[:2])
    with pytest.raises(InputError, match="unknown dtype 'int32'"):
        augment(images, index, shifts, flips, dtype=torch.int32)
