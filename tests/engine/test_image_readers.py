"""Several layers read the image, normalised or as it is: its gradient is that of them all, in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastensdistill.engine.common import state_of
from fastensdistill.engine.packed import pack
from fastensdistill.engine.part_run import PartRun
from fastensdistill.engine.passes import run_part
from fastensdistill.engine.probe import compared
from fastensdistill.models.layers import Normalize
from fastensdistill.network.launch import INPUT, Group, grad
from fastensdistill.network.plan import plan
from fastensdistill.network.trace import trace

SIZE = (3, 7, 9)
OTHERS = {
    "none": lambda s, x: 0,
    "another convolution": lambda s, x: s.b(x),
    "two others": lambda s, x: s.b(x) + s.c(x),
    "a depthwise one": lambda s, x: s.b(s.d(x)),
    "a pooling": lambda s, x: s.b(F.avg_pool2d(x, 3, 1, 1)),
    "a sum and an activation": lambda s, x: s.b(x + F.silu(x)),
    "a gate": lambda s, x: s.b(x * x.mean((2, 3), keepdim=True)),
}


class Net(nn.Module):
    """A convolution of the image, to which ``other`` adds what it makes of it; all activations are smooth."""

    def __init__(self, other, normalised):
        super().__init__()
        self.normalise = Normalize((0.4, 0.5, 0.6), (0.25, 0.5, 0.3)) if normalised else nn.Identity()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 5, padding=2)
        self.d, self.head, self.other = nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.Linear(8, 4), other

    def forward(self, x):
        x = self.normalise(x)
        return self.head(F.silu(self.a(x) + self.other(self, x)).mean((2, 3)))


def gradient_of_the_image(network, state, images, grad_logits, dtype):
    (forward,), (backward,) = (
        plan([network], [Group("T", gradient="input")], direction, len(images)).parts
        for direction in ("forward", "backward")
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = pack(forward, [{k: v.to(wide) for k, v in state.items()}], dtype, torch.device("cpu"))
    buffers = {
        INPUT: images.to(wide).permute(0, 2, 3, 1)[None].contiguous(),
        grad(network.output): grad_logits.to(wide)[None],
    }
    for part in (forward, backward):
        run_part(PartRun(part, weights, torch.zeros(1, dtype=torch.int32), buffers))
    return buffers[grad(INPUT)][0].permute(0, 3, 1, 2), wide


@pytest.mark.parametrize("normalised", [False, True], ids=["as-it-is", "normalised"])
@pytest.mark.parametrize("other", OTHERS)
def test_its_gradient_is_that_of_all(other, normalised):
    torch.manual_seed(0)
    module = Net(OTHERS[other], normalised).eval()
    network, state = trace(module, SIZE), {k: v.detach().double() for k, v in state_of(module).items()}
    images, grad_logits = torch.rand(4, *SIZE, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    leaf = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(module.double()(leaf), leaf, grad_logits)
    for dtype, bound in ((torch.float64, 1e-12), (torch.bfloat16, 0.02)):
        found, wide = gradient_of_the_image(network, state, images, grad_logits, dtype)
        assert found.dtype == wide
        assert float((found - expected).abs().max()) <= bound * float(expected.abs().max())


@pytest.mark.parametrize("other", [name for name in OTHERS if name != "none"])
def test_such_a_network_trains(other):
    """Weights that nothing reads have no gradient, and are none of the network's."""
    net = Net(OTHERS[other], True)
    used = {"another convolution": "b", "two others": "bc", "a depthwise one": "bd"}.get(other, "b")
    for name in "bcd":
        if name not in used:
            delattr(net, name)
    network = compared(net, SIZE, trains=True)
    assert {node.name for node in network.layers} == {"a", "head", *used}
