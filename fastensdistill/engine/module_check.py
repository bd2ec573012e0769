"""May a network that no plan covers run as its own module inside a captured step? Tried once, on a copy.

A graph replays what the device was told and nothing else: Python runs once, and never again. So a module is refused
that does anything else every time than to compute logits from images on the device:

    hooks                 except those that compute a weight (weight norm, spectral norm, pruning): what they are there
                          for, to count, to record, cannot be seen from outside
    state                 buffers, numbers or lists that a forward pass changes, or that the first images decide
    generators            its own, Python's or NumPy's, and the CPU's where it runs on a GPU; PyTorch's default one of
                          its device is the graph's too
    values on the host    control flow by data, ``.item()``: these wait for the device, which a capture cannot
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module
from torch.utils.flop_counter import FlopCounterMode

from fastensdistill.engine.common import ImageShape
from fastensdistill.engine.host_reads import HostReads
from fastensdistill.engine.module_pass import frozen_copy
from fastensdistill.engine.probe import compared
from fastensdistill.errors import InputError
from fastensdistill.method.calls import call, device_of, dtype_of, remember
from fastensdistill.method.computed_weights import HOOKS as COMPUTING
from fastensdistill.method.references import PLAIN, kept
from fastensdistill.network.launch import Group
from fastensdistill.network.nodes import Network
from fastensdistill.network.plan import plan
from fastensdistill.network.unplanned import unplanned
from fastensdistill.network.unseen import HOOKS, generators_kept, refusing

IMAGES = 3
TOLERANCE = 1e-3  # of the largest logit, between two calls that are to give the same
GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


def planned_or_module(
    module: nn.Module, shape: ImageShape, name: str, *, gradient: bool, dtype: torch.dtype | None = None,
    apart: bool = False,
) -> Network:  # fmt: skip
    """``module`` as it is planned or, where it cannot be, as a module; it is only evaluated.

    Args:
        shape: of an image, (C, H, W).
        name: what errors call it.
        gradient: whether the gradient of the image is needed.
        dtype: of the weights that are packed with its own, if that is known.
        apart: whether an image's logits have to be the same whatever other images it comes with.

    Raises InputError where neither is possible, with both reasons.
    """
    try:
        network = compared(module, shape, gradient=gradient)
        plan([network], [Group("")], "forward", 1)
        if dtype and (found := dtype_of(module, dtype)) != dtype:
            raise InputError(f"{type(module).__name__}: is {found}, not {dtype}, as the student is")
        return network
    except InputError as error:
        reason = str(error)
    try:
        classes, products = check_module(module, shape, name, gradient=gradient, apart=apart)
    except InputError as error:
        raise InputError(f"{name}: {reason}; nor can it be captured as a module: {error}") from error
    return unplanned(shape, classes, name, reason, products)


def check_module(
    module: nn.Module, shape: ImageShape, name: str, *, gradient: bool, apart: bool = False
) -> tuple[int, int]:
    """How many classes ``module`` has, and multiply-accumulates for an image.

    Raises InputError for what does not survive the capture of a step.
    """
    check_hooks(module)
    for path, value, _ in kept(module):
        if isinstance(value, GENERATORS):
            raise InputError(f"its {path!r} is a generator, which no graph draws from")
    with refusing("it cannot be tried"), generators_kept(module), torch.inference_mode(False), torch.no_grad():
        return _Trial(module, shape, name).run(gradient, apart)


def check_hooks(module: nn.Module) -> None:
    """Raise InputError for a hook that is called besides, in the forward or the backward pass."""
    for attribute, name in HOOKS.items():
        if getattr(every_module, f"_global{attribute}", None):
            raise InputError(f"{name} is registered for every module, and would be called at the capture alone")
        for path, layer in module.named_modules():
            hooks = getattr(layer, attribute, None) or {}
            if not all(isinstance(hook, COMPUTING) for hook in hooks.values()):
                place = f"module {path!r}" if path else "the outermost module"
                raise InputError(f"{place} has {name}, which would be called at the capture alone")


class _Trial:
    """Copies of ``module``, called as a step calls them."""

    def __init__(self, module: nn.Module, shape: ImageShape, name: str):
        self.module, self.own, self.name = module, frozen_copy(module), name
        self.device, dtype = device_of(module), dtype_of(module)
        generator, size = torch.Generator().manual_seed(1), (IMAGES, *shape)
        draws = [torch.rand(size, generator=generator).to(self.device, dtype) for _ in range(2)]
        self.images, self.others = (x.contiguous(memory_format=torch.channels_last) for x in draws)

    def logits(self, own: nn.Module, images: Tensor) -> Tensor:
        torch.manual_seed(0)  # what it draws is the same every time
        generators = _elsewhere(self.device)
        logits = call(own, images, self.name)
        if _elsewhere(self.device) != generators:
            raise InputError("it draws random numbers from a generator that no graph draws from")
        return logits

    def run(self, gradient: bool, apart: bool) -> tuple[int, int]:
        registered = _tensors(self.own)
        with FlopCounterMode(display=False) as counter:
            first = self.logits(self.own, self.images)  # what it sets up at its first call, it may
        products = counter.get_total_flops() // (2 * IMAGES)
        if first.dim() != 2 or len(first) != IMAGES:
            raise InputError(f"it returns {tuple(first.shape)} for {IMAGES} images; expected ({IMAGES}, classes)")
        if self.images.is_meta:
            return first.shape[1], products
        remember(self.module, self.own)
        self.same(registered, _tensors(self.own))
        before = snapshot(self.own)
        second = self.logits(self.own, self.images)
        self.same(before, snapshot(self.own))
        other = frozen_copy(self.module)
        self.logits(other, self.others)
        for logits in (second, self.logits(other, self.images)):
            if not self.close(first, logits):
                raise InputError("its logits depend on what it was called with before")
        if apart and not self.close(first[:2], self.logits(self.own, self.images[:2])):
            raise InputError("an image's logits depend on the images that it comes with")
        reads = HostReads({type(self.module).__name__: self.own}, self.device)
        with torch.set_grad_enabled(gradient), torch.autograd.set_multithreading_enabled(False), reads:
            self.once_more(gradient)
        if reads.found:
            raise InputError(reads.found[0])
        return first.shape[1], products

    def once_more(self, gradient: bool) -> None:
        """Forward and, with ``gradient``, back to the images."""
        x = self.images.clone().requires_grad_(gradient)
        logits = call(self.own, x, self.name)
        if not gradient:
            return
        found = torch.autograd.grad(logits.sum(), [x], allow_unused=True)[0] if logits.requires_grad else None
        if found is None:
            raise InputError("it gives no gradient of the images (no_grad, detach or argmax in its forward)")

    @staticmethod
    def close(one: Tensor, other: Tensor) -> bool:
        """But for rounding."""
        return torch.allclose(one, other, 0, TOLERANCE * float(one.abs().max()), equal_nan=True)

    def same(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        for path in dict.fromkeys([*before, *after]):
            if path not in before or path not in after or not _equal(before[path], after[path]):
                raise InputError(f"its {path!r} changes in a forward in evaluation mode")


def _tensors(module: nn.Module) -> dict[str, Any]:
    """Values of parameters and buffers, those that no state dict has too."""
    return {name: t.detach().clone() for name, t in [*module.named_parameters(), *module.named_buffers()]}


def snapshot(module: nn.Module) -> dict[str, Any]:
    """All that ``module`` and its submodules keep, as far as Python shows it: tensors, numbers, text, by path."""
    found = {path: value for path, value, _ in kept(module, plain=True) if isinstance(value, (Tensor, *PLAIN))}
    return _tensors(module) | {p: v.detach().clone() if isinstance(v, Tensor) else v for p, v in found.items()}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, 0, 0, equal_nan=True)
    return type(one) is type(other) and (one == other or one != one)


def _elsewhere(device: torch.device) -> Sequence[Any]:
    """The state of every generator that a graph on ``device`` does not know."""
    numpy: Any = np.random.get_state()
    of_cpu = torch.get_rng_state().tolist() if device.type == "cuda" else []
    return random.getstate(), numpy[1].tolist(), numpy[2:], of_cpu
