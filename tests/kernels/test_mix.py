"""Mixup and cutmix against torchvision's, its batches mixed with the same λ and boxes; and that no draw gives a NaN."""

import pytest
import torch
from torchvision.transforms import v2

from fastensdistill.errors import InputError
from fastensdistill.kernels.mix import GAMMAS, UNIFORMS, MixDraws, boxes, mix, strengths
from tests.kernels.both import check_op

CLASSES = 7
ALPHAS = {"mixup": (0.8, 0.0), "cutmix": (0.0, 1.0), "both": (0.2, 1.0)}
SHAPES = {"odd": (5, 7, 9, 3), "grey": (8, 8, 8, 1), "more than a block": (3, 32, 33, 3), "one image": (1, 6, 5, 3)}


def drawn(count: int, mixup: float, cutmix: float, dtype: torch.dtype = torch.float64) -> MixDraws:
    generator = torch.Generator().manual_seed(0)
    concentration = torch.tensor([mixup + 1, mixup + 1, cutmix + 1, cutmix + 1], dtype=dtype).expand(count, GAMMAS)
    gammas = torch._standard_gamma(concentration.contiguous(), generator=generator)
    return MixDraws(gammas, torch.rand(count, UNIFORMS, generator=generator, dtype=dtype))


def batch(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(CLASSES, shape[:1], generator=generator)


def of_torchvision(images, labels, lam, boxed, box):
    """One row after another out of torchvision's batch of that λ and box."""
    images = images.permute(0, 3, 1, 2)
    mixed, probabilities = [], []
    for b in range(len(images)):
        transform = (v2.CutMix if boxed[b] else v2.MixUp)(num_classes=CLASSES)
        top, bottom, left, right = box[:, b].tolist()
        kept = 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
        cut = {"box": (left, top, right, bottom), "lam_adjusted": kept}
        transform.make_params = lambda *_, lam=float(lam[b]), cut=cut: {"lam": lam, **cut}
        rows = transform(images, torch.nn.functional.one_hot(labels, CLASSES).double())
        mixed.append(rows[0][b])
        probabilities.append(rows[1][b])
    return torch.stack(mixed).permute(0, 2, 3, 1), torch.stack(probabilities)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("alphas", ALPHAS.values(), ids=ALPHAS)
def test_it_is_torchvisions_bit_for_bit(alphas, shape):
    mixup, cutmix = alphas
    images, labels = batch(shape)
    draws = drawn(len(images), *alphas)
    lam, boxed = strengths(draws, *alphas)
    found = mix(images, labels, draws, classes=CLASSES, mixup=mixup, cutmix=cutmix)
    expected = of_torchvision(images, labels, lam, boxed, boxes(draws, lam, *shape[1:3]))
    assert torch.equal(found.images, expected[0])
    assert torch.equal(found.labels, expected[1])
    assert len(images) == 1 or not torch.equal(found.images, images)


@pytest.mark.parametrize("size", [(7, 9), (32, 32), (3, 5)])
def test_boxes_are_torchvisions(size, monkeypatch):
    """Of the same λ and centre, over the whole range of both."""
    draws = drawn(300, 0, 0.7)
    lam, _ = strengths(draws, 0, 0.7)
    lam[:2] = torch.tensor([0.0, 1.0])
    found = boxes(draws, lam, *size)
    images = torch.zeros(2, 3, *size)
    transform = v2.CutMix(num_classes=2)
    for b in range(len(lam)):
        at = [int(u * n) for u, n in zip(draws.uniforms[b, [4, 3]].tolist(), reversed(size), strict=True)]
        monkeypatch.setattr(transform._dist, "sample", lambda _, b=b: lam[b])
        monkeypatch.setattr(torch, "randint", lambda *_, size, at=at: torch.tensor([at.pop(0)]))
        left, top, right, bottom = transform.make_params([images])["box"]
        assert found[:, b].tolist() == [top, bottom, left, right]
    assert found.min() == 0
    assert found[1].max() == size[0]


def quantiles(values):
    return values.sort().values[torch.linspace(0.05, 0.95, 19).mul(len(values)).long()]


@pytest.mark.parametrize("alpha", [0.1, 1.0, 4.0])
def test_strengths_are_beta(alpha):
    """For α = 1 they are uniform; else PyTorch's own Beta draws. 40,000 draws: five standard errors of a quantile's
    level are 0.0125."""
    count = 40_000
    torch.manual_seed(4)
    samples = torch.distributions.Beta(torch.tensor(alpha).double(), torch.tensor(alpha).double()).sample((count,))
    levels = torch.linspace(0.05, 0.95, 19).double()
    for mixup, cutmix in ((alpha, 0.0), (0.0, alpha)):
        lam, boxed = strengths(drawn(count, mixup, cutmix), mixup, cutmix)
        assert bool(boxed.all() if cutmix else not boxed.any())
        reached = (lam[:, None] <= quantiles(samples)).double().mean(0)
        assert (reached - levels).abs().max() < 0.02
    if alpha == 1:
        assert (quantiles(lam) - levels).abs().max() < 0.0125


def test_of_both_half_of_the_images_have_one_and_half_the_other():
    _, boxed = strengths(drawn(20_000, 0.2, 1.0), 0.2, 1.0)
    assert abs(boxed.double().mean() - 0.5) < 0.02


@pytest.mark.parametrize("alpha", [1e-3, 1e-9, 5e-324, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_draw_gives_a_nan(alpha, dtype):
    """Also uniform draws at the ends of [0, 1), and equal ones."""
    images, labels = batch((64, 4, 4, 1), dtype)
    for mixup, cutmix in ((alpha, 0.0), (0.0, alpha), (alpha, alpha)):
        draws = drawn(64, mixup, cutmix, dtype)
        draws.uniforms[:8, 1:3] = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]] * 2, dtype=dtype)
        draws.uniforms[:8].clamp_(max=1 - torch.finfo(dtype).eps)
        found = mix(images, labels, draws, classes=CLASSES, mixup=mixup, cutmix=cutmix)
        assert found.images.isfinite().all()
        assert (found.labels.sum(1) - 1).abs().max() < 1e-6
        assert (found.labels >= 0).all()
        lam, _ = strengths(draws, mixup, cutmix)
        if alpha <= 1e-3:
            assert ((lam < 1e-3) | (lam > 1 - 1e-3)).double().mean() > 0.9, "few draws between the two images"
            assert 0.2 < (lam > 0.5).double().mean() < 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("alphas", ALPHAS.values(), ids=ALPHAS)
def test_kernel(alphas, shape, dtype):
    mixup, cutmix = alphas
    images, labels = batch(shape, dtype)
    draws = drawn(len(images), mixup, cutmix, torch.float32)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    check_op(mix, images, labels, draws, classes=CLASSES, mixup=mixup, cutmix=cutmix, tolerance=tolerance)


def test_kernel_with_more_classes_than_a_block():
    images, _ = batch((3, 5, 5, 3), torch.float32)
    draws = drawn(3, 0.4, 0.4, torch.float32)
    check_op(mix, images, torch.tensor([0, 1029, 1029]), draws, classes=1030, mixup=0.4, cutmix=0.4)


REFUSED = {
    "bytes": (lambda x, y, d: (x.byte(), y, d, {}), "images is torch.uint8, expected a floating dtype"),
    "labels of another kind": (lambda x, y, d: (x, y.int(), d, {}), r"labels is torch.int32 of shape \(5,\)"),
    "too few labels": (lambda x, y, d: (x, y[1:], d, {}), r"labels is torch.int64 of shape \(4,\)"),
    "narrow draws": (lambda x, y, d: (x, y, MixDraws(d.gammas.float(), d.uniforms), {}), "gammas is torch.float32"),
    "too few draws": (lambda x, y, d: (x, y, MixDraws(d.gammas, d.uniforms[:, 1:]), {}), r"uniforms is .*\(5, 4\)"),
    "no classes": (lambda x, y, d: (x, y, d, {"classes": 0}), "classes is 0"),
    "neither": (lambda x, y, d: (x, y, d, {"mixup": 0}), "mixup is 0 and cutmix 0, expected"),
    "below zero": (lambda x, y, d: (x, y, d, {"cutmix": -1}), "mixup is 1 and cutmix -1, expected"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals(change, words):
    *operands, options = change(*batch((5, 4, 4, 3)), drawn(5, 1, 0))
    with pytest.raises(InputError, match=words):
        mix(*operands, **({"classes": CLASSES, "mixup": 1} | options))
