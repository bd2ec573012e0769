"""Tensors that a network's code makes of numbers: by value or made again, in their own precision, on the device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastensdistill.engine.probe import compared
from fastensdistill.network.constants import Constant
from fastensdistill.network.expression import evaluate, logical
from fastensdistill.network.launch import INPUT
from fastensdistill.network.nodes import Conv, Function
from fastensdistill.network.trace import trace
from tests.network.interpret import interpret

SIZE = (3, 5, 7)


class Positions(nn.Module):
    """Where each position of an image is, as sines, projected by a convolution and added; the sines are of an angle
    that is right in float32 alone."""

    def __init__(self, temperature=10.0):
        super().__init__()
        self.stem, self.project, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(6, 4, 1), nn.Linear(4, 2)
        self.temperature = temperature

    def positions(self, B, H, W):
        dtype, device = self.project.weight.dtype, self.project.weight.device
        rows = (~torch.zeros((B, H, W)).to(device=device, dtype=torch.bool)).cumsum(1, dtype=torch.float32)
        angles = 1000 * rows[..., None] / self.temperature ** torch.arange(6, dtype=torch.int64, device=device)
        return torch.cat([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1).permute(0, 3, 1, 2).to(dtype)

    def forward(self, x):
        B, _, H, W = x.shape
        x = self.stem(x) + self.project(self.positions(B, H, W))
        return self.head((x * torch.linspace(0.0, 1.0, W, device=x.device)).mean((2, 3)))


class OnlyThere(TorchDispatchMode):
    """Refuses what touches a tensor that is not on the meta device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            assert not isinstance(value, torch.Tensor) or value.is_meta, func
        return result


def functions(network):
    return [node for node in network.nodes if isinstance(node, Function)]


def values(network, node, dtype, device):
    shapes = (network.by_name[name].shape for name in node.inputs)
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(2, H, W, C, generator=generator).to(dtype).to(device) for C, H, W in shapes]
    return [logical(x, layout) for x, layout in zip(images, node.layouts, strict=True)]


def test_positions_are_a_function_of_the_number_of_images():
    module = Positions()
    network = trace(module, SIZE, trains=True)
    first, _ = functions(network)
    project = network.by_name["project"]
    assert isinstance(project, Conv)
    assert (first.inputs, project.inputs) == ((INPUT,), (first.name,))
    assert trace(copy.deepcopy(module), SIZE) == network
    assert trace(Positions(10.5), SIZE) != network
    module.double()
    for batch in (1, 4):
        x = torch.rand(batch, *SIZE, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(interpret(network, module.state_dict(), x), module(x), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("trains", [False, True])
def test_their_plan_computes_what_the_module_does(trains):
    """In both modes, with the gradients of the image and of the projection."""
    assert compared(Positions(), SIZE, trains=trains) == trace(Positions(), SIZE)


def test_they_are_made_in_their_own_precision():
    network = trace(Positions(), SIZE)
    for node in functions(network):
        exact, rounded = (
            evaluate(node.expression, [x.to(dtype) for x in values(network, node, torch.bfloat16, "cpu")], {})
            for dtype in (torch.float32, torch.bfloat16)
        )
        torch.testing.assert_close(rounded.float(), exact.float(), rtol=2**-7, atol=2**-7)


def test_nothing_is_copied_from_the_host_once_they_were_made():
    network = trace(Positions(), SIZE)
    for node in functions(network):
        images = values(network, node, torch.float32, "meta")
        first = evaluate(node.expression, images, {})
        with OnlyThere():
            assert evaluate(node.expression, images, {}).shape == first.shape


def test_networks_on_the_meta_device_are_traced_too():
    with torch.device("meta"):
        network = trace(Positions(), SIZE, trains=True)
    assert [node.shape for node in network.nodes] == [node.shape for node in trace(Positions(), SIZE).nodes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(3, 5), (0, 2), (2,)])
def test_a_constant_is_its_values(dtype, shape):
    tensor = torch.arange(60).reshape(6, 10)[: shape[0], ::2].reshape(-1)[: int(torch.Size(shape).numel())]
    tensor = tensor.reshape(shape).sub(3).to(dtype)
    constant, same, other = Constant.of(tensor), Constant.of(tensor.clone()), Constant.of(tensor.short() + 1)
    kept = tensor.clone()
    tensor.zero_()
    made = constant(torch.device("cpu"))
    assert made.dtype == dtype
    assert torch.equal(made, kept)
    assert constant(torch.device("cpu")) is made
    assert (constant, hash(constant)) == (same, hash(same))
    assert constant != other
