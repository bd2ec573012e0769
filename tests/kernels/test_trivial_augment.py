"""TrivialAugment against torchvision's own operations, byte by byte, and the kernels against the references."""

import math

import pytest
import torch
from torchvision.transforms.v2.functional._geometry import _get_inverse_affine_matrix

from fastensdistill.data.boxes import crop_sizes, erased_sizes
from fastensdistill.errors import InputError
from fastensdistill.kernels.augment import ChangeOperands, augment, augment_reference
from fastensdistill.kernels.crop import CropOperands, chosen
from fastensdistill.kernels.lookup_tables import lookup_tables, lookup_tables_reference
from fastensdistill.kernels.trivial_augment import BINS, OPERATIONS, ROWS, magnitude, trivial_rows
from tests.compare import check_close
from tests.kernels.both import DEVICE, run_kernel
from tests.kernels.changes import batch_of, on_device, pictures, row_of, torchvision_change

# torchvision adds two products in one rounding where the CPU can; elsewhere its color, contrast and sharpness are off
# by one in some pixels, and pixels half-way between two may go to the other one
FUSED = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")

DIVISION = 0.0 if DEVICE == "cpu" else 1e-6  # by 255: a GPU need not round it to nearest


def changed(batch: CropOperands, **more) -> torch.Tensor:
    """Bytes (B, H, W, C), by the references."""
    rows = trivial_rows(*batch.images.shape[1:3])
    change = ChangeOperands(rows, lookup_tables(batch, rows), **more)
    out = augment(*batch[:5], crops=batch.crops, change=change, dtype=torch.float64)
    return (out * 255).round().to(torch.uint8)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", [(32, 32, 3), (15, 10, 3), (8, 8, 1), (2, 5, 3)], ids=lambda s: "x".join(map(str, s)))
def test_every_operation_is_torchvisions(operation, shape):
    rows = torch.arange(row_of(operation, 0, False), row_of(operation, BINS - 1, True) + 1)
    if shape != (8, 8, 1):
        rows = rows[:: 1 if shape[0] == 32 else 5]
    images = pictures(3, *shape)
    batch = batch_of(images, rows, still=True)
    actual = changed(batch)
    expected = torch.stack([torchvision_change(images[i], int(r)) for i, r in zip(batch.picks, rows, strict=True)])
    wrong = (actual != expected).flatten(1).float().mean(1)
    bad = {int(row): float(w) for row, w in zip(rows, wrong, strict=True) if w > (0 if FUSED else 0.01)}
    assert not bad, bad


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (224, 224), (33, 20)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_maps_are_torchvisions(size):
    """The six numbers that torchvision makes its grid of, of every row."""
    height, width = size
    table, halves = trivial_rows(*size), torch.tensor([0.5 * width, 0.5 * height])[:, None]
    for operation in ("shear-x", "shear-y", "translate-x", "translate-y", "rotate"):
        for bin_ in range(BINS):
            for negative in (False, True):
                m = magnitude(operation, bin_, negative)
                degrees, corner = math.degrees(math.atan(m)), [-0.5 * width, -0.5 * height]
                if operation == "rotate":
                    if m % 90 == 0 and height == width:
                        continue  # torchvision turns these by whole pixels
                    arguments = [0.0, 0.0], -(m % 360), [0.0, 0.0], 1.0, [0.0, 0.0]
                elif operation.startswith("shear"):
                    shear = [degrees, 0.0] if operation == "shear-x" else [0.0, degrees]
                    arguments = corner, 0.0, [0.0, 0.0], 1.0, shear
                else:
                    shift = [float(int(m)), 0.0] if operation == "translate-x" else [0.0, float(int(m))]
                    arguments = [0.0, 0.0], 0.0, shift, 1.0, [0.0, 0.0]
                expected = torch.tensor(_get_inverse_affine_matrix(*arguments)).view(2, 3) / halves
                row = table[row_of(operation, bin_, negative)]
                assert torch.equal(row, expected.flatten()), (operation, bin_, negative)


def test_every_row_is_equally_likely():
    numbers = torch.randint(0, 1 << 31, (200_000, 10), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(chosen(numbers, "change", ROWS), minlength=ROWS)
    share = 1 / ROWS
    assert (counts / len(numbers) - share).abs().max() < 5 * math.sqrt(share * (1 - share) / len(numbers))
    edges = torch.zeros(2, 10, dtype=torch.int32)
    edges[1] = 2**31 - 1
    assert chosen(edges, "change", ROWS).tolist() == [0, ROWS - 1]


def crops_of(height: int, width: int, resized: bool) -> torch.Tensor | None:
    return crop_sizes(height, width, (0.08, 1.0)) if resized else None


SETTINGS = [
    pytest.param((7, 5, 3), True, {"cutout": 2}, id="odd-resized-cutout"),
    pytest.param((20, 18, 3), False, {"erasing": 1 << 30}, id="over-a-block-erased"),
    pytest.param((9, 6, 1), False, {}, id="grey"),
    pytest.param((2, 2, 3), False, {}, id="nothing-to-sharpen"),
]


@pytest.mark.parametrize(("shape", "resized", "more"), SETTINGS)
def test_kernels_are_the_references(shape, resized, more):
    """Every operation once, on cropped and mirrored images, and a right angle: pixels half-way between two."""
    height, width, _ = shape
    crops = crops_of(height, width, resized)
    if "erasing" in more:
        more = more | {"erased": erased_sizes(height, width)}
    rows = torch.tensor([row_of(name, (7 * i + 3) % BINS, bool(i % 2)) for i, name in enumerate(OPERATIONS)]
                        + [row_of("rotate", 20, True)])  # fmt: skip
    batch = batch_of(pictures(4, *shape), rows, crops)
    table = trivial_rows(height, width)
    tables = lookup_tables(batch, table)
    device = on_device(batch)
    assert torch.equal(run_kernel(lookup_tables, device, table.to(DEVICE)).cpu(), tables)
    change = ChangeOperands(table, tables, **more)
    expected = augment(*batch[:5], crops=crops, change=change)
    actual = run_kernel(augment, *device[:5], crops=device.crops, change=on_device(change))
    check_close("images", actual, expected, DIVISION)


@pytest.mark.parametrize("name", ["contrast", "autocontrast", "equalize"])
def test_statistics_of_large_images(name):
    """More pixels than a program takes at once, and than a float32 sum of bytes can hold."""
    rows = torch.tensor([row_of(name, 20, False)])
    images = pictures(1, 224, 224, 1)
    images[0, :200] = 255
    batch, table = batch_of(images, rows, still=True), trivial_rows(224, 224)
    actual = run_kernel(lookup_tables, on_device(batch), table.to(DEVICE)).cpu()
    assert torch.equal(actual, lookup_tables(batch, table))


@pytest.mark.parametrize(
    ("name", "shape", "resized"), [("sharpness", (64, 64, 3), False), ("rotate", (224, 224, 1), True)]
)
def test_pixels_of_large_images(name, shape, resized):
    """Of many programs, each of which looks into what others compute."""
    height, width, _ = shape
    batch = batch_of(pictures(1, *shape), torch.tensor([row_of(name, 13, True)]), crops_of(height, width, resized))
    table = trivial_rows(height, width)
    change = ChangeOperands(table, lookup_tables(batch, table), cutout=height // 2)
    device = on_device(batch)
    actual = run_kernel(augment, *device[:5], crops=device.crops, change=on_device(change))
    check_close("images", actual, augment(*batch[:5], crops=batch.crops, change=change), DIVISION)


def test_references_wait_for_nothing():
    """A value that is read back raises on the meta device; a captured step would fail."""
    table = trivial_rows(6, 5)
    batch = batch_of(pictures(2, 6, 5, 3), torch.tensor([0, 1]), crop_sizes(6, 5, (0.08, 1.0)))
    batch = on_device(batch, "meta")
    tables = lookup_tables_reference(batch, table.to("meta"))
    change = ChangeOperands(table.to("meta"), tables, 2, erased_sizes(6, 5).to("meta"), 9)
    assert augment_reference(batch, change, "float32").shape == (2, 6, 5, 3)


def test_refusals():
    batch = batch_of(pictures(2, 4, 4, 3), torch.tensor([0, 1]))
    assert batch.numbers is not None
    rows = trivial_rows(4, 4)
    tables = lookup_tables(batch, rows)
    with pytest.raises(InputError, match=r"numbers is torch\.int64"):
        lookup_tables(batch._replace(numbers=batch.numbers.long()), rows)
    with pytest.raises(InputError, match="rows are given without numbers"):
        lookup_tables(batch._replace(numbers=None), rows)
    with pytest.raises(InputError, match=r"rows is torch.float32 of shape \(867, 6\)"):
        lookup_tables(batch, rows[1:])
    with pytest.raises(InputError, match="images have 2 channels; TrivialAugment expects 1 or 3"):
        lookup_tables(batch._replace(images=batch.images[..., :2].contiguous()), rows)
    with pytest.raises(InputError, match="rows and tables must be given together"):
        augment(*batch[:5], change=ChangeOperands(rows))
    with pytest.raises(InputError, match=r"tables is torch.uint8 of shape \(1, 3, 256\)"):
        augment(*batch[:5], change=ChangeOperands(rows, tables[1:]))
    with pytest.raises(InputError, match="without numbers, which choose how"):
        augment(*batch[:4], change=ChangeOperands(cutout=1))
    with pytest.raises(InputError, match="crops are given without numbers"):
        augment(*batch[:4], crops=torch.ones(1, 2, dtype=torch.int32))
    with pytest.raises(InputError, match=r"crops is torch.int32 of shape \(0, 2\)"):
        augment(*batch[:5], crops=torch.ones(0, 2, dtype=torch.int32))
    with pytest.raises(InputError, match=r"erased is torch\.int64"):
        augment(*batch[:5], change=ChangeOperands(erased=torch.ones(1, 2, dtype=torch.int64), erasing=1))
