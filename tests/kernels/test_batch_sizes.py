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


@pytest.mark.parametrize(
    ("model", "size", "batches"),
    [
        ("wrn28_4", 32, (512, 100)),
        ("resnet32", 32, (512, 128, 100, 8, 1)),  # an elementwise gradient too
        ("resnet18", 64, (96, 9)),  # pooling
    ],
    ids=["wrn28_4", "resnet32", "resnet18"],
)
def test_every_batch_size_runs_the_kernels_of_the_check(model, size, batches):
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", STEP, model, str(size), *map(str, batches)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    names, other = json.loads(done.stdout)
    assert {"grouped_conv_kernel", "conv_data_gradient_kernel", "add_rows_kernel", "pack_kernel"} <= set(names)
    assert other == {str(B): [] for B in batches}
