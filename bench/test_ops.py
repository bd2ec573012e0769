"""pytest-benchmark over the ops and a step on this machine's CPU (or GPU): ``pytest bench``."""

from __future__ import annotations

import pytest
import torch

from bench import depthwise, elementwise
from bench.common import synchronize
from bench.contenders import CONTENDERS, Gate
from bench.elementwise import Case
from bench.setting import METHODS, Setting, batches, drawn_pairs, make
from bench.throughput import cycle
from fastensdistill.kernels.distillation_loss import LossTerms, distillation_loss, distillation_loss_reference
from fastensdistill.kernels.perturb_step import perturb_step, perturb_step_reference
from tests.compare import check_close

pytest.importorskip("pytest_benchmark")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(benchmark, call) -> None:
    def run() -> None:
        call()
        synchronize(DEVICE)

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("classes", [10, 100])
def test_distillation_loss(benchmark, classes):
    teacher, branch = 3 * torch.randn(2, 4, 128, classes, device=DEVICE)
    labels = torch.randint(classes, (128,), device=DEVICE)
    expected = distillation_loss_reference(teacher.double(), branch.double(), labels, LossTerms(4.0, 1.0, False))
    actual = distillation_loss(teacher, branch, labels, 4.0, 1.0)
    check_close("loss", actual[0], expected[0], 1e-5)
    check_close("gradient", actual[3], expected[3], 1e-5)
    timed(benchmark, lambda: distillation_loss(teacher, branch, labels, 4.0, 1.0))


def test_perturb_step(benchmark):
    x, g = torch.rand(128, 3, 32, 32, device=DEVICE), torch.randn(2, 128, 3, 32, 32, device=DEVICE)
    expected = perturb_step_reference(x.double(), g.double(), None, 0.2, 0.0, 1.0)
    check_close("images", perturb_step(x, g, 0.2), expected, 1e-5)
    timed(benchmark, lambda: perturb_step(x, g, 0.2))


ON_GPU = DEVICE.type == "cuda"
KINDS = {"elementwise": elementwise.cases, "depthwise": depthwise.cases}
META = torch.device("meta")
NAMES = [(kind, case.name) for kind, cases in KINDS.items() for case in cases(META, torch.float32, images=1)]


def made(kind: str, name: str) -> Case:
    dtype, groups, images = (torch.bfloat16, 4, 128) if ON_GPU else (torch.float32, 1, 1)
    return next(case for case in KINDS[kind](DEVICE, dtype, groups, images) if case.name == name)


@pytest.mark.parametrize(("kind", "name"), NAMES)
@pytest.mark.parametrize("by", ["op", "pytorch"])
def test_layer(benchmark, kind, name, by):
    """Activations, gates, LayerNorms and depthwise convolutions behind their references, and what PyTorch would run in
    their place."""
    case = made(kind, name)
    for actual, exact in zip(results(case.run()), results(case.exact()), strict=True):
        sums = actual.dim() == 4 and actual.shape[2] == 2  # rows of partial sums, of rounded values
        check_close(name, actual.sum(1) if sums else actual, exact.sum(1) if sums else exact, 0.02 if ON_GPU else 1e-4)
    benchmark.extra_info["nbytes"] = case.nbytes
    timed(benchmark, case.run if by == "op" else case.peer)


def results(value) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [one for one in value if one is not None]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["reference", "eager", "fused"])
def test_step(benchmark, method, name):
    contender = CONTENDERS[name]
    if reason := contender.absent(method, DEVICE.type):
        pytest.skip(reason)
    setting = Setting("tiny", method, 4, 2)
    passed, errors = Gate(setting, DEVICE).check(contender)
    assert passed, errors
    problem = make(setting, DEVICE)
    step = contender.build(problem)
    timed(benchmark, cycle(step, batches(setting, 2, DEVICE, drawn_pairs(setting, 0, 2), torch.float32)))
