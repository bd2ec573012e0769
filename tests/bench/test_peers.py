"""Every peer computes the step: in float64, against the reference engine, what two steps change."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any

import pytest
import torch

from bench.contenders import CONTENDERS, Contender, Gate
from bench.peers.captured import CapturedStep, CapturedTeach, CompiledStep, Replay
from bench.peers.eager import EagerStep
from bench.setting import METHODS, Setting, make
from fastensdistill.network.gpu import GPUS
from tests.untyped import untyped

CPU = torch.device("cpu")
TRACED = {"backend": "aot_eager"}  # what torch.compile makes of the code, without its code generator
EXTRA = {
    "compiled, traced": Contender("", "", lambda p: CapturedStep(p, TRACED), methods=("tdiv-sdiv",)),
    "teach, traced": Contender("", "", lambda p: CapturedTeach(p, TRACED), methods=("teach",)),
    "compiled-own, traced": Contender("", "", lambda p: CompiledStep(p, {"backend": "eager"}), methods=("tdiv-sdiv",)),
}
PEERS = {name: c for name, c in CONTENDERS.items() if name not in ("compiled", "compiled-own", "max-autotune")} | EXTRA


@pytest.fixture(scope="module")
def gates():
    found: dict = {}

    def gate(network, method):
        if (network, method) not in found:
            found[network, method] = Gate(Setting(network, method, 3, 2), CPU)
        return found[network, method]

    return gate


def cases():
    for name, contender in PEERS.items():
        for network in ("tiny", "tiny-resnet"):
            if network == "tiny-resnet" and name in EXTRA:
                continue  # tracing is slow, and the code is the same
            for method in contender.methods:
                absent = contender.needs and importlib.util.find_spec(contender.needs) is None
                marks = [pytest.mark.skip(reason=f"{contender.needs} is not installed")] if absent else []
                yield pytest.param(network, method, name, id=f"{network}-{method}-{name}", marks=marks)


@pytest.mark.parametrize(("network", "method", "name"), list(cases()))
def test_computes_the_step(gates, network, method, name):
    gate = gates(network, method)
    passed, errors = gate.check(PEERS[name])
    assert set(errors) == set(gate.bounds)
    assert passed, errors


class Wrong(EagerStep):
    """Forgets that the gradients of r and s count K times."""

    def __init__(self, problem):
        super().__init__(problem)
        self.optimizer.param_groups[1]["lr"] /= self.k


def test_the_gate_searches_for_no_algorithms(monkeypatch):
    """Its steps run twice: in float32 at full size cuDNN's search would take longer than both."""
    searched: list[Any] = []
    exact = Gate._exact
    monkeypatch.setattr(
        Gate, "_exact", lambda self: untyped(searched).append(torch.backends.cudnn.benchmark) or exact(self)
    )
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    Gate(Setting("tiny", "kd", 3, 2), CPU)
    assert searched == [False]
    assert torch.backends.cudnn.benchmark


def test_a_peer_is_captured_on_the_stream_of_its_warm_up(monkeypatch):
    streams = []

    class Stream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def on(*arguments, stream=None):
        streams.append(stream or arguments[0])
        yield

    for name, value in {
        "Stream": Stream, "stream": on, "graph": on, "current_stream": Stream, "CUDAGraph": object,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    replay = Replay(lambda: None, [], torch.optim.SGD([torch.zeros(1)]), torch.device("cuda"))
    replay.capture()
    warm_up, capture = streams
    assert isinstance(warm_up, Stream)
    assert capture is warm_up


def test_the_gate_stops_a_wrong_step(gates):
    passed, errors = gates("tiny", "latentbe").check(Contender("", "", Wrong))
    assert not passed
    assert errors["factors"] > 0.1
    assert errors["shared"] < 0.1


def test_branches_differ_and_statistics_are_settled():
    problem = untyped(make(Setting("tiny", "tdiv-sdiv", 3, 2), CPU))
    with torch.no_grad():
        x = torch.rand(2, 3, 8, 8)
        z = problem.student.eval()(x)
    assert (z[0] - z[1]).abs().max() > 1e-2 * z.abs().max()
    assert problem.student.module.bn.running_mean.abs().max() > 0


@pytest.mark.parametrize(("method", "forwards"), [("kd", 7), ("latentbe", 16), ("tdiv-sdiv", 22), ("teach", 3)])
def test_least_work_is_the_papers_count(method, forwards):
    """Of F, up to the stem's input gradient, which training never needs."""
    setting = Setting("wrn28_1", method, 128, 4)
    f = 2 * 54.97e6
    assert setting.flops / setting.images / f == pytest.approx(forwards, rel=0.02)
    assert setting.least_time(GPUS["h200"]) > setting.flops / GPUS["h200"].flops


def test_every_method_and_network_can_be_planned():
    for network in ("tiny", "tiny-resnet", "resnet32"):
        for method in METHODS:
            assert Setting(network, method, 2, 2).nbytes > 0


def test_the_perturbations_branch_has_no_gradient_of_its_parameters():
    """A compiled backward would compute it, and throw it away: a whole network's weight gradients."""
    step = EagerStep(make(Setting("tiny", "tdiv-sdiv", 3, 2), CPU))
    x = torch.rand(3, 3, 8, 8, requires_grad=True)
    logits = step.branches(x, step.members[0]).sum()
    of_images, *others = torch.autograd.grad(logits, [x, *step.shared, *step.factors], allow_unused=True)
    assert of_images.abs().sum() > 0
    assert not [g for g in others if g is not None]
