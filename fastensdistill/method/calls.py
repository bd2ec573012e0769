"""Call a network that somebody else wrote, in its dtype and without changing the images, for its logits.

What is learnt of a network at its first call, in each mode, is kept beside it, never in it: whether it writes into its
input (``x -= mean``, ``ReLU(inplace=True)``) and so needs images of its own, and whether it needs them contiguous
(``x.view(-1, n)`` after a convolution) where the loader gives them channels last.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastensdistill.errors import InputError
from fastensdistill.method.outputs import alike, logits_of


@dataclass
class Habits:
    """Of one network in one mode."""

    writes: bool = False
    """It changes the images that it is given."""
    contiguous: bool = False
    """It has to be given images (B, channels, H, W) that lie in memory in this order, and weights too."""
    auxiliary: bool = False
    """It returns more than one tensor like the logits, of which the others are left out."""


_HABITS: WeakKeyDictionary[nn.Module, dict[bool, Habits]] = WeakKeyDictionary()


def call(network: nn.Module, images: Tensor, name: str = "") -> Tensor:
    """The logits of ``images`` (B, channels, H, W), which keep their values whatever the network does with its input.

    Images are cast to the network's dtype; logits are of theirs, or of bfloat16 where autocast made them. The first
    call in a mode raises InputError for whatever the network raises; ``name`` is what errors call it.
    """
    name = name or type(network).__name__
    x = images.to(dtype_of(network, images.dtype))
    habits = None if torch.compiler.is_compiling() else _HABITS.get(network, {}).get(network.training)
    if torch.compiler.is_compiling():
        output = network(x)
    elif habits is None and not images.is_meta:
        output = _first(network, x, name)
    else:
        output = _known(network, x, habits or Habits(), name)
    logits = logits_of(output, name, auxiliary=network.training)
    if logits.dtype in (torch.float16, torch.float64) and logits.dtype != images.dtype:
        logits = logits.to(torch.float32 if images.dtype == torch.bfloat16 else images.dtype)
    return logits


def _known(network: nn.Module, x: Tensor, habits: Habits, name: str) -> Any:
    x = contiguous(x) if habits.contiguous else x
    if habits.writes:
        return network(x.clone())
    before = _version(x)
    output = network(x)
    if _version(x) != before:
        raise InputError(f"{name} wrote into its images, as it had not at first; expected x = x - mean, not x -= mean")
    return output


def _first(network: nn.Module, images: Tensor, name: str) -> Any:
    habits = Habits(contiguous=any(known.contiguous for known in _HABITS.get(network, {}).values()))
    images = contiguous(images) if habits.contiguous else images
    x = images.clone()
    before = _version(x)
    try:
        output = network(x)
    except Exception as error:
        if not_about_images(error):
            raise
        if network.training or _in_order(images):
            raise refused(name, network, images, error) from error
        habits.contiguous, x = True, contiguous(images)
        before = _version(x)
        try:
            output = network(x)
        except Exception:
            raise refused(name, network, images, error) from error
    # Values too: a write to x.data moves no version, and a ReLU no values where there is nothing below zero
    habits.writes = _version(x) != before or not torch.equal(x.detach(), images.detach())
    habits.auxiliary = network.training and alike(output) > 1
    _HABITS.setdefault(network, {})[network.training] = habits
    return output


def not_about_images(error: Exception) -> bool:
    """Ours, of memory, or of a BatchNorm that has one value per channel, which those who gave the batch size catch."""
    memory = MemoryError | torch.cuda.OutOfMemoryError
    return isinstance(error, InputError | memory) or "more than 1 value per" in str(error)


def refused(name: str, network: nn.Module, images: Tensor, error: Exception) -> InputError:
    """The InputError for an exception of the network's own."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind, text = type(error).__name__, first[:200]
    what = text if isinstance(error, RuntimeError | AssertionError) and text else f"{kind}: {text}" if text else kind
    own = type(network).__name__
    about = name if own in name else f"{name} ({own})"
    return InputError(f"{about} does not take images of shape {tuple(images.shape[1:])}, {len(images)} at once: {what}")


def habits_of(network: nn.Module) -> list[Habits]:
    """What is known of ``network`` and the networks in it."""
    return [habits for m in network.modules() for habits in _HABITS.get(m, {}).values()]


def remember(network: nn.Module, like: nn.Module) -> None:
    """``network`` has the habits of ``like``, a copy of it."""
    for own, other in zip(network.modules(), like.modules(), strict=True):
        if other in _HABITS:
            _HABITS[own] = copy.deepcopy(_HABITS[other])


def learn_contiguous(network: nn.Module) -> None:
    """From now on give ``network``, and the networks called in it, contiguous images."""
    for habits in habits_of(network):
        habits.contiguous = True


def dtype_of(network: nn.Module, default: torch.dtype = torch.float32) -> torch.dtype:
    """That of its floating parameters, the first of them; ``default`` where there are none."""
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), default)


def device_of(network: nn.Module) -> torch.device:
    """That of its first parameter or buffer; the CPU where there is none."""
    tensors = (t for found in (network.parameters(), network.buffers()) for t in found)
    return next((t.device for t in tensors), torch.device("cpu"))


def contiguous(x: Tensor) -> Tensor:
    """``x`` as it lies in memory by default; of one channel it may call itself contiguous with other strides."""
    return x if _in_order(x) else x.clone(memory_format=torch.contiguous_format)


def _in_order(x: Tensor) -> bool:
    strides, step = [], 1
    for size in reversed(x.shape):
        strides.append(step)
        step *= max(size, 1)
    return list(x.stride()) == strides[::-1]


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
