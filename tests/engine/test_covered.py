"""What of a step is computed by kernels of ours, and what by PyTorch."""

from __future__ import annotations

import pytest
import torch

from fastensdistill.engine.covered import covered, ours
from fastensdistill.network.nodes import Function
from fastensdistill.network.plan import plan_step
from fastensdistill.network.trace import trace
from tests.network import models
from tests.network.nodes_by_hand import CASES


def test_a_network_of_dense_convolutions_is_covered():
    network = trace(models.preresnet(), (3, 8, 8))
    share = covered(plan_step(network, network, 2, 2, 4).values())
    assert share == (1.0, 1.0, 1.0)


def test_attention_is_not():
    """Two products of L x L x 8 for every image, three times over in the gradient, beside those of the layers."""
    network = CASES["vision"][0].network(7)
    plans = plan_step(network, network, 2, 2, 4).values()
    launches = [
        (launch, ours(part.network, launch)) for plan in plans for part in plan.parts for launch in part.launches
    ]
    outside = [launch for launch, own in launches if not own]
    assert {launch.op for launch in outside} == {"function", "function gradient", "dropout", "dropout gradient"}
    L = 10
    attention = 2 * (2 * L * L * 8) * 4
    forward = 4 + 2 + 2  # Ta, Sa, Tb, Sb; two teachers, two branches
    backward = 2 + 2
    assert sum(launch.flops for launch in outside) == attention * (forward + 3 * backward)
    share = covered(plans)
    assert 0 < share.flops < 1
    assert share.launches == 1 - len(outside) / len(launches)


@pytest.mark.parametrize("name", CASES)
def test_multiply_accumulates_are_those_of_the_module(name):
    """As PyTorch's own counter has them, of one image."""
    by_hand, size = CASES[name]
    network, module = by_hand.network(size), by_hand.module().eval().float().to("meta")
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(1, 3, size, size, device="meta"))
    assert 2 * network.macs == counter.get_total_flops()
    assert any(isinstance(node, Function) for node in network.nodes) == (name != "mobile")
