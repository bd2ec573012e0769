"""A run's kernels are those that the check before it has compared with the reference, whatever the batch size.

In a process of its own: where kernels are interpreted, nothing says what would be compiled.
"""

import json
import os
import subprocess
import sys

import pytest

STEP = """
import json
import sys
import torch
from bench.kernel_report import key
from fastensdistill.config import DistillConfig
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.verify import IMAGES, ROWS
from fastensdistill.kernels.launch import record_launches
from fastensdistill.kernels.sums import add_rows
from fastensdistill.kernels.tiles import assume_arch
from fastensdistill.method.student import LatentBE
from fastensdistill.method.teachers import Teachers
from fastensdistill.models import create_model

model, size, *batches = sys.argv[1:]
teachers = Teachers([create_model(model, num_classes=10) for _ in range(2)])
student = LatentBE(create_model(model, num_classes=10), 2)


def kernels(B, rows=()):
    images, labels = torch.zeros(B, 3, int(size), int(size)), torch.zeros(B, dtype=torch.int64)
    config = DistillConfig(precision="bf16", batch_size=B)
    with assume_arch(90), record_launches() as launches:
        FusedStep(student, teachers, config, image_shape=images.shape[1:], capture=False)(images, labels)
        if rows:
            add_rows(torch.zeros(rows), 1)
    return {key(launch): launch.kernel.__name__ for launch in launches}


checked = kernels(IMAGES, ROWS)
names, other = sorted(set(checked.values())), {}
for B in map(int, batches):
    other[B] = sorted({name for key, name in kernels(B).items() if key not in checked})
print(json.dumps([names, other]))
"""


OF_OTHER_NODES = """
import json
import torch
from bench.kernel_report import key
from fastensdistill.engine.verify import IMAGES
from fastensdistill.kernels.activation import activation
from fastensdistill.kernels.activation_gradient import activation_gradient
from fastensdistill.kernels.depthwise_conv import depthwise_conv
from fastensdistill.kernels.depthwise_data_gradient import depthwise_data_gradient
from fastensdistill.kernels.depthwise_weight_gradient import depthwise_weight_gradient
from fastensdistill.kernels.gate import gate, gate_gradient
from fastensdistill.kernels.launch import record_launches
from fastensdistill.kernels.layer_norm import layer_norm, layer_norm_gradient
from fastensdistill.kernels.tiles import assume_arch

SLOTS, row = torch.arange(2, dtype=torch.int32), torch.empty(1, 32)


def kernels(B):
    x, d, g = (torch.empty(2, B, side, side, 32, dtype=torch.bfloat16) for side in (14, 7, 1))
    with assume_arch(90), record_launches() as launches:
        for side in (3, 5):
            weight = torch.empty(2, side**2, 1, 32, dtype=torch.bfloat16)
            for stride, out in ((1, x), (2, d)):
                window = {"kernel": (side, side), "stride": (stride, stride), "padding": (side // 2, side // 2)}
                depthwise_conv(x, weight, SLOTS, **window, center=row)
                depthwise_data_gradient(out, weight.mT.contiguous(), SLOTS, in_size=(14, 14), **window, z=x, mean=row,
                                        inv_std=row)
                depthwise_weight_gradient(x, out, **window)
        activation(x, kind="silu", scale=row, shift=row)
        activation_gradient(x, x, kind="silu", scale=row, shift=row, mean=row, inv_std=row)
        gate(x, g)
        gate_gradient(x, x, g)
        layer_norm(x, row, row)
        layer_norm_gradient(x, x, row, sets=1)
    return {key(launch): launch.kernel.__name__ for launch in launches}


checked = kernels(IMAGES)
other = {B: sorted({name for key, name in kernels(B).items() if key not in checked}) for B in (512, 100, 9, 1)}
print(json.dumps([sorted(set(checked.values())), other]))
"""


def printed(script: str, *arguments: object) -> tuple[set[str], dict[str, list[str]]]:
    """Names of the kernels of the check, and by batch size of those that others would run."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    names, other = json.loads(done.stdout)
    return set(names), other


@pytest.mark.parametrize(
    ("model", "size", "batches"),
    [
        ("wrn28_4", 32, (512, 100)),
        ("resnet32", 32, (512, 100, 1)),  # an elementwise gradient too
        ("resnet18", 64, (96, 9)),  # pooling
    ],
    ids=["wrn28_4", "resnet32", "resnet18"],
)
def test_every_batch_size_runs_the_kernels_of_the_check(model, size, batches):
    names, other = printed(STEP, model, size, *batches)
    assert {"grouped_conv_kernel", "conv_data_gradient_kernel", "add_rows_kernel", "pack_kernel"} <= names
    assert other == {str(B): [] for B in batches}


def test_every_batch_size_runs_the_kernels_of_other_nodes():
    """Which a step of those models has none of."""
    names, other = printed(OF_OTHER_NODES)
    both = {f"{name}{way}_kernel" for name in ("activation", "gate", "layer_norm") for way in ("", "_gradient")}
    depthwise = {f"depthwise_{part}_kernel" for part in ("conv", "data_gradient", "weight_gradient")}
    assert both | depthwise <= names
    assert other == {str(B): [] for B in (512, 100, 9, 1)}
