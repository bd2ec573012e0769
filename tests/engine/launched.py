"""What a body launches: recorded kernels, and PyTorch's own."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastensdistill.kernels.launch import record_launches


class Kernels(TorchDispatchMode):
    """Names of what would be launched beside the recorded kernels: everything but views and empty memory."""

    FREE = ("view", "detach", "slice", "select", "unbind", "empty", "expand", "split", "as_strided", "new_empty")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and name not in self.FREE:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def launched(body) -> tuple[list[object], list[str]]:
    """Kernels that ``body`` launches on its second call (tables are built by the first), and names of other ones."""
    body()
    with torch.no_grad(), record_launches() as launches, Kernels() as kernels:
        body()
    return [launch.kernel for launch in launches], kernels.seen
