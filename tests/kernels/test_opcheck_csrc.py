"""torch.library.opcheck over every op of the loss, the seeds, the perturbation step and the rank-one factors."""

from __future__ import annotations

import pytest
import torch

from fastensdistill.kernels import distillation_loss, diversity_seed, perturb_step, rank_one

OPS = torch.ops.fastensdistill
LAYOUT = rank_one.Layout.build([("a", (4, 3, 3, 3), 1, False), ("b", (5, 4), 1, True)], plain=3, slots=3)


def operands(name: str, dtype: torch.dtype, grad: bool) -> tuple:
    torch.manual_seed(0)
    teacher, branch = torch.randn(2, 3, 5, dtype=dtype), torch.randn(2, 3, 5, dtype=dtype, requires_grad=grad)
    labels = torch.tensor([0, 4, 2])
    images, gradients = torch.rand(2, 3, 4, 5, dtype=dtype), torch.randn(2, 2, 3, 4, 5, dtype=dtype)
    parameters = torch.randn(LAYOUT.size, dtype=dtype, requires_grad=grad)
    deviations = torch.randn(2, LAYOUT.factors, dtype=dtype, requires_grad=grad)
    branch_gradients = torch.randn(2, LAYOUT.ranked, dtype=dtype)
    state = (parameters, torch.zeros_like(parameters), deviations, torch.zeros_like(deviations), branch_gradients)
    packed = tuple(torch.zeros(LAYOUT.packed_size, dtype=torch.bfloat16) for _ in range(2))
    step = (*state, torch.randn(3, dtype=dtype), torch.tensor(0.1, dtype=dtype), *packed, LAYOUT.fields, 1, 0.9, 5e-4)
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
        "fold_rank_one": (parameters, deviations, LAYOUT.fields, LAYOUT.ranked),
        "unfold_rank_one": (branch_gradients, parameters.detach(), deviations.detach(), LAYOUT.fields),
        "pack_rank_one": (parameters.detach(), deviations.detach(), *packed, LAYOUT.fields, 1),
        "rank_one_step": tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in step),
    }[name]


NAMES = [
    f"{op}"
    for module in (distillation_loss, diversity_seed, perturb_step, rank_one)
    for op in dir(module)
    if hasattr(OPS, op) and callable(getattr(module, op)) and getattr(module, op).__module__ == module.__name__
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, dtype):
    differentiable = name not in ("ods_seed", "perturb_step", "unfold_rank_one", "pack_rank_one", "rank_one_step")
    op = getattr(OPS, name).default
    for grad in {False, differentiable}:
        torch.library.opcheck(op, operands(name, dtype, grad))


def test_every_op_is_checked():
    assert sorted(NAMES) == [
        "distill_and_diversify",
        "distillation_loss",
        "diversity_seed",
        "fold_rank_one",
        "ods_seed",
        "pack_rank_one",
        "perturb_step",
        "rank_one_step",
        "teacher_diversity_seed",
        "unfold_rank_one",
    ]
