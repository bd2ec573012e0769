"""Operands of the ops over rows of logits and over images: the loss, the diversity seeds, the perturbation step."""

from __future__ import annotations

import torch
from torch import Tensor

from fastensdistill.kernels.layout import Layout

# id: M, K, B, C — why
LOSSES = {
    "two-classes": (2, 2, 3, 2),  # the smallest softmax
    "one-image": (4, 4, 1, 10),  # no batch to spread over threads
    "more-branches": (3, 5, 7, 10),  # k mod M comes round
    "more-teachers": (5, 2, 6, 33),  # teachers that the one-to-one target leaves out; odd row length
    "one-of-each": (1, 1, 9, 100),
    "cifar100": (4, 4, 16, 100),
    "imagenet": (2, 3, 5, 1000),
    "imagenet21k": (2, 2, 2, 21841),  # rows longer than any tile
}
PAIRS = {  # id: B, C
    "two-classes": (3, 2),
    "one-image": (1, 10),
    "odd": (7, 33),
    "cifar100": (16, 100),
    "imagenet": (4, 1000),
    "imagenet21k": (2, 21841),
}
IMAGES = {  # id: G, shape of the images
    "cifar": (2, (5, 3, 32, 32)),
    "one-image": (2, (1, 3, 32, 32)),
    "one-group": (1, (4, 3, 5, 7)),  # odd sizes
    "many-groups": (5, (3, 1, 9, 11)),
    "flat": (2, (6, 13)),  # images without an image's axes
    "large": (2, (2, 3, 96, 96)),
}
LAYOUT = Layout.build([("a", (4, 3, 3, 3), False), ("b", (5, 4), True)], plain=3, slots=3)


def logits(case: tuple[int, int, int, int], dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Teachers' (M, B, C), branches' (K, B, C), and the labels."""
    M, K, B, C = case
    g = torch.Generator().manual_seed(M + 10 * K + 100 * B + C)
    teacher = (scale * torch.randn(M, B, C, generator=g, dtype=torch.float64)).to(dtype)
    branch = (scale * torch.randn(K, B, C, generator=g, dtype=torch.float64)).to(dtype)
    return teacher, branch, torch.randint(0, C, (B,), generator=g)


def pairs(case: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits (2, B, C) of two teachers and of two branches."""
    g = torch.Generator().manual_seed(sum(case))
    teacher, branch = ((3 * torch.randn(2, *case, generator=g, dtype=torch.float64)).to(dtype) for _ in range(2))
    return teacher, branch


def images(case: str, dtype: torch.dtype, gradient_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, …), gradients (G, B, …) of them, confidences (B,)."""
    G, shape = IMAGES[case]
    g = torch.Generator().manual_seed(G + shape[0])
    x = torch.rand(shape, generator=g, dtype=torch.float64).to(dtype)
    gradients = (1e-3 * torch.randn(G, *shape, generator=g, dtype=torch.float64)).to(gradient_dtype or dtype)
    return x, gradients, torch.rand(shape[0], generator=g, dtype=torch.float64)


def operands(name: str, dtype: torch.dtype, grad: bool) -> tuple:
    """Of the extension's op ``name``, by position, small ones; ``grad``: which the logits require."""
    torch.manual_seed(0)
    teacher, branch = torch.randn(2, 3, 5, dtype=dtype), torch.randn(2, 3, 5, dtype=dtype, requires_grad=grad)
    labels = torch.tensor([0, 4, 2])
    x, gradients = torch.rand(2, 3, 4, 5, dtype=dtype), torch.randn(2, 2, 3, 4, 5, dtype=dtype)
    parameters = torch.randn(LAYOUT.size, dtype=dtype)
    deviations = torch.randn(2, LAYOUT.factors, dtype=dtype)
    packed = tuple(torch.zeros(LAYOUT.packed_size, dtype=torch.bfloat16) for _ in range(2))
    return {
        "distillation_loss": (teacher, branch, labels, 4.0, 0.9, False, 0.1, True, [0.5, 1.5]),
        "teacher_diversity_seed": (teacher.requires_grad_(grad),),
        "diversity_seed": (teacher, branch),
        "ods_seed": (teacher[0].detach(), branch[0].detach(), 2.0),
        "perturb_step": (
            x.to(memory_format=torch.channels_last),
            gradients,
            torch.ones(2, dtype=dtype),
            0.5,
            0.0,
            1.0,
        ),
        "pack_rank_one": (parameters, deviations, *packed, LAYOUT.dense_fields, 1),
    }[name]
