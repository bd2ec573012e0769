"""Tensors that a module's code makes of nothing but numbers, as parts of an expression that compare by what they hold.

On a device they are copied once and then kept: what a captured step reads stays where it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Constant:
    """A tensor by its shape, dtype and bytes; called with a device, it is the tensor there."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    content: bytes = field(repr=False)
    copies: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, tensor: Tensor) -> Constant:
        """The values of ``tensor``, which may change afterwards; of one on the meta device, where there are none."""
        if tensor.is_meta:
            return cls(tuple(tensor.shape), tensor.dtype, b"")
        plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        return cls(tuple(tensor.shape), tensor.dtype, plain.numpy().tobytes())

    def __call__(self, device: torch.device) -> Tensor:
        if device not in self.copies:
            with torch.inference_mode(False):
                plain = torch.empty(self.shape, dtype=self.dtype, device="cpu")
                if self.content:
                    values = torch.frombuffer(bytearray(self.content), dtype=torch.uint8)
                    plain.flatten().view(torch.uint8).copy_(values)
                self.copies[device] = plain.to(device)
        return self.copies[device]
