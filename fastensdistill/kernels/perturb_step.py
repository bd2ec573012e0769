"""One normalised ascent step in pixel space.

    g_b  = Σ_G input_gradients[G, b]
    x'_b = clip( x_b + step · confidence_b · g_b / ‖g_b‖₂, low, high )         ‖·‖₂ over all values of an image

(docs/method.md, Perturbation: step = ε·√D, ε = 1/255, D values per image; confidence is ConfODS's factor, else 1.)
An image whose g is zero is returned as it is, bit for bit and not clipped: there is no direction to step in. g is
divided by its largest absolute value before it is squared, so that the norm neither underflows nor overflows while the
sum over the groups is finite; a NaN or infinite gradient gives a NaN image, for everybody to see.
"""

import math

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.operands import FLOATING, accumulator, check_device
from fastensdistill.kernels.ops import define


def perturb_step_reference(
    images: Tensor, input_gradients: Tensor, confidence: Tensor | None, step: float, low: float, high: float
) -> Tensor:
    """The equations above in plain PyTorch: any device, any floating dtype (narrow ones computed in float32)."""
    dtype = accumulator(images.dtype)
    g = input_gradients.to(dtype).sum(0)
    x = images.to(dtype)
    inner = list(range(1, images.dim()))
    peak = g.abs().amax(inner, keepdim=True)
    g = g / torch.where(peak == 0, 1, peak)
    norm = g.square().sum(inner, keepdim=True).sqrt()
    length = torch.where(peak == 0, 0, step / norm)
    if confidence is not None:
        length = length * confidence.to(dtype).view(-1, *[1] * len(inner))
    moved = (x + length * g).clamp(low, high).to(images.dtype)
    # empty_like keeps the memory format of the images whatever that of the gradients
    return torch.empty_like(images).copy_(torch.where(peak == 0, images, moved))


def _empty(images, *unused):
    return torch.empty_like(images)


_perturb_step = define("perturb_step", perturb_step_reference, _empty)


def perturb_step(
    images: Tensor, input_gradients: Tensor, step: float, low: float = 0.0, high: float = 1.0,
    confidence: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Moves every image by ``step`` along its normalised gradient and clips it to [low, high].

    Args:
        images: [B, …] (usually [B, 3, H, W] in [0, 1]); float32, bfloat16, float16 or float64, any memory format.
        input_gradients: [G, B, …], summed over G. float64 exactly when the images are; otherwise any of the three.
        step: length of the step, ε·√D; any finite number.
        low, high: range of a pixel, low ≤ high.
        confidence: [B] factor of each image's step, float32 (float64 for float64 images), or None.

    Returns:
        The images after the step: shape, dtype and memory format of ``images``, not differentiable.

    Raises:
        InputError: a dtype, shape, device or number that does not fit.

    Source: Nam et al., ICML 2022, and docs/method.md, Perturbation; ConfODS: Nam et al., NeurIPS 2021.
    """
    for name, tensor in (("images", images), ("input_gradients", input_gradients)):
        good = tensor.dtype in FLOATING
        if not good:
            raise InputError(f"{name} has dtype {tensor.dtype}; expected float32, bfloat16, float16 or float64")
    if not (images.dim() >= 2 and input_gradients.shape[1:] == images.shape and 0 not in input_gradients.shape):
        raise InputError(
            f"images has shape {tuple(images.shape)} and input_gradients {tuple(input_gradients.shape)}; "
            "expected [B, …] and [G, B, …], not empty"
        )
    dtype, B = accumulator(images.dtype), images.shape[0]
    if accumulator(input_gradients.dtype) != dtype:
        raise InputError(
            f"input_gradients has dtype {input_gradients.dtype} but images has {images.dtype}; "
            "expected float64 for both or for neither"
        )
    check_device("input_gradients", input_gradients, "images", images)
    if confidence is not None:
        if not (confidence.dtype == dtype and confidence.shape == (B,)):
            raise InputError(
                f"confidence has dtype {confidence.dtype} and shape {tuple(confidence.shape)}; "
                f"expected {dtype} and ({B},)"
            )
        check_device("confidence", confidence, "images", images)
        confidence = confidence.detach()
    if not math.isfinite(step):
        raise InputError(f"step is {step}; expected a finite number")
    if not (low <= high):  # NaN is refused too
        raise InputError(f"low is {low} and high is {high}; expected low ≤ high")
    return _perturb_step(images.detach(), input_gradients.detach(), confidence, step, low, high)
