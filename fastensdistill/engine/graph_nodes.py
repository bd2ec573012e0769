"""How many device operations a step issues: the nodes of its CUDA graph, counted without a GPU.

A step is run on the meta device, where nothing is computed, and every operation is looked at as it is dispatched:

    Triton      the launches that the ops would make
    PyTorch     its own operations but for views and allocations, each as one, though a few (long sums) are two kernels
    extension   the kernels of the ops that only the compiled extension has on a GPU
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastensdistill.config import DistillConfig
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.graph import gathered
from fastensdistill.kernels.launch import record_launches
from fastensdistill.kernels.ops import PORTABLE
from fastensdistill.kernels.tiles import assume_arch
from fastensdistill.method.student import STUDENTS
from fastensdistill.method.teachers import Teachers
from fastensdistill.models import create_model, image_size

# What the extension launches for each of its ops that have no Triton kernel
EXTENSION = {
    "distillation_loss": 2, "distill_and_diversify": 2, "diversity_seed": 2, "teacher_diversity_seed": 2,
    "ods_seed": 1, "perturb_step": 1,
}  # fmt: skip
# What launches nothing, beside views
NO_LAUNCH = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach_")


class GraphNodes(TorchDispatchMode):
    """``with GraphNodes() as nodes:`` counts what the code inside issues on meta tensors, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.triton: Counter[str] = Counter()
        self.pytorch: Counter[str] = Counter()
        self.extension: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if func.namespace != "fastensdistill":
            if not func.is_view and name not in NO_LAUNCH:
                self.pytorch[name] += 1
            return func(*args, **kwargs)
        if name in EXTENSION:
            self.extension[name] += EXTENSION[name]
            return func(*args, **kwargs)
        with self, record_launches() as launches:
            result = PORTABLE[name](*args, **kwargs)
        self.triton.update(launch.kernel.__name__ for launch in launches)
        return result

    @property
    def total(self) -> int:
        return sum(count.total() for count in (self.triton, self.pytorch, self.extension))

    def __str__(self) -> str:
        return (
            f"{self.total} graph nodes: {self.triton.total()} Triton, {self.pytorch.total()} PyTorch, "
            f"{self.extension.total()} extension"
        )


def count_step(
    model: str, teachers: int = 4, branches: int = 4, batch: int = 128, arch: int = 90, **settings: Any
) -> GraphNodes:
    """The nodes of a captured step of ``model``, teachers and student alike, on 100 classes in bf16.

    ``batch`` and ``arch``, the compute capability, decide which weight gradients are summed from parts. ``settings``
    are further ones of :class:`DistillConfig`. Reading a batch, where the graph contains that, is not counted. Raises
    InputError for what the fused engine cannot train.
    """
    config = DistillConfig(precision="bf16", batch_size=batch, **settings)
    size = image_size(model)
    with torch.device("meta"):
        frozen = Teachers([create_model(model, 100) for _ in range(teachers)])
        step = FusedStep(STUDENTS[config.student](create_model(model, 100), branches), frozen, config)
        step.load((torch.zeros(batch, 3, size, size), torch.zeros(batch, dtype=torch.int64)))
    with torch.no_grad(), assume_arch(arch), GraphNodes() as nodes:
        gathered(step.body())
    return nodes
