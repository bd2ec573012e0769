"""Call a copy of a network once before a run, the way the run will, and refuse what does not fit.

In evaluation mode and, where it is trained, in training mode too; on images as they lie in memory by default and
channels last, which is how the loader gives them and faster, and decides how the run gives them to this network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastensdistill.errors import InputError
from fastensdistill.method.calls import (
    call,
    contiguous,
    device_of,
    dtype_of,
    habits_of,
    learn_contiguous,
    not_about_images,
    refused,
    remember,
)
from fastensdistill.method.copying import check_complete, copy_network, error_name
from fastensdistill.method.modes import evaluating, set_mode, without_weight_gradients
from fastensdistill.method.outputs import check_logits

IMAGES = 5
ImageShape = tuple[int, int, int]


def check_output(network: nn.Module, name: str, image_shape: ImageShape, expected: Sequence[int]) -> Tensor:
    """Logits of a few images (channels, H, W) of noise in evaluation mode, which the network is put back from.

    ``expected`` is (C,), or (E, C) for a student or an ensemble. Raises InputError, which begins with ``name``, where
    the network does not take such images, or returns anything but logits (B, C) or (E, B, C).
    """
    check_values(network, name)
    with evaluating(network):
        logits = _logits(network, name, _noise(network, image_shape), expected)
    check_logits(logits, name)
    return logits


def check_values(network: nn.Module, name: str) -> None:
    """Raise InputError for parameters that have no values yet: on the meta device, or of lazy layers."""
    check_complete(network, name)
    about = error_name(network, name)
    for key, p in [*network.named_parameters(), *network.named_buffers()]:
        if p.is_meta:
            raise InputError(f"{about} has {key!r} on the meta device, without values; expected it on a CPU or a GPU")


def check_network(
    network: nn.Module, name: str, image_shape: ImageShape, expected: Sequence[int], device: torch.device, *,
    trained: bool = False, ascended: str = "",
) -> list[str]:  # fmt: skip
    """Try a copy of ``network`` on ``device``, and keep what that shows of it; what the user should hear, in lines.

    ``trained``: it will be, so the loss has to reach a parameter in training mode. ``ascended`` is the perturbation
    that needs its gradient with respect to the images. Raises InputError as :func:`check_output` does, for these, and
    for a network to be trained whose parameters are all frozen or are not float32.
    """
    check_values(network, name)
    about = error_name(network, name)
    if trained and not any(p.requires_grad for p in network.parameters()):
        raise InputError(f"{about} requires no gradients for any parameter; expected some to be trained")
    usual = torch.get_default_dtype()  # float32, but for whoever computes in float64 throughout
    if trained and dtype_of(network) != usual:
        raise InputError(f"{about} is of {dtype_of(network)}; expected {usual}, network.float(), to train it")
    tried = copy_network(network, forget=True, name=name).to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        images = _in_evaluation(tried, name, image_shape, expected)
        if ascended:
            with evaluating(tried):
                _check_ascent(tried, name, images, expected, ascended)
        if trained:
            _in_training(tried, name, images, expected)
    remember(network, tried)
    if any(habits.auxiliary for habits in habits_of(tried)):
        return [f"{about} returns auxiliary outputs in training: only its first, the logits, are trained"]
    return []


def _in_evaluation(tried: nn.Module, name: str, shape: ImageShape, expected: Sequence[int]) -> Tensor:
    """Images of noise, laid out in memory as this network wants them, and its weights with them."""
    torch.manual_seed(0)
    logits = check_output(tried, name, shape, expected)
    images, last = _noise(tried, shape), torch.channels_last
    with evaluating(tried):
        tried.to(memory_format=last)  # type: ignore[call-overload]
        torch.manual_seed(0)  # for networks that draw in evaluation mode too
        try:
            again = _logits(tried, name, images.to(memory_format=last), expected)
        except InputError:
            again = torch.full_like(logits, torch.nan)
    if any(h.contiguous for h in habits_of(tried)) or not torch.allclose(
        again, logits, rtol=1e-2, atol=1e-2 * float(logits.detach().abs().max())
    ):
        return _kept_contiguous(tried, images)
    return images.to(memory_format=last)


def _kept_contiguous(tried: nn.Module, images: Tensor) -> Tensor:
    tried.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    learn_contiguous(tried)
    return images


def _in_training(tried: nn.Module, name: str, images: Tensor, expected: Sequence[int]) -> None:
    """Raise InputError unless a loss in training mode reaches a parameter."""
    try:
        set_mode(tried, True)
        try:
            logits = _logits(tried, name, images, expected)
        except InputError:
            images = _kept_contiguous(tried, contiguous(images))
            logits = _logits(tried, name, images, expected)
        if logits.requires_grad:
            logits.float().logsumexp(-1).sum().backward()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise refused(f"{name}, in training mode,", tried, images, error) from error
    if all(p.grad is None for p in tried.parameters()):
        raise InputError(
            f"{name} ({type(tried).__name__}) cannot be trained: its logits depend on no parameter that requires a "
            "gradient (no_grad, detach or argmax in its forward?)"
        )


def _check_ascent(network: nn.Module, name: str, images: Tensor, expected: Sequence[int], perturbation: str) -> None:
    x = images.detach().requires_grad_()
    with torch.enable_grad(), without_weight_gradients(network):
        logits = _logits(network, name, x, expected)
        gradient = torch.autograd.grad(logits.sum(), [x], allow_unused=True)[0] if logits.requires_grad else None
    if gradient is None:
        raise InputError(
            f"perturbation {perturbation!r} needs the gradient of {name} ({type(network).__name__}) with respect to "
            "the images, which it does not give (no_grad, detach or argmax in its forward); 'none' and 'gaussian' "
            "need none"
        )


def _logits(network: nn.Module, name: str, images: Tensor, expected: Sequence[int]) -> Tensor:
    """Raises InputError for whatever the network raises, and for logits of another shape."""
    *members, classes = expected
    try:
        logits = network(images) if members else call(network, images, name)
    except Exception as error:
        if not_about_images(error):
            raise
        raise refused(name, network, images, error) from error
    if tuple(logits.shape) != (*members, IMAGES, classes):
        per_image = logits.ndim == len(members) + 2 and tuple(logits.shape[:-1]) == (*members, IMAGES)
        if per_image:
            raise InputError(f"{name} returns {logits.shape[-1]} values per image; the data has {classes} classes")
        raise InputError(
            f"{name} returns {tuple(logits.shape)} for {IMAGES} images of {classes} classes; expected "
            f"{(*members, IMAGES, classes)}"
        )
    return logits


def _noise(network: nn.Module, shape: ImageShape) -> Tensor:
    images = torch.rand(IMAGES, *shape, generator=torch.Generator().manual_seed(0))
    return images.to(device_of(network))
