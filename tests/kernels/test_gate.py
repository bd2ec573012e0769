"""Gates and their gradients: kernels against references, references against PyTorch's autograd in float64."""

import pytest
import torch

from fastensdistill.errors import InputError
from fastensdistill.kernels.gate import gate, gate_gradient, image_tile
from tests.compare import check_close
from tests.kernels.both import SHAPES, TOLERANCE, check_op, each_dtype, values

# a map of more than one block of positions, one smaller than a block, many channels of one pixel, more than one block
MORE = {"two-blocks": (1, 2, 9, 8, 12), "wide": (2, 1, 1, 1, 130), "many-channels": (1, 1, 8, 9, 70)}
each_case = pytest.mark.parametrize("shape", [*SHAPES.values(), *MORE.values()], ids=[*SHAPES, *MORE])


@each_dtype
@each_case
def test_the_kernels_are_their_references(shape, dtype):
    d, x = (values(*shape, dtype=dtype, seed=seed) for seed in range(2))
    g = values(*shape[:2], 1, 1, shape[4], dtype=dtype, seed=2)
    check_op(gate, x, g, tolerance=TOLERANCE[dtype])
    check_op(gate_gradient, d, x, g, tolerance=TOLERANCE[dtype])
    check_op(gate_gradient, d, x, g.float(), tolerance=TOLERANCE[dtype])


@each_case
def test_the_gradient_is_autograds(shape):
    d, x = (values(*shape, seed=seed).double() for seed in range(2))
    g = values(*shape[:2], 1, 1, shape[4], seed=2).double()
    leaves = [x.clone().requires_grad_(), g.clone().requires_grad_()]
    y = leaves[0] * leaves[1]
    check_close("y", gate(x, g), y, 1e-15)
    dx, dg = torch.autograd.grad(y, leaves, d)
    found = gate_gradient(d, x, g)
    check_close("dx", found.dx, dx, 1e-15)
    check_close("dg", found.dg, dg, 1e-13)


def test_tiles():
    for positions in (1, 2, 49, 64, 12544):
        for channels in (1, 16, 24, 144, 2048, 9000):
            tile = image_tile(positions, channels)
            assert 8 <= tile.BLOCK_M * tile.BLOCK_N <= 4096
            assert tile.BLOCK_M * tile.BLOCK_N == 4096 or channels <= tile.BLOCK_N
            assert all(size & (size - 1) == 0 for size in tile[:2]), "Triton's blocks are powers of two"


def test_refusals():
    x, g = values(2, 3, 4, 5, 6), values(2, 3, 1, 1, 6)
    with pytest.raises(InputError, match=r"g has shape \(2, 3, 1, 1, 5\), expected \(2, 3, 1, 1, 6\)"):
        gate(x, values(2, 3, 1, 1, 5))
    with pytest.raises(InputError, match=r"x of shape .* is not contiguous"):
        gate(x.transpose(2, 3), g)
    with pytest.raises(InputError, match="x has shape"):
        gate_gradient(x, x[:1], g)
    with pytest.raises(InputError, match="g has shape"):
        gate_gradient(x, x, x)
