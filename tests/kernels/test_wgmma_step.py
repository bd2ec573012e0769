"""Whole steps of distillation whose convolutions are the wgmma kernels', run on the CPU by the emulation."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastensdistill.engine.dispatch import Choice, Dispatch
from fastensdistill.engine.fused import FusedStep
from fastensdistill.models.preresnet import PreResNet
from tests.compare import check_close
from tests.engine.cases import CLASSES, setting, steps
from tests.kernels import emulation
from tests.network.models import moved

OPS = "conv", "conv gradient", "weight gradient"
ROWS = [
    *(Choice(op, "triton", "three channels", layer="stem") for op in OPS),
    *(Choice(op, "wgmma", "for the test") for op in OPS),
]


class Calls(TorchDispatchMode):
    """Counts calls of the package's ops, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastensdistill":
            self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def wide(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return moved(PreResNet(CLASSES, blocks=(1, 1), in_planes=16), seed)


def changes(emulated: bool) -> tuple[torch.Tensor, torch.Tensor, Counter[str]]:
    """The loss of a step, what it changes of the student, and the ops that it called."""
    student, teachers, config = setting(dtype=torch.float32, precision="bf16", teacher=wide, student=wide)
    before = copy.deepcopy(student.state_dict())
    step = FusedStep(student, teachers, config, implementations=Dispatch(ROWS))
    with emulation.on_cpu() if emulated else contextlib.nullcontext(), Calls() as calls:
        loss = steps(step, 1, B=4, size=10, dtype=torch.float32)[0]["loss"]
    values = [
        (value - before[name]).flatten() for name, value in student.state_dict().items() if value.is_floating_point()
    ]
    return loss, torch.cat(values).double(), calls.count


def test_a_step_by_the_kernels_is_that_of_the_references():
    """Perturbation and distillation: forward in both modes, joint, gradients of images and of weights, on load."""
    loss, change, _ = changes(False)
    own_loss, own, calls = changes(True)
    check_close("loss", own_loss, loss, 1e-2)
    assert torch.cosine_similarity(own, change, 0) > 0.999
    check_close("size of the update", own.norm(), change.norm(), 2e-2)
    for name in ("wgmma_conv", "wgmma_joint_conv", "wgmma_data_gradient", "wgmma_weight_gradient"):
        assert calls[name] > 0, name
