"""A step on PyTorch's meta device: shapes, dtypes and lifetimes of a real one, no memory and no values."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastensdistill.config import DistillConfig
from fastensdistill.engine.fused import FusedStep
from fastensdistill.kernels.tiles import assume_arch
from fastensdistill.method.student import STUDENTS
from fastensdistill.method.teachers import Teachers
from fastensdistill.models import create_model


def build(model: str, B: int, M: int = 4, K: int = 4, size: int = 32, teacher: str = "", **config) -> FusedStep:
    with torch.device("meta"):
        teachers = Teachers([create_model(teacher or model, 100) for _ in range(M)])
        student = STUDENTS[config.get("student", "latent-be")](create_model(model, 100), K)
    step = FusedStep(student, teachers, DistillConfig(precision="bf16", **config))
    with assume_arch(90):  # whose kernels' partial results the step has memory for
        step.load((torch.zeros(B, 3, size, size, device="meta"), torch.zeros(B, dtype=torch.int64, device="meta")))
    return step


class Watch(TorchDispatchMode):
    """Counts the bytes of storages made within that are alive, and refuses what would wait for the device."""

    SYNCS = ("_local_scalar_dense", "nonzero", "lift_fresh", "equal", "is_nonzero", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()
        self.syncs: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.known.update(x.untyped_storage()._cdata for x in inputs)
        result = func(*args, **(kwargs or {}))
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        name = func.overloadpacket.__name__
        if name in self.SYNCS or len({x.device for x in (*inputs, *outputs)}) > 1:
            self.syncs.append(str(func))
        for x in outputs:
            self.count(x.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size

        def freed() -> None:
            self.known.discard(key)
            self.live -= size

        weakref.finalize(storage, freed)


@contextlib.contextmanager
def watched() -> Iterator[Watch]:
    with torch.no_grad(), Watch() as watch:
        yield watch
