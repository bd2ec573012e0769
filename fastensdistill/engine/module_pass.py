"""Networks that no plan covers, as parts of passes: each is its own module, called as the reference engine calls it.

    module            logits = module(images), in evaluation mode
    module gradient   ∂loss/∂images by autograd, of what the forward pass has recorded

Images are given channels last, or as the module has been seen to want them (``method.calls``); bfloat16 is autocast's.
Both launches are captured with the rest: autograd runs on the calling thread, and so on the stream that is captured.
What a graph would freeze (Python that counts, values read by the host) ``engine.module_check`` has refused before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastensdistill.engine.common import cudnn_tf32
from fastensdistill.engine.packed import PackedWeights
from fastensdistill.engine.part_run import PartRun
from fastensdistill.kernels.operands import accumulator
from fastensdistill.method.calls import call, remember
from fastensdistill.method.copying import copy_network
from fastensdistill.method.modes import set_mode
from fastensdistill.network.launch import INPUT, Launch, Part, grad, recorded
from fastensdistill.network.unplanned import Unplanned


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy of ``module`` for good in evaluation mode, without gradients of its parameters, called as it is called."""
    own = set_mode(copy_network(module, forget=True), False).requires_grad_(False)
    remember(own, module)
    return own


class ModuleWeights(PackedWeights):
    """So many ``slots`` for copies of modules of one :class:`Unplanned` network, which stay where they are.

    Attributes:
        modules: the copies, None until one is written.
        uncounted: on the meta device, what a module raised that does not run there; its logits are made up then.
    """

    def __init__(self, part: Part, slots: int, dtype: torch.dtype, device: torch.device | str):
        super().__init__(part, slots, dtype, device)
        self.modules: list[nn.Module | None] = [None] * slots
        self.uncounted = ""

    @torch.no_grad()
    def fill(self, slot: int, source: nn.Module | Mapping[str, Tensor]) -> None:
        """Copy a module into ``slot``, or the weights of one into the copy that is there."""
        own = self.modules[slot]
        if own is None:
            assert isinstance(source, nn.Module)
            own = self.modules[slot] = frozen_copy(source)
            if self.values.is_meta and self.dtype == torch.bfloat16:
                own.to(self.dtype)  # what autocast, of which the meta device has none, comes to
            return
        theirs: Any = source
        if isinstance(source, nn.Module):
            theirs = dict([*source.named_parameters(), *source.named_buffers()])
        for name, value in [*own.named_parameters(), *own.named_buffers()]:
            if name in theirs:
                value.copy_(theirs[name])

    def logits(self, slot: int, images: Tensor) -> Tensor:
        """Of images (N, channels, H, W), in whatever dtype the module gives."""
        own, network = self.modules[slot], self.part.network
        assert own is not None
        assert isinstance(network, Unplanned)
        try:
            return call(own, images, network.name)
        except Exception as error:
            if not images.is_meta:
                raise
            self.uncounted = f"{network.name}: {error}"
            return images.new_empty(len(images), network.by_name[network.output].shape[0]) + images.sum()


@contextmanager
def as_reference(dtype: torch.dtype, precision: str, device: torch.device) -> Iterator[None]:
    """Plain PyTorch inside multiplies as in the reference engine: bfloat16 by autocast, float32 as configured."""
    on = "cpu" if device.type == "meta" else device.type
    enabled = dtype == torch.bfloat16 and device.type != "meta"
    with cudnn_tf32(precision == "tf32"), torch.autocast(on, torch.bfloat16, enabled, cache_enabled=False):
        yield


def module(run: PartRun, launch: Launch) -> None:
    """Logits (G, N, classes); of groups with a gradient the images and logits that autograd goes between."""
    weights, found, record = run.weights, [], []
    assert isinstance(weights, ModuleWeights)
    images = run.buffers[INPUT]
    with as_reference(weights.dtype, run.precision, images.device):
        for g, group in enumerate(run.part.groups):
            x = images[g % len(images)].permute(0, 3, 1, 2).detach()
            with torch.set_grad_enabled(group.gradient is not None):
                logits = weights.logits(g, x.requires_grad_(group.gradient is not None))
            found.append(logits.detach().to(accumulator(weights.dtype)))
            if group.gradient is not None:
                record.append((x, logits))
    run.buffers[launch.node] = torch.stack(found)
    if record:
        run.buffers[recorded(launch.node)] = record


def module_gradient(run: PartRun, launch: Launch) -> None:
    """∂loss/∂images (G, N, H, W, C)."""
    assert isinstance(run.weights, ModuleWeights)
    grad_logits, found = run.read(grad(launch.node)), []
    record: list[tuple[Tensor, Tensor]] = run.buffers.pop(recorded(launch.node))
    with as_reference(run.weights.dtype, run.precision, grad_logits.device):
        for (x, logits), gradient in zip(record, grad_logits, strict=True):
            with torch.autograd.set_multithreading_enabled(False):
                (of_images,) = torch.autograd.grad([logits], [x], [gradient.to(logits.dtype)])
            found.append(of_images.permute(0, 2, 3, 1))
    run.buffers[grad(INPUT)] = torch.stack(found)
