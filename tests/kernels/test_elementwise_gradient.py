"""Residual, mask, scale and sums of a gradient: against float64 autograd in every order that a plan can ask for."""

from itertools import combinations
from typing import Any

import pytest
import torch

from fastensdistill.errors import InputError
from fastensdistill.kernels.elementwise_gradient import ROWS_BLOCK, elementwise_gradient
from fastensdistill.kernels.reference import pack_mask, shortcut, wide
from fastensdistill.network import gradients
from tests.compare import check_close
from tests.kernels.both import DEVICE, TOLERANCE, check_op, each_dtype, each_shape, each_sharing, run_kernel, values
from tests.untyped import present

FUSIONS = gradients.FUSIONS["elementwise gradient"]
# the residual's stride, and its channels beyond those of the gradient
RESIDUALS = {"whole": (1, 0), "every second, more channels": (2, 3), "every third, fewer channels": (3, -2)}
ORDERS = {
    ", ".join([*kinds, residual] if "add" in kinds else kinds) or "copy": (kinds, *RESIDUALS[residual])
    for n in range(len(FUSIONS))
    for kinds in combinations(FUSIONS, n)
    for residual in RESIDUALS
    if kinds.count("add") < 2
}
SHAPE = (2, 3, 5, 4, 10)


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_a_plan_is_autograds(order):
    """The reference in float64, the kernel in memory that starts as NaN."""
    kinds, stride, more = ORDERS[order]
    G, N, H, W, C = SHAPE
    size = G, N, -(-H // stride), -(-W // stride), C + more
    z, d, r = (values(*shape, seed=i).double() for i, shape in enumerate((SHAPE, SHAPE, size)))
    mean, inv_std = values(G, C).double(), values(G, C, seed=1).abs().double()
    leaves = [values(G, C, seed=i).double().requires_grad_() for i in (2, 3)]
    x = wide(leaves[0]) * ((z - wide(mean)) * wide(inv_std)) + wide(leaves[1])
    scale = values(G, C, seed=4).double()
    y = x * wide(scale) if "scale" in kinds else x
    mask = pack_mask(y > 0)
    y = y.relu() if "mask" in kinds else y
    last = kinds[:1] != ("add",)
    options: dict[str, Any] = {"residual_first": not last}
    loss = (d * y).sum()
    if "add" in kinds:
        options |= {"residual": r, "residual_stride": stride}
        loss = loss + (r * shortcut(x if last else y, stride, size[2], size[3], size[4])).sum()
    options |= {name: value for name, value in (("mask", mask), ("scale", scale)) if name in kinds}
    options |= {"z": z, "mean": mean, "inv_std": inv_std} if "sums" in kinds else {}
    u, d_weight, d_bias = torch.autograd.grad(loss, [x, *leaves])

    def low(value):
        return value.to(DEVICE, torch.float32 if value.is_floating_point() else None)

    moved = {name: low(value) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    for result, tolerance in (
        (elementwise_gradient(d, **options), 1e-13),
        (run_kernel(elementwise_gradient, low(d), **moved), 1e-5),
    ):
        check_close("u", result.d, u, tolerance)
        if "sums" in kinds:
            sums = torch.stack([d_bias, d_weight], 1)
            check_close("sums", present(result.statistics).sum(1), sums, tolerance)
        else:
            assert result.statistics is None


@each_dtype
@each_shape
def test_the_kernel_is_the_reference(shape, dtype):
    groups, images, height, width, channels = shape
    d, residual = values(*shape, dtype=dtype), values(*shape, dtype=dtype, seed=1)
    small = values(groups, images, -(-height // 2), -(-width // 2), channels + 3, dtype=dtype)
    mask, scale = pack_mask(values(*shape, seed=4) > 0), values(groups, channels, seed=5)
    check_op(elementwise_gradient, d, mask=mask, tolerance=TOLERANCE[dtype])
    evaluation = {"mask": mask, "scale": scale, "residual": residual, "residual_first": False}
    check_op(elementwise_gradient, d, **evaluation, tolerance=TOLERANCE[dtype])
    check_op(elementwise_gradient, d, residual=small, residual_stride=2, mask=mask, tolerance=TOLERANCE[dtype])
    few = small[..., : channels // 2].contiguous()
    check_op(elementwise_gradient, d, residual=few, residual_stride=2, tolerance=TOLERANCE[dtype])


@each_dtype
@each_sharing
@each_shape
def test_sums(shape, shared, dtype):
    d, z, residual = (values(*shape, dtype=dtype, seed=s) for s in range(3))
    sets = 1 if shared else shape[0]
    batch = {"z": z, "mean": values(sets, shape[4]), "inv_std": 0.5 + values(sets, shape[4], seed=1).abs()}
    check_op(elementwise_gradient, d, **batch, tolerance=TOLERANCE[dtype])
    more = {"mask": pack_mask(values(*shape, seed=4) > 0), "residual": residual}
    sums = check_op(elementwise_gradient, d, **batch, **more, tolerance=TOLERANCE[dtype])
    assert sums.statistics.shape[1] == -(-shape[1] * shape[2] * shape[3] // ROWS_BLOCK)


def test_refusals():
    z, row = values(2, 1, 3, 3, 8), torch.ones(1, 8)
    with pytest.raises(InputError, match="z has shape"):
        elementwise_gradient(z, z=z[:1], mean=row, inv_std=row)
    with pytest.raises(InputError, match="given together"):
        elementwise_gradient(z, z=z, mean=row)
    with pytest.raises(InputError, match="mask is torch"):
        elementwise_gradient(z, mask=torch.zeros(2, 1, 3, 2, 1, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"residual has shape \(2, 1, 3, 3, 8\), expected \(2, 1, 2, 2\)"):
        elementwise_gradient(z, residual=z, residual_stride=2)
