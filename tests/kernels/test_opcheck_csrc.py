"""torch.library.opcheck over every op of the loss, the seeds, the perturbation step and the packing."""

from __future__ import annotations

import pytest
import torch

from fastensdistill.kernels import distillation_loss, diversity_seed, pack, perturb_step  # noqa: F401  (ops)
from fastensdistill.kernels.layout import Layout
from tests.kernels import emulation

OPS = torch.ops.fastensdistill
pytestmark = pytest.mark.usefixtures("each_implementation")
LAYOUT = Layout.build([("a", (4, 3, 3, 3), False), ("b", (5, 4), True)], plain=3, slots=3)


def operands(name: str, dtype: torch.dtype, grad: bool) -> tuple:
    torch.manual_seed(0)
    teacher, branch = torch.randn(2, 3, 5, dtype=dtype), torch.randn(2, 3, 5, dtype=dtype, requires_grad=grad)
    labels = torch.tensor([0, 4, 2])
    images, gradients = torch.rand(2, 3, 4, 5, dtype=dtype), torch.randn(2, 2, 3, 4, 5, dtype=dtype)
    parameters = torch.randn(LAYOUT.size, dtype=dtype)
    deviations = torch.randn(2, LAYOUT.factors, dtype=dtype)
    packed = tuple(torch.zeros(LAYOUT.packed_size, dtype=torch.bfloat16) for _ in range(2))
    return {
        "distillation_loss": (teacher, branch, labels, 4.0, 0.9, False),
        "distill_and_diversify": (teacher, branch, labels, torch.tensor([1, 0]), 4.0, 0.9, True),
        "teacher_diversity_seed": (teacher.requires_grad_(grad),),
        "diversity_seed": (teacher, branch),
        "ods_seed": (teacher[0].detach(), branch[0].detach(), 2.0),
        "perturb_step": (
            images.to(memory_format=torch.channels_last),
            gradients,
            torch.ones(2, dtype=dtype),
            0.5,
            0.0,
            1.0,
        ),
        "pack_rank_one": (parameters, deviations, *packed, LAYOUT.fields, 1),
    }[name]


DIFFERENTIABLE = ("distill_and_diversify", "distillation_loss", "diversity_seed", "teacher_diversity_seed")
NAMES = [*DIFFERENTIABLE, "ods_seed", "pack_rank_one", "perturb_step"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, dtype):
    op = getattr(OPS, name).default
    for grad in {False, name in DIFFERENTIABLE}:
        torch.library.opcheck(op, operands(name, dtype, grad))


def test_every_op_is_checked():
    """Those of the extension, but the convolution's, which test_halo_conv checks."""
    assert set(emulation.OPS) - {"halo_conv", "halo_data_gradient"} == set(NAMES)
