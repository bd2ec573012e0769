"""Mixup and cutmix: every image of a batch blended with the image before it, and their labels as probabilities.

    λ_b = sigmoid( ln(g_1 / g_2) + ln(u_1 / u_2) / α )              which is Beta(α, α): g·u^(1/α) is Gamma(α)
    y_b = λ_b·x_b + (1 − λ_b)·x_{b−1}                               mixup
    y_b = x_{b−1} inside a box, x_b outside                         cutmix
    p_b = w_b·onehot(label_b) + (1 − w_b)·onehot(label_{b−1})       w_b: λ_b, or the share of the pixels outside the box

g are draws of Gamma(α + 1), u of [0, 1); image −1 is the last one. A box has a drawn centre and sides √(1 − λ_b)·(H, W)
and is cut off at the image's edges. λ is found in logarithms because draws of Gamma(α) underflow for small α, and 0 / 0
is no share: here λ tends to 0 or 1, as it should. Where both are on, a draw below 1/2 makes it cutmix. Sources: Zhang
et al., ICLR 2018; Yun et al., ICCV 2019; the boxes are torchvision's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import BATCH_SIZES, launch, tl, triton
from fastensdistill.kernels.operands import FLOATING, accumulator, check_device, check_tensor
from fastensdistill.kernels.ops import define
from fastensdistill.kernels.tiles import Tile

MIX_TILE = Tile(0, 1024, 0, 4, 1, "two reads and a write a value: bandwidth decides, 8 values a thread")
GAMMAS, UNIFORMS = 4, 5  # draws an image: mixup's pair and cutmix's; coin, u_1, u_2, and the box's row and column
MOST = 1e30  # of 1/α


class MixDraws(NamedTuple):
    """What decides how every image of a batch is mixed."""

    gammas: Tensor
    uniforms: Tensor

    def of(self, rows: slice) -> "MixDraws":
        """Those of some of the images."""
        return MixDraws(self.gammas[rows], self.uniforms[rows])


class Mixed(NamedTuple):
    """A mixed batch: images (B, H, W, C), and probabilities (B, classes) of their dtype."""

    images: Tensor
    labels: Tensor


def cutmix_share(mixup: float, cutmix: float) -> float:
    """The share of images that are mixed by a box: where both are on, half of them."""
    return 0.5 if mixup > 0 and cutmix > 0 else float(cutmix > 0)


def strengths(draws: MixDraws, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """λ (B,), before a box is cut off at an edge, and which images are mixed by a box, bool (B,)."""
    boxed = draws.uniforms[:, 0] < cutmix_share(mixup, cutmix)
    mixup_logits, cutmix_logits = (
        draws.gammas[:, i].log() - draws.gammas[:, i + 1].log() + inverse(alpha) * _log_ratio(draws.uniforms)
        for i, alpha in ((0, mixup), (2, cutmix))
    )
    return torch.where(boxed, cutmix_logits, mixup_logits).sigmoid(), boxed


def _log_ratio(uniforms: Tensor) -> Tensor:
    return (1 - uniforms[:, 1]).log() - (1 - uniforms[:, 2]).log()  # of (0, 1]


def inverse(alpha: float) -> float:
    """1/α as a number that stays finite times a logarithm; 0 where α is."""
    return min(1 / alpha, MOST) if alpha > 1 / MOST else MOST * (alpha > 0)


def boxes(draws: MixDraws, lam: Tensor, height: int, width: int) -> Tensor:
    """(top, bottom, left, right) of the boxes with these λ, int64 (4, B); bottom and right are not inside any more."""
    half = 0.5 * (1 - lam).sqrt()
    edges = []
    for i, size in ((3, height), (4, width)):
        centre = (draws.uniforms[:, i] * size).long().clamp_max(size - 1)
        reach = (half * size).long()
        edges += [(centre - reach).clamp_min(0), (centre + reach).clamp_max(size)]
    return torch.stack(edges)


def mix_reference(
    images: Tensor, labels: Tensor, draws: MixDraws, classes: int, mixup: float, cutmix: float
) -> tuple[Tensor, Tensor]:
    """The equations above in plain PyTorch: any device, any floating dtype (narrow ones computed in float32)."""
    _, height, width, _ = images.shape
    lam, boxed = strengths(draws, mixup, cutmix)
    top, bottom, left, right = (edge[:, None] for edge in boxes(draws, lam, height, width))
    rows, columns = (torch.arange(n, device=images.device)[None] for n in (height, width))
    inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None, :]
    area = ((bottom - top) * (right - left))[:, 0]
    dtype = accumulator(images.dtype)
    kept = torch.where(boxed, 1 - area.to(lam.dtype) / (height * width), lam).to(dtype)
    # Of every pixel; inside a box nothing is kept, outside of it everything
    weight = torch.where(boxed[:, None, None], (~inside).to(dtype), kept[:, None, None])[..., None]
    x = images.to(dtype)
    mixed = x.roll(1, 0) * (1 - weight) + x * weight
    onehot = torch.zeros(len(labels), classes, dtype=dtype, device=images.device).scatter_(1, labels[:, None], 1)
    probabilities = onehot.roll(1, 0) * (1 - kept)[:, None] + onehot * kept[:, None]
    return mixed.to(images.dtype), probabilities.to(images.dtype)


@triton.jit(do_not_specialize=BATCH_SIZES)
def mix_kernel(
    p_images, p_labels, p_gammas, p_uniforms, p_mixed, p_probabilities,
    share, inverse_mixup, inverse_cutmix, N, classes,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    i_before = (i_b + N - 1) % N
    i_n = tl.program_id(1)
    BLOCKS: tl.constexpr = (H * W * C + BLOCK_N - 1) // BLOCK_N  # behind them, blocks of classes
    boxed = tl.load(p_uniforms + 5 * i_b) < share
    o_pair = 4 * i_b + tl.where(boxed, 2, 0)
    logit = tl.log(tl.load(p_gammas + o_pair)) - tl.log(tl.load(p_gammas + o_pair + 1))
    ratio = tl.log(1 - tl.load(p_uniforms + 5 * i_b + 1)) - tl.log(1 - tl.load(p_uniforms + 5 * i_b + 2))
    logit += tl.where(boxed, inverse_cutmix, inverse_mixup) * ratio
    small = tl.exp(-tl.abs(logit))
    lam = tl.where(logit < 0, small, 1.0) / (1.0 + small)
    half = 0.5 * tl.sqrt_rn(1.0 - lam)
    row = tl.minimum((tl.load(p_uniforms + 5 * i_b + 3) * H).to(tl.int32), H - 1)
    column = tl.minimum((tl.load(p_uniforms + 5 * i_b + 4) * W).to(tl.int32), W - 1)
    down, across = (half * H).to(tl.int32), (half * W).to(tl.int32)
    top, bottom = tl.maximum(row - down, 0), tl.minimum(row + down, H)
    left, right = tl.maximum(column - across, 0), tl.minimum(column + across, W)
    if i_n < BLOCKS:
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < H * W * C
        i_h, i_w = o_n // (C * W), (o_n // C) % W
        m_inside = (i_h >= top) & (i_h < bottom) & (i_w >= left) & (i_w < right)
        weight = tl.where(boxed, tl.where(m_inside, 0.0, 1.0), lam)
        b_x = tl.load(p_images + i_b * (H * W * C) + o_n, mask=m_n, other=0).to(tl.float32)
        b_before = tl.load(p_images + i_before * (H * W * C) + o_n, mask=m_n, other=0).to(tl.float32)
        b_mixed = b_before * (1 - weight) + b_x * weight
        tl.store(p_mixed + i_b * (H * W * C) + o_n, b_mixed.to(p_mixed.dtype.element_ty), mask=m_n)
    else:
        o_c = (i_n - BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
        kept = tl.where(boxed, 1.0 - ((bottom - top) * (right - left)).to(tl.float32) / (H * W), lam)
        b_p = tl.where(o_c == tl.load(p_labels + i_before), 1 - kept, 0.0)
        b_p += tl.where(o_c == tl.load(p_labels + i_b), kept, 0.0)
        out = p_probabilities + i_b * classes + o_c
        tl.store(out, b_p.to(p_probabilities.dtype.element_ty), mask=o_c < classes)


def _empty(images, labels, draws, classes, mixup, cutmix):
    return torch.empty_like(images), images.new_empty(len(labels), classes)


def _launch(images, labels, draws, classes, mixup, cutmix):
    mixed, probabilities = _empty(images, labels, draws, classes, mixup, cutmix)
    count, height, width, channels = images.shape
    blocks = -(-height * width * channels // MIX_TILE.BLOCK_N) + -(-classes // MIX_TILE.BLOCK_N)
    launch(
        mix_kernel, (count, blocks), MIX_TILE, draws,
        p_images=images, p_labels=labels, p_mixed=mixed, p_probabilities=probabilities,
        share=cutmix_share(mixup, cutmix), inverse_mixup=inverse(mixup), inverse_cutmix=inverse(cutmix),
        N=count, classes=classes, H=height, W=width, C=channels,
    )  # fmt: skip
    return mixed, probabilities


_mix = define("mix", mix_reference, _empty, _launch)


def mix(images: Tensor, labels: Tensor, draws: MixDraws, *, classes: int, mixup: float = 0, cutmix: float = 0) -> Mixed:
    """Blend every image with the one before it; how, is drawn.

    Args:
        images: (B, H, W, C), contiguous, any floating dtype.
        labels: int64 (B,), below ``classes``.
        draws: gammas (B, 4), two of Gamma(mixup + 1) and two of Gamma(cutmix + 1), and uniforms (B, 5) in [0, 1), both
            float32, or float64 with float64 images; contiguous.
        classes: columns of the probabilities.
        mixup: α of mixup's Beta(α, α); 0 for none.
        cutmix: α of cutmix's; 0 for none. With both, each image gets one of them at random.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, and neither of the two.
    """
    check_tensor("images", images, 4)
    if images.dtype not in FLOATING:
        raise InputError(f"images is {images.dtype}, expected a floating dtype")
    count, wanted = len(images), accumulator(images.dtype)
    if not (labels.shape == (count,) and labels.dtype == torch.int64):
        raise InputError(f"labels is {labels.dtype} of shape {tuple(labels.shape)}, expected int64 ({count},)")
    for name, tensor, width in (("gammas", draws.gammas, GAMMAS), ("uniforms", draws.uniforms, UNIFORMS)):
        if not (tensor.shape == (count, width) and tensor.dtype == wanted and tensor.is_contiguous()):
            raise InputError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected contiguous {wanted} "
                f"({count}, {width})"
            )
        check_device(name, tensor, "images", images)
    check_device("labels", labels, "images", images)
    if classes < 1:
        raise InputError(f"classes is {classes}, expected at least 1")
    if not (mixup >= 0 and cutmix >= 0 and mixup + cutmix > 0):
        raise InputError(f"mixup is {mixup} and cutmix {cutmix}, expected numbers of at least 0, one of them above")
    return Mixed(*_mix(images, labels, *draws, classes, mixup, cutmix))
