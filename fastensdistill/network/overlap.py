"""Which tensors lie in memory that is not theirs alone: tied or expanded ones, and those with gaps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn


def trained_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters, and BatchNorm's statistics: what a step changes, each under every name that it has."""
    yield from module.named_parameters(prefix, remove_duplicate=False)
    for name, buffer in module.named_buffers(prefix, remove_duplicate=False):
        if name.endswith((".running_mean", ".running_var")):
            yield name, buffer


def common_memory(named: Iterable[tuple[str, Tensor]]) -> tuple[str, str] | None:
    """The names of two tensors that have elements in common; one name twice for a tensor that repeats its own."""
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in named:
        address = 0 if tensor.device.type == "meta" else tensor.untyped_storage().data_ptr()
        if address and tensor.numel():
            by_storage.setdefault(address, []).append((name, tensor))
    for held in by_storage.values():
        held.sort(key=lambda pair: pair[1].storage_offset())
        spans = [_span(tensor) for _, tensor in held]
        filled = all(span[1] - span[0] == tensor.numel() for span, (_, tensor) in zip(spans, held, strict=True))
        if filled and all(one[1] <= other[0] for one, other in pairwise(spans)):
            continue
        owner = torch.full((max(span[1] for span in spans),), -1)
        for i, (name, tensor) in enumerate(held):
            own = torch.arange(len(owner)).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).flatten()
            others = owner[own]
            if bool((others >= 0).any()):
                return held[int(others.max())][0], name
            if len(own.unique()) < len(own):
                return name, name
            owner[own] = i
    return None


def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """A strict ``load_state_dict``. An expanded buffer cannot be written to: it gets memory for every element first."""
    new: dict[int, Tensor] = {}
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and common_memory([(name, buffer)]):
                owner._buffers[name] = new.setdefault(id(buffer), buffer.clone(memory_format=torch.contiguous_format))
    module.load_state_dict(state)


def _span(tensor: Tensor) -> tuple[int, int]:
    """First element in its storage, and the one after the last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    start = int(tensor.storage_offset())
    return start, start + sum((int(size) - 1) * int(stride) for size, stride in steps) + 1


def dense(tensor: Tensor) -> bool:
    """Whether ``tensor`` fills a piece of memory, in whatever order."""
    first, end = _span(tensor)
    return tensor.numel() == 0 or (end - first == tensor.numel() and common_memory([("", tensor)]) is None)
