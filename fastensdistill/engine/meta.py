"""A step on PyTorch's meta device: a real one's launches, shapes, dtypes and lifetimes, without values or memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastensdistill.config import DistillConfig
from fastensdistill.engine.dispatch import Dispatch
from fastensdistill.engine.fused import FusedStep
from fastensdistill.kernels.launch import KernelLaunch, record_launches
from fastensdistill.kernels.ops import NAMESPACE, PORTABLE
from fastensdistill.method.student import STUDENTS
from fastensdistill.method.teachers import Teachers
from fastensdistill.models import create_model, image_size

# What the extension launches for each of its ops that have no Triton kernel
EXTENSION = {
    "distillation_loss": 2, "diversity_seed": 2, "teacher_diversity_seed": 2,
    "ods_seed": 1, "perturb_step": 1, "halo_conv": 1, "halo_data_gradient": 1, "wgmma_conv": 1,
    "wgmma_data_gradient": 1, "wgmma_joint_conv": 1, "wgmma_weight_gradient": 1,
}  # fmt: skip
DRAWS = ("uniform_", "normal_")  # for which the meta device has no generators


class AsOnGPU(TorchDispatchMode):
    """Within, our ops on meta tensors allocate and launch what they would on a GPU; the launches are recorded alone.

    ``kernels.tiles.assume_arch`` decides their tiles. Subclasses learn what was issued through the ``on_`` methods.
    """

    def on_pytorch(self, op: Any, result: Any) -> None:
        """PyTorch's own ``op`` gave ``result``; those inside of our ops too."""

    def on_triton(self, launches: Sequence[KernelLaunch]) -> None:
        """An op of ours made these launches."""

    def on_extension(self, name: str, result: Any) -> None:
        """An op of the extension gave ``result``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if func.namespace != NAMESPACE:
            result = args[0] if name in DRAWS else func(*args, **kwargs)
            self.on_pytorch(func, result)
        elif name in EXTENSION:
            result = func(*args, **kwargs)
            self.on_extension(name, result)
        else:
            with self, record_launches() as launches:
                result = PORTABLE[name](*args, **kwargs)
            self.on_triton(launches)
        return result


def meta_step(
    model: str, teachers: int = 4, branches: int = 4, size: int | None = None,
    implementations: Dispatch | None = None, **settings: Any,
) -> FusedStep:  # fmt: skip
    """A step of ``model``, teachers and student alike, on 100 classes in bf16, traced but not built.

    ``size`` of the square images defaults to 32, for torchvision's networks to 224; ``settings`` are further ones of
    :class:`DistillConfig`. Raises InputError for what the fused engine cannot train.
    """
    config = DistillConfig(**{"precision": "bf16", **settings})
    size = size or image_size(model)
    with torch.device("meta"):
        frozen = Teachers([create_model(model, 100) for _ in range(teachers)])
        student = STUDENTS[config.student](create_model(model, 100), branches)
        return FusedStep(student, frozen, config, image_shape=(3, size, size), implementations=implementations)
