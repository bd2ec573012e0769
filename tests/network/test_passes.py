"""Whole passes over the kernels' ops against the plain executor of the same plan, which test_execute.py trusts."""

from __future__ import annotations

import contextlib

import pytest
import torch

from fastensdistill.engine.part_run import PartRun
from fastensdistill.engine.passes import run_part
from fastensdistill.engine.weights import pack
from fastensdistill.kernels.launch import use_kernels
from fastensdistill.network.execute import execute
from fastensdistill.network.launch import Group
from fastensdistill.network.plan import plan
from fastensdistill.network.trace import trace
from tests.compare import check_close
from tests.network import models
from tests.network.test_execute import CASES, check_gradient, images, random_like, state

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-9


def run_both(network, groups, direction, batch, states, slots, oracle, fused, dtype, weights=None):
    """The one part of a pass, by the plain executor and by the ops; ``slots`` picks each group's state."""
    (part,) = plan([network], groups, direction, batch).parts
    execute(part, [states[s] for s in slots], oracle)
    device = fused["input"].device
    weights = weights or pack(part, states, dtype, device)
    run_part(PartRun(part, weights, torch.tensor(slots, dtype=torch.int32, device=device), fused))
    return weights


def check_results(network, oracle, fused, tolerance):
    check_close("logits", fused[network.output], oracle[network.output], tolerance)
    names = [n for n in oracle if n.endswith((".weight.grad", ".bias.grad")) or n == "input.grad"]
    for name in names:
        expected = oracle[name].permute(0, 1, 3, 4, 2) if name == "input.grad" else oracle[name]
        check_gradient(name, fused[name], expected, tolerance)
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


@pytest.mark.parametrize("gradient", ["input", "parameters"])
def test_kernels_where_layers_stand_in_unusual_order(gradient):
    """What test_step.py's networks lack, with the kernels themselves: pooling, 5x5, biases, sums, linear layers."""
    states = [state(models.odd(seed)) for seed in range(2)]
    network = trace(models.odd(), (3, 9, 9))
    groups = [Group(f"{k}", 0, None if gradient == "input" else f"{k}", gradient) for k in range(2)]
    oracle, fused = start(images(2, 9), torch.float32)
    on_device = {name: value.to(DEVICE) for name, value in fused.items()}
    with use_kernels() if DEVICE == "cpu" else contextlib.nullcontext():
        weights = run_both(network, groups, "forward", 2, states, [0, 1], oracle, on_device, torch.float32)
        seed = random_like(oracle[network.output])
        oracle[f"{network.output}.grad"] = seed
        on_device[f"{network.output}.grad"] = seed.to(DEVICE, torch.float32)
        run_both(network, groups, "backward", 2, states, [0, 1], oracle, on_device, torch.float32, weights)
    check_results(network, oracle, on_device, 1e-4)


@pytest.mark.parametrize("gradient", ["input", "parameters"])
@pytest.mark.parametrize("model", [models.preresnet, models.resnet, models.resnet18])
def test_bfloat16_errs_no_more_than_pytorch(model, gradient):
    """Root-mean-square errors against float64: at most twice those of the module itself in bfloat16."""
    network, batch, x = trace(model(), (3, 16, 16)), 16, images(16, 16)
    modules = [model(seed).train(gradient == "parameters") for seed in range(2)]
    states = [state(module) for module in modules]
    groups = [Group(f"{k}", 0, None if gradient == "input" else f"{k}", gradient) for k in range(2)]
    oracle, fused = start(x, torch.float32)
    weights = run_both(network, groups, "forward", batch, states, [0, 1], oracle, fused, torch.bfloat16)
    seed = random_like(oracle[network.output])
    oracle[f"{network.output}.grad"], fused[f"{network.output}.grad"] = seed, seed.float()
    run_both(network, groups, "backward", batch, states, [0, 1], oracle, fused, torch.bfloat16, weights)

    peers = {}
    for k, module in enumerate(modules):
        image = x.bfloat16().requires_grad_()
        logits = module.bfloat16()(image)
        logits.backward(seed[k].bfloat16())
        peers |= {(network.output, k): logits.detach(), ("input.grad", k): image.grad}
        peers |= {(f"{name}.grad", k): parameter.grad for name, parameter in module.named_parameters()}
    names = ["input.grad"] if gradient == "input" else [f"{n}.grad" for n, _ in modules[0].named_parameters()]
    ours, theirs = [], []
    for name in [network.output, *names]:
        for k in range(2):
            actual = fused[name][k].permute(0, 3, 1, 2) if name == "input.grad" else fused[name][k]
            exact = oracle[name][k]
            # beyond 100% an error says no more: a layer whose ReLUs are all but closed has next to no gradient
            ours.append(min(1.0, float((actual.double() - exact).norm() / exact.norm())))
            theirs.append(min(1.0, float((peers[name, k].double() - exact).norm() / exact.norm())))
    for what, part in (("logits", slice(0, 2)), ("gradients", slice(2, None))):
        mine, torchs = sum(ours[part]), sum(theirs[part])
        assert mine <= 2 * torchs, f"{what}: error {mine:.2e}, PyTorch's own {torchs:.2e}"
