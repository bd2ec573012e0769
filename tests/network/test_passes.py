"""Whole passes over the kernels' ops against the plain executor of the same plan, which test_execute.py trusts."""

from __future__ import annotations

import pytest
import torch

from fastensdistill.engine.passes import run_part
from fastensdistill.engine.weights import pack
from fastensdistill.network.execute import execute
from fastensdistill.network.launch import Group
from fastensdistill.network.plan import plan
from fastensdistill.network.trace import trace
from tests.compare import check_close
from tests.network.test_execute import CASES, check_gradient, images, random_like, state

TOLERANCE = 1e-9
LAST = (0, 1, 3, 4, 2)


def run_both(network, groups, direction, batch, states, slots, oracle, fused, dtype, weights=None):
    """The one part of a pass, by the plain executor and by the ops; ``slots`` picks each group's state."""
    (part,) = plan([network], groups, direction, batch).parts
    execute(part, [states[s] for s in slots], oracle)
    weights = weights or pack(part, states, dtype)
    run_part(part, weights, torch.tensor(slots, dtype=torch.int32), fused)
    return weights


def check_results(network, oracle, fused, tolerance):
    check_close("logits", fused[network.output], oracle[network.output], tolerance)
    names = [n for n in oracle if n.endswith((".weight.grad", ".bias.grad")) or n == "input.grad"]
    for name in names:
        expected = oracle[name].permute(0, 1, 3, 4, 2) if name == "input.grad" else oracle[name]
        if tolerance == TOLERANCE:
            check_gradient(name, fused[name], expected)
        else:
            check_close(name, fused[name], expected, tolerance)
    assert names


def start(x, dtype):
    return {"input": x[None]}, {"input": x.permute(0, 2, 3, 1)[None].to(dtype).contiguous()}


@pytest.mark.parametrize(("model", "size", "batch"), CASES)
def test_evaluation_mode(model, size, batch):
    """Four groups of three networks, chosen by slot; input gradients of two of them."""
    states = [state(model(seed)) for seed in range(3)]
    network = trace(model(0), (3, size, size))
    groups = [Group("a", gradient="input"), Group("b", gradient="input"), Group("c"), Group("d")]
    oracle, fused = start(images(batch, size), torch.float64)
    weights = run_both(network, groups, "forward", batch, states, [2, 0, 0, 1], oracle, fused, torch.float64)
    seed = random_like(oracle[network.output][:2])
    oracle[f"{network.output}.grad"] = fused[f"{network.output}.grad"] = seed
    run_both(network, groups, "backward", batch, states, [2, 0], oracle, fused, torch.float64, weights)
    check_results(network, oracle, fused, TOLERANCE)


@pytest.mark.parametrize("shared", [True, False], ids=["shared-statistics", "own-statistics"])
@pytest.mark.parametrize(("model", "size", "batch"), CASES)
def test_training_mode(model, size, batch, shared):
    states = [state(model(seed)) for seed in range(2)]
    network = trace(model(0), (3, size, size))
    if shared:
        keys = [f"{n.name}.{k}" for n in network.nodes for k in ("weight", "bias", "running_mean", "running_var")]
        layers = {p for n in network.nodes if hasattr(n, "macs") for p in n.parameters}
        states[1].update({key: states[0][key] for key in keys if key in states[0] and key not in layers})
    groups = [Group(f"{k}", 0, "S" if shared else f"{k}", "parameters") for k in range(2)]
    oracle, fused = start(images(batch, size), torch.float64)
    weights = run_both(network, groups, "forward", batch, states, [0, 1], oracle, fused, torch.float64)
    seed = random_like(oracle[network.output])
    oracle[f"{network.output}.grad"] = fused[f"{network.output}.grad"] = seed
    run_both(network, groups, "backward", batch, states, [0, 1], oracle, fused, torch.float64, weights)
    check_results(network, oracle, fused, TOLERANCE)
    for name, norm in weights.norms.items():
        running = torch.stack([norm.running_mean, norm.running_var], 1)
        check_close(f"{name}.running", running, oracle[f"{name}.running"], TOLERANCE)
