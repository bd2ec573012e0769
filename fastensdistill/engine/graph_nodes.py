"""How many device operations a step issues: the nodes of its CUDA graph, counted without a GPU.

A step is run on the meta device, where nothing is computed, and every operation is looked at as it is dispatched:

    Triton      the launches that the ops would make
    PyTorch     its own operations but for views and allocations, each as one, though a few (long sums) are two kernels
    extension   the kernels of the ops that only the compiled extension has on a GPU
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from fastensdistill.engine.dispatch import Dispatch
from fastensdistill.engine.graph import gathered
from fastensdistill.engine.meta import EXTENSION, AsOnGPU, meta_step
from fastensdistill.kernels.launch import KernelLaunch
from fastensdistill.kernels.tiles import assume_arch

# What launches nothing, beside views
NO_LAUNCH = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach_")


class GraphNodes(AsOnGPU):
    """``with GraphNodes() as nodes:`` counts what the code inside issues on meta tensors, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.triton: Counter[str] = Counter()
        self.pytorch: Counter[str] = Counter()
        self.extension: Counter[str] = Counter()

    def on_pytorch(self, op: Any, result: Any) -> None:
        name = op.overloadpacket.__name__
        if not op.is_view and name not in NO_LAUNCH:
            self.pytorch[name] += 1

    def on_triton(self, launches: Sequence[KernelLaunch]) -> None:
        self.triton.update(launch.kernel.__name__ for launch in launches)

    def on_extension(self, name: str, result: Any) -> None:
        self.extension[name] += EXTENSION[name]

    @property
    def total(self) -> int:
        return sum(count.total() for count in (self.triton, self.pytorch, self.extension))

    def __str__(self) -> str:
        return (
            f"{self.total} graph nodes: {self.triton.total()} Triton, {self.pytorch.total()} PyTorch, "
            f"{self.extension.total()} extension"
        )


def count_step(
    model: str, teachers: int = 4, branches: int = 4, batch: int = 128, arch: int = 90,
    implementations: Dispatch | None = None, **settings: Any,
) -> GraphNodes:  # fmt: skip
    """The nodes of a captured step of ``model``, teachers and student alike, on 100 classes in bf16.

    ``batch`` and ``arch``, the compute capability, decide which weight gradients are summed from parts;
    ``implementations``, which name what computes convolutions, what these take in as they load. ``settings`` are
    further ones of :class:`DistillConfig`. Reading a batch, where the graph contains that, is not counted. Raises
    InputError for what the fused engine cannot train.
    """
    with torch.no_grad(), assume_arch(arch):
        step = meta_step(model, teachers, branches, implementations=implementations, batch_size=batch, **settings)
        step.build((batch, *step.image_shape))
        with GraphNodes() as nodes:
            gathered(step.body())
    return nodes
