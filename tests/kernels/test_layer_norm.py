"""LayerNorm: kernels against references, references against PyTorch's LayerNorm and autograd in float64."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fastensdistill.errors import InputError
from fastensdistill.kernels.layer_norm import MOST_CHANNELS, ROWS_BLOCK, layer_norm, layer_norm_gradient, positions_tile
from tests.compare import check_close
from tests.kernels.both import DEVICE, SHAPES, TOLERANCE, check_op, each_dtype, run_kernel, values
from tests.untyped import present, untyped

SLOTS = torch.tensor([2, 0], dtype=torch.int32)
# more positions than a program of the gradient sums, and more channels than a block would have at 32 a thread
MORE = {"more-channels": (2, 1, 3, 23, 70), "wide": (1, 1, 1, 3, 1100)}
each_case = pytest.mark.parametrize("shape", [*SHAPES.values(), *MORE.values()], ids=[*SHAPES, *MORE])


def test_the_cases_cross_the_borders_of_a_program():
    assert any(shape[1] * shape[2] * shape[3] > ROWS_BLOCK for shape in MORE.values())
    assert {positions_tile(shape[4], 16).BLOCK_M for shape in MORE.values()} >= {1, 16}


@each_dtype
@each_case
def test_the_kernels_are_their_references(shape, dtype):
    groups, channels = shape[0], shape[4]
    d, x = (values(*shape, dtype=dtype, seed=seed, scale=2) for seed in range(2))
    x = x + 3
    for rows in {1, groups}:
        weight, bias = (values(rows, channels, seed=seed) for seed in (2, 3))
        options: dict[str, Any] = {"tolerance": 2 * TOLERANCE[dtype]}
        check_op(layer_norm, x, weight, bias, **options)
        check_op(layer_norm_gradient, d, x, weight, sets=rows, **options)
    check_op(layer_norm, x, **options)
    assert check_op(layer_norm_gradient, d, x, **options).d_weight is None


@each_dtype
def test_each_group_has_its_slots_row(dtype):
    shape = SHAPES["odd"]
    d, x = (values(*shape, dtype=dtype, seed=seed) for seed in range(2))
    weight, bias = (values(3, shape[4], seed=seed) for seed in (2, 3))
    options: dict[str, Any] = {"weight_index": SLOTS, "tolerance": TOLERANCE[dtype]}
    found = check_op(layer_norm, x, weight, bias, **options)
    own = weight[SLOTS.long()], bias[SLOTS.long()]
    assert torch.equal(found, layer_norm(x, *own))
    d_found = check_op(layer_norm_gradient, d, x, weight, sets=2, **options)
    assert torch.equal(d_found.d, layer_norm_gradient(d, x, own[0]).d)


@each_case
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_it_is_pytorchs_and_autograds(shape, shared, affine):
    groups, channels = shape[0], shape[4]
    sets = 1 if shared else groups
    d, x = (values(*shape, seed=seed).double() for seed in range(2))
    weight, bias = (values(sets, channels, seed=seed).double() for seed in (2, 3))
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    parts = []
    for g in range(groups):
        row = [leaf[g % sets] for leaf in leaves[1:]] if affine else [None, None]
        parts.append(F.layer_norm(leaves[0][g], (channels,), row[0], row[1], eps=1e-6))
    y = torch.stack(parts)
    given = {"weight": weight, "bias": bias} if affine else {}
    found = layer_norm(x, given.get("weight"), given.get("bias"), eps=1e-6)
    check_close("y", found, y, 1e-12)
    grads = torch.autograd.grad(y, leaves if affine else leaves[:1], d)
    back = layer_norm_gradient(d, x, given.get("weight"), eps=1e-6, sets=sets if affine else 0)
    check_close("dx", back.d, grads[0], 1e-11)
    if affine:
        check_close("d_weight", present(back.d_weight), grads[1], 1e-11)
        check_close("d_bias", present(back.d_bias), grads[2], 1e-11)


def test_the_variance_survives_a_large_mean():
    """Σx² − mean² in float32 would lose everything at mean 1e4, deviation 1."""
    x = 1e4 + values(1, 2, 3, 3, 64)
    y = run_kernel(layer_norm, x.to(DEVICE))
    check_close("y", y, F.layer_norm(x.double(), (64,)), 2e-3)


def test_every_channel_count_has_a_tile():
    for channels in (1, 3, 96, 384, 768, 1024, 3072, MOST_CHANNELS):
        for each in (16, 32):
            tile = positions_tile(channels, each)
            assert channels <= tile.BLOCK_N
            assert all(size & (size - 1) == 0 for size in (tile.BLOCK_M, tile.BLOCK_N, tile.num_warps))
            assert 32 * tile.num_warps * each >= tile.BLOCK_M * tile.BLOCK_N


def test_refusals():
    x, row = values(2, 1, 3, 3, 8), torch.ones(1, 8)
    with pytest.raises(InputError, match="weight and bias must be given together"):
        layer_norm(x, row)
    with pytest.raises(InputError, match=r"weight and bias has shape \(3, 8\), expected \(2 or 1, 8\)"):
        layer_norm(x, torch.ones(3, 8), torch.ones(3, 8))
    with pytest.raises(InputError, match=r"weight_index is torch.int64"):
        layer_norm(x, torch.ones(3, 8), torch.ones(3, 8), weight_index=torch.tensor([0, 2]))
    with pytest.raises(InputError, match="at most 8192 fit a program"):
        layer_norm(torch.ones(1, 1, 1, 1, MOST_CHANNELS + 1))
    with pytest.raises(InputError, match="x has shape"):
        layer_norm_gradient(x, x[:1], row)
    with pytest.raises(InputError, match="sets is 3, expected 0, 1 or 2"):
        layer_norm_gradient(x, x, row, sets=3)
    with pytest.raises(InputError, match="expected 5 dimensions"):
        untyped(layer_norm)(x[0], row, row)
