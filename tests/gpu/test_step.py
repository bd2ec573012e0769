"""The whole step on a device: against float64, captured against launched one by one, and run twice."""

from __future__ import annotations

import pytest
import torch

from bench.contenders import CONTENDERS, Engine, Gate, changes
from bench.setting import METHODS, Distillation, Setting, Teaching, batches, make
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.teach import FusedTeachStep
from tests.untyped import untyped

CUDA = torch.device("cuda")
CASES = [
    *(pytest.param(Setting("tiny", method, 5, 3), id=f"tiny-{method}") for method in METHODS),
    *(pytest.param(Setting("tiny-resnet", method, 4, 2), id=f"resnet-{method}") for method in METHODS),
    pytest.param(Setting("wrn28_1", "tdiv-sdiv", 32, 2), id="wrn28_1"),
]


def fused(setting: Setting, capture: bool, precision: str = "bf16") -> Engine:
    problem = make(setting, CUDA).copy(torch.float32, precision)
    for module in problem.modules:
        untyped(module).to(memory_format=torch.contiguous_format)
    if isinstance(problem, Teaching):
        shape = (3, setting.size, setting.size)
        return Engine(FusedTeachStep(problem.networks, problem.config, image_shape=shape, capture=capture), problem)
    assert isinstance(problem, Distillation)
    return Engine(FusedStep(problem.student, problem.teachers, problem.config, capture=capture), problem)


@pytest.mark.parametrize("setting", CASES)
def test_bf16_errs_at_most_twice_as_much_as_pytorch(setting, warps):
    gate = Gate(setting, CUDA)
    passed, errors = gate.check(CONTENDERS["fused"])
    assert passed, f"errors {errors}, allowed {gate.bounds}"


@pytest.mark.parametrize("setting", CASES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replayed_is_launched_and_twice_is_the_same(setting, precision):
    """Four steps, so that the pair changes inside the captured graph: bit for bit the same parameters."""
    given = batches(setting, 4, CUDA, [(0, 1)], torch.float32)
    engines = [fused(setting, capture, precision) for capture in (True, True, False)]
    replayed, again, launched = (changes(engine, given) for engine in engines)
    for engine, capture in zip(engines, (True, True, False), strict=True):
        assert engine.step.captured is capture, engine.step.capture_error
    for kind, value in replayed.items():
        assert value.abs().max() > 0
        assert torch.equal(value, again[kind]), f"{kind}: two runs differ"
        assert torch.equal(value, launched[kind]), f"{kind}: replayed and launched differ"


@pytest.mark.parametrize("setting", CASES[:8])
def test_float32_is_the_reference_engine(setting):
    """No tf32 and no bf16 anywhere: what is left is the order of float32 sums."""
    gate = Gate(setting, CUDA)
    step = fused(setting, True, "fp32")
    found = changes(step, [gate._cast(batch, torch.float32) for batch in gate.batches])
    for kind, exact in gate.exact.items():
        error = float((found[kind] - exact).norm() / exact.norm())
        assert error < 2e-3, f"{kind}: {error:.1e}"


@pytest.mark.parametrize("name", ["captured", "compiled"])
@pytest.mark.parametrize("method", ["kd", "tdiv-sdiv", "teach"])
def test_captured_peers_compute_the_step(name, method):
    """Who is measured against has to be right as well; only a device can capture."""
    gate = Gate(Setting("tiny", method, 4, 2), CUDA)
    passed, errors = gate.check(CONTENDERS[name])
    assert passed, f"errors {errors}, allowed {gate.bounds}"
